"""Maps brought to a lower resolution, or to their average."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["average_pool", "pooled"]


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


def average_pool(features: Tensor, keepdim: bool = False) -> Tensor:
    """Average a map over its positions, with a gradient that lies in memory as the map does.

    Definition: `v_nc = 1 / (H W) sum_hw f_nchw`.

    Shapes: f [N, C, H, W] -> v [N, C], with `keepdim` [N, C, 1, 1].

    The gradient of `f.mean(dim=(2, 3))` is contiguous whatever f is, and what it then meets behind a channels-last map
    (the ReLU before the pool, sums with other gradients) runs ten times slower on a CPU for the mixture.
    """
    if features.is_contiguous(memory_format=torch.channels_last):
        averaged = features.movedim(1, -1).mean(dim=(1, 2), keepdim=keepdim)
        return averaged.movedim(-1, 1) if keepdim else averaged
    return features.mean(dim=(2, 3), keepdim=keepdim)
