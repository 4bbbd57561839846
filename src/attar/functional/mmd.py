"""Maximum mean discrepancy: how far the distributions of two batches of features lie apart."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from attar.functional.logits import full_precision
from attar.functional.world import gathered

__all__ = ["linear_mmd"]


def linear_mmd(a: Tensor, b: Tensor, *, scope: Literal["rank", "world"] = "world", per_channel: bool = True) -> Tensor:
    """The squared maximum mean discrepancy under the linear kernel: the squared distance of two batches' mean vectors.

    Definition: `|| (1/N) sum_n a_n - (1/N) sum_n b_n ||_2^2`, summed over channels. It compares distributions: the
    order of samples inside a batch does not matter, nor does a vector added to both. Gradients flow to both sides.

    Shapes: a and b [N, D]; returns a scalar in squared units of the features.

    Args:
        a: features of one batch.
        b: features of the other.
        scope: "world" takes the means over the batches of all processes, "rank" over this process's own.
        per_channel: False averages over channels too before the squaring, as winycg/Self-KD-Lib does: means that
            differ in opposite directions then cancel.

    Raises:
        ValueError: shapes that are not one [N, D].

    Source: Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, with k(x, y) = x^T y.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"Features {list(a.shape)} and {list(b.shape)} must have one shape [N, D].")
    difference = full_precision(a).mean(dim=0) - full_precision(b).mean(dim=0)
    if scope == "world":
        difference = gathered(difference.unsqueeze(0)).mean(dim=0)
    return difference.square().sum() if per_channel else difference.mean().square()
