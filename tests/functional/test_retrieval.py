"""Ranking and precision against hand-computed examples, scikit-learn and a plain reading of the released code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from attar.functional.retrieval import (
    Distance,
    average_precision,
    batch_interpolated_average_precision,
    batch_interpolated_precision,
    precision_at,
    relevance_by_rank,
)

DISTANCES: list[Distance] = ["cosine", "euclidean"]


def example(queries: int = 40, items: int = 150, dim: int = 6, classes: int = 4, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator)
    query_labels = torch.randint(classes, (queries,), generator=generator)
    labels = torch.randint(classes, (items,), generator=generator)
    query = centres[query_labels] + torch.randn(queries, dim, generator=generator)
    database = centres[labels] + torch.randn(items, dim, generator=generator)
    return query, query_labels, database, labels


def rows(*texts: str) -> Tensor:
    return torch.tensor([[letter == "1" for letter in text] for text in texts])


def test_average_precision_by_hand() -> None:
    relevance = rows("10100", "01001", "11000", "00001", "00000", "11111")
    expected = [(1 + 2 / 3) / 2, (1 / 2 + 2 / 5) / 2, 1.0, 1 / 5, 0.0, 1.0]
    torch.testing.assert_close(average_precision(relevance), torch.tensor(expected, dtype=torch.float64))


def test_precision_at_k_by_hand() -> None:
    relevance = rows("10100", "01001")
    assert precision_at(relevance, 1).tolist() == [1.0, 0.0]
    assert precision_at(relevance, 3).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert precision_at(relevance, 5).tolist() == [0.4, 0.4]
    for k in (0, 6):
        with pytest.raises(ValueError, match=r"k must lie in 1\.\.5"):
            precision_at(relevance, k)


def test_ranking_by_hand() -> None:
    """The cosine ignores length, the Euclidean distance does not."""
    queries, query_labels = torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    database = torch.tensor([[10.0, 1.0], [0.9, 0.3], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([1, 0, 1, 0])
    cosine = relevance_by_rank(queries, query_labels, database, labels, "cosine")
    euclidean = relevance_by_rank(queries, query_labels, database, labels, "euclidean")
    assert cosine.tolist() == [[True, False, True, False]]
    # Nearest first: (0.9, 0.3), (0, 1) at sqrt 2, (-1, 0) at 2, (10, 1) far away.
    assert euclidean.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("distance", DISTANCES)
def test_average_precision_is_scikit_learns(distance: Distance) -> None:
    queries, query_labels, database, labels = example()
    found = average_precision(relevance_by_rank(queries, query_labels, database, labels, distance))
    for query, label, value in zip(queries.double(), query_labels, found, strict=True):
        items = database.double()
        scores = torch.cosine_similarity(items, query[None]) if distance == "cosine" else -(items - query).norm(dim=1)
        expected = average_precision_score((labels == label).numpy(), scores.numpy())
        assert value.item() == pytest.approx(expected, abs=1e-12)


def test_scale_and_rotation_change_nothing() -> None:
    queries, query_labels, database, labels = example()
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    lengths = torch.rand(150, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    for distance in DISTANCES:
        before = relevance_by_rank(queries, query_labels, database, labels, distance)
        turned = relevance_by_rank(
            queries @ rotation.float(), query_labels, database @ rotation.float(), labels, distance
        )
        assert torch.equal(before, turned)
        assert torch.equal(before, relevance_by_rank(3.0 * queries, query_labels, 3.0 * database, labels, distance))
    scaled = [relevance_by_rank(7.0 * queries, query_labels, lengths * database, labels, d) for d in DISTANCES]
    assert torch.equal(scaled[0], relevance_by_rank(queries, query_labels, database, labels, "cosine"))
    assert not torch.equal(scaled[1], relevance_by_rank(queries, query_labels, database, labels, "euclidean"))


@pytest.mark.parametrize("distance", DISTANCES)
def test_ties_keep_the_order_of_the_database(distance: Distance) -> None:
    """Copies of an image, whatever stands between them and however the queries are split."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(37, 24, generator=generator)
    database = base.repeat(11, 1)[torch.randperm(37 * 11, generator=generator)]
    # A label of its own for every item, asked for one at a time: the rank of each item.
    labels = torch.arange(len(database))
    queries = torch.cat([base[:5], torch.randn(8, 24, generator=generator)])

    def order(some: Tensor) -> Tensor:
        ranks = [relevance_by_rank(some, torch.full((len(some),), n), database, labels, distance) for n in range(407)]
        return torch.stack(ranks, dim=1).int().argmax(dim=2).argsort(dim=1)

    together = order(queries)
    assert torch.equal(together, torch.cat([order(query[None]) for query in queries]))
    difference = (database[together][:, 1:] - database[together][:, :-1]).abs().amax(dim=2)
    copies = difference == 0
    assert copies.sum() == 13 * 37 * 10
    assert (together.diff(dim=1)[copies] > 0).all()


def test_zero_vectors_are_no_trouble() -> None:
    zeros, labels = torch.zeros(3, 4), torch.tensor([0, 1, 0])
    for distance in DISTANCES:
        assert relevance_by_rank(zeros[:1], labels[:1], zeros, labels, distance).tolist() == [[True, False, True]]


def test_features_must_be_of_one_length() -> None:
    labels = torch.tensor([0])
    with pytest.raises(ValueError, match="cannot be compared"):
        relevance_by_rank(torch.zeros(1, 3), labels, torch.zeros(1, 4), labels)
    with pytest.raises(ValueError, match="'cosine' or 'euclidean', not 'l1'"):
        relevance_by_rank(torch.zeros(1, 3), labels, torch.zeros(1, 3), labels, "l1")  # type: ignore[arg-type]


def as_released(relevance: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """The published procedure in words of one loop: eleven levels, interpolation up to the number of queries."""
    values, curves = [], []
    for row in relevance:
        precision = [row[: n + 1].sum() / (n + 1) for n in range(len(row))]
        for n in range(min(batch, len(row)) - 2, -1, -1):
            precision[n] = max(precision[n], precision[n + 1])
        recall = np.cumsum(row) / row.sum()
        levels = [precision[int(np.argmin(np.abs(recall - level)))] for level in np.arange(0, 1.01, 0.1)]
        values.append(np.mean(levels))
        curves.append(precision)
    return np.array(values), np.array(curves)


@pytest.mark.parametrize("batch", [1, 2, 7, 40, 150, 500])
def test_batch_interpolation_is_the_released_codes(batch: int) -> None:
    queries, query_labels, database, labels = example()
    relevance = relevance_by_rank(queries, query_labels, database, labels)
    values, curves = as_released(relevance.numpy(), batch)
    np.testing.assert_allclose(batch_interpolated_average_precision(relevance, batch).numpy(), values, atol=1e-15)
    np.testing.assert_allclose(batch_interpolated_precision(relevance, batch).numpy(), curves, atol=1e-15)


def test_batch_interpolation_by_hand() -> None:
    """One relevant item at rank 2 of four: recall is 0, 1, 1, 1; levels to 0.5 read rank 1, those above it rank 2."""
    relevance = rows("0100")
    assert batch_interpolated_precision(relevance, 1).tolist() == [pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])]
    assert batch_interpolated_precision(relevance, 2).tolist() == [pytest.approx([1 / 2, 1 / 2, 1 / 3, 1 / 4])]
    assert batch_interpolated_average_precision(relevance, 1).tolist() == [pytest.approx(5 * 0.5 / 11)]
    assert batch_interpolated_average_precision(relevance, 2).tolist() == [pytest.approx(0.5)]
    assert average_precision(relevance).tolist() == [0.5]


def test_top_k_of_the_released_code_is_never_lower() -> None:
    queries, query_labels, database, labels = example()
    relevance = relevance_by_rank(queries, query_labels, database, labels)
    curve = batch_interpolated_precision(relevance, 128)
    for k in (1, 10, 100):
        assert (curve[:, k - 1] >= precision_at(relevance, k)).all()
    assert (curve[:, 9] > precision_at(relevance, 10)).any()
    assert torch.equal(curve[:, 139], precision_at(relevance, 140))  # beyond the batch nothing is changed
