"""Targets that peers make of each other's answers, and how much the answers differ."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from attar.functional.logits import full_precision

__all__ = ["peer_attention", "peer_targets", "prediction_diversity"]


def peer_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Weigh for every sample and peer all peers, itself among them: `softmax_b(q_a . k_b)`, not scaled, not masked.

    Shapes: [N, P, D] and [N, P, D] -> [N, P, P], rows sum to one; not symmetric.
    Source: Chen et al., "Online Knowledge Distillation with Diverse Peers", AAAI 2020.
    """
    # Products and sums, since a matrix product would be taken to half precision under autocast.
    energy = (full_precision(queries).unsqueeze(2) * full_precision(keys).unsqueeze(1)).sum(dim=3)
    return torch.softmax(energy, dim=2)


def peer_targets(
    logits: Tensor, attention: Tensor, temperature: float, mixture: Literal["logits", "probabilities"] = "logits"
) -> Tensor:
    """Log-probabilities at temperature T that every peer is to learn, a mixture of all peers' answers of its own.

    Definition: `log softmax(sum_b alpha_ab z_b / T)` for the mixture "logits", `log sum_b alpha_ab softmax(z_b / T)`
    for "probabilities". Nothing is a constant: gradients reach logits and attention.

    Shapes: `logits` [N, P, K], `attention` [N, P, P] -> [N, P, K].
    """
    z = full_precision(logits)
    if mixture == "logits":
        return torch.log_softmax((attention.unsqueeze(3) * z.unsqueeze(1)).sum(dim=2) / temperature, dim=2)
    mixed = (attention.unsqueeze(3) * torch.softmax(z / temperature, dim=2).unsqueeze(1)).sum(dim=2)
    return mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()


def prediction_diversity(logits: Sequence[Tensor]) -> Tensor:
    """How much several networks' predictions differ: the L2 distance of their softmax vectors, a mean over pairs.

    Definition: `2 / (M (M - 1)) sum_{a < b} (1/N) sum_n ||softmax(z_a) - softmax(z_b)||_2`, between 0 (all alike) and
    sqrt(2).

    Shapes: M >= 2 tensors [N, K]; returns a scalar.

    Raises:
        ValueError: fewer than two networks.

    Source: the code of Chen et al., "Online Knowledge Distillation with Diverse Peers", AAAI 2020.
    """
    if len(logits) < 2:
        raise ValueError("Diversity is a matter of two networks or more.")
    predictions = [torch.softmax(full_precision(z), dim=1) for z in logits]
    pairs = itertools.combinations(predictions, 2)
    return torch.stack([torch.linalg.vector_norm(p - q, dim=1).mean() for p, q in pairs]).mean()
