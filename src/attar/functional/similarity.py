"""How alike the samples of a batch are to a layer, and the distance between what two layers say about it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.functional.logits import full_precision
from attar.functional.world import gathered

__all__ = ["Scope", "batch_similarity", "similarity_distance"]

Scope = Literal["rank", "world"]


def batch_similarity(features: Tensor, *, scope: Scope = "rank") -> Tensor:
    """Return the row-normalised matrix of inner products between the samples of a batch.

    Definition, with q_i the flattened features of sample i: `G_ij = q_i . q_j`, then `G_i / max(||G_i||_2, 1e-12)`.
    Samples are not normalised themselves; rows of the result are, so it is not symmetric. It is unchanged by any
    rotation of the feature space and by one positive factor for all samples.

    Shapes: [B, ...] -> [B, B], in at least float32 whatever autocast says (sums of products over whole maps overflow
    half precision). With scope "world" B counts the samples of all processes, and every process holds all of G.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019.
    """
    flat = features.flatten(1)
    if scope == "world":
        flat = gathered(flat)
    flat = full_precision(flat)
    with torch.autocast(flat.device.type, enabled=False):
        return F.normalize(flat @ flat.T, dim=1, eps=1e-12)


def similarity_distance(similarity: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference of two similarity matrices: `(1 / B^2) ||G - T||_F^2`.

    The target is a constant: no gradient reaches it. Rows are unit vectors, so the distance lies in [0, 4 / B], and in
    [0, 2 / B] where no inner product is negative.

    Shapes: [B, B] both; returns a scalar, without unit.

    Raises:
        ValueError: matrices of different batches.
    """
    if similarity.shape != target.shape:
        raise ValueError(f"Similarities of {len(similarity)} and {len(target)} samples cannot be compared.")
    return (similarity - target.detach()).square().mean()
