"""Probabilistic knowledge transfer: who is whose neighbour in a batch, as conditional probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from attar.functional.logits import full_precision
from attar.functional.similarity import Scope
from attar.functional.world import gathered

__all__ = [
    "Divergence",
    "Kernel",
    "Reduction",
    "neighbour_divergence",
    "neighbour_log_probs",
    "probabilistic_transfer",
    "same_class_log_probs",
]

Kernel = Literal["cosine", "student-t", "rbf", "adaptive-rbf", "cauchy"]
Divergence = Literal["kl", "jeffreys", "abs", "squared"]
Reduction = Literal["official", "batchmean"]

# Opposite features have a cosine kernel of 0, which has no logarithm.
_FLOOR = 1e-12
# Within the root of the distances, whose derivative is infinite at 0.
_UNDER_ROOT = 1e-6


def neighbour_log_probs(
    features: Tensor, kernel: Kernel = "cosine", *, eps: float = 1e-7, sigma: float = 1.0, scope: Scope = "rank"
) -> Tensor:
    """Return the logarithm of how likely every sample of a batch is the neighbour of every other.

    Definition: `P_ij = K_ij / sum_k K_ik`, the diagonal included, with features f, `u = f / (||f|| + eps)` and
    `D_ij = sqrt(||f_i - f_j||^2 + 1e-6)`:
        "cosine"        K = (u_i . u_j + 1) / 2
        "student-t"     K = 1 / (1 + D)
        "rbf"           K = exp(-D / sigma)
        "adaptive-rbf"  the same with sigma = mean D, a constant
        "cauchy"        K = 1 / (1 + D^2 / sigma^2)
    Cosine is unchanged by a positive factor for any sample (but for eps); the others see lengths.

    Shapes: [N, ...] -> [N, N], rows are distributions; in at least float32 whatever autocast says. With scope "world"
    N counts the samples of all processes, and every process holds all of P.

    Source: Passalis and Tefas, ECCV 2018 ("cosine"); the others are passalis/pkth's.
    """
    flat = features.flatten(1)
    if scope == "world":
        flat = gathered(flat)
    flat = full_precision(flat)
    with torch.autocast(flat.device.type, enabled=False):
        if kernel == "cosine":
            unit = flat / (torch.linalg.vector_norm(flat, dim=1, keepdim=True) + eps)
            logs = ((unit @ unit.T + 1) / 2).clamp_min(_FLOOR).log()
        else:
            distances = _distances(flat)
            if kernel == "student-t":
                logs = -torch.log1p(distances)
            elif kernel == "cauchy":
                logs = -torch.log1p((distances / sigma).square())
            else:
                logs = -distances / (distances.mean().detach() if kernel == "adaptive-rbf" else sigma)
        return torch.log_softmax(logs, dim=1)


def _distances(flat: Tensor) -> Tensor:
    squares = flat.square().sum(dim=1)
    squared = (squares[:, None] + squares[None, :] - 2 * flat @ flat.T).clamp_min(0)
    # In float32 these differences leave a remainder on the diagonal, which is 0.
    itself = torch.eye(len(flat), dtype=torch.bool, device=flat.device)
    return (squared.masked_fill(itself, 0.0) + _UNDER_ROOT).sqrt()


def same_class_log_probs(labels: Tensor, *, scope: Scope = "rank") -> Tensor:
    """Return the logarithm of the neighbours by class: every sample of the own class is equally likely.

    Shapes: [N] class indices -> [N, N] in float32, -inf between classes; the sample itself is one of its class.
    """
    if scope == "world":
        labels = gathered(labels)
    same = (labels[:, None] == labels[None, :]).float()
    return (same / same.sum(dim=1, keepdim=True)).log()


def neighbour_divergence(
    log_probs: Tensor,
    target: Tensor,
    divergence: Divergence = "kl",
    *,
    eps: float = 1e-7,
    reduction: Reduction = "official",
) -> Tensor:
    """Return how far the neighbours of one side are from those of another, which is a constant.

    Definition, over entries ij with P of `log_probs` and T of the target:
        "kl"        T log((T + eps) / (P + eps))
        "jeffreys"  (T - P) (log T - log P)
        "abs"       |T - P|
        "squared"   (T - P)^2
    Reduction "official" is the mean over all N^2 entries, "batchmean" the mean over rows of their sum: N times that.

    Shapes: [N, N] both; returns a scalar, in nats for "kl" and "jeffreys".

    Raises:
        ValueError: matrices of different batches.
    """
    if log_probs.shape != target.shape:
        raise ValueError(f"Neighbours of {len(log_probs)} and {len(target)} samples cannot be compared.")
    target = target.detach().to(log_probs.dtype)
    p, t = log_probs.exp(), target.exp()
    if divergence == "kl":
        entries = t * ((t + eps).log() - (p + eps).log())
    elif divergence == "jeffreys":
        entries = (t - p) * (target - log_probs)
    else:
        entries = (t - p).abs() if divergence == "abs" else (t - p).square()
    return entries.mean() if reduction == "official" else entries.sum() / len(entries)


def probabilistic_transfer(
    features: Tensor,
    target: Tensor,
    *,
    kernels: Sequence[Kernel] = ("cosine",),
    divergence: Divergence = "kl",
    eps: float = 1e-7,
    sigma: float = 1.0,
    reduction: Reduction = "official",
    scope: Scope = "rank",
) -> Tensor:
    """Probabilistic knowledge transfer (PKT): the student's samples get the neighbours that the teacher's have.

    Definition: the sum over kernels of `neighbour_divergence` between `neighbour_log_probs` of both sides. The base
    form is the default; the "combined" form of passalis/pkth and InDistill has the kernels "cosine" and "student-t",
    divergence "jeffreys" and eps 1e-6. The target is a constant: no gradient reaches it.

    Shapes: features [N, ...] and target [N, ...], flattened, of any widths; returns a scalar, in nats.

    Source: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018.
    """
    target = target.detach()
    parts = []
    for kernel in kernels:
        own, other = (neighbour_log_probs(f, kernel, eps=eps, sigma=sigma, scope=scope) for f in (features, target))
        parts.append(neighbour_divergence(own, other, divergence, eps=eps, reduction=reduction))
    return torch.stack(parts).sum()
