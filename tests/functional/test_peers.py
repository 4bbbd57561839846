from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attar.functional import kl_divergence
from attar.functional.peers import peer_attention, peer_targets, prediction_diversity

ANSWERS = st.integers(0, 10_000).map(
    lambda seed: 3 * torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
)


def test_worked_example_of_the_attention() -> None:
    queries = torch.tensor([[[1.0, 0], [0, 1]]], dtype=torch.float64)
    keys = torch.tensor([[[1.0, 0], [1, 1]]], dtype=torch.float64)
    attention = peer_attention(queries, keys)
    expected = torch.tensor([[[0.5, 0.5], [0.268941, 0.731059]]], dtype=torch.float64)
    torch.testing.assert_close(attention, expected, atol=1e-6, rtol=0)
    logits = torch.tensor([[[2.0, 0, -1], [0, 1, 0]]], dtype=torch.float64)
    mixed = torch.tensor([[[1.0, 0.5, -0.5], [0.537883, 0.731059, -0.268941]]], dtype=torch.float64)
    for temperature in (1.0, 3.0):
        targets = peer_targets(logits, attention, temperature).exp()
        torch.testing.assert_close(targets, (mixed / temperature).softmax(2), atol=1e-6, rtol=0)
        printed = attention @ (logits / temperature).softmax(2)
        torch.testing.assert_close(peer_targets(logits, attention, temperature, "probabilities").exp(), printed)


@given(ANSWERS, st.floats(0.5, 8.0), st.sampled_from(["logits", "probabilities"]))
def test_targets_are_distributions_and_the_identity_gives_the_own_answer(z: Tensor, t: float, mixture: str) -> None:
    attention = peer_attention(z, z.flip(1))
    torch.testing.assert_close(attention.sum(2), torch.ones(5, 3, dtype=torch.float64))
    targets = peer_targets(z, attention, t, mixture)  # type: ignore[arg-type]
    torch.testing.assert_close(targets.exp().sum(2), torch.ones(5, 3, dtype=torch.float64))
    own = peer_targets(z, torch.eye(3, dtype=torch.float64).expand(5, 3, 3), t, mixture)  # type: ignore[arg-type]
    torch.testing.assert_close(own, (z / t).log_softmax(2))


@given(ANSWERS, st.floats(0.5, 8.0), st.sampled_from([0.0, 1e-7]))
def test_the_attached_divergence_is_kl_whose_target_learns(answers: Tensor, temperature: float, shift: float) -> None:
    z, target = (answers[:, i].clone().requires_grad_() for i in (0, 1))
    log_t = (target / temperature).log_softmax(1)
    loss = kl_divergence(z, temperature=temperature, target_log_probs=log_t, shift=shift, constant_target=False)
    constant = kl_divergence(z, target, temperature, shift=shift)
    torch.testing.assert_close(loss, constant)
    (expected,) = torch.autograd.grad(constant, z)
    found, of_target = torch.autograd.grad(loss, (z, target))
    torch.testing.assert_close(found, expected)
    p, t = (z.detach() / temperature).softmax(1), (target.detach() / temperature).softmax(1)
    difference = t.log() - p.log()
    by_hand = temperature / 5 * t * (difference - (t * difference).sum(1, keepdim=True))
    torch.testing.assert_close(of_target, by_hand, rtol=1e-4, atol=1e-6)


def test_diversity() -> None:
    sure = 100 * torch.eye(3, dtype=torch.float64)
    assert prediction_diversity([sure, sure]) == 0
    assert prediction_diversity([sure, sure.roll(1, 0)]).item() == pytest.approx(math.sqrt(2))
    # Of the three pairs two differ, on every sample.
    assert prediction_diversity([sure, sure, sure.roll(1, 0)]).item() == pytest.approx(math.sqrt(2) * 2 / 3)
    a, b = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    assert prediction_diversity([a, b]).item() == pytest.approx(0.25 * math.sqrt(2), abs=1e-6)
    with pytest.raises(ValueError, match="two networks or more"):
        prediction_diversity([sure])
