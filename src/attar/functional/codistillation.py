"""What replicas tell each other, and how much two trainings of one network disagree."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attar.functional.logits import full_precision, kl_divergence

__all__ = ["Psi", "codistillation_loss", "prediction_churn"]

Psi = Literal["kl", "cross_entropy", "reverse_kl"]


def codistillation_loss(logits: Tensor, target_log_probs: Tensor, psi: Psi = "kl") -> Tensor:
    """How far a prediction is from a constant target, with `p = softmax(z)` and the target q.

    Definition, a mean over n of
        "kl":            sum_c q_nc (log q_nc - log p_nc)
        "cross_entropy": -sum_c q_nc log p_nc, which has the gradient of "kl"
        "reverse_kl":    sum_c p_nc (log p_nc - log q_nc)

    Shapes: `logits` and `target_log_probs` [N, C]; returns a scalar in nats. No gradient reaches the target.
    """
    if psi == "kl":
        return kl_divergence(logits, target_log_probs=target_log_probs)
    log_p, log_q = torch.log_softmax(full_precision(logits), dim=1), full_precision(target_log_probs.detach())
    if psi == "cross_entropy":
        return -(log_q.exp() * log_p).sum(dim=1).mean()
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()


def prediction_churn(logits: Tensor, other_logits: Tensor) -> Tensor:
    """How much two trainings of one network disagree: the mean L1 distance of their probabilities, 0 to 2.

    Definition: `(1/N) sum_n sum_c |softmax(z)_nc - softmax(z')_nc|`; of two classes twice the mean absolute difference.

    Shapes: [N, C] and [N, C]; returns a scalar.
    """
    p, q = (torch.softmax(full_precision(z), dim=1) for z in (logits, other_logits))
    return (p - q).abs().sum(dim=1).mean()
