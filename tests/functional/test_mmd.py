from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.functional import linear_mmd

A = torch.tensor([[1.0, 0], [3, 2]], dtype=torch.float64)
B = torch.tensor([[0.0, 1], [2, 3]], dtype=torch.float64)


def test_worked_example() -> None:
    assert linear_mmd(A, B).item() == 2.0
    assert linear_mmd(A, B, per_channel=False).item() == 0.0
    assert ((A - B) ** 2).mean().item() == 1.0  # an elementwise error is another quantity


def test_zero_without_equal_features() -> None:
    """It compares distributions, not pairs."""
    assert linear_mmd(A, A.flip(0)).item() == 0.0
    assert not torch.equal(A, A.flip(0))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_invariances_and_gradients(rows: int, channels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, rows, channels, generator=generator, dtype=torch.float64)
    found = linear_mmd(a, b)
    torch.testing.assert_close(linear_mmd(b, a), found)
    torch.testing.assert_close(linear_mmd(a[torch.randperm(rows, generator=generator)], b), found)
    shift = torch.randn(channels, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(linear_mmd(a + shift, b + shift), found)
    torch.testing.assert_close(linear_mmd(a + shift, a), shift.square().sum())
    a.requires_grad_(), b.requires_grad_()
    grad_a, grad_b = torch.autograd.grad(linear_mmd(a, b), [a, b])
    difference = (a - b).mean(0).detach()
    torch.testing.assert_close(grad_a, (2 * difference / rows).expand_as(a))
    torch.testing.assert_close(grad_b, -grad_a)
    scalar = linear_mmd(a, b, per_channel=False).item()
    assert scalar == pytest.approx((a.mean() - b.mean()).item() ** 2, abs=1e-12)
    assert scalar <= found.item() / channels + 1e-12


def test_half_precision_is_raised() -> None:
    assert linear_mmd(A.bfloat16(), B.bfloat16()).dtype == torch.float32


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"one shape \[N, D\]"):
        linear_mmd(A, B[:1])
