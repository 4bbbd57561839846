from __future__ import annotations

from fractions import Fraction

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import attar.zoo  # noqa: F401 - registers the CIFAR networks
from attar.anatomy import split
from attar.anatomy.narrow import narrow_replicas, narrowed
from attar.errors import AttarError

HALF = Fraction(1, 2)


@pytest.mark.parametrize(
    ("channels", "left"),
    [(16, [16, 12, 9, 6, 3]), (32, [32, 25, 19, 12, 6]), (64, [64, 51, 38, 25, 12]), (256, [256, 204, 153, 102, 51])],
)
def test_published_widths(channels: int, left: list[int]) -> None:
    assert [narrowed(channels, Fraction(5 - j + 1, 5)) for j in range(1, 6)] == left


@given(groups=st.integers(1, 32), each=st.integers(1, 16), students=st.integers(1, 9), data=st.data())
def test_widths_are_multiples_of_the_divisor_and_fall(
    groups: int, each: int, students: int, data: st.DataObject
) -> None:
    channels, j = groups * each, data.draw(st.integers(1, students))
    left = narrowed(channels, Fraction(students - j + 1, students), groups)
    assert left % groups == 0
    assert groups <= left <= channels
    assert left == max(int(channels * (students - j + 1) / students + 1e-9) // groups, 1) * groups
    assert narrowed(channels, Fraction(1), groups) == channels
    assert narrowed(channels + 1, Fraction(1, students), channels + 2) == channels + 1  # nothing divides: all stay


class Mixed(nn.Module):
    """Grouped and depth-wise convolutions, group norm, PReLU, a scale of its own, concatenation and a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Sequential(nn.Conv2d(8, 24, 1), nn.GroupNorm(4, 24), nn.PReLU(24))
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=6)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.gamma = nn.Parameter(torch.ones(1, 24, 1, 1))
        self.beside = nn.Conv2d(8, 10, 1)
        self.mixed = nn.Sequential(nn.BatchNorm2d(42), nn.ReLU(), nn.Conv2d(42, 12, 3, 2, 1))
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.enter(images)
        y = self.depthwise(self.grouped(self.wide(x))) * self.gamma
        return self.head(self.mixed(torch.cat([x, y, self.beside(x)], dim=1)).flatten(1))


def narrow(network: nn.Module, cut: str, *shares: Fraction, size: int = 4) -> tuple[list[nn.Module], Tensor, nn.Module]:
    images = torch.randn(2, 3, size, size)
    halves = split(network, cut, images)
    with torch.no_grad():
        (carried,) = halves.trunk.eval()(images)
    torch.manual_seed(1)
    return narrow_replicas(halves.tail, [carried], shares, last=[False], where="It"), carried, halves.tail


def test_every_kind_of_layer_becomes_narrower() -> None:
    torch.manual_seed(0)
    (tail,), carried, whole = narrow(Mixed(), "enter", HALF)
    # 24 channels in 6 groups and 4 norm groups: multiples of 12.
    assert tail.wide[0].weight.shape == (12, 8, 1, 1)
    assert (tail.wide[1].num_channels, tail.wide[1].num_groups, tail.wide[2].num_parameters) == (12, 4, 12)
    assert (tail.grouped.in_channels, tail.grouped.out_channels, tail.grouped.groups) == (12, 12, 6)
    assert (tail.depthwise.groups, tail.depthwise.weight.shape) == (12, (12, 1, 3, 3))
    assert tail.gamma.shape == (1, 12, 1, 1)
    assert tail.beside.weight.shape == (5, 8, 1, 1)
    assert tail.mixed[0].num_features == 8 + 12 + 5  # what comes from the cut stays
    assert tail.mixed[2].weight.shape == (6, 25, 3, 3)
    assert tail.head.weight.shape == (5, 6 * 4)
    assert tail(carried).shape == (2, 5)
    assert whole.mixed[2].weight.shape == (12, 42, 3, 3)
    tail(carried).sum().backward()
    assert all(parameter.grad is not None for parameter in tail.parameters())


def test_a_grouped_convolution_may_become_as_narrow_as_a_depthwise_one() -> None:
    (tail,), _, _ = narrow(Mixed(), "enter", Fraction(1, 8))
    assert (tail.grouped.in_channels, tail.grouped.out_channels, tail.grouped.groups) == (12, 6, 6)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 32, 1), nn.Conv2d(32, 32, 3, 1, 1, groups=8), nn.Flatten(), nn.Linear(512, 2)
    )
    (tail,), carried, _ = narrow(network, "0", Fraction(1, 8))
    conv = tail.get_submodule("2")
    assert (conv.in_channels, conv.out_channels, conv.groups, conv.weight.shape) == (8, 8, 8, (8, 1, 3, 3))
    assert tail(carried).shape == (2, 2)


def test_weights_are_drawn_afresh_and_keep_the_variance_of_sums() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Conv2d(16, 256, 3), nn.Conv2d(256, 128, 3), nn.Flatten(), nn.Linear(2048, 3)
    )
    (half, quarter), _, whole = narrow(network, "0", HALF, Fraction(1, 4), size=8)

    def spread(tail: nn.Module, layer: str) -> float:
        return float(tail.get_submodule(layer).weight.detach().std())

    for share, tail in ((2, half), (4, quarter)):
        first = tail.get_submodule("1")
        assert spread(tail, "1") == pytest.approx(spread(whole, "1"), rel=0.05)  # of all 16 inputs
        assert spread(tail, "2") == pytest.approx(spread(whole, "2") * share**0.5, rel=0.05)
        kept = whole.get_submodule("1").weight[: len(first.weight)]
        assert not torch.equal(first.weight, kept)
        assert all(parameter.requires_grad and parameter.is_leaf for parameter in tail.parameters())


@pytest.mark.parametrize(("model", "cut"), [("cifar_wrn_16_1", "conv1"), ("cifar_resnet20", "layer1.0")])
def test_an_identity_shortcut_behind_the_cut_becomes_a_projection(model: str, cut: str) -> None:
    network = timm.create_model(model, num_classes=4, width=0.5)
    (tail,), carried, _ = narrow(network, cut, HALF, size=8)
    blocks = [module for module in tail.modules() if hasattr(module, "downsample")]
    projection = blocks[0].downsample
    assert (projection[0].weight.shape, projection[1].num_features) == ((4, 8, 1, 1), 4)
    assert tail(carried).shape == (2, 4)
    assert {m.weight.shape[0] for m in network.layer1.modules() if isinstance(m, nn.Conv2d)} == {8}  # as it was


def test_what_does_not_run_is_refused() -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(len(x), 2, 8, 2, 2).mean(dim=(1, 3, 4))

    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 16, 3), Sized(), nn.Linear(8, 2))
    with pytest.raises(AttarError, match=r"^It cannot be made narrower, since .+ \(.+\): choose another cut"):
        narrow(network, "0", HALF)
