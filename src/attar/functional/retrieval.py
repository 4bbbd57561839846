"""How well features find images of the same class: ranking a database, average precision and precision at k."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Distance",
    "average_precision",
    "batch_interpolated_average_precision",
    "batch_interpolated_precision",
    "precision_at",
    "relevance_by_rank",
]

Distance = Literal["cosine", "euclidean"]

_RESOLUTION = 2.0**32
_LEVELS = 11


def relevance_by_rank(
    queries: Tensor, query_labels: Tensor, database: Tensor, database_labels: Tensor, distance: Distance = "cosine"
) -> Tensor:
    """Sort the database by its distance from every query and tell which of its items have the query's label.

    Definition: `r_qn = [label of the n-th nearest item = label of q]`, by `1 - cos(q, x)` or `||q - x||_2`.
    Distances are computed in float64. Such that differ by less than 2^-32 of the largest possible count as equal, and
    equal ones keep the order of the database: copies of an image stand in a fixed order, however the queries are split.

    Shapes: features [Q, D] and [N, D], labels [Q] and [N] -> [Q, N] bool. Memory: about 40 Q N bytes at the peak, so
    give few queries at a time.

    Args:
        queries: features of the queries.
        query_labels: their labels.
        database: features of the items.
        database_labels: their labels.
        distance: "cosine" (a zero vector is at distance 1 from everything) or "euclidean".

    Raises:
        ValueError: another distance, or features of different lengths.
    """
    if queries.shape[1:] != database.shape[1:]:
        raise ValueError(f"Features of {list(queries.shape[1:])} and {list(database.shape[1:])} cannot be compared.")
    queries, database = queries.double(), database.double()
    if distance == "cosine":
        key = F.normalize(queries, dim=1) @ F.normalize(database, dim=1).T
        key.neg_()
    elif distance == "euclidean":
        # Without ||q||^2, which is the same for all items. Between -2 and 1 after the division.
        squares = database.square().sum(dim=1)
        key = torch.addmm(squares, queries, database.T, alpha=-2.0)
        largest = squares.max().sqrt()
        reach = largest * torch.maximum(largest, torch.linalg.vector_norm(queries, dim=1, keepdim=True))
        key /= reach.clamp(min=torch.finfo(key.dtype).tiny)
    else:
        raise ValueError(f"The distance is 'cosine' or 'euclidean', not '{distance}'.")
    # One integer that sorts by distance and then by number: half the time of a stable sort, and it brings the number.
    items = len(database)
    bits = max(1, (items - 1).bit_length())
    keys = key.mul_(_RESOLUTION).round_().long().bitwise_left_shift_(bits)
    keys += torch.arange(items, device=keys.device)
    order = torch.sort(keys, dim=1).values.bitwise_and_((1 << bits) - 1)
    return database_labels[order] == query_labels[:, None]


def average_precision(relevance: Tensor) -> Tensor:
    """Average precision of every query, plain: the mean over its relevant items of the precision at their ranks.

    Definition: `AP = (1 / R) sum_n r_n P(n)` with `P(n) = (1 / n) sum_{m <= n} r_m` and `R = sum_n r_n`.
    Its mean over queries is mAP. A query without a relevant item has 0.

    Shapes: r [Q, N] bool, nearest first -> [Q] float64 in [0, 1].
    """
    found = relevance.cumsum(dim=1)
    total = (found / _ranks(relevance) * relevance).sum(dim=1)
    return total / found[:, -1].clamp(min=1)


def precision_at(relevance: Tensor, k: int) -> Tensor:
    """Precision at k of every query: the share of relevant items among its k nearest.

    Shapes: r [Q, N] bool, nearest first -> [Q] float64 in [0, 1].

    Raises:
        ValueError: k is not in 1..N.
    """
    if not 1 <= k <= relevance.shape[1]:
        raise ValueError(f"k must lie in 1..{relevance.shape[1]}, not {k}.")
    return relevance[:, :k].double().mean(dim=1)


def batch_interpolated_precision(relevance: Tensor, batch: int) -> Tensor:
    """Precision at every rank as released retrieval code has it: interpolated over the first `batch` ranks.

    Definition: `P'(n) = max_{n <= m <= B} P(m)` for n < B, else `P(n)`; B the number of queries evaluated together, a
    slip for the number of ranks. The value for a query depends on how many others stand in its batch: for comparison
    with published tables only, where B is 128 and the last batch is smaller.

    Shapes: r [Q, N] bool, nearest first -> [Q, N] float64. `batch` is B, whatever Q is.

    Source: retrieval_evaluation.py of passalis/pkth and of gsarridis/InDistill (there "interpolated precision").
    """
    precision = relevance.cumsum(dim=1) / _ranks(relevance)
    first = precision[:, :batch]
    precision[:, :batch] = first.flip(1).cummax(dim=1).values.flip(1)
    return precision


def batch_interpolated_average_precision(relevance: Tensor, batch: int) -> Tensor:
    """Average precision as released retrieval code has it: eleven levels of recall, interpolation by batch.

    Definition: `(1 / 11) sum_{l = 0, 0.1, ..., 1} P'(n_l)` with P' of `batch_interpolated_precision` and n_l the first
    of the ranks whose recall is nearest to l. Level 0 is always rank 1.

    Shapes: r [Q, N] bool, nearest first, a relevant item in every row -> [Q] float64 in [0, 1].

    Source: as `batch_interpolated_precision`.
    """
    precision = batch_interpolated_precision(relevance, batch)
    found = relevance.cumsum(dim=1)
    total = found[:, -1:].double()
    levels = torch.arange(_LEVELS, dtype=torch.float64, device=relevance.device) * 0.1
    # Recall takes the values 0, 1 / R, ..., 1: the nearest is the one below a level or the one above.
    below = (levels * total).floor()
    above = (below + 1).minimum(total)
    nearer = (above / total - levels).abs() < (below / total - levels).abs()
    wanted = torch.where(nearer, above, below).long()
    ranks = torch.searchsorted(found, wanted)  # the first rank with so many found
    return precision.gather(1, ranks).mean(dim=1)


def _ranks(relevance: Tensor) -> Tensor:
    return torch.arange(1, relevance.shape[1] + 1, dtype=torch.float64, device=relevance.device)
