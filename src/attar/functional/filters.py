"""Which channels of a convolution matter, by the weights of their filters."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["filter_norms", "strongest"]


def filter_norms(weight: Tensor, p: float = 1.0) -> Tensor:
    """Return the norm of every filter of a convolution: `(sum |W[k]|^p)^(1/p)`.

    Norms compare the filters of one layer only.

    Shapes: [C, ...] -> [C]. Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (p = 1).
    """
    norms: Tensor = torch.linalg.vector_norm(weight.flatten(1), p, dim=1)
    return norms


def strongest(scores: Tensor, keep: int) -> Tensor:
    """Return the indices of the `keep` largest scores, in their original order.

    Shapes: [C] -> [keep], int64. Raises ValueError for more than there are.
    """
    if not 0 < keep <= len(scores):
        raise ValueError(f"{keep} of {len(scores)} channels cannot be kept.")
    return torch.topk(scores, keep).indices.sort().values
