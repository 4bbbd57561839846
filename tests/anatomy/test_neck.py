"""The neck of stacked BiFPN layers and the dense head: published sizes, wiring and any resolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attar.anatomy.neck import BiFPNLayer, BiFPNNeck, DenseHead, Node, enlarged


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("channels", "teacher", "head"), [(64, 4_352, 196_629), (88, 5_984, 251_925)])
def test_published_sizes(channels: int, teacher: int, head: int) -> None:
    """frskd.md: 4 outc parameters a node; at d0 4,352 in the self-teacher's neck, 196,629 in a head of 21 classes."""
    assert parameters(Node(channels)) == 4 * channels
    full, last = BiFPNNeck(channels, 6, 2, ends_fine=True).layers
    assert (len(full.up), len(full.down), len(last.up), len(last.down)) == (6, 5, 6, 0)
    assert parameters(BiFPNNeck(channels, 6, 2, ends_fine=True)) == 17 * 4 * channels == teacher
    assert parameters(BiFPNNeck(channels, 6, 3)) == 33 * 4 * channels
    assert parameters(DenseHead(channels, 256, 21)) == head


def test_a_node_is_depth_wise_with_a_bias() -> None:
    conv, norm, act = Node(6)
    assert (conv.kernel_size, conv.groups, conv.bias is not None) == ((1, 1), 6, True)
    assert (type(norm), norm.eps, norm.momentum, type(act)) == (nn.BatchNorm2d, 1e-5, 0.1, nn.ReLU)
    assert parameters(Node(6, batch_norm=False)) == 12


@pytest.mark.parametrize("ends_fine", [True, False])
def test_wiring_against_the_definition(ends_fine: bool) -> None:
    torch.manual_seed(0)
    layer = BiFPNLayer(4, 3, ends_fine=ends_fine).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-1, 1)
    f = [torch.randn(2, 4, *size, dtype=torch.float64) for size in ((9, 7), (5, 4), (2, 2))]

    def bilinear(x: Tensor, y: Tensor) -> Tensor:
        return F.interpolate(x, size=tuple(y.shape[2:]), mode="bilinear", align_corners=False)

    def nearest(x: Tensor, y: Tensor) -> Tensor:
        rows, columns = (torch.arange(y.shape[d]) * x.shape[d] // y.shape[d] for d in (2, 3))
        return x[:, :, rows][:, :, :, columns]

    p3 = layer.up[2](f[2])
    p2 = layer.up[1](f[1] + bilinear(p3, f[1]))
    p1 = layer.up[0](f[0] + bilinear(p2, f[0]))
    expected = [p1, p2, p3]
    if not ends_fine:
        t2 = layer.down[0](f[1] + p2 + nearest(p1, f[1]))
        expected = [p1, t2, layer.down[1](f[2] + p3 + nearest(t2, f[2]))]
    for found, by_hand in zip(layer(f), expected, strict=True):
        torch.testing.assert_close(found, by_hand)
        assert found.min() >= 0


@settings(max_examples=15, deadline=None)
@given(levels=st.integers(2, 6), layers=st.integers(1, 3), height=st.integers(1, 19), width=st.integers(1, 19))
def test_any_sizes_and_all_of_it_is_trained_from_the_finest_map(
    levels: int, layers: int, height: int, width: int
) -> None:
    neck = BiFPNNeck(3, levels, layers, ends_fine=True)
    sizes = [(-(-height // 2**i), -(-width // 2**i)) for i in range(levels)]
    refined = neck([torch.randn(2, 3, *size) for size in sizes])
    assert [tuple(m.shape) for m in refined] == [(2, 3, *size) for size in sizes]
    refined[0].sum().backward()
    assert all(p.grad is not None for p in neck.parameters())


@pytest.mark.parametrize("ends_fine", [True, False])
def test_ends_are_the_modules_that_return_the_refined_maps(ends_fine: bool) -> None:
    neck = BiFPNNeck(3, 4, 2, ends_fine=ends_fine)
    seen: list[Tensor] = []
    for end in neck.ends:
        neck.get_submodule(end).register_forward_hook(lambda module, args, output: seen.append(output))
    refined = neck([torch.randn(2, 3, s, s) for s in (8, 4, 2, 1)])
    assert len(neck.ends) == len(seen) == 4
    assert {id(x) for x in seen} == {id(x) for x in refined}
    order = [int(x.shape[2]) for end in neck.ends for x in seen if x is refined[neck.ends.index(end)]]
    assert order == [8, 4, 2, 1]


def test_the_head_is_the_published_one_at_any_size() -> None:
    torch.manual_seed(0)
    head = DenseHead(4, 5, 3)
    assert (head.bn.eps, head.bn.momentum) == (1e-4, 0.997)
    x = torch.randn(2, 4, 6, 5)
    logits = head(x, (23, 18))
    assert logits.shape == (2, 3, 23, 18)
    coarse = head.classifier(F.relu(head.bn(head.conv(x))))
    torch.testing.assert_close(logits, enlarged(coarse, torch.empty(1, 1, 23, 18)))
    assert parameters(DenseHead(4, 5, 3, batch_norm=False)) == parameters(head) - 10
