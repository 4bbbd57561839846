"""What a training step costs beside a plain one, measured in one process."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from typing import cast

import torch

from attar.data import Sample
from attar.spec import TrainSpec
from attar.train.distributed import Ranks, join
from attar.train.loop import train_step
from attar.train.run import Run

__all__ = ["StepTimes", "step_times"]

_WARM_UP, _ROUNDS, _STEPS = 2, 5, 2


@dataclass(frozen=True)
class StepTimes:
    """How long training steps take.

    Attributes:
        relative: time of an entry's step in times of the plain one's, by label; without those whose step fails.
        plain_epoch_seconds: time of one epoch of plain training, evaluation left out.
    """

    relative: dict[str, float]
    plain_epoch_seconds: float


def step_times(plain: TrainSpec, specs: Mapping[str, TrainSpec], threads: int) -> StepTimes:
    """Measure every run's training step against the plain one's, both on one batch of their own.

    The two take turns, so that whatever else the machine does slows both alike; the ratio is the median over rounds.

    Args:
        plain: plain training.
        specs: the other runs by label; two runs are in memory at a time.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    with join() as ranks:
        relative, plain_seconds = {}, []
        for label, spec in {"plain": plain, **specs}.items():
            one = _Stepper(plain, ranks)
            try:
                other = _Stepper(spec, ranks)
            except Exception:  # its runs will tell why; the others are measured
                continue
            pairs = [(one.seconds(_STEPS), other.seconds(_STEPS)) for _ in range(_ROUNDS)]
            relative[label] = median(theirs / ours for ours, theirs in pairs)
            plain_seconds.append(median(ours for ours, _ in pairs))
        del relative["plain"]
        return StepTimes(relative, min(plain_seconds) * one.run.steps_per_epoch)


class _Stepper:
    """One run that takes steps on its first batch, warmed up."""

    def __init__(self, spec: TrainSpec, ranks: Ranks) -> None:
        self.run = Run.prepare(spec, ranks)
        self.run.distiller.train()
        with closing(cast(Generator[Sample, None, None], self.run.loader.epoch(0))) as batches:
            self.sample = next(batches)
        self.progress = torch.zeros((), device=ranks.device)
        self.seconds(_WARM_UP)

    def seconds(self, steps: int) -> float:
        """Return the time of one step."""
        began = time.perf_counter()
        for _ in range(steps):
            train_step(self.run, self.sample, 0, self.progress)
        if self.progress.is_cuda:
            torch.cuda.synchronize(self.progress.device)
        return (time.perf_counter() - began) / steps
