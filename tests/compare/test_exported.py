"""`attar compare --int8`: every student exported, measured as it will run, and in the report's table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from attar.cli import main
from attar.compare.records import measured, read_records

pytest.importorskip("onnxruntime", reason='needs pip install "attar[export]"')
pytest.importorskip("onnxscript", reason='needs pip install "attar[export]"')

COMMAND = "compare plain --model cifar_resnet20 --model-options width=0.25 --data digits --train-limit 256 --epochs 3"
OPTIONS = "--batch 32 --lr 0.05 --precision fp32 --smoothing 0.1 --seeds 1 --jobs 1 --int8"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("compared") / "home"
    assert main([*COMMAND.split(), *OPTIONS.split(), "--out", str(home)]) == 0
    return home


def test_every_run_is_exported_and_its_figures_are_in_the_table(home: Path) -> None:
    records = read_records([home])
    assert len(records) == 2
    with (home / "report.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["key"] in ("int8_top1", "int8_size", "outliers")]
    table = {(row["role"], row["key"]): row["seed_0"] for row in rows}
    for record in records:
        role = "smoothing" if record.spec.methods else "plain"
        report = json.loads((record.folder / "export" / "onnx-int8" / "export.json").read_text())
        assert record.exports == (report,)
        assert report["int8"] is not None
        assert float(table[role, "int8_top1"]) == report["accuracy"]["artefact"]
        assert int(float(table[role, "int8_size"])) == (record.folder / "export/onnx-int8/model.onnx").stat().st_size
        assert float(table[role, "outliers"]) == max(each["outliers"] for each in record.measured["ranges"])
    assert "int8 top-1" in (home / "report.html").read_text()
    ranges = (home / "ranges.md").read_text()
    assert "| logits | plain |" in ranges
    assert "| logits | Supervised(label_smoothing=0.1) |" in ranges


def test_again_measures_nothing_anew_and_a_refused_export_costs_no_report(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = read_records([home])
    before = {record.folder: (measured(record.folder), record.exports) for record in records}
    untouched, broken = (record.folder for record in records)
    for path in (broken / "export" / "onnx-int8").iterdir():
        path.unlink()
    (broken / "export" / "onnx-int8" / "mine.txt").write_text("no export")
    assert main([*COMMAND.split(), *OPTIONS.split(), "--out", str(home)]) == 0
    said = capsys.readouterr().out
    assert f"No int8 figures of {broken.name}: " in said.replace("\n", " ")
    assert "something that is no export" in said
    assert (measured(untouched), read_records([home])[records.index(records[0])].exports) == before[untouched]
    assert (broken / "export" / "onnx-int8" / "mine.txt").read_text() == "no export"
