"""How long a training step takes, entry against entry in one process."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from statistics import median
from typing import cast

import torch

from attar.data import Sample
from attar.spec import TrainSpec
from attar.train.distributed import join
from attar.train.loop import train_step
from attar.train.run import Run

__all__ = ["step_seconds"]

_WARM_UP, _ROUNDS, _STEPS = 2, 5, 2


def step_seconds(specs: Sequence[TrainSpec], jobs: int) -> tuple[list[float], int]:
    """Measure the training step of several runs on one batch each, in turn, so that a busy machine slows all alike.

    Args:
        specs: the runs; all are in memory at once.
        jobs: runs that will share the machine, each with its part of the threads.

    Returns:
        Seconds per image of each run, the median over rounds, and the images of one epoch.
    """
    torch.set_num_threads(max(torch.get_num_threads() // jobs, 1))
    with join() as ranks:
        runs = [Run.prepare(spec, ranks) for spec in specs]
        samples = [_first(run) for run in runs]
        progress = torch.zeros((), device=ranks.device)

        def timed(run: Run, sample: Sample, steps: int) -> float:
            run.distiller.train()
            began = time.perf_counter()
            for _ in range(steps):
                train_step(run, sample, 0, progress)
            if ranks.device.type == "cuda":
                torch.cuda.synchronize(ranks.device)
            return (time.perf_counter() - began) / (steps * run.batch)

        pairs = list(zip(runs, samples, strict=True))
        for run, sample in pairs:
            timed(run, sample, _WARM_UP)
        rounds = [[timed(run, sample, _STEPS) for run, sample in pairs] for _ in range(_ROUNDS)]
        seconds = [median(values) for values in zip(*rounds, strict=True)]
        return seconds, runs[0].steps_per_epoch * runs[0].batch


def _first(run: Run) -> Sample:
    with closing(cast(Generator[Sample, None, None], run.loader.epoch(0))) as batches:
        return next(batches)
