"""The optimiser, and its learning rate as a pure function of the step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from attar.distiller import Distiller
from attar.method import Method
from attar.spec import TrainSpec

__all__ = ["Schedule", "make_optimizer", "make_schedule"]


def make_optimizer(spec: TrainSpec, distiller: Distiller) -> torch.optim.Optimizer:
    """Return SGD or AdamW over student and auxiliaries.

    SGD decays every parameter, as the papers' code does; AdamW decays neither vectors (biases, norms) nor what the
    student exempts by timm's `no_weight_decay`. Auxiliaries whose method scales their rate (`Method.lr_scale`) follow
    the schedule of the student by that factor.
    """
    if spec.optimizer == "sgd":
        parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
        nesterov = spec.nesterov and spec.momentum > 0
        sgd = torch.optim.SGD(
            _by_rate([{"params": parameters}], distiller),
            lr=spec.lr,
            momentum=spec.momentum,
            weight_decay=spec.weight_decay,
            nesterov=nesterov,
            fused=True,
        )
        if spec.momentum > 0 and distiller.phases:
            # Fused SGD refuses parameters whose first gradient comes after the others'; a momentum of 0 is what it
            # would begin with anyway.
            for parameter in parameters:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    groups = param_groups_weight_decay(distiller, spec.weight_decay, no_weight_decay_list=_exempt(distiller.student))
    return torch.optim.AdamW(_by_rate(groups, distiller), lr=spec.lr, weight_decay=spec.weight_decay, fused=True)


def _by_rate(groups: list[dict[str, Any]], distiller: Distiller) -> list[dict[str, Any]]:
    """Take the parameters with a rate of their own out into groups that carry timm's `lr_scale`."""
    scales: dict[int, float] = {}
    for method in distiller.methods.values():
        assert isinstance(method, Method)
        scales |= {id(parameter): method.lr_scale(name) for name, parameter in method.named_parameters()}
    shared, own = [], []
    for group in groups:
        by_scale: dict[float, list[nn.Parameter]] = {1.0: []}
        for parameter in group["params"]:
            by_scale.setdefault(scales.get(id(parameter), 1.0), []).append(parameter)
        shared.append({**group, "params": by_scale.pop(1.0)})
        own += [{**group, "params": params, "lr_scale": scale} for scale, params in by_scale.items()]
    return [*shared, *own]


def _exempt(student: nn.Module) -> set[str]:
    exempt = getattr(student, "no_weight_decay", None)
    return {f"student.{name}" for name in exempt()} if callable(exempt) else set()


class Schedule:
    """Sets the learning rate of any step, whatever came before.

    Args:
        stretches: what sets the rate from which step (0-based) on, each counting from there.
    """

    def __init__(self, stretches: Sequence[tuple[int, Scheduler]]) -> None:
        self._starts, self._parts = zip(*stretches, strict=True)

    def step_update(self, step: int) -> None:
        """Set the rate of a step (0-based)."""
        place = bisect_right(self._starts, step) - 1
        self._parts[place].step_update(step - self._starts[place])


def make_schedule(
    spec: TrainSpec, optimizer: torch.optim.Optimizer, total_steps: int, starts: Sequence[int] = (0,)
) -> Schedule:
    """Return the schedule of a run that begins it at `starts` (steps, the first one 0) and goes through it each time.

    Definition: over the first `warmup` share of a stretch lr (t + 1) / (W + 1); then `cosine` falls to 0 over the rest,
    `step` multiplies by `gamma` at every milestone's share of the whole stretch, `constant` stays.
    """
    ends = [*starts[1:], total_steps]
    return Schedule([(start, _stretch(spec, optimizer, end - start)) for start, end in zip(starts, ends, strict=True)])


def _stretch(spec: TrainSpec, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
    warmup = round(spec.warmup * steps)
    common = {"warmup_t": warmup, "warmup_lr_init": spec.lr / (warmup + 1), "t_in_epochs": False}
    if spec.schedule == "cosine":
        return CosineLRScheduler(optimizer, t_initial=max(steps - warmup, 1), warmup_prefix=True, **common)
    milestones = sorted(spec.milestones) if spec.schedule == "step" else []
    # timm applies a milestone one update early; the rate falls at the step that the share names.
    falls = [round(share * steps) + 1 for share in milestones]
    return MultiStepLRScheduler(optimizer, decay_t=falls, decay_rate=spec.gamma, warmup_prefix=False, **common)
