"""`attar compare --int8`: every student exported, measured as it will run, and in the report's table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from attar.cli import main
from attar.compare.records import measured, read_records
from pictures import write_discs

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


def test_masks_are_compared_by_mean_iou(tmp_path: Path) -> None:
    write_discs(tmp_path / "data", train=40, test=6)
    words = "compare plain --task segmentation --model lraspp_mobilenet_v3_large --epochs 2 --batch 8 --lr 0.05"
    options = f"--precision fp32 --holdout 0.2 --smoothing 0.1 --seeds 1 --jobs 1 --int8 --data {tmp_path / 'data'}"
    assert main([*words.split(), *options.split(), "--out", str(tmp_path / "home")]) == 0
    record = next(one for one in read_records([tmp_path / "home"]) if not one.spec.methods)
    with (tmp_path / "home" / "report.csv").open() as file:
        table = {row["key"]: row["seed_0"] for row in csv.DictReader(file) if row["role"] == "plain"}
    (report,) = record.exports
    assert report["accuracy"]["metric"] == "miou"
    assert float(table["int8_miou"]) == report["accuracy"]["artefact"]
    assert float(table["int8_drop"]) == report["int8"]["drop"]
    assert float(table["outliers"]) == max(each["outliers"] for each in record.measured["ranges"])
    assert record.measured["ranges"][-1]["tap"] == "logits"
    assert "int8 mIoU" in (tmp_path / "home" / "report.html").read_text()
