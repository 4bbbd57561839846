from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.functional import ensemble_log_probs, gated_logits, kl_divergence, masked_mean, sigmoid_ramp

Z_S = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
Z_T = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1, 0.0615542), (4, 0.103107), (1000, 0.111086), (2e4, 0.111111)]
)
def test_worked_kl(temperature: float, expected: float) -> None:
    assert kl_divergence(Z_S, Z_T, temperature).item() == pytest.approx(expected, abs=2e-6)


def test_without_squared_temperature() -> None:
    assert kl_divergence(Z_S, Z_T, 4, squared_temperature=False).item() == pytest.approx(0.00644416, abs=1e-8)


logit_rows = st.lists(st.lists(st.floats(-8, 8), min_size=4, max_size=4), min_size=1, max_size=5)


@settings(deadline=None, max_examples=50)
@given(logit_rows, st.floats(0.5, 20), st.floats(-50, 50))
def test_kl_properties(rows: list[list[float]], temperature: float, shift: float) -> None:
    z = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    target = z.detach().flip(0).roll(1, dims=1)
    value = kl_divergence(z, target, temperature)
    assert value >= -1e-12
    # Zero, with zero gradient, when prediction and target agree.
    same = kl_divergence(z, z, temperature)
    assert same.item() == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(same, z)
    assert gradient.abs().max() < 1e-12
    # A constant added to a row changes nothing; a batch given twice neither.
    assert kl_divergence(z + shift, target - shift, temperature).item() == pytest.approx(value.item(), abs=1e-9)
    twice = kl_divergence(torch.cat([z, z]), torch.cat([target, target]), temperature)
    assert twice.item() == pytest.approx(value.item(), abs=1e-10)
    # Gradient T (q - p) / N.
    (gradient,) = torch.autograd.grad(value, z)
    expected = temperature * ((z / temperature).softmax(1) - (target / temperature).softmax(1)) / len(z)
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-8, atol=1e-10)


def test_target_gets_no_gradient_and_shapes_must_agree() -> None:
    target = Z_T.clone().requires_grad_()
    kl_divergence(Z_S.clone().requires_grad_(), target, 2.0).backward()
    assert target.grad is None
    with pytest.raises(ValueError, match="one shape"):
        kl_divergence(Z_S.expand(4, 3), Z_T, 2.0)
    with pytest.raises(ValueError, match="exactly one"):
        kl_divergence(Z_S)


def test_dense_logits_average_over_pixels() -> None:
    z, t = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 3) for x in (z, t)]
    torch.testing.assert_close(kl_divergence(z, t, 2.0), kl_divergence(*flat, 2.0))


def test_void_pixels_stay_out_of_the_average() -> None:
    z, t = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 4, 5).double()
    valid = torch.arange(40).view(2, 4, 5) % 3 > 0
    divergence = kl_divergence(z, t, 2.0, valid=valid)
    flat = [x.movedim(1, -1)[valid] for x in (z, t)]
    torch.testing.assert_close(divergence, kl_divergence(*flat, 2.0))
    # Not even an overflow counts there.
    wild = t.masked_fill(~valid[:, None], float("inf"))
    assert torch.equal(kl_divergence(z, wild, 2.0, valid=valid), divergence)
    (gradient,) = torch.autograd.grad(divergence, z)
    assert not gradient.movedim(1, -1)[~valid].any()
    assert kl_divergence(z, t, valid=torch.zeros_like(valid)) == 0


def test_masked_mean() -> None:
    values = torch.tensor([[1.0, 2.0], [4.0, float("nan")]])
    assert masked_mean(values, torch.tensor([[True, False], [True, False]])) == 2.5
    assert masked_mean(values[:1], None) == 1.5
    assert masked_mean(values, torch.zeros(2, 2, dtype=torch.bool)) == 0


def test_half_precision_is_computed_in_float32() -> None:
    assert kl_divergence(Z_S.bfloat16(), Z_T.bfloat16(), 4.0).dtype == torch.float32


def test_ensemble_averages_probabilities_not_logits() -> None:
    a, b = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    expected = (torch.softmax(a / 2, 1) + torch.softmax(b / 2, 1)) / 2
    torch.testing.assert_close(ensemble_log_probs([a, b], 2.0).exp(), expected)
    assert not torch.allclose(expected, torch.softmax((a + b) / 4, 1), atol=1e-2)


def test_one_gate_value_stands_for_all_pixels_of_a_sample() -> None:
    one, two = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    mixed = gated_logits([one, two], torch.tensor([[0.25, 0.75], [1.0, 0.0]]))
    torch.testing.assert_close(mixed, torch.stack([0.25 * one[0] + 0.75 * two[0], one[1]]))


def test_gated_logits() -> None:
    gate = torch.tensor([[0.25, 0.75]])
    mixed = gated_logits([torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])], gate)
    torch.testing.assert_close(mixed, torch.tensor([[1.0, 3.0]]))
    with pytest.raises(ValueError, match="gate"):
        gated_logits([torch.zeros(1, 2)], gate)


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 0.006738), (10, 0.021750), (40, 0.286505), (79, 0.999219), (80, 1.0), (250, 1.0)]
)
def test_ramp(epoch: int, expected: float) -> None:
    progress = torch.tensor(epoch / 300, dtype=torch.float64)
    assert sigmoid_ramp(progress, 80 / 300).item() == pytest.approx(expected, abs=1e-6)


def test_no_ramp() -> None:
    assert sigmoid_ramp(torch.tensor(0.0), 0.0).item() == 1.0
    assert math.isclose(sigmoid_ramp(torch.tensor(0.0), 1.0).item(), math.exp(-5), rel_tol=1e-6)
