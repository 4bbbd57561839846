"""What MEAL compares and judges: maps as vectors of any length, gradients reversed, a judge's mistakes."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.functional.logits import full_precision

__all__ = ["activation_bins", "discriminator_loss", "reverse_gradient"]


def activation_bins(features: Tensor, bins: int, pooling: Literal["avg", "max"] = "avg") -> Tensor:
    """Reduce a feature map of any channels and size to a vector: its activation along the positions, resampled.

    Definition: adaptive pooling of each channel's H W positions, row by row, to `bins` values, then the mean (the
    maximum) over channels. More bins than positions repeat values. Invariant to the order of channels.

    Shapes: `features` [N, C, H, W] -> [N, bins] in at least float32, in the map's unit.

    Source: Shen, He, Xue, "MEAL", AAAI 2019, as released. Here channels are joined first, which is the same and keeps
    C times less.
    """
    features = full_precision(features)
    if pooling == "max":
        largest: Tensor = F.adaptive_max_pool1d(features.amax(dim=1).flatten(1), bins)
        return largest
    averages: Tensor = F.adaptive_avg_pool1d(features.mean(dim=1).flatten(1), bins)
    return averages


def reverse_gradient(x: Tensor) -> Tensor:
    """Return x; its gradient changes sign on the way back (Ganin and Lempitsky, ICML 2015)."""
    return 2 * x.detach() - x


def discriminator_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Binary cross-entropy of a judge that should answer (1, 0) for the student and (0, 1) for the teacher.

    Definition: with s the logistic function, `-(1 / 4N) sum_n log s(a_n0) + log s(-a_n1) + log s(-b_n0) + log s(b_n1)`;
    ln 2 for a judge that cannot tell.

    Shapes: logits a and b [N, 2]. Returns a scalar in nats.
    """
    a, b = full_precision(student), full_precision(teacher)
    right = torch.stack([a[:, 0], -a[:, 1], -b[:, 0], b[:, 1]])
    return -F.logsigmoid(right).mean()
