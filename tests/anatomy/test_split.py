from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architectures import ARCHITECTURES, Architecture, HandWritten
from attar.anatomy import redraw_, replica, split, survey
from attar.errors import AttarError
from attar.tasks import Segmentation
from dense_networks import DENSE_NETWORKS, DenseNetwork, Dilated

# A second or more each, and cut as others are.
HEAVY = {
    *("resnet50", "seresnext26t_32x4d", "vgg11_bn", "repvit_m0_9", "fastvit_t8", "mobileone_s0", "cifar_resnet18"),
    *("efficientformerv2_s0", "coat_lite_tiny", "dla34", "cspresnet50", "nfnet_l0", "res2net50_26w_4s"),
    *("tiny_vit_5m_224", "torchvision:densenet121", "torchvision:convnext_tiny", "torchvision:swin_t"),
}


def default_or_slow() -> list[Any]:
    assert {architecture.name for architecture in ARCHITECTURES} >= HEAVY
    return [
        pytest.param(each, id=each.name, marks=[pytest.mark.slow] if each.name in HEAVY else [])
        for each in ARCHITECTURES
    ]


@pytest.mark.parametrize("architecture", default_or_slow())
def test_halves_equal_the_whole(architecture: Architecture) -> None:
    """`split` proves itself; here once more from outside, at every stage but the last, on other images."""
    torch.manual_seed(0)
    network = architecture.make(5)
    shape = (2, 3, architecture.size, architecture.size)
    anatomy, _ = survey(network, torch.randn(shape), num_classes=5)
    own = {id(parameter) for parameter in network.parameters()}
    other = torch.randn(shape)
    network.eval()
    for stage in anatomy.stages[:-1]:
        halves = split(network, stage.name, torch.randn(shape))
        with torch.no_grad():
            assert torch.equal(halves.tail.eval()(*halves.trunk.eval()(other)), network(other)), stage.name
        for name, parameter in halves.tail.named_parameters():
            assert id(parameter) in own, f"{name} is not the network's own"


def test_modes_and_buffers_are_left_alone() -> None:
    network = HandWritten(5)
    network.first.eval()
    modes = [module.training for module in network.modules()]
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    split(network, "first", torch.randn(2, 3, 32, 32))
    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(value, buffers[name]) for name, value in network.named_buffers())


def test_one_example_image_is_enough() -> None:
    split(HandWritten(5), "first", torch.randn(1, 3, 32, 32))


def test_functional_dropout_follows_the_mode() -> None:
    class Net(HandWritten):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(images), 0.5, self.training)

    network = Net(50)
    halves = split(network, "first", torch.randn(2, 3, 32, 32))
    x = halves.trunk(torch.randn(2, 3, 32, 32))[0].detach()
    halves.tail.eval()
    assert torch.equal(halves.tail(x), halves.tail(x))
    halves.tail.train()
    torch.manual_seed(0)
    assert (halves.tail(x) == 0).any()


def test_values_between_modules_cross_the_cut() -> None:
    """A residual sum at the top level is no module's output: the tail repeats it from what modules returned."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.head = nn.Linear(3, 4)

        def forward(self, images: Tensor) -> Tensor:
            x = images + self.a(images)
            y = self.b(x)
            return self.head((self.c(y) + x * images.shape[2]).mean(dim=(2, 3)))

    halves = split(Net(), "b", torch.randn(2, 3, 8, 8))
    assert {tap and tap.module for tap in halves.carried} == {"b", "a", None}


def test_the_tail_leaves_shared_values_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 6, 3)
            self.act = nn.ReLU(inplace=True)
            self.head = nn.Linear(6, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.act(self.a(images)).mean(dim=(2, 3)))

    class Given(nn.Module):
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.act, self.head = net.act, net.head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(x).mean(dim=(2, 3)))

    net = Net()
    with pytest.raises(AttarError, match="overwrites its input in place"):
        split(net, "a", torch.randn(2, 3, 8, 8), tail=Given(net))

    halves = split(Net(), "a", torch.randn(2, 3, 8, 8))
    (x,) = halves.trunk(torch.randn(2, 3, 8, 8))
    before = x.detach().clone()
    halves.tail(x)
    assert torch.equal(x.detach(), before)
    assert (before < 0).any()


def test_untraceable_networks_ask_for_a_tail() -> None:
    class Net(HandWritten):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images if images.mean() > 0 else -images)

    with pytest.raises(AttarError, match=r"cannot be cut at 'first' automatically .* tail="):
        split(Net(5), "first", torch.randn(2, 3, 32, 32))


def test_decisions_by_what_tensors_hold_are_not_frozen() -> None:
    class Net(HandWritten):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images if images.mean().item() > 0 else -images)

    with pytest.raises(AttarError, match="cannot be cut at 'first' automatically"):
        split(Net(5), "first", torch.randn(2, 3, 32, 32))


class Padding(nn.Module):
    """Decides by sizes before the cut and behind it, there by those of a map that batch norm has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4))
        self.middle = nn.Conv2d(4, 4, 3, 2, 1)
        self.leave = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % 8 or width % 8:
            raise ValueError("not a multiple of 8")
        x = self.middle(self.enter(images))
        if x.size(-1) > 4:
            x = nn.functional.avg_pool2d(x, 2)
        return self.leave(x.mean((2, 3)))


@pytest.mark.parametrize("side", [16, 32])
def test_decisions_by_size_are_those_of_the_example_images(side: int) -> None:
    network = Padding()
    network.middle.eval()
    modes = [module.training for module in network.modules()]
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    halves = split(network, "enter", torch.randn(2, 3, side, side))
    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(value, buffers[name]) for name, value in network.named_buffers())
    images = torch.randn(4, 3, side, side)
    twin = replica(halves.tail)
    assert torch.equal(halves.tail(*halves.trunk(images)), network(images))
    twin(*halves.trunk(images))
    with pytest.raises(AttarError, match="cut with images of one size and is used with another"):
        twin(*halves.trunk(torch.randn(4, 3, 48 - side, 48 - side)))
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*halves.trunk(images)), twin(*halves.trunk(images)))


def test_replicas_are_independent() -> None:
    network = HandWritten(5)
    halves = split(network, "first", torch.randn(2, 3, 32, 32))
    twin = replica(halves.tail)
    own = dict(network.named_parameters())
    for name, parameter in twin.named_parameters():
        assert parameter is not own[name]
        assert parameter.untyped_storage().data_ptr() != own[name].untyped_storage().data_ptr()


def test_redrawing_keeps_every_layers_distribution() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    module(torch.randn(4, 3, 9, 9))
    nn.init.trunc_normal_(module[0].weight, std=0.02)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    redraw_(module)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.flatten().sort().values, before[name].flatten().sort().values)
    assert not torch.equal(module[0].weight, before["0.weight"])
    assert torch.equal(module[1].weight, torch.ones(8))
    assert torch.equal(module[1].running_mean, torch.zeros(8))
    assert torch.equal(module[1].running_var, torch.ones(8))


# The rest of them are cut by ONE's contract.
_CUT_HERE = ("pyramid", "torchvision:deeplabv3_mobilenet_v3_large", "smp:FPN")
DENSE = [
    pytest.param(n, id=n.name, marks=pytest.mark.skipif(bool(n.missing), reason=f"needs {n.missing}"))
    for n in DENSE_NETWORKS
    if n.cheap or n.name in _CUT_HERE
]


@pytest.mark.parametrize("network", DENSE)
def test_dense_networks_are_cut_inside_and_behind_their_encoder(network: DenseNetwork) -> None:
    """At every stage, the last too, on images of another size; the tail returns the logits alone."""
    torch.manual_seed(0)
    whole, task = network.make(4), Segmentation(4)
    images = torch.randn(2, 3, *network.size)
    anatomy, _ = survey(whole, images, num_classes=4, dense=True)
    other = torch.randn(2, 3, 2 * network.size[0], network.size[1] + 32)
    whole.eval()
    for stage in anatomy.stages:
        halves = split(whole, stage.name, images, answer=task.logits)
        with torch.no_grad():
            answer = halves.tail.eval()(*halves.trunk.eval()(other))
            assert torch.equal(answer, task.logits(whole(other))), stage.name
        assert not any("aux" in name for name, _ in halves.tail.named_parameters())


def test_without_a_finder_the_tail_returns_all_that_the_network_returns() -> None:
    whole = Dilated(4).eval()
    images = torch.randn(2, 3, 32, 48)
    halves = split(whole, "encoder", images)
    answer = halves.tail(*halves.trunk(images))
    assert answer.keys() == {"out", "aux"}
    assert torch.equal(answer["aux"], whole(images)["aux"])


def test_an_answer_made_by_one_module_is_taken_apart_in_the_tail() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": self.layer(x), "features": x}

    network = nn.Sequential(nn.Conv2d(3, 4, 1), Head()).eval()
    images = torch.randn(2, 3, 8, 12)
    halves = split(network, "0", images, answer=Segmentation(3).logits)
    assert torch.equal(halves.tail(*halves.trunk(images)), network(images)["out"])


def test_a_given_tail_returns_the_logits_alone() -> None:
    whole = Dilated(4)

    class Tail(nn.Module):
        def __init__(self, pick: bool) -> None:
            super().__init__()
            self.head, self.pick = whole.head, pick

        def forward(self, features: Tensor) -> object:
            out = nn.functional.interpolate(self.head(features), scale_factor=4, mode="bilinear")
            return out if self.pick else {"out": out}

    images = torch.randn(2, 3, 32, 48)
    split(whole, "encoder", images, Tail(True), answer=Segmentation(4).logits)
    with pytest.raises(AttarError, match="do not equal the whole"):
        split(whole, "encoder", images, Tail(False), answer=Segmentation(4).logits)
