from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.functional import attention_map, attention_transfer, flat_map, resized_map

F = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, -1.0]]]], dtype=torch.float64)


def random_features(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_map_worked_by_hand() -> None:
    assert attention_map(F).tolist() == [[[1.0, 1.0], [0.0, 2.0]]]
    assert attention_map(F, reduce="mean").tolist() == [[[0.5, 0.5], [0.0, 1.0]]]
    assert attention_map(2 * F, power=3, reduce="max").tolist() == [[[8.0, 8.0], [0.0, 8.0]]]
    assert attention_map(F, power=1).tolist() == attention_map(-F, power=1).tolist() == [[[1.0, 1.0], [0.0, 2.0]]]


def test_half_precision_neither_overflows_nor_stays() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        energy = attention_map(torch.full((1, 4, 2, 2), 300.0, dtype=dtype))
        assert energy.dtype == torch.float32
        assert torch.isfinite(energy).all()


def test_bilinear_by_hand() -> None:
    maps = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]], dtype=torch.float64)
    assert resized_map(maps, (4, 4))[0, 0].tolist() == [0.0, 0.25, 0.75, 1.0]
    aligned = resized_map(maps, (4, 4), align_corners=True)[0, 0]
    torch.testing.assert_close(aligned, torch.tensor([0.0, 1 / 3, 2 / 3, 1.0], dtype=torch.float64))
    assert resized_map(maps, (3, 5)).shape == (1, 3, 5)
    assert resized_map(maps, (2, 2)) is maps


def test_normalisations_by_hand() -> None:
    maps = attention_map(F)
    assert flat_map(maps, "none").tolist() == [[1.0, 1.0, 0.0, 2.0]]
    assert flat_map(maps, "l2")[0].tolist() == pytest.approx([1 / math.sqrt(6)] * 2 + [0, 2 / math.sqrt(6)])
    expected = [0.196612, 0.196612, 0.072329, 0.534447]
    assert flat_map(maps, "softmax")[0].tolist() == pytest.approx(expected, abs=1e-6)
    cold = flat_map(maps, "softmax", temperature=2.0)
    torch.testing.assert_close(cold, flat_map(maps / 2, "softmax"))


def test_an_empty_map_gives_no_nan() -> None:
    zero = torch.zeros(2, 3, 4, 4, requires_grad=True)
    assert not flat_map(attention_map(zero), "l2").any()
    torch.testing.assert_close(flat_map(attention_map(zero), "softmax"), torch.full((2, 16), 1 / 16))
    loss = attention_transfer(zero, torch.rand(2, 5, 4, 4))
    assert loss.item() == pytest.approx(1 / 16)
    loss.backward()
    assert not zero.grad.any()


def test_transfer_worked_by_hand() -> None:
    """Two positions: maps (4, 0) and (1, 1) become (1, 0) and (.7071, .7071)."""
    a = torch.tensor([[[[2.0, 0.0]]]], dtype=torch.float64)
    t = torch.tensor([[[[0.6, 1.0]], [[0.8, 0.0]]]], dtype=torch.float64)
    r = math.sqrt(0.5)
    squared = (1 - r) ** 2 + r**2
    assert attention_transfer(a, t).item() == pytest.approx(squared / 2)
    assert attention_transfer(a, t, form="paper").item() == pytest.approx(math.sqrt(squared))


features = st.tuples(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))


@settings(deadline=None, max_examples=40)
@given(features, st.floats(0.01, 100))
def test_transfer_properties(drawn: tuple[int, int, int, int, int], scale: float) -> None:
    seed, n, c, h, w = drawn
    f = random_features(seed, n, c, h, w).requires_grad_()
    t = random_features(seed + 1, n, c + 1, h, w).requires_grad_()
    for form in ("code", "paper"):
        loss = attention_transfer(f, t, form=form)
        assert 0 <= loss <= (2 / (h * w) if form == "code" else math.sqrt(2)) + 1e-12
        assert attention_transfer(f, f, form=form) == 0
        torch.testing.assert_close(attention_transfer(scale * f, t.flip(1), form=form), loss)
        torch.testing.assert_close(attention_transfer(f.flip(1), -scale * t, form=form), loss)
        loss.backward()
    assert t.grad is None
    assert f.grad is not None


def test_sizes_must_agree_or_be_resized() -> None:
    large, small = random_features(0, 2, 3, 6, 8), random_features(1, 2, 5, 3, 4)
    with pytest.raises(ValueError, match="cannot be compared"):
        attention_transfer(large, small)
    pooled = torch.nn.functional.adaptive_avg_pool2d(large, (3, 4))
    assert attention_transfer(large, small, resize=True) == attention_transfer(pooled, small)
    assert attention_transfer(small, large, resize=True) == attention_transfer(small, pooled)
    with pytest.raises(ValueError, match="cannot be compared"):
        attention_transfer(small[:1], small)
