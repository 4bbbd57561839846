from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
from attar.errors import AttarError
from attar.methods import OSAKD
from networks import IMAGES, LABELS, Answers, Net

Z = torch.tensor([[2, 0, 0], [1, 1, 0], [3, 0, 1], [0, 2, 0], [0, 1, 1], [0, 0, 2]], dtype=torch.float64)
Y = torch.tensor([0, 0, 0, 1, 1, 2])


def step(z: Tensor, labels: Tensor, progress: float = 0.5, **options: Any) -> tuple[attar.Terms, Tensor]:
    """Return the terms, and q."""
    seen: list[Tensor] = []

    class Watched(OSAKD):
        def posterior(self, outputs: attar.Outputs, batch: attar.Batch) -> Tensor:
            seen.append(super().posterior(outputs, batch))
            return seen[-1]

    method = Watched(**options)
    images = z[:, None, None, :]
    distiller = attar.Distiller(Answers(), [method], attar.Classification(z.shape[1]), stages=["stage"])
    terms = distiller.build(images.detach())(attar.Batch(images, labels, labels=labels), progress)
    return terms, seen[-1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"k": 2}, 1.018745), ({"k": 2, "divergence": "mse"}, 0.270700), ({"k": 3}, 1.324301)],
)
def test_worked_example(options: dict[str, Any], expected: float) -> None:
    terms, posterior = step(Z, Y, **options)
    assert terms.losses["Watched.soft"].item() == pytest.approx(expected, abs=1e-6)
    if options["k"] == 2:
        half = [0.5, 0.5, 0.0]
        assert posterior.tolist() == [[1, 0, 0], half, [1, 0, 0], half, half, half]
        entropy = -torch.special.entr(posterior).sum(1).mean()
        if "divergence" not in options:
            assert (terms.losses["Watched.soft"] + entropy).item() == pytest.approx(0.556647, abs=1e-6)
    else:
        assert posterior[4].tolist() == pytest.approx([1 / 3] * 3)


BATCHES = st.integers(0, 10_000).map(
    lambda seed: (
        2 * torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),
        torch.randint(4, (9,), generator=torch.Generator().manual_seed(seed + 1)),
    )
)


@given(BATCHES, st.integers(1, 8), st.booleans())
def test_votes_and_gradient(batch: tuple[Tensor, Tensor], k: int, include_self: bool) -> None:
    z, labels = batch
    z = z.clone().requires_grad_()
    terms, posterior = step(z, labels, k=k, include_self=include_self)
    torch.testing.assert_close(posterior.sum(1), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(posterior * k, (posterior * k).round())
    terms.losses["Watched.soft"].backward()
    torch.testing.assert_close(z.grad, (z.detach().softmax(1) - posterior) / 9)
    _, moved = step(
        z.detach() + torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64), labels, k=k, include_self=include_self
    )
    torch.testing.assert_close(moved, posterior)


@given(BATCHES)
def test_all_others_vote_for_the_frequency_of_the_classes(batch: tuple[Tensor, Tensor]) -> None:
    z, labels = batch
    _, posterior = step(z, labels, k=8)
    counts = nn.functional.one_hot(labels, 4).double()
    torch.testing.assert_close(posterior, (counts.sum(0) - counts) / 8)


def test_separated_clusters_give_the_labels_back() -> None:
    labels = torch.arange(3).repeat_interleave(4)
    z = 100.0 * nn.functional.one_hot(labels, 3).double() + 0.01 * torch.randn(12, 3, dtype=torch.float64)
    terms, posterior = step(z, labels, k=3)
    torch.testing.assert_close(posterior, nn.functional.one_hot(labels, 3).double())
    torch.testing.assert_close(terms.losses["Watched.soft"], terms.losses["task"])


def test_weights() -> None:
    terms, _ = step(Z, Y, weight=0.0)
    torch.testing.assert_close(terms.total(), nn.functional.cross_entropy(Z, Y))
    assert [
        float(step(Z, Y, progress)[0].weights["Watched.soft"]) for progress in (0.0, 0.05, 0.1, 1.0)
    ] == pytest.approx([0.0, 0.05, 0.1, 0.1])
    assert float(step(Z, Y, divergence="mse")[0].weights["Watched.soft"]) == 1.0


def test_neighbours_in_the_embedding() -> None:
    torch.manual_seed(0)
    net = Net().double()
    method = OSAKD(k=1, space="penultimate")
    distiller = attar.Distiller(net, [method], attar.Classification(3)).build(IMAGES)
    found = distiller((IMAGES, LABELS), 0.5)
    embedding = net.high(net.low(IMAGES)).mean(dim=(2, 3))
    apart = torch.cdist(embedding, embedding) + torch.eye(6) * 1e9
    expected = nn.functional.cross_entropy(found.logits, LABELS[apart.argmin(1)])
    torch.testing.assert_close(found.losses["OSAKD.soft"], expected)


def test_mistakes() -> None:
    with pytest.raises(AttarError, match="at least one neighbour"):
        OSAKD(k=0)
    with pytest.raises(AttarError, match="share of the run"):
        OSAKD(ramp=1.5)
