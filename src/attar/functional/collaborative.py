"""Networks that teach each other: targets made of the others' logits, and divergences between all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from attar.functional.logits import ensemble_log_probs, full_precision, kl_divergence

__all__ = [
    "CollaborativeTarget",
    "MutualTarget",
    "collaborative_target",
    "error_covariance",
    "general_target",
    "general_weights",
    "linear_weights",
    "mutual_divergences",
]

MutualTarget = Literal["each", "probabilities", "logits"]
CollaborativeTarget = Literal["naive", "linear", "minlogit"]

# `linear_weights`: Newton steps, candidates of each line search, and the barrier's fall from step to step.
_STEPS, _HALVINGS, _BARRIER = 24, 8, 0.4


def mutual_divergences(
    logits: Sequence[Tensor],
    temperature: float = 1.0,
    *,
    target: MutualTarget = "each",
    reduction: Literal["mean", "sum"] = "mean",
    shift: float = 0.0,
    constant: bool = True,
    valid: Tensor | None = None,
) -> list[Tensor]:
    """What every network of a group still has to learn of the others: KL from their predictions to its own.

    Definition, with `p_k = softmax(z_k / T)` and M networks:
        "each":          d_k = T^2 (1/(M-1)) sum_{l != k} KL(p_l || p_k), or the sum without 1/(M-1)
        "probabilities": d_k = T^2 KL( (1/(M-1)) sum_{l != k} p_l || p_k )
        "logits":        d_k = T^2 KL( softmax((1/(M-1)) sum_{l != k} z_l / T) || p_k )
    with `KL(q || p) = (1/N) sum_n sum_c q_nc (log q_nc - log p_nc)`.

    Shapes: M tensors of one shape, [N, C] or [N, C, ...], whose mean then runs over all further axes too, or over what
    `valid` [N, ...] marks; returns M scalars in nats. One network alone has nothing to learn: 0.

    Args:
        logits: z_1 ... z_M.
        temperature: T > 0.
        target: what the others are to a network.
        reduction: of "each" over the others.
        shift: added to every target probability before its logarithm and not renormalised; OKDDip's code uses 1e-7.
        constant: no gradient reaches the network that a target is taken from. False moves both.
        valid: which answers count; default: all of them.

    Source: Zhang et al., "Deep Mutual Learning", CVPR 2018 ("each", and "probabilities" as its DML_e); "logits" is the
    re-implementation in DefangChen/OKDDip-AAAI2020.
    """
    predictions = [full_precision(z) for z in logits]
    if len(predictions) == 1:
        return [predictions[0].sum() * 0.0]
    divergences = []
    for own, prediction in enumerate(predictions):
        others = predictions[:own] + predictions[own + 1 :]
        if target == "each":
            targets = [torch.log_softmax(z / temperature, dim=1) for z in others]
        elif target == "probabilities":
            targets = [ensemble_log_probs(others, temperature)]
        else:
            targets = [torch.log_softmax(torch.stack(others).mean(dim=0) / temperature, dim=1)]
        each = torch.stack(
            [
                kl_divergence(
                    prediction,
                    temperature=temperature,
                    target_log_probs=log_t,
                    shift=shift,
                    constant_target=constant,
                    valid=valid,
                )
                for log_t in targets
            ]
        )
        divergences.append(each.sum() if reduction == "sum" else each.mean())
    return divergences


def collaborative_target(logits: Sequence[Tensor], labels: Tensor, rule: CollaborativeTarget = "minlogit") -> Tensor:
    """The logits of a target that is at least as good on every sample as the best of several networks.

    Definition, with `u_i = z_i - z_i[y]`, so that `CE(z_i, y) = log sum_j exp u_ij`:
        "naive":    u_k of the network with the smallest cross-entropy
        "linear":   sum_i a_i u_i with the weights that minimise its cross-entropy (`linear_weights`)
        "minlogit": min_i u_ij for every class j
    so that on every sample CE(minlogit) <= CE(linear) <= CE(naive) = min_i CE(z_i).

    Shapes: M tensors [N, C] and class indices [N]; returns [N, C], whose entry at the label is 0. A constant.

    Source: Guo et al., "Online Knowledge Distillation via Collaborative Learning", CVPR 2020.
    """
    u = _margins(logits, labels)
    if rule == "minlogit":
        return u.amin(dim=0)
    if rule == "linear":
        return (linear_weights(logits, labels).t().unsqueeze(2) * u).sum(dim=0)
    best = torch.logsumexp(u, dim=2).argmin(dim=0)
    return u.gather(0, best.view(1, -1, 1).expand(1, -1, u.shape[2])).squeeze(0)


def _margins(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """[M, N, C]: every network's logits minus its own logit of the true class."""
    z = torch.stack([full_precision(each.detach()) for each in logits])
    return z - z.gather(2, labels.view(1, -1, 1).expand(len(z), -1, 1))


def linear_weights(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The mixture of several networks' logits that has the smallest cross-entropy, sample by sample.

    Definition: `argmin_a CE(sum_i a_i z_i, y)` over `a_i >= 0, sum_i a_i = 1`, a convex problem.

    A fixed number of Newton steps with a logarithmic barrier that falls to nothing, each with the best of several step
    lengths, so that no decision waits for the device; in float64 where there is one. What is found is compared with
    every network alone, so that it is never worse than the best. In trials of 2 to 5 networks with logits of any
    scale the cross-entropy exceeded the smallest by at most 1e-5 of the range of the logits.

    Shapes: M tensors [N, C] and class indices [N]; returns [N, M], rows sum to one. A constant.

    Source: Guo et al., "Online Knowledge Distillation via Collaborative Learning", CVPR 2020, which names no solver.
    """
    margins = _margins(logits, labels)
    count = len(margins)
    u = margins.transpose(0, 1)  # [N, M, C]
    if u.device.type != "mps":
        u = u.double()
    spread = (u.amax(dim=(1, 2)) - u.amin(dim=(1, 2))).clamp_min(1e-3)
    halvings = torch.tensor([0.5**k for k in range(_HALVINGS)], dtype=u.dtype, device=u.device).view(1, -1, 1)
    eye = torch.eye(count, dtype=u.dtype, device=u.device)
    a = torch.full_like(u[:, :, 0], 1.0 / count)
    for step in range(_STEPS):
        barrier = max(0.1 * _BARRIER**step, 1e-8) * spread  # [N]
        p = torch.softmax(_mixed(a.unsqueeze(1), u).squeeze(1), dim=1)
        slope = (u * p.unsqueeze(1)).sum(dim=2)
        # Newton's equation for relative changes d = da / a, under sum_i a_i d_i = 0.
        centred = a.unsqueeze(2) * (u - slope.unsqueeze(2))
        curvature = (centred * p.unsqueeze(1)) @ centred.transpose(1, 2) + barrier.view(-1, 1, 1) * eye
        both, _ = torch.linalg.solve_ex(curvature, torch.stack([a, a * slope - barrier.unsqueeze(1)], dim=2))
        along, down = both.unbind(dim=2)
        multiplier = (a * down).sum(dim=1) / (a * along).sum(dim=1)
        d = multiplier.unsqueeze(1) * along - down
        longest = (0.95 / (-d).amax(dim=1).clamp_min(1e-30)).clamp_max(1.0)
        tried = a.unsqueeze(1) * (1.0 + longest.view(-1, 1, 1) * halvings * d.unsqueeze(1))  # [N, S, M]
        tried = tried / tried.sum(dim=2, keepdim=True)
        height = torch.logsumexp(_mixed(tried, u), dim=2) - barrier.unsqueeze(1) * tried.log().sum(dim=2)
        a = tried.gather(1, height.argmin(dim=1).view(-1, 1, 1).expand(-1, 1, count)).squeeze(1)
    alone, best = torch.logsumexp(u, dim=2).min(dim=1)
    together = torch.logsumexp(_mixed(a.unsqueeze(1), u).squeeze(1), dim=1)
    return torch.where((together < alone).unsqueeze(1), a, eye[best]).to(margins.dtype)


def _mixed(a: Tensor, u: Tensor) -> Tensor:
    """[N, S, M] mixtures of [N, M, C] -> [N, S, C]."""
    return a @ u


def error_covariance(probabilities: Sequence[Tensor], labels: Tensor) -> Tensor:
    """How far several networks are from the labels, and how much together.

    Definition: `C_ij = (1/N) sum_n <f_i(x_n) - t_n, f_j(x_n) - t_n>` with one-hot labels t.

    Shapes: M tensors [N, C] of probabilities on samples that were not trained on, class indices [N]; returns [M, M].
    """
    f = torch.stack([full_precision(p.detach()) for p in probabilities])
    errors = f - torch.nn.functional.one_hot(labels, f.shape[2]).to(f.dtype)
    return torch.einsum("inc,jnc->ij", errors, errors) / f.shape[1]


def general_weights(covariance: Tensor, ridge: float = 0.0) -> Tensor:
    """The mixture of several networks with the smallest squared error: KDCL-General's weights.

    Definition: `w = C^-1 1 / (1^T C^-1 1)`, the minimiser of `w^T C w` with `sum w = 1`; entries may be negative.

    Shapes: `covariance` [M, M] (`error_covariance`), returns [M].

    Args:
        covariance: C.
        ridge: added to C's diagonal as a share of its mean, for networks that nearly agree.

    Source: Guo et al., "Online Knowledge Distillation via Collaborative Learning", CVPR 2020.
    """
    one = covariance.new_ones(len(covariance))
    damped = covariance + ridge * covariance.diagonal().mean() * torch.diag(one)
    solved, _ = torch.linalg.solve_ex(damped, one)
    weights: Tensor = solved / solved.sum()
    return weights


def general_target(probabilities: Sequence[Tensor], weights: Tensor) -> Tensor:
    """KDCL-General's target: `sum_i w_i f_i`, negative entries set to 0 and the rest made to sum to one.

    Shapes: M tensors [N, C] of probabilities and [M] weights; returns [N, C]. A constant.

    Probabilities are mixed because the weights are made for probabilities; the paper's choice is unknown, and so is
    what it does with negative entries.
    """
    f = torch.stack([full_precision(p.detach()) for p in probabilities])
    mixed = torch.einsum("m,mnc->nc", weights.to(f.dtype), f).clamp_min(0.0)
    return mixed / mixed.sum(dim=1, keepdim=True)
