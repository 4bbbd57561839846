"""What methods have gained in attar's own comparisons: written from their reports, printed by `attar methods NAME`."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

__all__ = ["Measurement", "measured", "read_report", "write_measured"]

_FILE = "measured.json"


@dataclass(frozen=True)
class Measurement:
    """One method with its default options against plain training, in one comparison.

    Attributes:
        method: its name.
        report: the benchmark file that holds the comparison.
        model: of the student.
        data: in words.
        epochs: of every run.
        seeds: how many, paired.
        metric: what was compared, on the test images: "top-1" or "mIoU".
        points: its mean difference from plain training, in points.
        low: lower end of its 95 % interval.
        high: upper end.
        verdict: "helps" or "hurts" where that is more than chance can explain, after the correction for the number of
            entries, else "no evidence".
    """

    method: str
    report: str
    model: str
    data: str
    epochs: int
    seeds: int
    metric: str
    points: float
    low: float
    high: float
    verdict: Literal["helps", "hurts", "no evidence"]

    def __str__(self) -> str:
        return (
            f"{self.points:+.2f} points of {self.metric} over plain training ({self.low:+.2f} to {self.high:+.2f}), "
            f"{self.verdict}: {self.model}, {self.data}, {self.epochs} epochs, {self.seeds} seeds ({self.report})"
        )


def measured(method: str) -> list[Measurement]:
    """Return what was measured of a method, in the order of the reports."""
    kept = json.loads(files("attar").joinpath(_FILE).read_text(encoding="utf-8"))
    return [Measurement(**row) for row in kept if row["method"] == method]


def read_report(report: dict[str, Any], file: str, data: str) -> list[Measurement]:
    """Take from a comparison's `report.json` the entries of one method with its default options.

    Args:
        report: its content.
        file: the benchmark file that shows it.
        data: in words.
    """
    from attar.compare.primary import primary
    from attar.compare.statistics import ALPHA

    found = []
    for entry in report["entries"]:
        against = entry["against_plain"]
        alone = re.fullmatch(r"(\w+)(?:\(teachers=[^(),]*\))?", entry["label"])
        if entry["role"] != "method" or alone is None or against is None:
            continue
        points, low, high = (round(100 * against[key], 2) for key in ("mean", "low", "high"))
        chance = against["p_corrected"] is None or against["p_corrected"] >= ALPHA
        found.append(
            Measurement(
                alone[1],
                file,
                report["settings"]["model"] + _options(report["settings"]["model_options"]),
                data,
                report["settings"]["epochs"],
                len(entry["seeds"]),
                primary(report["settings"]["task"]).name,
                points,
                low,
                high,
                "no evidence" if chance else ("helps" if against["mean"] > 0 else "hurts"),
            )
        )
    return found


def _options(options: dict[str, Any]) -> str:
    return f" ({', '.join(f'{name} {value}' for name, value in options.items())})" if options else ""


def write_measured(rows: list[Measurement], path: Path) -> None:
    """Put rows into a file of measurements, in place of those of the same reports and data."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    replaced = {(row.report, row.data) for row in rows}
    kept = [row for row in before if (row["report"], row["data"]) not in replaced]
    assert all(set(row) == {field.name for field in fields(Measurement)} for row in kept)
    path.write_text(json.dumps([*kept, *map(asdict, rows)], indent=1) + "\n", encoding="utf-8")
