"""Losses between logits: Kullback-Leibler divergences at a temperature and gated ensembles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ensemble_log_probs", "full_precision", "gated_logits", "kl_divergence", "masked_mean", "sigmoid_ramp"]


def full_precision(x: Tensor) -> Tensor:
    """Return `x` in at least float32: half and bfloat16 are cast, float32 and float64 pass through."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def kl_divergence(
    logits: Tensor,
    target_logits: Tensor | None = None,
    temperature: float = 1.0,
    *,
    target_log_probs: Tensor | None = None,
    shift: float = 0.0,
    squared_temperature: bool = True,
    constant_target: bool = True,
    valid: Tensor | None = None,
) -> Tensor:
    """Distillation's soft-label loss: the KL divergence from the target to the prediction, both at temperature T.

    Definition: `T^2 (1/N) sum_n sum_c t_nc (log t_nc - log softmax(z_n / T)_c)` with `t = softmax(target / T)`.
    The target is a constant, and no gradient reaches it, unless `constant_target` is switched off.

    Shapes: `logits` and the target [N, C] or [N, C, ...]; with further axes the mean runs over all of them too, or over
    those that `valid` [N, ...] marks.
    Returns a scalar in nats.

    Args:
        logits: the prediction z.
        target_logits: the target before its softmax; or give `target_log_probs` instead.
        temperature: T > 0.
        target_log_probs: log t, already at temperature T (an ensemble of teachers has no logits of its own).
        shift: added to every entry of t before its logarithm and not renormalised; ONE's code uses 1e-7.
        squared_temperature: False leaves out the factor T^2.
        valid: which answers count, of the shape of `logits` without C; default: all of them. Where none does the loss
            is 0.
        constant_target: False lets the target learn too, for targets that are made to be learnt (OKDDip's attention).

    Raises:
        ValueError: both targets or none given, or shapes that differ (which would broadcast silently).

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. The batch mean, not the mean
    over classes that some code bases take, so that a weight means the same for any number of classes.
    """
    if (target_logits is None) == (target_log_probs is None):
        raise ValueError("Give exactly one of target_logits and target_log_probs.")
    log_p = torch.log_softmax(full_precision(logits) / temperature, dim=1)
    if target_log_probs is None:
        assert target_logits is not None
        log_t = torch.log_softmax(full_precision(target_logits) / temperature, dim=1)
    else:
        log_t = full_precision(target_log_probs)
    if constant_target:
        log_t = log_t.detach()
    if log_t.shape != log_p.shape:
        raise ValueError(f"Prediction {list(log_p.shape)} and target {list(log_t.shape)} must have one shape.")
    t = log_t.exp()
    if shift:
        t = t + shift
        log_t = t.log()
    factor = temperature**2 if squared_temperature else 1.0
    if valid is not None:
        return factor * masked_mean((t * (log_t - log_p)).sum(dim=1), valid)
    rows = log_p.numel() // log_p.shape[1]
    return (t * (log_t - log_p)).sum() * (factor / rows)


def masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean of the values [N, ...] that a mask of their shape marks, all without one; 0 where none is."""
    if valid is None:
        return values.mean()
    return values.where(valid, 0.0).sum() / valid.sum().clamp(min=1)


def ensemble_log_probs(logits: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """Log of the mean of several networks' probabilities at temperature T.

    Definition: `log (1/M) sum_m softmax(z_m / T)`; probabilities are averaged, not logits.

    Shapes: M tensors [N, C] (or [N, C, ...]) of one shape; returns that shape, in nats.
    """
    stacked = torch.stack([torch.log_softmax(full_precision(z) / temperature, dim=1) for z in logits])
    return torch.logsumexp(stacked, dim=0) - math.log(len(logits))


def gated_logits(logits: Sequence[Tensor], gate: Tensor) -> Tensor:
    """Mix branch logits with one weight per sample and branch: `z_e[n] = sum_b g[n, b] z_b[n]`.

    Shapes: B tensors [N, C] (or [N, C, ...]) and a gate [N, B] whose rows sum to one; returns the tensors' shape.
    Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018.
    """
    stacked = torch.stack([full_precision(z) for z in logits], dim=1)
    if gate.shape != stacked.shape[:2]:
        raise ValueError(f"The gate {list(gate.shape)} must be [N, B] = {list(stacked.shape[:2])}.")
    weights = full_precision(gate).view(*gate.shape, *[1] * (stacked.ndim - 2))
    return (weights * stacked).sum(dim=1)


def sigmoid_ramp(progress: Tensor, length: float) -> Tensor:
    """Ramp a weight up from exp(-5) to 1: `exp(-5 (1 - min(progress, length) / length)^2)`.

    Shapes: `progress` a scalar tensor in [0, 1], the fraction of the run that is done; `length` the fraction at which
    the ramp ends (0: always 1). Source: Laine and Aila, "Temporal Ensembling", ICLR 2017, as ONE's code uses it.
    """
    if length <= 0:
        return torch.ones_like(progress)
    return torch.exp(-5.0 * (1.0 - progress.clamp(max=length) / length) ** 2)
