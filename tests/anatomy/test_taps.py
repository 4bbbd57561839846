from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from attar.anatomy import Recorder, Tap, overwritten


class Twice(nn.Module):
    """Calls one module twice and overwrites two tensors in place: once through a module, once functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.conv(x)
        y = self.other(self.act(x))
        y += 1
        return y


def test_values_come_from_the_same_forward_with_gradient() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3))
    recorder = Recorder(net, [Tap("1"), Tap("2", side="input")])
    x = torch.randn(2, 3, 8, 8)
    output, values = recorder.run(x)
    assert values[Tap("1")] is values[Tap("2", side="input")]
    values[Tap("1")].sum().backward()
    assert net[0].weight.grad is not None
    assert net[2].weight.grad is None
    assert torch.equal(net[2](values[Tap("1")]), output)


def test_nothing_is_kept_between_passes_and_outside_them() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh())
    recorder = Recorder(net, [Tap("0")])
    recorder.run(torch.randn(1, 3, 8, 8))
    net(torch.randn(1, 3, 8, 8))
    assert not recorder._values
    recorder.remove()
    assert not any(module._forward_hooks for module in net.modules())


def test_a_module_called_twice_is_read_by_call() -> None:
    net = Twice()
    taps = [Tap("conv", call=0), Tap("conv", call=1), Tap("conv")]
    _, values = Recorder(net, taps, cloned=taps).run(torch.randn(1, 4, 5, 5))
    assert not torch.equal(values[taps[0]], values[taps[1]])
    assert values[taps[1]] is values[taps[2]]


def test_layouts_become_maps_without_a_copy() -> None:
    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    tokens = torch.arange(2 * 7 * 3.0).view(2, 7, 3)
    tap = Tap("0", layout="nld", prefix_tokens=1, grid=(2, 3))
    _, values = Recorder(nn.Sequential(Tokens()), [tap]).run(tokens)
    assert values[tap].shape == (2, 3, 2, 3)
    assert torch.equal(values[tap][1, :, 1, 2], tokens[1, 6])
    assert values[tap].untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
    nhwc = torch.randn(2, 4, 5, 3)
    tap = Tap("0", layout="nhwc")
    _, values = Recorder(nn.Sequential(Tokens()), [tap]).run(nhwc)
    assert torch.equal(values[tap], nhwc.permute(0, 3, 1, 2))


def test_overwritten_taps_and_their_writers_are_found() -> None:
    net = Twice()
    touched, writers = overwritten(net, [Tap("conv"), Tap("conv", call=0), Tap("other")], torch.randn(1, 4, 5, 5))
    assert {tap.module for tap in touched} == {"conv", "other"}
    assert writers == ["act"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert overwritten(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), [Tap("0")], torch.randn(1, 4, 5, 5)) == (set(), [])


def test_a_copied_network_can_be_freed_of_the_hooks() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh())
    own = net[0].register_forward_hook(lambda m, a, o: None)
    recorder = Recorder(net, [Tap("0"), Tap("1", side="input")])
    twin = copy.deepcopy(net)
    recorder.remove_from_copy(twin)
    assert list(twin[0]._forward_hooks) == [own.id]
    assert not twin[1]._forward_pre_hooks


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_full_graph_compile_sees_the_taps(backend: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3))
    recorder = Recorder(net, [Tap("1")])

    def loss(x: Tensor) -> Tensor:
        output, values = recorder.run(x)
        return output.square().mean() + values[Tap("1")].square().mean()

    x = torch.randn(2, 3, 8, 8)
    loss(x).backward()
    expected = net[0].weight.grad.clone()
    net.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for _ in range(2):
        net.zero_grad()
        compiled(x).backward()
        torch.testing.assert_close(net[0].weight.grad, expected)
