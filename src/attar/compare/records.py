"""Run folders read back: everything that a comparison is computed from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attar.compare.masks import MASKS, Masks
from attar.compare.primary import Primary, primary
from attar.errors import AttarError
from attar.spec import TrainSpec
from attar.train.files import read_json, write_json
from attar.train.predictions import Predictions
from attar.train.segmentation import PixelPredictions

__all__ = ["FAILURE", "MEASURED", "Record", "measured", "read_record", "read_records", "remember"]

# What a comparison adds to the run folders, beside what training leaves there.
FAILURE, MEASURED = "failure.json", "measured.json"


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        folder: where it is.
        spec: what was asked.
        result: `result.json`; None while the run is not finished.
        epochs: the lines of its history that end an epoch.
        predictions: the student's answers for the test images; None while the run is not finished.
        measured: what was measured on the student afterwards: `latency`, `step`, `corruptions`, `ranges`, `retrieval`.
        environment: one entry for each time the run was started.
        failure: why it ended without a result, in a sentence.
        exports: what `export.json` says of each of its exports.
        masks: what the student answers for a few test images of segmentation; None where none were kept.
    """

    folder: Path
    spec: TrainSpec
    result: dict[str, Any] | None
    epochs: tuple[dict[str, Any], ...]
    predictions: Predictions | PixelPredictions | None
    measured: dict[str, Any]
    environment: tuple[dict[str, Any], ...]
    failure: str | None
    exports: tuple[dict[str, Any], ...] = ()
    masks: Masks | None = None

    @property
    def primary(self) -> Primary:
        """What it is compared by."""
        return primary(self.spec.task)

    @property
    def score(self) -> float | None:
        """Its primary metric on the test images; None while it is not finished."""
        return None if self.result is None else float(self.result["test"][self.primary.key])


def read_records(paths: Iterable[Path]) -> list[Record]:
    """Read run folders, and all run folders that lie directly in a folder of runs.

    Raises:
        AttarError: a path that is neither, or a damaged run.
    """
    folders: list[Path] = []
    for path in paths:
        inside = sorted(spec.parent for spec in path.glob("*/spec.json"))
        if (path / "spec.json").is_file():
            folders.append(path)
        elif inside:
            folders += inside
        else:
            raise AttarError(f"'{path}' is no run folder and holds none: give what attar train or compare wrote.")
    return [read_record(folder) for folder in dict.fromkeys(folders)]


def read_record(folder: Path) -> Record:
    """Read one run folder, finished or not.

    Raises:
        AttarError: it is damaged.
    """
    finished = (folder / "result.json").is_file()
    spec = TrainSpec.load(folder / "spec.json")
    answers = PixelPredictions if primary(spec.task).dense else Predictions
    return Record(
        folder,
        spec,
        read_json(folder / "result.json") if finished else None,
        _epochs(folder / "metrics.jsonl"),
        answers.load(folder / "predictions.npz") if finished else None,
        measured(folder),
        tuple(_optional(folder / "environment.json", [])),
        None if finished else _optional(folder / FAILURE, {}).get("reason"),
        # Hidden folders are exports that are still being written, or were interrupted.
        tuple(read_json(path) for path in sorted(folder.glob("export/[!.]*/export.json"))),
        Masks.load(folder / MASKS) if finished and (folder / MASKS).is_file() else None,
    )


def measured(folder: Path) -> dict[str, Any]:
    """Return what was measured on a run's student."""
    found = _optional(folder / MEASURED, {})
    assert isinstance(found, dict)
    return found


def remember(folder: Path, **values: Any) -> None:
    """Keep something measured in the run's folder; what else is there stays."""
    write_json(folder / MEASURED, {**measured(folder), **values})


def _optional(path: Path, default: Any) -> Any:
    return read_json(path) if path.is_file() else default


def _epochs(path: Path) -> tuple[dict[str, Any], ...]:
    if not path.is_file():
        return ()
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # the last line of a run that was killed while it wrote
            continue
        if value.get("kind") == "epoch":
            lines.append(value)
    return tuple(lines)
