"""Samples of a batch that lie next to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from attar.functional.logits import full_precision

__all__ = ["nearest", "squared_distances"]


def squared_distances(points: Tensor, others: Tensor) -> Tensor:
    """Squared Euclidean distances between samples.

    Definition: `d_ij = ||r_i - r'_j||^2`, in at least float32 (squares of logits overflow half precision) and from the
    differences instead of inner products, so that equal samples are at distance 0 exactly.

    Shapes: r [N, D], r' [M, D] -> [N, M].
    """
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(full_precision(points), full_precision(others), compute_mode=exact).square()


def nearest(distances: Tensor, allowed: Tensor, k: int) -> Tensor:
    """The k nearest of those allowed, for every sample; fewer where fewer are allowed.

    Definition: `S_i`, the k smallest `d_ij` with `allowed_ij`, ties in favour of the lower j.

    Shapes: distances [N, M], allowed [N, M] bool -> membership [N, M] bool, at most k true a row.
    """
    far = torch.where(allowed, distances, torch.inf)
    # A stable sort settles ties by number, which top-k does not.
    order = torch.sort(far, dim=1, stable=True).indices[:, :k]
    members = torch.zeros_like(allowed).scatter(1, order, torch.ones_like(order, dtype=torch.bool))
    return members & allowed
