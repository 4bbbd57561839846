"""From run folders to the answer: what every entry scored and cost, and what that is evidence of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attar.compare.columns import COLUMNS, DENSE_COLUMNS, Column, at, class_iou, confusion, figures, recall
from attar.compare.command import command
from attar.compare.groups import chosen, finished, grouped, smoothing, tuning
from attar.compare.masks import Masks
from attar.compare.primary import CLASSIFICATION, Primary, resolution
from attar.compare.records import Record
from attar.compare.statistics import Contrast, Summary, contrasts, verdict
from attar.compare.teachers import resolved, teacher_seconds, teachers
from attar.train.files import read_json
from attar.train.predictions import Predictions
from attar.train.segmentation import PixelPredictions

__all__ = ["COLUMNS", "Analysis", "Attached", "Column", "EntryAnalysis", "Failure", "analyse"]


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


# Fields that the files of a comparison have in dense tasks alone, and one that they never have.
_DENSE, _UNWRITTEN = {"written": "dense"}, {"written": "never"}


@dataclass(frozen=True)
class EntryAnalysis:
    """One row of the comparison.

    Of an entry without a finished run, `curve` is [0, E] and everything else that is measured is zero.

    Attributes:
        label: what it is called.
        role: `plain` and `smoothing` are the baselines, all others are methods.
        seeds: of the finished runs, ascending.
        failures: the runs without a result.
        figures: by column key; columns that were not measured are absent.
        against_plain: paired difference of the primary metric to plain; None for plain itself or with fewer than two
            common seeds.
        against_smoothing: likewise to label smoothing; None for both baselines.
        verdict: in words; for the baselines what they scored.
        curve: [S, E] primary metric on the hold-out of every seed after every epoch; runs of the entry have equal
            lengths.
        curve_cost: [E] mean seconds of training (teachers included) until the end of every epoch.
        confusion: [K, K] mean over seeds of the test confusion matrix, true class by row, in images; [0, 0] in dense
            tasks.
        per_class: [K] mean over seeds of the share of each class's test images answered rightly, in dense tasks of its
            intersection over union; NaN for a class that has none.
        attached: what its methods added.
        options: hyper-parameters of its methods, resolved, by method name.
        teacher_seconds: training time of its teachers, where their run folders are there; included in training time.
        epochs: of its runs.
        folders: of its runs, in the order of `seeds`.
        class_iou: in dense tasks [S, K] intersection over union of every seed and class on the test images, NaN where
            a class occurs nowhere; else [0, 0].
        masks: in dense tasks what the student of its first finished seed answers for a few test images.
        masks_seed: that seed.
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
    class_iou: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)), metadata=_DENSE)
    masks: Masks | None = field(default=None, metadata=_UNWRITTEN)
    masks_seed: int | None = field(default=None, metadata=_UNWRITTEN)


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
        smoothing: what label smoothing was tuned over, the primary metric on the hold-out by candidate on the seeds
            that all candidates have; empty when it was not tuned.
        settings: everything all runs share, resolved (the spec without methods and seed).
        environment: hardware and versions that the runs saw; several values where they differ.
        reproduce: the command that makes the same comparison.
        notes: what a reader must know, in sentences (equal cost, runs at a time, teachers, missing runs).
        primary: what entries are compared by.
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
    primary: Primary = field(default=CLASSIFICATION, metadata=_DENSE)


_CAUTION = (
    "Conclusions are about this split and these test images: seeds vary initialisation, order and augmentation alone."
)


def analyse(
    records: Sequence[Record],
    *,
    order: Sequence[str] = (),
    seeds: Sequence[int] = (),
    reproduce: str | None = None,
    notes: Sequence[str] = (),
) -> Analysis:
    """Compute a comparison from its runs.

    Entries are compared by the primary metric on the test images, seed by seed, with plain training and with label
    smoothing. Of several label smoothings the one with the most finished seeds is the entry; among equals the hold-out
    decides, never the test set.

    Args:
        records: all runs of one comparison, finished or not.
        order: labels of the methods as they shall be listed; others follow as they come.
        seeds: all that were asked for; default: those that any entry has.
        reproduce: the command that made the runs; default: one that makes the same comparison.
        notes: what a reader must know besides.

    Raises:
        AttarError: runs that are not of one comparison, a run given twice, or none that is finished.
    """
    groups = grouped(records)
    asked = tuple(seeds) or tuple(sorted({record.spec.seed for record in records}))
    candidates = {share: runs for runs in groups.values() if (share := smoothing(runs[0].spec.methods)) is not None}
    tuned = tuning(candidates)
    best = chosen(candidates, tuned)
    dropped = [run for share, runs in candidates.items() if share != best for run in runs]
    rows = [_Row(label, groups[label]) for label in dict.fromkeys(["plain", *order, *groups]) if label in groups]
    rows = [row for row in rows if row.share in (None, best)]
    rows.sort(key=lambda row: ("plain", "smoothing", "method").index(row.role))
    against = {role: _against(role, rows) for role in ("plain", "smoothing")}
    rival = "label smoothing" if best is None else f"{'tuned ' * (len(tuned) > 1)}label smoothing {best:g}"
    classes, main = _classes(records), records[0].primary
    entries = tuple(_entry(row, asked, len(classes), against, rival) for row in rows)
    measured = {key for entry in entries for key in entry.figures}
    specs = [record.spec.model_dump(mode="json") for record in records]
    said = [
        *_about_epochs(entries),
        *_about_tuning(tuned),
        *(note for row in rows for note in _about_teachers(row)),
        *_about_missing(entries, dropped, [label for label in order if label not in groups]),
        *_about_machines(records),
    ]
    return Analysis(
        model=records[0].spec.model,
        data=records[0].spec.data,
        classes=classes,
        images=_images(records),
        seeds=asked,
        columns=tuple(column for column in (DENSE_COLUMNS if main.dense else COLUMNS) if column.key in measured),
        entries=entries,
        smoothing={f"{share:g}": score for share, (score, _) in tuned.items()} if len(tuned) > 1 else {},
        settings={
            name: value
            for name, value in specs[0].items()
            if name not in ("methods", "seed") and all(spec[name] == value for spec in specs)
        },
        environment=_environment(records),
        reproduce=reproduce or command([record.spec for record in records], asked, [row.name for row in rows]),
        notes=(*notes, _CAUTION, *said),
        primary=main,
    )


# One entry -----------------------------------------------------------------------------------------------------------


class _Row:
    """The runs of one entry."""

    def __init__(self, label: str, runs: Sequence[Record]) -> None:
        self.spec = runs[0].spec
        self.share = smoothing(self.spec.methods)
        self.role: Literal["plain", "smoothing", "method"]
        self.role = "plain" if not self.spec.methods else "method" if self.share is None else "smoothing"
        self.name = label if self.share is None else f"label smoothing {self.share:g}"
        self.main = runs[0].primary
        self.runs = {run.spec.seed: run for run in runs}
        self.finished = finished(runs)

    @property
    def scores(self) -> dict[int, float]:
        """The primary metric on the test images, by seed."""
        return {seed: score for seed, run in self.finished.items() if (score := run.score) is not None}


def _against(role: str, rows: Sequence[_Row]) -> dict[str, Contrast]:
    """Compare with one baseline, by the primary metric, all entries that are listed after it."""
    baseline = next((row for row in rows if row.role == role and row.finished), None)
    if baseline is None:
        return {}
    others = {row.name: row.scores for row in rows if row.role not in ("plain", role)}
    answers = next(iter(baseline.finished.values())).predictions
    assert answers is not None
    return contrasts(others, baseline.scores, resolution(answers))


def _entry(
    row: _Row, asked: Sequence[int], classes: int, against: Mapping[str, Mapping[str, Contrast]], rival: str
) -> EntryAnalysis:
    runs = list(row.finished.values())
    failures = [
        Failure(seed, run.failure or "not finished yet") for seed, run in row.runs.items() if run.result is None
    ]
    failures += [Failure(seed, "not started") for seed in asked if seed not in row.runs]
    plain, rivals = (against[role].get(row.name) for role in ("plain", "smoothing"))
    found, main = figures(runs), row.main
    if not runs:
        said = f"{row.name} has no finished run ({failures[0].reason.rstrip('.')})."
    elif row.role == "method":
        said = verdict(row.name, plain, rivals, rival=rival, metric=main.name)
    else:
        said = _scored(row.name, found[main.key], main)
    epochs = min((len(run.epochs) for run in runs), default=row.spec.epochs)
    curve = [[epoch["holdout"][main.key] for epoch in run.epochs[:epochs]] for run in runs]
    counts, shares = _by_class(runs, classes, main)
    masks_seed = next((seed for seed, run in row.finished.items() if run.masks is not None), None)
    before = teacher_seconds(row.spec) if runs else 0.0
    own = found["training_seconds"].mean - before if runs else 0.0
    return EntryAnalysis(
        label=row.name,
        role=row.role,
        seeds=tuple(row.finished),
        failures=tuple(sorted(failures, key=lambda failure: failure.seed)),
        figures=found,
        against_plain=plain,
        against_smoothing=rivals,
        verdict=said,
        curve=np.array(curve, dtype=np.float64).reshape(len(runs), epochs),
        # The teachers come first; then every epoch takes the same number of equal steps.
        curve_cost=before + own * np.arange(1, epochs + 1) / row.spec.epochs,
        confusion=counts.mean(axis=0) if runs else np.zeros(counts.shape[1:]),
        per_class=_mean_of_known(shares) if runs else np.zeros(classes),
        attached=tuple(about for method in row.spec.methods if (about := _attached(method.name, runs)) is not None),
        options={method.name: resolved(method) for method in row.spec.methods},
        teacher_seconds=teacher_seconds(row.spec),
        epochs=row.spec.epochs,
        folders=tuple(str(run.folder) for run in runs),
        class_iou=shares if main.dense else np.zeros((0, 0)),
        masks=None if masks_seed is None else row.finished[masks_seed].masks,
        masks_seed=masks_seed,
    )


def _by_class(runs: Sequence[Record], classes: int, main: Primary) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return confusion matrices [S, K, K], in dense tasks [S, 0, 0], and what every class scores, [S, K]."""
    if main.dense:
        shares = [class_iou(run) for run in runs]
        return np.zeros((len(runs), 0, 0)), np.array(shares).reshape(len(runs), classes)
    counts = np.array([confusion(run, classes) for run in runs]).reshape(-1, classes, classes)
    return counts, np.array([recall(each) for each in counts]).reshape(len(runs), classes)


def _mean_of_known(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the means over seeds of [S, K], of those seeds in which a class occurs; NaN where it does in none."""
    known = np.isfinite(shares)
    sums, counts = np.where(known, shares, 0.0).sum(axis=0), known.sum(axis=0)
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return means


def _scored(name: str, score: Summary, main: Primary) -> str:
    n = len(score.values)
    low, high = (100 * min(max(end, 0.0), 1.0) for end in (score.low, score.high))
    said = f"95 % interval {low:.2f} to {high:.2f}, {n} seeds" if n > 1 else "1 seed"
    name = "plain training" if name == "plain" else name
    return f"{name[0].upper()}{name[1:]} scores {100 * score.mean:.2f} % of test {main.name} ({said})."


def _attached(method: str, runs: Sequence[Record]) -> Attached | None:
    """Return what a method added; None when no run recorded it."""
    found = next((about for run in runs if (about := at(run.result, "attached", method)) is not None), None)
    if found is None:
        return None
    terms: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        for name, term in (at(run.result, "terms") or {}).items():
            owner, _, short = name.partition(".")
            if owner == method and short:
                terms.setdefault(short, []).append((term["loss"], term["weight"]))
    return Attached(
        method=method,
        auxiliaries=dict(found["auxiliaries"]),
        taps=tuple(found["taps"]),
        teachers=tuple(found["teachers"]),
        views=found["views"],
        terms={
            name: (fmean(pair[0] for pair in seen), fmean(pair[1] for pair in seen)) for name, seen in terms.items()
        },
    )


# The whole comparison ------------------------------------------------------------------------------------------------


def _classes(records: Sequence[Record]) -> tuple[str, ...]:
    """Return the class names as a student's folder tells them, else numbers."""
    for record in records:
        config = record.folder / "student" / "config.json"
        if record.result is not None and config.is_file():
            return tuple(at(read_json(config), "attar", "classes"))
    answers = [record.predictions for record in records if isinstance(record.predictions, Predictions)]
    if not answers:
        pixels = next(each for record in records if isinstance(each := record.predictions, PixelPredictions))
        return tuple(map(str, range(pixels.labelled.shape[1])))
    highest = max(max(int(each.targets.max()), int(each.predicted.max())) for each in answers)
    return tuple(map(str, range(highest + 1)))


def _images(records: Sequence[Record]) -> dict[str, int]:
    sessions = [about["images"] for record in records for about in record.environment if "images" in about]
    if sessions:
        return dict(sessions[0])
    result = next(record.result for record in records if record.result is not None)
    return {split: result[split]["images"] for split in ("holdout", "test")}


_MACHINE = ("device", "device_name", "processes", "threads")
_SOFTWARE = ("precision", "compiled", "attar", "torch", "torchvision", "timm", "python", "platform")


def _environment(records: Sequence[Record]) -> dict[str, tuple[str, ...]]:
    sessions = [about for record in records for about in record.environment]
    return {
        name: values
        for name in (*_MACHINE, *_SOFTWARE)
        if any(values := tuple(dict.fromkeys(str(about[name]) for about in sessions if name in about)))
    }


# What a reader must know, a sentence each ----------------------------------------------------------------------------


def _about_epochs(entries: Sequence[EntryAnalysis]) -> list[str]:
    if len({entry.epochs for entry in entries}) == 1:
        return []
    said = ", ".join(f"{entry.label} {entry.epochs}" for entry in entries)
    return [f"Entries were trained for different numbers of epochs, as equal training cost asks ({said})."]


def _about_tuning(tuned: Mapping[float, tuple[float, float]]) -> list[str]:
    if len(tuned) < 2:
        return []
    said = ", ".join(f"{share:g}" for share in tuned)
    return [f"Label smoothing was tuned over {said} on the hold-out, on the seeds that all of them have."]


def _about_teachers(row: _Row) -> list[str]:
    seconds, named = teacher_seconds(row.spec), teachers(row.spec)
    unknown = [text for text in named if not (Path(text) / "result.json").is_file()]
    notes = []
    if seconds:
        notes.append(
            f"The training time of {row.name} includes {seconds:.0f} s of its teachers' for every seed, though they "
            "were trained once."
        )
    if unknown:
        notes.append(f"The training time of {row.name} lacks that of {', '.join(unknown)}, which is not known.")
    return notes


def _about_missing(entries: Sequence[EntryAnalysis], dropped: Sequence[Record], absent: Sequence[str]) -> list[str]:
    told = [(entry.label, failure.seed, failure.reason) for entry in entries for failure in entry.failures]
    told += [
        (f"label smoothing {smoothing(run.spec.methods):g}", run.spec.seed, run.failure or "not finished yet")
        for run in dropped
        if run.result is None
    ]
    missing = [f"{label}, seed {seed} ({reason.rstrip('.')})" for label, seed, reason in told]
    notes = [f"Runs without a result: {'; '.join(missing)}."] if missing else []
    return [*notes, f"No run has begun of {', '.join(absent)}."] if absent else notes


def _about_machines(records: Sequence[Record]) -> list[str]:
    seen = _environment(records)
    notes = []
    for names, doubt in (
        (_MACHINE, "times and memory do not compare exactly"),
        (_SOFTWARE, "results may differ by that"),
    ):
        said = [f"{name} ({', '.join(seen[name])})" for name in names if len(seen.get(name, ())) > 1]
        if said:
            notes.append(f"Not all runs saw the same {', '.join(said)}: {doubt}.")
    return notes
