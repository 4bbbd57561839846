"""A comparison as text: every number is that of the analysis."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import fields, replace

import numpy as np
import pytest
from rich.console import Console

from attar.compare.analysis import Analysis, EntryAnalysis, Failure
from attar.compare.tables import (
    answer,
    csv_text,
    json_text,
    judged,
    markdown_text,
    points,
    spread,
    terminal_table,
    verdict_lines,
    written,
)
from compare.samples import COLUMNS, sample, several, two_entries


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.93418, "share", "93.42 %"),
        (1.0, "share", "100.00 %"),
        (0.0, "seconds", "0 s"),
        (0.0423, "seconds", "42.3 ms"),
        (12.34, "seconds", "12.3 s"),
        (59.96, "seconds", "1 min 0 s"),
        (250.2, "seconds", "4 min 10 s"),
        (3599.7, "seconds", "1 h 0 min"),
        (7500.0, "seconds", "2 h 5 min"),
        (0.001836, "milliseconds", "1.84 ms"),
        (1.5 * 2**30, "bytes", "1.50 GiB"),
        (40.3 * 2**20, "bytes", "40.3 MiB"),
        (1023.9 * 2**20, "bytes", "1.00 GiB"),
        (17.0, "bytes", "17 B"),
        (8.17e7, "flops", "81.7 MFLOP"),
        (3.7e15, "flops", "3.70 PFLOP"),
        (9_999.0, "count", "9,999"),
        (272_474.0, "count", "272 k"),
        (25_600_000.0, "count", "25.6 M"),
        (6506.2, "rate", "6,506/s"),
        (42.31, "rate", "42.3/s"),
        (0.31234, "number", "0.312"),
        (-0.25, "number", "−0.250"),
        (float("nan"), "share", "–"),
    ],
)
def test_numbers_are_written_as_people_read_them(value: float, kind: str, text: str) -> None:
    assert written(value, kind) == text


def test_points_have_a_sign_but_for_nothing() -> None:
    assert [points(value) for value in (0.0084, -0.0084, 0.0, -1e-9)] == ["+0.84", "−0.84", "0.00", "0.00"]


def test_half_an_interval_is_left_out_where_seeds_do_not_differ() -> None:
    entry = sample().entries[0]
    assert spread(entry.figures["parameters"], "count") == ""
    half = (entry.figures["top1"].high - entry.figures["top1"].low) / 2
    assert spread(entry.figures["top1"], "share") == f"± {100 * half:.2f}"


def rows_of(analysis: Analysis) -> dict[tuple[str, str], dict[str, str]]:
    return {(row["label"], row["key"]): row for row in csv.DictReader(io.StringIO(csv_text(analysis)))}


@pytest.mark.parametrize("analysis", [sample(), two_entries(), several(23)], ids=["plain", "two", "many"])
def test_csv_has_every_figure_and_difference(analysis: Analysis) -> None:
    rows = rows_of(analysis)
    expected = len(analysis.entries) * len(analysis.columns)
    for entry in analysis.entries:
        for column in analysis.columns:
            row, figure = rows[entry.label, column.key], entry.figures.get(column.key)
            assert row["role"] == entry.role
            if figure is None:
                assert (row["n"], row["mean"]) == ("0", "")
                continue
            assert [float(row[name]) for name in ("mean", "low", "high")] == [figure.mean, figure.low, figure.high]
            assert int(row["n"]) == len(figure.values)
            values = [row[f"seed_{seed}"] for seed in analysis.seeds]
            if len(figure.values) == len(entry.seeds):
                assert [float(value) for value in values if value] == list(figure.values)
                assert [seed for seed, value in zip(analysis.seeds, values, strict=True) if value] == list(entry.seeds)
            else:
                assert set(values) == {""}
        for baseline, contrast in (("plain", entry.against_plain), ("smoothing", entry.against_smoothing)):
            if contrast is not None:
                expected += 1
                row = rows[entry.label, f"top1_minus_{baseline}"]
                for name in ("mean", "low", "high", "p", "p_corrected", "detectable"):
                    assert float(row[name]) == getattr(contrast, name)
                values = [float(row[f"seed_{seed}"]) for seed in analysis.seeds if row[f"seed_{seed}"]]
                assert values == list(contrast.differences)
    assert len(rows) == expected


def test_csv_puts_a_difference_under_its_seed() -> None:
    rows = rows_of(sample())
    row = rows["SCD", "top1_minus_plain"]
    assert row["seed_2"] == ""  # failed
    difference = float(rows["SCD", "top1"]["seed_3"]) - float(rows["plain", "top1"]["seed_3"])
    assert float(row["seed_3"]) == pytest.approx(difference, abs=1e-11)


def test_json_holds_everything() -> None:
    analysis = sample()
    told = json.loads(json_text(analysis))
    # Those of dense tasks have no place in a comparison of classifiers.
    assert set(told) == {"format", *(field.name for field in fields(Analysis))} - {"primary"}
    dense = {"class_iou", "masks", "masks_seed"}
    for entry, row in zip(analysis.entries, told["entries"], strict=True):
        assert list(row) == [field.name for field in fields(EntryAnalysis) if field.name not in dense]
        assert np.array_equal(np.array(row["confusion"]), entry.confusion)
        assert np.array_equal(np.array(row["curve"]).reshape(entry.curve.shape), entry.curve)
        assert {key: tuple(one["values"]) for key, one in row["figures"].items()} == {
            key: one.values for key, one in entry.figures.items()
        }
        contrast = row["against_plain"]
        assert contrast is None if entry.against_plain is None else contrast["p"] == entry.against_plain.p
        assert [(one["seed"], one["reason"]) for one in row["failures"]] == [(f.seed, f.reason) for f in entry.failures]


def test_json_writes_null_for_what_is_not_finite() -> None:
    analysis = sample()
    holes = np.full(len(analysis.classes), np.nan)
    changed = replace(analysis, entries=(replace(analysis.entries[0], per_class=holes), *analysis.entries[1:]))
    told = json.loads(json_text(changed), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["entries"][0]["per_class"] == [None] * len(analysis.classes)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_table_agrees() -> None:
    analysis = sample()
    text = markdown_text(analysis)
    table = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert table[0][4:] == [column.title for column in COLUMNS]
    assert len({len(row) for row in table}) == 1
    for entry, row in zip(analysis.entries, table[2:], strict=True):
        assert row[0] == entry.label
        if entry.seeds:
            assert row[4].startswith(f"{100 * entry.figures['top1'].mean:.2f} %")
        else:
            assert set(row[2:]) == {"–"}
        if entry.against_plain is not None:
            assert row[2].startswith(points(entry.against_plain.mean))
            assert row[2].endswith(f"({judged(entry.against_plain).word})")
    for line in verdict_lines(analysis):
        assert line in text
    assert f"```bash\n{analysis.reproduce}\n```" in text


def test_markdown_escapes_what_markdown_reads() -> None:
    analysis = sample([("A|B<i>*c*", 0.0, 1.0)], broken=None, failed=None)
    entry = replace(analysis.entries[-1], failures=(Failure(9, "a | b\n<script> [x](y)"),))
    text = markdown_text(replace(analysis, entries=(*analysis.entries[:-1], entry), reproduce="a ``` b"))
    assert r"A\|B\<i\>\*c\*" in text
    assert r"Seed 9: a \| b \<script\> \[x\](y)" in text
    assert "````bash\na ``` b\n````" in text


def test_terminal_table_fits_and_takes_no_label_for_markup() -> None:
    analysis = sample([("ONE(branches=[2,3])[/red]", 0.01, 2.0)], broken=None)
    console = Console(width=120, file=io.StringIO(), highlight=False)
    console.print(terminal_table(analysis))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "[2,3]" in text
    assert max(map(len, text.splitlines())) <= 120
    assert len(text.splitlines()) == 1 + len(analysis.entries)


def test_a_verdict_speaks_of_the_corrected_test() -> None:
    contrast = next(entry.against_plain for entry in sample().entries if entry.label == "Mixup")
    assert contrast is not None
    assert judged(contrast).word == "hurts"
    assert judged(replace(contrast, mean=0.01)).word == "helps"
    assert judged(replace(contrast, p=0.01, p_corrected=0.06)).word == "no evidence"
    assert judged(None).word == "not judged"


def test_the_answer_in_one_line() -> None:
    assert answer(sample()).startswith("2 of 5 methods help cifar_resnet20 on cifar10. ONE(branches=2)+SCD gains most:")
    assert answer(two_entries()) == "No evidence that ONE helps cifar_resnet20 on cifar10."
    assert answer(sample([])) == "Only the baselines were trained: name a method to compare with them."
    assert answer(sample(seeds=(0,))).startswith("No answer yet:")
    one = answer(sample([("ONE", 0.03, 1.0)], broken=None))
    assert re.fullmatch(r"Yes: ONE helps .*, by \+[\d.]+ points .*\. It beats label smoothing too\.", one)
    mixed = answer(sample([("ONE", 0.03, 1.0), ("Mixup", -0.02, 1.0)], broken=None))
    assert mixed.startswith("1 of 2 methods helps cifar_resnet20 on cifar10. ONE: it gains +")
    assert "; 1 of 1 hurts" in answer(sample([("Mixup", -0.02, 1.0)], broken=None))
