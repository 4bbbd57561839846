from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from attar.functional import (
    MutualTarget,
    collaborative_target,
    error_covariance,
    general_target,
    general_weights,
    linear_weights,
    mutual_divergences,
)

RULES = ("naive", "linear", "minlogit")


def random(networks: int, seed: int, scale: float, classes: int = 6) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = [scale * torch.randn(7, classes, dtype=torch.float64, generator=generator) for _ in range(networks)]
    return z, torch.randint(classes, (7,), generator=generator)


def losses(z: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(z, labels, reduction="none")


def test_worked_example() -> None:
    """kdcl.md: two networks, three classes, the first one is right on its own."""
    z = [torch.tensor([row], dtype=torch.float64) for row in ((2, 0, -1), (1, 1, -2))]
    label = torch.tensor([0])
    assert [losses(each, label).item() for each in z] == pytest.approx([0.169846, 0.717736], abs=1e-6)
    target = torch.tensor([[0, -2, -3]], dtype=torch.float64)
    for rule in RULES:
        torch.testing.assert_close(collaborative_target(z, label, rule), target)
        assert losses(collaborative_target(z, label, rule), label).item() == pytest.approx(0.169846, abs=1e-6)
    assert torch.equal(linear_weights(z, label), torch.tensor([[1.0, 0.0]], dtype=torch.float64))


def test_own_true_class_is_subtracted_before_the_minimum() -> None:
    z = [torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[5.0, 4.0, 4.0]])]
    target = collaborative_target(z, torch.tensor([0]))
    assert torch.equal(target, torch.tensor([[0.0, -2.0, -3.0]]))  # not min(2, 5), min(0, 4), min(-1, 4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    networks=st.integers(2, 5),
    scale=st.sampled_from([0.01, 1.0, 5.0, 30.0]),
    single=st.booleans(),
)
def test_each_rule_is_at_least_as_good_as_the_next(seed: int, networks: int, scale: float, single: bool) -> None:
    z, labels = random(networks, seed, scale)
    if single:
        z = [each.float() for each in z]
    alone = torch.stack([losses(each, labels) for each in z])
    slack = 1e-5 * scale if single else 1e-12
    naive, linear, minlogit = (losses(collaborative_target(z, labels, rule), labels) for rule in RULES)
    torch.testing.assert_close(naive, alone.amin(dim=0))
    assert (linear <= naive + slack).all()
    assert (minlogit <= linear + slack).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), networks=st.integers(2, 5), scale=st.sampled_from([0.01, 1.0, 5.0, 30.0, 200.0]))
def test_linear_weights_are_the_best_there_are(seed: int, networks: int, scale: float) -> None:
    """No direction inside the simplex leads down: <a, gradient> - min gradient bounds what is left to gain."""
    z, labels = random(networks, seed, scale)
    a = linear_weights(z, labels)
    assert (a >= 0).all()
    torch.testing.assert_close(a.sum(dim=1), torch.ones(7, dtype=torch.float64))
    weights = a.clone().requires_grad_()
    losses((weights.t().unsqueeze(2) * torch.stack(z)).sum(dim=0), labels).sum().backward()
    slope = weights.grad
    assert slope is not None
    assert ((a * slope).sum(dim=1) - slope.amin(dim=1)).max() < 5e-5 * scale


def test_linear_weights_of_two_against_a_fine_grid() -> None:
    z, labels = random(2, 3, 2.0)
    share = torch.linspace(0, 1, 10_001, dtype=torch.float64).view(-1, 1, 1)
    grid = share * z[0] + (1 - share) * z[1]
    every = torch.stack([losses(mixed, labels) for mixed in grid])
    found = linear_weights(z, labels)
    torch.testing.assert_close(found[:, 0], share[every.argmin(dim=0), 0, 0], atol=2e-3, rtol=0)
    assert (losses(collaborative_target(z, labels, "linear"), labels) <= every.amin(dim=0) + 1e-6).all()
    # The case would prove little if one network were always best.
    inside = (found > 0.01).all(dim=1)
    assert inside.any()
    assert not inside.all()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), networks=st.integers(1, 4), rule=st.sampled_from(RULES))
def test_invariances(seed: int, networks: int, rule: str) -> None:
    z, labels = random(networks, seed, 2.0)
    target = collaborative_target(z, labels, rule)
    assert (target.gather(1, labels.view(-1, 1)) == 0).all()
    # A constant added to one network's logits says nothing, and networks have no order.
    near = {"rtol": 1e-4, "atol": 1e-4} if rule == "linear" else {}
    torch.testing.assert_close(collaborative_target([z[0] + 3.0, *z[1:]], labels, rule), target, **near)
    torch.testing.assert_close(collaborative_target(z[::-1], labels, rule), target, **near)
    if networks == 1:
        torch.testing.assert_close(target.softmax(1), z[0].softmax(1))
    attached = [each.clone().requires_grad_() for each in z]
    assert not collaborative_target(attached, labels, rule).requires_grad


def test_equal_networks_are_their_own_target() -> None:
    z, labels = random(1, 0, 2.0)
    for rule in RULES:
        target = collaborative_target(z * 3, labels, rule)
        torch.testing.assert_close(target.softmax(1), z[0].softmax(1))


def test_general_weights() -> None:
    """kdcl.md: C = [[.3, .1], [.1, .5]] gives w = (2/3, 1/3) and w^T C w = 0.2333."""
    c = torch.tensor([[0.3, 0.1], [0.1, 0.5]], dtype=torch.float64)
    w = general_weights(c)
    torch.testing.assert_close(w, torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))
    assert (w @ c @ w).item() == pytest.approx(0.2333, abs=1e-4)
    # The best of all weights that sum to one, negative ones included.
    for first in torch.linspace(-1, 2, 31, dtype=torch.float64):
        other = torch.stack([first, 1 - first])
        assert w @ c @ w <= other @ c @ other + 1e-12
    assert general_weights(torch.tensor([[0.1, 0.3], [0.3, 1.5]]))[1] < 0
    equal = torch.full((3, 3), 0.2, dtype=torch.float64)
    torch.testing.assert_close(general_weights(equal, ridge=1e-6), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_error_covariance_and_general_target() -> None:
    z, labels = random(3, 1, 1.0)
    f = [each.softmax(1) for each in z]
    c = error_covariance(f, labels)
    one_hot = torch.eye(6, dtype=torch.float64)[labels]
    for i, j in itertools.product(range(3), repeat=2):
        torch.testing.assert_close(c[i, j], ((f[i] - one_hot) * (f[j] - one_hot)).sum(1).mean())
    w = general_weights(c)
    # What the weights are made for: the mixture's squared error is w^T C w, and none of the networks has less.
    mixed = sum(weight * each for weight, each in zip(w, f, strict=True))
    torch.testing.assert_close((mixed - one_hot).square().sum(1).mean(), w @ c @ w)
    assert w @ c @ w <= c.diagonal().min()
    target = general_target(f, w)
    torch.testing.assert_close(target.sum(1), torch.ones(7, dtype=torch.float64))
    assert (target >= 0).all()
    torch.testing.assert_close(general_target(f, torch.tensor([0.5, 0.5, 0.0])), (f[0] + f[1]) / 2)
    assert (general_target(f, torch.tensor([2.0, -1.0, 0.0])) >= 0).all()


@pytest.mark.parametrize("target", ["each", "probabilities", "logits"])
def test_networks_imitate_each_other_on_valid_pixels(target: MutualTarget) -> None:
    generator = torch.Generator().manual_seed(0)
    z = [torch.randn(2, 4, 5, 6, dtype=torch.float64, generator=generator) for _ in range(3)]
    valid = torch.rand(2, 5, 6, generator=generator) < 0.7
    found = mutual_divergences(z, 2.0, target=target, valid=valid)
    expected = mutual_divergences([x.movedim(1, -1)[valid] for x in z], 2.0, target=target)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))
