"""From run folders to the answer: what every entry scored and cost, and what that is evidence of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attar.compare.statistics import Contrast, Summary

__all__ = ["Analysis", "Attached", "Column", "EntryAnalysis", "Failure"]


@dataclass(frozen=True)
class Column:
    """One figure that every entry has.

    Attributes:
        key: as in the CSV and JSON files.
        title: as in tables.
        kind: how it is written: `share` (0..1, as percent), `number`, `seconds`, `milliseconds`, `bytes`, `flops`,
            `count` or `rate`.
        better: which way is better; None where neither is.
        meaning: one sentence.
        group: `quality`, `training` or `deployment`.
    """

    key: str
    title: str
    kind: Literal["share", "number", "seconds", "milliseconds", "bytes", "flops", "count", "rate"]
    better: Literal["high", "low"] | None
    meaning: str
    group: Literal["quality", "training", "deployment"]


@dataclass(frozen=True)
class Failure:
    """A run without a result.

    Attributes:
        seed: of the run.
        reason: in a sentence; "not finished yet" for one that is still to be trained.
    """

    seed: int
    reason: str


@dataclass(frozen=True)
class Attached:
    """What one method of an entry added while training.

    Attributes:
        method: its name.
        auxiliaries: parameters of every module that died after training.
        taps: modules of the student that it read.
        teachers: frozen networks it asked.
        views: augmented versions of each image it needed.
        terms: mean of every term in the last epoch and its weight then, over the seeds.
    """

    method: str
    auxiliaries: Mapping[str, int]
    taps: tuple[str, ...]
    teachers: tuple[str, ...]
    views: int
    terms: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class EntryAnalysis:
    """One row of the comparison.

    Attributes:
        label: what it is called.
        role: `plain` and `smoothing` are the baselines, all others are methods.
        seeds: of the finished runs, ascending.
        failures: the runs without a result.
        figures: by column key; columns that were not measured are absent.
        against_plain: paired test top-1 difference to plain; None for plain itself or with fewer than two common seeds.
        against_smoothing: likewise to label smoothing; None for both baselines.
        verdict: in words; for the baselines what they scored.
        curve: [S, E] hold-out top-1 of every seed after every epoch; runs of the entry have equal lengths.
        curve_cost: [E] mean seconds of training (teachers included) until the end of every epoch.
        confusion: [K, K] mean over seeds of the test confusion matrix, true class by row, in images.
        per_class: [K] mean over seeds of the share of each class's test images answered rightly.
        attached: what its methods added.
        options: hyper-parameters of its methods, resolved, by method name.
        teacher_seconds: training time of its teachers, where their run folders are there; included in training time.
        epochs: of its runs.
        folders: of its runs, in the order of `seeds`.
    """

    label: str
    role: Literal["plain", "smoothing", "method"]
    seeds: tuple[int, ...]
    failures: tuple[Failure, ...]
    figures: Mapping[str, Summary]
    against_plain: Contrast | None
    against_smoothing: Contrast | None
    verdict: str
    curve: NDArray[np.float64]
    curve_cost: NDArray[np.float64]
    confusion: NDArray[np.float64]
    per_class: NDArray[np.float64]
    attached: tuple[Attached, ...]
    options: Mapping[str, Mapping[str, Any]]
    teacher_seconds: float
    epochs: int
    folders: tuple[str, ...]


@dataclass(frozen=True)
class Analysis:
    """A whole comparison.

    Attributes:
        model: name of the student.
        data: name of the data.
        classes: K class names.
        images: number of images in each split.
        seeds: all seeds that were asked for.
        columns: in the order of the table; only those that at least one entry has.
        entries: plain, label smoothing, then the methods in the order given.
        smoothing: what label smoothing was tuned over, hold-out top-1 by candidate; empty when it was not tuned.
        settings: everything all runs share, resolved (the spec without methods and seed).
        environment: hardware and versions that the runs saw; several values where they differ.
        reproduce: the command that makes the same comparison.
        notes: what a reader must know, in sentences (equal cost, runs at a time, teachers, missing runs).
    """

    model: str
    data: str
    classes: tuple[str, ...]
    images: Mapping[str, int]
    seeds: tuple[int, ...]
    columns: tuple[Column, ...]
    entries: tuple[EntryAnalysis, ...]
    smoothing: Mapping[str, float]
    settings: Mapping[str, Any]
    environment: Mapping[str, tuple[str, ...]]
    reproduce: str
    notes: tuple[str, ...]
