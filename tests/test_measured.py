"""What the cards say of attar's own comparisons is what the reports say."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import attar
from attar.compare.analysis import Analysis
from attar.compare.tables import json_text
from attar.measured import Measurement, measured, read_report, write_measured
from compare.samples import dense_sample, sample

ROOT = Path(__file__).parent.parent
KEPT = [found for name in attar.methods.available() for found in measured(name)]


def entry(label: str, mean: float | None, p: float = 0.5, role: str = "method") -> dict[str, object]:
    against = None if mean is None else {"mean": mean, "low": mean - 0.01, "high": mean + 0.01, "p_corrected": p}
    return {"label": label, "role": role, "seeds": [0, 1, 2], "against_plain": against}


def test_every_row_stands_in_its_report() -> None:
    rows = json.loads((ROOT / "src/attar/measured.json").read_text())
    assert len(rows) == len(KEPT) > 0  # no row of a method that does not exist
    for found in KEPT:
        text = (ROOT / found.report).read_text().replace("−", "-")
        lines = [line for line in text.splitlines() if re.match(rf"\| {found.method}(\(teachers=[^)]*\))? \| ", line)]
        wanted = f"| {found.seeds} | {found.points:+.2f} ± "
        assert any(wanted in line and f"({found.verdict})" in line for line in lines), found


def test_default_options_alone_are_taken_from_a_report() -> None:
    settings = {"task": "segmentation", "model": "cifar_resnet20", "model_options": {"width": 0.5}, "epochs": 8}
    entries = [
        entry("plain", None, role="plain"),
        entry("label smoothing 0.1", 0.02, 0.01, role="smoothing"),
        entry("ONE", 0.0269, 0.13),
        entry("ONE(branches=2)", 0.03, 0.01),
        entry("ONE+SCD", 0.03, 0.01),
        entry("InDistill(teachers=runs/teacher)+KD(teachers=runs/teacher)", 0.03, 0.01),
        entry("KD(teachers=runs/teacher,temperature=2.0)", 0.03, 0.01),
        entry("KD(teachers=runs/teacher)", 0.0327, 0.019),
        entry("SPKD", -0.16, 0.001),
        entry("SAD", None),
    ]
    report = {"settings": settings, "entries": entries}
    found = read_report(report, "benchmarks/x.md", "digits")
    assert [(row.method, row.verdict) for row in found] == [
        ("ONE", "no evidence"),
        ("KD", "helps"),
        ("SPKD", "hurts"),
    ]
    assert found[0] == Measurement(
        "ONE", "benchmarks/x.md", "cifar_resnet20 (width 0.5)", "digits", 8, 3, "mIoU", 2.69, 1.69, 3.69, "no evidence"
    )
    assert str(found[0]).startswith("+2.69 points of mIoU over plain training (+1.69 to +3.69), no evidence: ")


@pytest.mark.parametrize(("made", "metric"), [(sample, "top-1"), (dense_sample, "mIoU")])
def test_what_a_comparison_writes_can_be_read(made: Callable[[], Analysis], metric: str) -> None:
    made_up = made()
    analysis = dataclasses.replace(made_up, settings={**made_up.settings, "task": made_up.primary.task})
    found = read_report(json.loads(json_text(analysis)), "benchmarks/x.md", "images")
    assert found
    for row in found:
        entry = next(one for one in analysis.entries if one.label.partition("(")[0] == row.method)
        assert entry.against_plain is not None
        assert row.points == pytest.approx(100 * entry.against_plain.mean, abs=0.005)
        assert (row.metric, row.model) == (metric, analysis.settings["model"])


def test_a_report_read_again_replaces_its_rows_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    settings = {"task": "classification", "model": "resnet18", "model_options": {}, "epochs": 1}

    def rows(mean: float, file: str) -> list[Measurement]:
        report = {"settings": settings, "entries": [entry("ONE", mean)]}
        return read_report(report, file, "digits")

    write_measured(rows(0.01, "a.md"), path)
    write_measured(rows(0.02, "b.md"), path)
    write_measured(rows(0.03, "a.md"), path)
    assert [(row["report"], row["points"]) for row in json.loads(path.read_text())] == [("b.md", 2.0), ("a.md", 3.0)]
