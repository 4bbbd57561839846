"""Whole comparisons on digits: planned, interrupted, with failures, within a budget; and what the command line says."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from attar.cli import main
from attar.compare.analysis import Analysis
from attar.compare.comparison import Plan, compare, read_duration, report, written_duration
from attar.compare.protocol import read_entry
from attar.errors import AttarError
from runs import compare_in_child, in_child, quiet, tiny

BASE = tiny(train_limit=128, epochs=1, checkpoint_seconds=0.0)
# Differ from run to run whatever is trained.
TIMES = {"training_seconds", "images_per_second", "peak_memory", "latency", "step"}


def plan(*entries: str, seeds: int = 2, **settings: Any) -> Plan:
    base = BASE.model_copy(update=settings.pop("base", {}))
    return Plan(tuple(map(read_entry, entries)), base, tuple(range(seeds)), **{"smoothing": (0.1,), **settings})


def figures(analysis: Analysis) -> dict[str, Any]:
    """Everything that must not depend on when and how often the comparison was interrupted."""
    return {
        entry.label: (
            entry.seeds,
            {key: value for key, value in entry.figures.items() if key not in TIMES},
            entry.against_plain,
            entry.against_smoothing,
            entry.verdict,
            entry.curve.tolist(),
            entry.confusion.tolist(),
            entry.attached,
        )
        for entry in analysis.entries
    }


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, Analysis]:
    home = tmp_path_factory.mktemp("compared")
    chosen = plan("ONE(branches=2)", smoothing=(0.05, 0.2))
    return home, chosen, compare(chosen, home, jobs=2, console=quiet())


def test_baselines_are_always_there_and_smoothing_is_tuned_on_the_holdout(
    compared: tuple[Path, Plan, Analysis],
) -> None:
    home, _, analysis = compared
    results = {
        share: json.loads(next(home.glob(f"Supervised-label_smoothing-{share}-seed0-*/result.json")).read_text())
        for share in (0.05, 0.2)
    }
    best = max(results, key=lambda share: (results[share]["holdout"]["top1"], -results[share]["holdout"]["nll"]))
    labels = [entry.label for entry in analysis.entries]
    assert labels == ["plain", f"label smoothing {best}", "ONE(branches=2)"]
    assert [entry.role for entry in analysis.entries] == ["plain", "smoothing", "method"]
    assert all(entry.seeds == (0, 1) for entry in analysis.entries)
    # The other candidate has the first seed alone.
    other = next(share for share in results if share != best)
    assert len(list(home.glob(f"Supervised-label_smoothing-{other}-*"))) == 1
    assert dict(analysis.smoothing) == {str(share): result["holdout"]["top1"] for share, result in results.items()}
    assert {path.name for path in home.glob("report.*")} == {"report.html", "report.md", "report.csv", "report.json"}


def test_all_runs_share_seeds_split_order_and_schedule(compared: tuple[Path, Plan, Analysis]) -> None:
    home, _, _ = compared
    specs = [json.loads(path.read_text()) for path in home.glob("*/spec.json")]
    for name in specs[0].keys() - {"methods", "seed"}:
        assert len({json.dumps(spec[name]) for spec in specs}) == 1, name
    results = [json.loads(path.read_text()) for path in home.glob("*/result.json")]
    assert len({result["data_fingerprint"] for result in results}) == 1
    # Students of one seed begin alike: their plain runs and the smoothed ones see the same first loss but for labels.
    assert len({result["parameters"]["deployed"] for result in results}) == 1


def test_again_trains_nothing_and_an_added_entry_only_itself(compared: tuple[Path, Plan, Analysis]) -> None:
    home, chosen, analysis = compared
    before = {path: path.stat().st_mtime_ns for path in home.glob("*/result.json")}
    again = compare(chosen, home, jobs=2, console=quiet())
    assert figures(again) == figures(analysis)
    assert {entry.label: entry.figures.get("step") for entry in again.entries} == {
        entry.label: entry.figures.get("step") for entry in analysis.entries
    }, "what was measured is kept"
    wider = compare(plan("ONE(branches=2)", "ONE(gate=mean)", smoothing=(0.05, 0.2)), home, console=quiet())
    after = {path: path.stat().st_mtime_ns for path in home.glob("*/result.json")}
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 2
    assert [entry.label for entry in wider.entries][2:] == ["ONE(branches=2)", "ONE(gate=mean)"]


def test_report_from_run_folders_alone(compared: tuple[Path, Plan, Analysis], tmp_path: Path) -> None:
    home, _, analysis = compared
    chosen = [Path(folder) for entry in analysis.entries[:3] for folder in entry.folders]
    assert figures(report(chosen, tmp_path / "some")).keys() == {entry.label for entry in analysis.entries[:3]}
    assert (tmp_path / "some/report.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(home), "--out", str(tmp_path / "all")]) == 0
    assert (tmp_path / "all/report.csv").is_file()


def test_killed_and_called_again_reports_the_same(compared: tuple[Path, Plan, Analysis], tmp_path: Path) -> None:
    _, chosen, undisturbed = compared
    child = in_child(compare_in_child, chosen, tmp_path / "killed")
    waited = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("*/result.json"))) < 3:
        assert time.monotonic() < waited
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*/result.json")}
    again = compare(chosen, tmp_path / "killed", jobs=2, console=quiet())
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert figures(again) == figures(undisturbed)


def test_two_processes_share_one_comparison(tmp_path: Path) -> None:
    chosen = plan("ONE", seeds=1)
    children = [in_child(compare_in_child, chosen, tmp_path) for _ in range(2)]
    for child in children:
        child.join(300)
        assert child.exitcode == 0
    started = [len(json.loads(path.read_text())) for path in tmp_path.glob("*/environment.json")]
    assert started == [1] * 3


def test_a_method_that_produces_nan_is_explained_and_the_rest_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "ONE(temperature=1e30)", "ONE", "--seeds", "1", "--smoothing", "0.1", "--out", str(tmp_path)]
    words += ["--model", "cifar_resnet20", "--model-options", "width=0.25", "--data", "digits"]
    words += ["--train-limit", "128", "--epochs", "1", "--batch", "32", "--precision", "fp32"]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "ONE(temperature=1e+30), seed 0: Term ONE.kl became NaN or infinite at step" in out
    with (tmp_path / "report.json").open() as file:
        entries = {entry["label"]: entry for entry in json.load(file)["entries"]}
    assert len(entries["ONE"]["seeds"]) == 1
    assert len(entries["ONE(temperature=1e+30)"]["failures"]) == 1
    assert "became NaN" in (tmp_path / "report.html").read_text()
    assert "became NaN" in (tmp_path / "report.md").read_text()
    with (tmp_path / "report.csv").open() as file:
        assert {row["label"] for row in csv.DictReader(file)} >= {"plain", "ONE"}


def test_equal_cost_gives_dearer_methods_fewer_epochs(tmp_path: Path) -> None:
    chosen = plan("ONE(branches=5)", seeds=1, equal="cost", base={"epochs": 6})
    analysis = compare(chosen, tmp_path, jobs=1, console=quiet())
    cost = json.loads((tmp_path / "comparison.json").read_text())["relative_cost"]["ONE(branches=5)"]
    epochs = {entry.label: entry.epochs for entry in analysis.entries}
    assert cost > 1.1
    assert epochs == {"plain": 6, "label smoothing 0.1": 6, "ONE(branches=5)": max(1, round(6 / cost))}
    assert epochs["ONE(branches=5)"] < 6
    assert any("Equal training cost" in note for note in analysis.notes)


def test_a_budget_chooses_the_epochs_once(tmp_path: Path) -> None:
    chosen = plan("ONE", seeds=1, budget=6.0, base={"checkpoint_seconds": 60.0})
    first = compare(chosen, tmp_path, jobs=1, console=quiet())
    epochs = json.loads((tmp_path / "comparison.json").read_text())["epochs_for_budget"]["6s"]
    assert [entry.epochs for entry in first.entries] == [epochs] * 3
    assert epochs > 1
    assert figures(compare(chosen, tmp_path, jobs=1, console=quiet())) == figures(first)
    with pytest.raises(AttarError, match=r"One epoch of every run takes about \d+s, more than the budget of 0s"):
        compare(plan("ONE", budget=1e-3), tmp_path / "none", jobs=1, console=quiet())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "Name what to compare first"),
        (["ONE"], "Option 'model' must be given"),
        (["ONE", "ONE(branches=3)"], "'ONE' is given 2 times"),
        (["Supervised(label_smoothing=0.3)"], "Label smoothing is always in the table: give --smoothing"),
        (["ONE", "--seeds", "0"], "at least 1 seed, not 0"),
        (["ONE", "--smoothing", "1.5"], r"between 0 and 1 and cannot be \[1.5\]"),
        (["ONE", "--budget", "soon"], "'soon' is no time: write 8h"),
        (["ONE", "--budget", "1h", "--epochs", "3"], "Give --epochs or --budget"),
        (["ONE", "--equal", "luck"], "invalid choice"),
        (["ONE", "--seed", "1"], "There is no option '--seed': did you mean '--seeds'"),
        (["ONE(branch=1)"], "did you mean 'branches'"),
        (["ONE", "--jobs", "0"], "At least 1 run at a time"),
        (["KD(teachers=nowhere)"], "There is no teacher 'nowhere'"),
        (["ONE", "--data", "nowhere"], "nowhere"),
        (["ONE", "--model", "resnet19"], "did you mean"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["compare", *words, "--out", str(tmp_path / "out")]
    if words and words != ["ONE"]:
        for option, value in (("--model", "cifar_resnet20"), ("--data", "digits")):
            given += [] if option in words else [option, value]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said), said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_reports_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        ([], "Name the run folders"),
        ([str(tmp_path / "none")], "There is no folder"),
        ([str(tmp_path)], "is no run folder and holds none"),
        ([str(tmp_path), str(tmp_path)], "Say with --out"),
    ):
        assert main(["report", *words]) == 2
        assert sentence in capsys.readouterr().err
    (tmp_path / "spec.json").write_text("{}")
    assert main(["compare", "ONE", "--model", "cifar_resnet20", "--data", "digits", "--out", str(tmp_path)]) == 2
    assert "is no folder of a comparison" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"), [("8h", 28800), ("1h30min", 5400), ("90 min", 5400), ("1.5h", 5400), ("45s", 45)]
)
def test_durations(text: str, seconds: float) -> None:
    assert read_duration(text) == seconds
    assert read_duration(written_duration(seconds)) == seconds
