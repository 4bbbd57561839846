"""Which runs belong together: entries, what makes runs comparable, and which label smoothing stands for it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from attar.compare.protocol import label_of
from attar.compare.records import Record
from attar.errors import AttarError
from attar.spec import FREE, MethodSpec

__all__ = ["chosen", "finished", "grouped", "smoothing", "tuning"]

# What else may be different between the runs of one comparison.
_VARIED = frozenset({"methods", "seed", "epochs"})


def grouped(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the runs of every entry by its label, in the order of seeds.

    Raises:
        AttarError: runs that are not of one comparison, a run given twice, or none that is finished.
    """
    if not any(record.result for record in records):
        raise AttarError(
            f"None of the {len(records)} runs is finished: give the same attar compare command again to go on."
        )
    specs = [record.spec.model_dump(mode="json") for record in records]
    fields = [name for name in specs[0] if name not in _VARIED | FREE]
    different = [name for name in fields if any(spec[name] != specs[0][name] for spec in specs)]
    if different:
        said = "; ".join(f"{name} ({_listed(spec[name] for spec in specs)})" for name in different)
        raise AttarError(
            f"The runs are not of one comparison, they differ in {said}: give runs that agree in all of it."
        )
    fingerprints = {name: record for record in records if (name := _fingerprint(record)) is not None}
    if len(fingerprints) > 1:
        first, second, *_ = fingerprints.values()
        raise AttarError(
            f"'{first.folder}' and '{second.folder}' differ in data_fingerprint, they saw different images under the "
            f"name '{first.spec.data}': train all of them on the same data."
        )
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(label_of(record.spec.methods), []).append(record)
    for label, runs in groups.items():
        runs.sort(key=lambda record: record.spec.seed)
        epochs = sorted({record.spec.epochs for record in runs})
        if len(epochs) > 1:
            raise AttarError(f"The runs of {label} differ in epochs ({_listed(epochs)}): give those of one number.")
        for one, two in itertools.pairwise(runs):
            if one.spec.seed == two.spec.seed:
                raise AttarError(
                    f"'{one.folder}' and '{two.folder}' are both {label} with seed {one.spec.seed}: give one."
                )
    return groups


def _listed(values: Any) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _fingerprint(record: Record) -> str | None:
    sessions = [session.get("data") for session in record.environment]
    return (record.result or {}).get("data_fingerprint") or next(filter(None, sessions), None)


def smoothing(methods: Sequence[MethodSpec]) -> float | None:
    """Return by how much plain training smooths its labels; None for anything else."""
    if len(methods) != 1 or methods[0].name != "Supervised" or set(methods[0].options) != {"label_smoothing"}:
        return None
    return float(methods[0].options["label_smoothing"])


def finished(runs: Sequence[Record]) -> dict[int, Record]:
    """Return the runs that have a result, by seed."""
    return {record.spec.seed: record for record in runs if record.result is not None}


def tuning(candidates: Mapping[float, Sequence[Record]]) -> dict[float, tuple[float, float]]:
    """Return mean hold-out score and NLL of every label smoothing, on the seeds that all of them have.

    The score is the primary metric.

    Candidates without a finished run do not count; without a common seed there is no answer.
    """
    done = {share: finished(runs) for share, runs in sorted(candidates.items()) if finished(runs)}
    shared = sorted(set.intersection(*map(set, done.values()))) if done else []
    found = {}
    for share, runs in done.items():
        key = next(iter(runs.values())).primary.key
        held = [run.result["holdout"] for seed in shared if (run := runs[seed]).result is not None]
        if held:
            found[share] = (fmean(each[key] for each in held), fmean(each["nll"] for each in held))
    return found


def chosen(candidates: Mapping[float, Sequence[Record]], tuned: Mapping[float, tuple[float, float]]) -> float | None:
    """Return the label smoothing that is compared: most finished seeds, then the hold-out's score, then its NLL."""

    def rank(share: float) -> tuple[int, float, float]:
        score, nll = tuned.get(share, (-1.0, 0.0))
        return len(finished(candidates[share])), score, -nll

    return max(candidates, key=rank, default=None)
