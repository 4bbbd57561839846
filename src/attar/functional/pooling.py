"""Maps brought to a lower resolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["pooled"]


def pooled(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a map averaged to a lower resolution (adaptive average pooling), itself where it has that resolution.

    Shapes: [N, C, H, W] -> [N, C, *size].

    Raises:
        ValueError: a higher resolution is asked for.
    """
    height, width = features.shape[2:]
    if (height, width) == size:
        return features
    if height < size[0] or width < size[1]:
        raise ValueError(f"A map of {height} x {width} is not pooled to {size[0]} x {size[1]}.")
    return F.adaptive_avg_pool2d(features, size)
