"""Sparse codes over a dictionary of atoms: similarities, the strongest of them, and how many atoms are in use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.functional.logits import full_precision

__all__ = ["atom_usage", "decoded", "similarities", "sparsified"]


def similarities(features: Tensor, centers: Tensor, intercept: Tensor) -> Tensor:
    """Return how alike the features at every pixel are to every atom, before the sigmoid.

    Definition: `<x, v_m> + c` for atoms v_m, the columns of `centers`, and one intercept c.

    Shapes: features [N, D, H, W], centers [D, M], intercept [1]; returns [N, M, H, W] in at least float32, whatever
    autocast says: rounded similarities would be equal where their order is what counts.
    """
    features, centers = full_precision(features), full_precision(centers)
    with torch.autocast(features.device.type, enabled=False):
        return F.conv2d(features, centers.T[:, :, None, None]) + full_precision(intercept)


def sparsified(codes: Tensor, k: int) -> Tensor:
    """Return codes of which every pixel keeps those that are at least its k-th largest; the others are 0.

    Ties with the k-th keep more than k. What is kept is not renormalised, and only it has a gradient.

    Shapes: [N, M, H, W] -> the same, 1 <= k <= M.
    """
    threshold = torch.topk(codes.detach(), k, dim=1).values[:, -1:]
    return torch.where(codes >= threshold, codes, torch.zeros_like(codes))


def decoded(codes: Tensor, centers: Tensor) -> Tensor:
    """Return the features that codes stand for: `x_hat = sum_m s_m v_m`.

    Shapes: codes [N, M, H, W], centers [D, M]; returns [N, D, H, W].
    """
    with torch.autocast(codes.device.type, enabled=False):
        return F.conv2d(codes, full_precision(centers)[:, :, None, None])


def atom_usage(labels: Tensor, atoms: int) -> Tensor:
    """Return the entropy of how often each atom is a pixel's strongest: `-sum_m f_m log f_m`, f_m its frequency.

    0 where one atom answers for every pixel (a collapsed dictionary), log M where all M are used alike.

    Shapes: labels of any shape, integers below `atoms`; returns a scalar in nats.
    """
    frequencies = torch.bincount(labels.flatten(), minlength=atoms).double() / labels.numel()
    entropy: Tensor = torch.special.entr(frequencies).sum()
    return entropy
