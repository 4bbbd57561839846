from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attar.functional import layer_pairs, linear_ramp


def test_pairs_by_hand() -> None:
    assert layer_pairs(4, "adjacent") == ((0, 1), (1, 2), (2, 3))
    assert layer_pairs(4, "deepest") == ((0, 3), (1, 3), (2, 3))
    assert layer_pairs(4, "all") == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
    assert layer_pairs(2, "adjacent") == layer_pairs(2, "deepest") == layer_pairs(2, "all") == ((0, 1),)
    assert layer_pairs(1, "adjacent") == layer_pairs(1, "deepest") == layer_pairs(1, "all") == ()


@given(st.integers(1, 8))
def test_who_imitates_is_always_shallower(layers: int) -> None:
    for pairing in ("adjacent", "deepest", "all"):
        pairs = layer_pairs(layers, pairing)
        assert len(set(pairs)) == len(pairs) == (layers * (layers - 1) // 2 if pairing == "all" else layers - 1)
        assert all(0 <= shallow < deep < layers for shallow, deep in pairs)


@pytest.mark.parametrize(
    ("progress", "length", "start", "expected"),
    [(0, 0.1, 0, 0), (0.05, 0.1, 0, 0.5), (0.1, 0.1, 0, 1), (1, 0.1, 0, 1), (0.4, 0.2, 0.5, 0), (0.55, 0.2, 0.5, 0.25),
     (0.49, 0, 0.5, 0), (0.5, 0, 0.5, 1), (0, 0, 0, 1)],
)  # fmt: skip
def test_linear_ramp(progress: float, length: float, start: float, expected: float) -> None:
    assert linear_ramp(torch.tensor(progress, dtype=torch.float64), length, start).item() == pytest.approx(expected)
