from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attar.functional.pkt import (
    Kernel,
    neighbour_divergence,
    neighbour_log_probs,
    probabilistic_transfer,
    same_class_log_probs,
)

T = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
S = torch.tensor([[1, 0], [1, 0], [0, 1]], dtype=torch.float64)
KERNELS: tuple[Kernel, ...] = ("cosine", "student-t", "rbf", "adaptive-rbf", "cauchy")


def random_features(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_worked_example() -> None:
    rows = [[0.424889, 0.212445, 0.362666], [0.212445, 0.424889, 0.362666], [0.315301, 0.315301, 0.369398]]
    torch.testing.assert_close(neighbour_log_probs(T).exp(), torch.tensor(rows).double(), atol=1e-6, rtol=0)
    rows = [[0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [0.25, 0.25, 0.5]]
    torch.testing.assert_close(neighbour_log_probs(S).exp(), torch.tensor(rows).double(), atol=1e-6, rtol=0)
    loss = probabilistic_transfer(S, T)
    assert loss.item() == pytest.approx(0.0276264, abs=1e-7)
    assert 9 * loss.item() == pytest.approx(0.248638, abs=1e-6)
    assert probabilistic_transfer(S, T, reduction="batchmean").item() == pytest.approx(3 * 0.0276264, abs=1e-6)
    combined = {"divergence": "jeffreys", "eps": 1e-6}
    parts = [probabilistic_transfer(S, T, kernels=[kernel], **combined).item() for kernel in ("cosine", "student-t")]
    assert parts == pytest.approx([0.0559821, 0.0433964], abs=1e-6)
    both = probabilistic_transfer(S, T, kernels=("cosine", "student-t"), **combined)
    assert both.item() == pytest.approx(0.0993785, abs=1e-6)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("rbf", lambda d, mean: math.exp(-d / 0.5)),
        ("adaptive-rbf", lambda d, mean: math.exp(-d / mean)),
        ("cauchy", lambda d, mean: 1 / (1 + d**2 / 0.25)),
        ("student-t", lambda d, mean: 1 / (1 + d)),
    ],
)
def test_kernels_by_hand(kernel: Kernel, expected: object) -> None:
    points = torch.tensor([[0.0], [3.0]], dtype=torch.float64)
    near, far = math.sqrt(1e-6), math.sqrt(9 + 1e-6)
    values = [expected(d, (near + far) / 2) for d in (near, far)]
    found = neighbour_log_probs(points, kernel, sigma=0.5).exp()
    assert found[0].tolist() == pytest.approx([value / sum(values) for value in values], rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.tuples(st.integers(0, 9999), st.integers(1, 6), st.integers(1, 5)), st.sampled_from(KERNELS))
def test_properties(drawn: tuple[int, int, int], kernel: Kernel) -> None:
    seed, n, d = drawn
    student = random_features(seed, n, d).requires_grad_()
    teacher = random_features(seed + 1, n, d + 2).requires_grad_()
    torch.testing.assert_close(neighbour_log_probs(student, kernel).exp().sum(1), torch.ones(n).double())
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    rotation, _ = torch.linalg.qr(random_features(seed + 2, d, d))
    for divergence in ("kl", "jeffreys", "abs", "squared"):
        options = {"kernels": [kernel], "divergence": divergence}
        loss = probabilistic_transfer(student, teacher, **options)
        assert loss >= -1e-12
        assert probabilistic_transfer(student, student, **options).abs() < 1e-12
        torch.testing.assert_close(probabilistic_transfer(student[order], teacher[order], **options), loss)
        torch.testing.assert_close(probabilistic_transfer(student @ rotation, teacher, **options), loss)
        loss.backward()
        assert teacher.grad is None
        assert torch.isfinite(student.grad).all()
        if n == 1:
            assert loss.abs() < 1e-12


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 9999), st.floats(0.1, 100))
def test_the_cosine_form_does_not_see_lengths(seed: int, scale: float) -> None:
    student, teacher = random_features(seed, 4, 3), random_features(seed + 1, 4, 5)
    factors = torch.tensor([[scale], [1.0], [2.0], [0.5]], dtype=torch.float64)
    loss = probabilistic_transfer(student, teacher, eps=0.0)
    torch.testing.assert_close(probabilistic_transfer(factors * student, factors * teacher, eps=0.0), loss)
    other = probabilistic_transfer(factors * student * 3, teacher, kernels=["student-t"])
    assert other != probabilistic_transfer(student, teacher, kernels=["student-t"])


def test_empty_equal_and_opposite_features_are_finite() -> None:
    rows = torch.tensor([[0.0, 0.0], [1e6, 0.0], [-1e6, 0.0], [1e6, 0.0]], requires_grad=True)
    for kernel in KERNELS:
        for divergence in ("kl", "jeffreys"):
            rows.grad = None
            target = random_features(0, 4, 3).float()
            loss = probabilistic_transfer(rows, target, kernels=[kernel], divergence=divergence)
            loss.backward()
            assert torch.isfinite(loss), kernel
            assert torch.isfinite(rows.grad).all(), kernel
    cosine = neighbour_log_probs(rows.detach().double()).exp()
    torch.testing.assert_close(cosine[0], torch.full((4,), 0.25).double())


def test_neighbours_by_class() -> None:
    probs = same_class_log_probs(torch.tensor([0, 1, 0])).exp()
    torch.testing.assert_close(probs, torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]))


def test_other_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="Neighbours of 2 and 3 samples"):
        neighbour_divergence(torch.zeros(2, 2), torch.zeros(3, 3))


def test_full_precision_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = probabilistic_transfer(S.bfloat16(), T.bfloat16(), kernels=("cosine", "student-t"))
    assert loss.dtype == torch.float32
