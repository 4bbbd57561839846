"""Attention maps: where in the image a feature map has its energy, and losses between such maps."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.functional.logits import full_precision

__all__ = ["MapNorm", "attention_map", "attention_transfer", "flat_map", "resized_map"]

MapNorm = Literal["l2", "softmax", "none"]

# Below this norm a map counts as empty and stays zero: the floor of the published codes.
_FLOOR = 1e-12


def attention_map(features: Tensor, *, power: float = 2, reduce: Literal["sum", "mean", "max"] = "sum") -> Tensor:
    """Reduce a feature map to one spatial map: the energy at every position.

    Definition: `A[n, h, w] = sum_c |F[n, c, h, w]|^p`, or the mean or the maximum over c.

    Shapes: `features` [N, C, H, W]; returns [N, H, W] in at least float32 (squares overflow half precision).

    Args:
        features: F.
        power: p, at least 1.
        reduce: how channels are joined. Sum and mean differ by the factor C, which an L2 normalisation removes and a
            softmax does not.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017.
    """
    features = full_precision(features)
    energy = features.square() if power == 2 else features.abs().pow(power)
    if reduce == "sum":
        return energy.sum(dim=1)
    return energy.mean(dim=1) if reduce == "mean" else energy.amax(dim=1)


def resized_map(maps: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Resize maps [N, H, W] to [N, *size], bilinearly; maps of that size are returned as they are.

    With `align_corners` the corner positions stay where they are, as in Lua Torch; without, as in PyTorch's default,
    pixels are areas and the borders are repeated.
    """
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    resized = F.interpolate(maps.unsqueeze(1), size=size, mode="bilinear", align_corners=align_corners)
    return resized.squeeze(1)


def flat_map(maps: Tensor, norm: MapNorm, *, temperature: float = 1.0) -> Tensor:
    """Normalise each sample's map over its positions and lay it out as a vector.

    Definition, with q the H W entries of one map: "l2" is `q / max(||q||_2, 1e-12)`, "softmax" `softmax(q / T)`,
    "none" q itself. An all-zero map stays zero under "l2" and becomes uniform under "softmax".

    Shapes: [N, H, W] -> [N, H W]; never normalised over the batch.
    """
    flat = full_precision(maps).flatten(1)
    if norm == "l2":
        return F.normalize(flat, dim=1, eps=_FLOOR)
    if norm == "softmax":
        return torch.softmax(flat / temperature, dim=1)
    return flat


def attention_transfer(
    features: Tensor,
    target: Tensor,
    *,
    form: Literal["code", "paper"] = "code",
    power: float = 2,
    reduce: Literal["mean", "max"] = "mean",
    resize: bool = False,
) -> Tensor:
    """Attention transfer (AT) at one level: the distance between two L2-normalised attention maps.

    Definition, with a and t the flattened maps `A / max(||A||_2, 1e-12)` of each sample: form "code" is
    `mean_{n, positions} (a - t)^2`, "paper" `(1/N) sum_n ||a_n - t_n||_2`. The target is a constant: no gradient
    reaches it. Invariant to positive scaling and to the order of channels on either side; "code" lies in
    [0, 2 / (H W)], so its weight depends on the resolution.

    Shapes: `features` [N, C, H, W], `target` [N, C', H, W], C and C' free. Returns a scalar, without unit.

    Args:
        features: what learns.
        target: what is imitated.
        form: the released code's reduction or the printed one.
        power: p of the attention map.
        reduce: how channels are joined; the sum gives the same as the mean, since maps are normalised.
        resize: when sizes differ, average-pool the larger features to the smaller size first.

    Raises:
        ValueError: sizes that differ without `resize`, or other batches.

    Source: Zagoruyko and Komodakis, ICLR 2017; "code" is szagoruyko/attention-transfer's, whose paper norm is not
    squared; resizing follows RepDistiller.
    """
    target = target.detach()
    if resize:
        size = (min(features.shape[2], target.shape[2]), min(features.shape[3], target.shape[3]))
        features, target = _pooled(features, size), _pooled(target, size)
    if features.shape[0] != target.shape[0] or features.shape[2:] != target.shape[2:]:
        raise ValueError(f"Maps of {list(features.shape)} and {list(target.shape)} cannot be compared: resize one.")
    # The mean over channels, since sums of many squares leave less room before float32 overflows.
    a, t = (flat_map(attention_map(f, power=power, reduce=reduce), "l2") for f in (features, target))
    if form == "paper":
        distances: Tensor = torch.linalg.vector_norm(a - t, dim=1)
        return distances.mean()
    return (a - t).square().mean()


def _pooled(features: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(features.shape[2:]) == size:
        return features
    pooled: Tensor = F.adaptive_avg_pool2d(full_precision(features), size)
    return pooled
