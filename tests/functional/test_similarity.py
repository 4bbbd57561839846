from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attar.functional import batch_similarity, similarity_distance

Q_S = torch.tensor([[1, 0], [1, 1], [0, 1]], dtype=torch.float64)
Q_T = torch.tensor([[1, 0], [1, 0], [0, 1]], dtype=torch.float64)


def random_features(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distance(a: Tensor, b: Tensor) -> Tensor:
    return similarity_distance(batch_similarity(a), batch_similarity(b))


def test_worked_example() -> None:
    rows = [[0.707107, 0.707107, 0], [0.408248, 0.816497, 0.408248], [0, 0.707107, 0.707107]]
    torch.testing.assert_close(batch_similarity(Q_S), torch.tensor(rows).double(), atol=1e-6, rtol=0)
    rows = [[0.707107, 0.707107, 0]] * 2 + [[0, 0, 1]]
    torch.testing.assert_close(batch_similarity(Q_T), torch.tensor(rows).double(), atol=1e-6, rtol=0)
    assert 9 * distance(Q_S, Q_T).item() == pytest.approx(0.853736, abs=1e-6)
    assert distance(Q_S, Q_T).item() == pytest.approx(0.094860, abs=1e-6)


shapes = st.tuples(st.integers(0, 9999), st.integers(1, 6), *[st.integers(1, 4)] * 3)


@settings(deadline=None, max_examples=40)
@given(shapes, st.floats(0.01, 100))
def test_properties(drawn: tuple[int, ...], scale: float) -> None:
    seed, b, c, h, w = drawn
    student = random_features(seed, b, c, h, w).requires_grad_()
    teacher = random_features(seed + 1, b, c + 1, w, h).requires_grad_()
    loss = distance(student, teacher)
    assert 0 <= loss <= 4 / b + 1e-12
    assert distance(student.abs(), teacher.abs()) <= 2 / b + 1e-12
    assert distance(student, student) == 0
    # Samples in another order, another basis of the features, another unit of measurement: the same relations.
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(distance(student[order], teacher[order]), loss)
    torch.testing.assert_close(distance(student.flip(1, 2), scale * teacher), loss)
    rotation, _ = torch.linalg.qr(random_features(seed + 2, c * h * w, c * h * w))
    torch.testing.assert_close(distance(scale * student.flatten(1) @ rotation, teacher), loss)
    loss.backward()
    assert teacher.grad is None
    assert torch.isfinite(student.grad).all()
    if b == 1:
        assert loss == 0


def test_scaling_one_sample_is_another_similarity() -> None:
    a, b = random_features(0, 4, 3), random_features(1, 4, 5)
    scaled = a * torch.tensor([[3.0], [1.0], [1.0], [1.0]])
    assert abs(distance(scaled, b) - distance(a, b)) > 1e-3


def test_rows_are_normalised_not_samples() -> None:
    similarity = batch_similarity(random_features(0, 4, 3))
    torch.testing.assert_close(similarity.norm(dim=1), torch.ones(4).double())
    assert not torch.allclose(similarity, similarity.T)
    assert not torch.allclose(similarity.diagonal(), torch.ones(4).double())


def test_zeros_give_no_nan_and_half_precision_no_overflow() -> None:
    zero = torch.zeros(3, 4, requires_grad=True)
    distance(zero, torch.randn(3, 4)).backward()
    assert torch.isfinite(zero.grad).all()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            similarity = batch_similarity(torch.full((3, 64, 8, 8), 40.0, dtype=dtype))
        assert similarity.dtype == torch.float32
        torch.testing.assert_close(similarity, torch.full((3, 3), 3**-0.5))


def test_other_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 2 samples"):
        similarity_distance(torch.eye(3), torch.eye(2))
