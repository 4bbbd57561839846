from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.functional.adversarial import activation_bins, discriminator_loss, reverse_gradient


@pytest.mark.parametrize(
    ("row", "bins", "expected"),
    [((1, 2, 3, 4), 2, (1.5, 3.5)), ((1, 2), 4, (1, 1, 2, 2)), ((1, 2, 3), 2, (1.5, 2.5))],
)
def test_worked_rows(row: tuple[int, ...], bins: int, expected: tuple[float, ...]) -> None:
    """meal.md, property 1."""
    features = torch.tensor(row, dtype=torch.float64).view(1, 1, 1, -1)
    torch.testing.assert_close(activation_bins(features, bins), torch.tensor([expected], dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(1, 50),
    st.sampled_from(["avg", "max"]), st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_any_order_of_channels(n, c, h, w, bins, pooling, seed) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64)
    vector = activation_bins(features, bins, pooling)
    assert vector.shape == (n, bins)
    shuffled = features[:, torch.randperm(c, generator=generator)]
    torch.testing.assert_close(activation_bins(shuffled, bins, pooling), vector)
    # As the definition has it: positions first, channels second.
    pool = F.adaptive_avg_pool1d if pooling == "avg" else F.adaptive_max_pool1d
    pooled = pool(features.flatten(2), bins)
    torch.testing.assert_close(vector, pooled.mean(1) if pooling == "avg" else pooled.amax(1))
    assert vector.min() >= features.min() - 1e-12
    assert vector.max() <= features.max() + 1e-12


def test_half_precision_is_raised() -> None:
    assert activation_bins(torch.randn(1, 2, 3, 3).bfloat16(), 4).dtype == torch.float32
    assert discriminator_loss(torch.zeros(1, 2).bfloat16(), torch.zeros(1, 2).bfloat16()).dtype == torch.float32


def test_worked_discriminator_losses() -> None:
    """meal.md, property 3."""
    loss = discriminator_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert loss.item() == pytest.approx(0.456621, abs=1e-6)
    nothing = torch.zeros(1, 2)
    assert discriminator_loss(nothing, nothing).item() == pytest.approx(math.log(2))
    # What a final ReLU leaves of a judge that is always right: the 0 that should be far below it.
    sure, unsure = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    assert discriminator_loss(sure, unsure).item() == pytest.approx(0.346574, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.floats(0.1, 60), st.integers(0, 99))
def test_it_is_binary_cross_entropy(n: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = scale * torch.randn(2, n, 2, generator=generator, dtype=torch.float64)
    truth = torch.tensor([[1.0, 0.0]] * n + [[0.0, 1.0]] * n, dtype=torch.float64)
    torch.testing.assert_close(
        discriminator_loss(a, b), F.binary_cross_entropy_with_logits(torch.cat([a, b]), truth), rtol=1e-12, atol=0
    )


def test_a_reversed_gradient() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    y = reverse_gradient(x)
    assert torch.equal(y, x)
    (y * torch.arange(5)).sum().backward()
    assert torch.equal(x.grad, -torch.arange(5, dtype=torch.float64))
