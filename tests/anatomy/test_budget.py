"""Budgets: met within 2 % on real modules, monotonic, never below the smallest widths, impossible ones refused."""

from __future__ import annotations

import copy

import pytest
import torch

import widths
from attar.anatomy import Limit, Widths, slice_, within_budget
from attar.errors import AttarError


@pytest.mark.parametrize("resource", ["macs", "params"])
@pytest.mark.parametrize("name", ["cifar_resnet56", "mobilenetv2_100", "torchvision:mobilenet_v2"])
def test_half_is_met_within_two_percent_by_the_real_module(name: str, resource: str) -> None:
    structure, network, side = widths.structure(name), widths.network(name), widths.SIDES[name]
    before = widths.counted(network, resource, side)
    limit = widths.limit(structure, 0.5, resource)
    staying = within_budget(structure, widths.scales(structure, network), [limit], resource)
    small = slice_(copy.deepcopy(network), structure.kept(staying))
    assert 0.98 * 0.5 * before <= widths.counted(small, resource, side) <= 0.5 * before
    counts = [len(channels) for channels in staying]
    assert min(counts) >= 8
    # The last step ignores the divisor, and fills one group after another.
    assert sum(count % 8 > 0 for count in counts) <= 2


@pytest.mark.parametrize("resource", ["macs", "params"])
def test_smaller_budgets_never_leave_larger_networks(resource: str) -> None:
    structure = widths.structure("cifar_resnet20")
    for seed in range(3):
        network = widths.stirred(copy.deepcopy(widths.network("cifar_resnet20")), seed)
        scores = widths.scales(structure, network)
        costs = []
        for percent in range(15, 101, 2 if seed else 1):
            budget = widths.limit(structure, percent / 100, resource)
            staying = within_budget(structure, scores, [budget], resource)
            costs.append(structure.cost([len(channels) for channels in staying], resource))
            assert costs[-1] <= budget.most
        assert costs == sorted(costs)
        assert costs[0] < 0.2 * costs[-1]


@pytest.mark.parametrize("resource", ["macs", "params"])
def test_the_whole_budget_keeps_everything(resource: str) -> None:
    structure = widths.structure("cifar_resnet20")
    scores = widths.scales(structure, widths.network("cifar_resnet20"))
    scores[0][0] = 0.0  # even what is switched off already
    staying = within_budget(structure, scores, [widths.limit(structure, 1.0, resource)], resource)
    assert [len(channels) for channels in staying] == widths.whole(structure)
    assert structure.kept(staying) == {}


def test_the_largest_scales_stay() -> None:
    structure = widths.structure("cifar_resnet20")
    scores = widths.scales(structure, widths.network("cifar_resnet20"))
    staying = within_budget(structure, scores, [widths.limit(structure, 0.4, "macs")], "macs")
    for known, channels in zip(scores, staying, strict=True):
        gone = [known[channel] for channel in range(len(known)) if channel not in channels]
        assert min(known[channel] for channel in channels) >= max(gone, default=0.0)
    assert any(len(channels) < len(known) for known, channels in zip(scores, staying, strict=True))


def test_what_costs_more_goes_first() -> None:
    """At equal scales the groups whose channels cost most lose most."""
    structure = widths.structure("cifar_resnet20")
    scores = [[1.0] * count for count in widths.whole(structure)]
    whole = widths.whole(structure)
    first = max(range(len(whole)), key=lambda group: structure.marginal(whole, group, "macs"))
    cost = structure.cost(whole, "macs")
    staying = within_budget(structure, scores, [Limit(cost - 1, tuple(range(len(whole))))], "macs", widths=Widths(1, 1))
    left = [len(channels) for channels in staying]
    assert [group for group in range(len(left)) if left[group] < whole[group]] == [first]


def test_only_groups_of_a_limit_are_narrowed_for_it() -> None:
    structure = widths.structure("cifar_resnet20")
    scores = widths.scales(structure, widths.network("cifar_resnet20"))
    inside = [
        number
        for number, group in enumerate(structure.groups)
        if all(gate.module.startswith("layer2.") for gate in group.gates)
    ]
    layers = frozenset(layer.module for layer in structure.layers if layer.module.startswith("layer2."))
    cost = structure.cost(widths.whole(structure), "params", layers)
    staying = within_budget(structure, scores, [Limit(0.5 * cost, tuple(inside), layers)], "params")
    left = [len(channels) for channels in staying]
    assert 0.97 * 0.5 * cost <= structure.cost(left, "params", layers) <= 0.5 * cost
    changed = [group for group, (now, then) in enumerate(zip(left, widths.whole(structure), strict=True)) if now < then]
    assert changed
    assert set(changed) <= set(inside)


def test_dead_channels_go_before_living_ones() -> None:
    structure = widths.structure("cifar_resnet20")
    scores = [[1.0] * (count // 2) + [0.001] * (count - count // 2) for count in widths.whole(structure)]
    half = [count // 2 for count in widths.whole(structure)]
    limit = Limit(structure.cost(half, "macs"), tuple(range(len(half))))
    staying = within_budget(structure, scores, [limit], "macs")
    assert staying == [list(range(count)) for count in half]


def test_widths_are_multiples_and_have_a_floor() -> None:
    steps = Widths(8, 8)
    assert [steps.floor(channels) for channels in (64, 16, 12, 4, 2, 1)] == [8, 8, 6, 2, 1, 1]
    assert (steps.below(64, 64), steps.below(20, 20), steps.below(9, 20), steps.below(8, 20)) == (56, 16, 8, 8)
    assert (steps.above(8, 20), steps.above(16, 20), steps.above(20, 20)) == (16, 20, 20)
    assert (Widths(8, 3).below(8, 32), Widths(8, 3).below(10, 32), Widths(8, 3).above(8, 32)) == (8, 9, 9)


def test_an_impossible_budget_is_refused() -> None:
    structure = widths.structure("cifar_resnet20")
    scores = [[1.0] * count for count in widths.whole(structure)]
    with pytest.raises(AttarError, match=r"A budget of 0.10 of the macs cannot be met, since 0.12 are left"):
        within_budget(structure, scores, [widths.limit(structure, 0.1, "macs")], "macs")
    staying = within_budget(structure, scores, [widths.limit(structure, 0.1, "macs")], "macs", widths=Widths(4, 4))
    assert min(map(len, staying)) >= 4


def test_the_choice_is_the_same_every_time() -> None:
    structure = widths.structure("cifar_resnet20")
    scores = [[1.0] * count for count in widths.whole(structure)]  # nothing but ties
    chosen = [within_budget(structure, scores, [widths.limit(structure, 0.5, "macs")], "macs") for _ in range(2)]
    assert chosen[0] == chosen[1]
    assert torch.tensor([channels[0] for channels in chosen[0]]).eq(0).all()
