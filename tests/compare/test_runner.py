"""The runner: every run exactly once, whatever fails, whoever is killed, however many work in one folder."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from attar.compare.protocol import Entry, read_entry, run_folder
from attar.compare.records import read_records
from attar.compare.runner import Cell, train_all
from attar.errors import AttarError
from attar.spec import parse
from attar.train import fit
from runs import in_child, quiet, tiny, train_all_in_child

SMALL = {"train_limit": 128, "epochs": 1, "checkpoint_seconds": 0.0}


def cells(home: Path, entries: Sequence[str], seeds: int, **fields: object) -> list[Cell]:
    made = []
    for seed in range(seeds):
        for text in entries:
            entry = Entry("plain", ()) if text == "plain" else read_entry(text)
            spec = tiny(*(method.model_dump() for method in entry.methods), **{**SMALL, **fields}, seed=seed)
            made.append(Cell(entry.label, spec, run_folder(home, spec)))
    return made


def times_started(home: Path) -> dict[str, int]:
    return {path.parent.name: len(json.loads(path.read_text())) for path in home.glob("*/environment.json")}


def test_several_at_a_time_give_what_each_gives_alone(tmp_path: Path) -> None:
    planned = cells(tmp_path / "together", ["plain", "ONE"], 2)
    said = io.StringIO()
    train_all(planned, jobs=2, console=Console(file=said, width=200))
    assert all(cell.finished for cell in planned)
    alone = fit(planned[1].spec, tmp_path / "alone", console=quiet())
    together = json.loads((planned[1].folder / "result.json").read_text())
    for name in ("test", "holdout", "deployables", "terms", "flops", "attached"):
        assert together[name] == alone[name], name
    lines = said.getvalue().splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == [
        *("ONE, seed 0", "ONE, seed 1", "plain, seed 0", "plain, seed 1")
    ]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "together").rglob("*")}
    train_all(planned, jobs=2, console=quiet())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "together").rglob("*")} == before


def test_what_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    good = cells(tmp_path, ["plain"], 2)
    diverging = cells(tmp_path, ["ONE"], 1, lr=1e12)
    impossible = cells(tmp_path, ["plain"], 1, model_options={"width": "wide"})
    planned = [diverging[0], impossible[0], *good]
    said = io.StringIO()
    train_all(planned, jobs=2, console=Console(file=said, width=400))
    assert [cell.finished for cell in planned] == [False, False, True, True]
    reasons = {record.folder: record.failure for record in read_records([tmp_path])}
    assert "became NaN or infinite at step" in str(reasons[diverging[0].folder])
    assert "cannot be made with these options" in str(reasons[impossible[0].folder])
    assert reasons[good[0].folder] is None
    assert "ONE, seed 0: FAILED: " in said.getvalue()
    # The next call tries what failed again, and nothing else.
    train_all(planned, jobs=2, console=quiet())
    started = times_started(tmp_path)
    assert started[good[0].folder.name] == 1
    assert started[diverging[0].folder.name] == 2


@pytest.mark.slow  # as a part of two whole comparisons at one folder: test_comparison.py
def test_two_processes_at_one_folder_do_each_run_once(tmp_path: Path) -> None:
    planned = cells(tmp_path, ["plain", "ONE"], 2)
    parents = [in_child(train_all_in_child, planned, 1), in_child(train_all_in_child, planned[::-1], 1)]
    for parent in parents:
        parent.join(120)
        assert parent.exitcode == 0
    assert all(cell.finished for cell in planned)
    assert set(times_started(tmp_path).values()) == {1}


@pytest.mark.slow  # as a part of a whole comparison: test_comparison.py
def test_killed_and_called_again(tmp_path: Path) -> None:
    planned = cells(tmp_path, ["plain", "ONE"], 2, epochs=6)
    parent = in_child(train_all_in_child, planned, 1)
    waited = time.monotonic() + 100
    while sum(cell.finished for cell in planned) < 1 or not any((planned[1].folder / "checkpoints").glob("*")):
        assert time.monotonic() < waited, "the first run must end and the second begin"
        time.sleep(0.01)
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    finished = [cell for cell in planned if cell.finished]
    assert 1 <= len(finished) < len(planned)
    result = (finished[0].folder / "result.json").stat().st_mtime_ns
    train_all(planned, jobs=1, console=quiet())
    assert all(cell.finished for cell in planned)
    assert (finished[0].folder / "result.json").stat().st_mtime_ns == result
    assert times_started(tmp_path)[finished[0].folder.name] == 1
    interrupted = planned[1]
    alone = fit(interrupted.spec, tmp_path / "alone" / "run", console=quiet())
    assert json.loads((interrupted.folder / "result.json").read_text())["test"] == alone["test"]


def test_a_child_that_is_killed_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    planned = cells(tmp_path, ["ONE"], 1, epochs=50)
    parent = in_child(train_all_in_child, planned, 1)
    waited = time.monotonic() + 100
    while not (environment := planned[0].folder / "environment.json").exists():
        assert time.monotonic() < waited
        time.sleep(0.01)
    child = json.loads(environment.read_text())[-1]["process"]
    os.kill(child, signal.SIGKILL)
    parent.join(60)
    assert parent.exitcode == 0
    reason = read_records([tmp_path])[0].failure
    assert reason == "Its process was ended from outside (SIGKILL), perhaps for lack of memory."


def test_no_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AttarError, match="At least 1 run at a time"):
        train_all(cells(tmp_path, ["plain"], 1), jobs=0, console=quiet())


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("ONE", "ONE"),
        ("one(branches=3)", "ONE"),
        ("ONE(branches=2, gate=mean)", "ONE(branches=2,gate=mean)"),
        ("ONE(kl-weight=0)+Supervised(label_smoothing=0.1)", "ONE(kl_weight=0.0)+Supervised(label_smoothing=0.1)"),
        ("KD(teachers=runs/ONE+x)", "KD(teachers=runs/ONE+x)"),
        ("DML(peers=2)", "DML(peers=2)"),
        ("DML(peers=1)", "DML"),
        ("DML(peers=resnet18)", "DML(peers=resnet18)"),
        ('DML(peers=["cifar_resnet32", "resnet18"])', "DML(peers=[cifar_resnet32,resnet18])"),
        ("DML(peers=[cifar_resnet32,resnet18])", "DML(peers=[cifar_resnet32,resnet18])"),
        ('KD(teachers=["a","b,c"],temperature=2)', "KD(teachers=[a,b,c],temperature=2.0)"),
    ],
)
def test_entries_are_read_as_they_are_written(text: str, label: str) -> None:
    assert read_entry(text).label == label


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ONF", "no method 'ONF': did you mean 'ONE'"),
        ("ONE(branch=2)", "ONE: There is no option 'branch': did you mean 'branches'"),
        ("ONE(branches=two)", "ONE: Option 'branches' cannot be 'two'"),
        ("ONE(branches=2", "brackets of 'ONE\\(branches=2' do not match"),
        ("ONE)", "brackets of 'ONE\\)' do not match"),
        ("ONE+ONE(gate=mean)", "ONE is given 2 times"),
        ("ONE()x", "cannot be read"),
        ("ONE(2)", "'2' in 'ONE\\(2\\)' is no OPTION=VALUE"),
        ("KD", "KD: Option 'teachers' must be given"),
    ],
)
def test_entries_that_are_none(text: str, sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        read_entry(text)


def test_a_folder_per_spec_and_no_folder_for_two(tmp_path: Path) -> None:
    planned = cells(tmp_path, ["plain", "ONE", "ONE(branches=2)"], 2)
    assert len({cell.folder for cell in planned}) == len(planned)
    later = parse(type(planned[0].spec), {**planned[0].spec.model_dump(), "log_every": 9})
    assert run_folder(tmp_path, later) == planned[0].folder, "how often a run reports changes nothing of it"
