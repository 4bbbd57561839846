"""Constants of switched-off channels: moved into the next layer where that is exact, and nowhere else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import widths
from attar.anatomy import channel_groups, slice_, switch_off_

IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def chain(second: nn.Module, *, norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), copy.deepcopy(second)]
    layers += [nn.BatchNorm2d(6)] if norm else []
    return widths.stirred(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).double())


def answers(network: nn.Module, staying: list[Any]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Logits with the scales alone at zero, and after switching off and slicing."""
    structure = channel_groups(network, IMAGES)
    muted = structure.mask_(copy.deepcopy(network), staying, shifts=False)
    taken = switch_off_(network, structure, staying, IMAGES)
    with torch.no_grad():
        off = network(IMAGES)
        torch.testing.assert_close(slice_(network, structure.kept(staying))(IMAGES), off, rtol=0, atol=1e-12)
        return muted(IMAGES), off, taken


@pytest.mark.parametrize(
    ("second", "norm"),
    [
        (nn.Conv2d(12, 6, 1, bias=False), True),
        (nn.Conv2d(12, 6, 1, bias=True), False),
        (nn.Conv2d(12, 6, 3, bias=False), True),
        (nn.Conv2d(12, 6, 1, stride=2), True),
    ],
    ids=["1x1, norm", "1x1, bias", "3x3 unpadded, norm", "strided, bias before norm"],
)
def test_exact_without_padding(second: nn.Module, norm: bool) -> None:
    network = chain(second, norm=norm)
    known = len(channel_groups(network, IMAGES).groups)
    staying = [range(0, 12, 2), range(6)][:known]
    muted, off, taken = answers(network, staying)
    assert taken >= 1
    torch.testing.assert_close(off, muted, rtol=0, atol=1e-12)
    # Not because there was nothing to move.
    plain = chain(second, norm=norm)
    channel_groups(plain, IMAGES).mask_(plain, staying)
    with torch.no_grad():
        assert float((plain(IMAGES) - muted).abs().max()) > 1e-3


def test_padding_is_left_alone() -> None:
    network = chain(nn.Conv2d(12, 6, 3, padding=1, bias=False))
    mean = network[4].running_mean.clone()
    *_, taken = answers(network, [range(0, 12, 2), range(6)])
    assert taken == 0
    assert torch.equal(network[4].running_mean, mean)


def test_without_a_norm_or_bias_there_is_no_place() -> None:
    *_, taken = answers(chain(nn.Conv2d(12, 6, 1, bias=False), norm=False), [range(0, 12, 2)])
    assert taken == 0


def test_a_flattened_map_is_folded_into_the_classifier() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 4)
    ).double()
    muted, off, taken = answers(widths.stirred(network), [[0, 3, 5]])
    assert taken == 1
    torch.testing.assert_close(off, muted, rtol=0, atol=1e-12)
    assert network[4].in_features == 27


def test_mobilenets_linear_bottlenecks_lose_nothing() -> None:
    """Residual streams and projections of MobileNetV2 are read by 1x1 convolutions only."""
    name = "mobilenetv2_100"
    structure, network, images = widths.structure(name), copy.deepcopy(widths.network(name)), widths.images(name)
    readers = {m.module for g in structure.groups for m in g.members if m.side == "in"}
    padded = {path for path in readers if getattr(network.get_submodule(path), "padding", 0) not in (0, (0, 0))}
    assert padded == set()
    # Groups with a depth-wise convolution hear their own shift behind padding; the others are exact.
    staying = [
        range(count if any(".conv_dw" in m.module for m in group.members) else count // 2)
        for group, count in zip(structure.groups, widths.whole(structure), strict=True)
    ]
    muted = structure.mask_(copy.deepcopy(network), staying, shifts=False)
    assert switch_off_(network, structure, staying, images) > 5
    with torch.no_grad():
        torch.testing.assert_close(network(images), muted(images), rtol=0, atol=1e-10)


def test_modes_are_left_as_they_are() -> None:
    network = chain(nn.Conv2d(12, 6, 1, bias=False)).train()
    structure = channel_groups(network, IMAGES)
    statistics = network[1].running_mean.clone()
    switch_off_(network, structure, [range(6), range(6)], IMAGES)
    assert network[1].training
    assert torch.equal(network[1].running_mean, statistics)
