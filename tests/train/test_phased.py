"""Methods that train in phases, in the training loop: what is learnt when, and what a stop inside or between leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attar.cli import main
from attar.errors import AttarError
from attar.spec import TrainSpec
from attar.teacher import Teacher
from attar.train import Interrupted, build, fit
from runs import lines, quiet, tiny, train_as_rank, two_ranks

# Every epoch of the run: what is learnt in it, in which phase.
SHORT = {"train_limit": 160, "epochs": 5, "log_every": 1, "model_options": {"width": 0.125}}
INDISTILL = [*((f"layer {i}", {"InDistill.mse"}) for i in (1, 2, 3)), *[(None, {"task", "KD.kl"})] * 2]
SRM = [
    ("dictionary", {"SRM.reconstruction"}),
    *[("initialisation", {"SRM.pixel", "SRM.image"})] * 2,
    *[(None, {"task", "SRM.kl"})] * 2,
]


def spec_of(name: str, teacher: Path, **fields: Any) -> TrainSpec:
    given = {"teachers": [str(teacher)]}
    methods = [{"name": name, "options": given}]
    if name == "InDistill":
        methods.append({"name": "KD", "options": given})
    return tiny(*methods, **{**SHORT, **fields})


def history(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]


@pytest.mark.parametrize(("name", "epochs", "stops"), [("InDistill", INDISTILL, (7, 10)), ("SRM", SRM, (5, 8))])
def test_phases_follow_one_another_and_a_run_stopped_anywhere_ends_the_same(
    name: str,
    epochs: list[tuple[str | None, set[str]]],
    stops: tuple[int, ...],
    tmp_path: Path,
    one_run: tuple[Path, TrainSpec, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teachers: list[Teacher] = []
    load = build.load_teacher

    def remembered(*arguments: Any) -> Teacher:
        teachers.append(load(*arguments))
        return teachers[-1]

    monkeypatch.setattr(build, "load_teacher", remembered)
    spec = spec_of(name, one_run[0])
    result = fit(spec, tmp_path / "whole", console=quiet())
    assert epochs[result["best_epoch"]][0] is None  # what a phase leaves is not chosen

    told = lines(tmp_path / "whole", "epoch")
    assert [(line.get("phase"), set(line["losses"])) for line in told] == epochs
    steps = lines(tmp_path / "whole", "step")
    assert [step.get("phase") for step in steps] == [phase for phase, _ in epochs for _ in range(len(steps) // 5)]
    rates = [step["lr"] for step in steps]  # of InDistill the first step warms up; five steps are too few for that
    assert [i for i in range(1, 25) if rates[i] > rates[i - 1]] == {"InDistill": [1], "SRM": [5, 15]}[name]
    assert set(result["terms"]) == epochs[-1][1]
    fresh = load(str(one_run[0]), 10).network.state_dict()
    assert teachers
    for teacher in teachers:
        assert all(torch.equal(value, fresh[key]) for key, value in teacher.network.state_dict().items())
        assert not teacher.network.training

    for stop in stops:
        folder = tmp_path / f"stopped{stop}"
        with pytest.raises(Interrupted, match=f"step {stop} of 25"):
            fit(spec, folder, console=quiet(), stop_after=stop)
        fit(spec, folder, console=quiet())
        weights = [(path / "student/model.safetensors").read_bytes() for path in (folder, tmp_path / "whole")]
        assert weights[0] == weights[1]
        assert history(folder) == history(tmp_path / "whole")


def test_what_is_said_while_it_trains(tmp_path: Path, one_run: tuple[Path, TrainSpec, dict[str, Any]]) -> None:
    console = quiet()
    fit(spec_of("SRM", one_run[0], epochs=3), tmp_path / "run", console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "epoch 1/3 (dictionary)  loss" in said
    assert "epoch 2/3 (initialisation)  loss" in said
    assert "epoch 3/3  loss" in said


def test_phases_on_two_ranks(tmp_path: Path, one_run: tuple[Path, TrainSpec, dict[str, Any]]) -> None:
    """Parameters that take no part in a phase hang no process, and a stop between two phases leaves no trace."""
    short = {"train_limit": 160, "log_every": 1}
    teacher = {"teachers": [str(one_run[0])]}
    methods = [{"name": name, "options": teacher} for name in ("InDistill", "SRM")]
    options = {"width": 0.125}
    spec = tiny(*methods, epochs=6, model_options=options, **short)
    assert two_ranks(train_as_rank, spec, tmp_path / "whole", None) == [0, 0]
    assert two_ranks(train_as_rank, spec, tmp_path / "run", 15) == [130, 130]
    assert two_ranks(train_as_rank, spec, tmp_path / "run", None) == [0, 0]
    told = [(line.get("phase"), line["losses"]) for line in lines(tmp_path / "whole", "epoch")]
    assert [phase for phase, _ in told] == ["layer 1", "layer 2", "layer 3", "dictionary", "initialisation", None]
    assert told == [(line.get("phase"), line["losses"]) for line in lines(tmp_path / "run", "epoch")]
    weights = [(tmp_path / name / "student/model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]


def test_a_run_too_short_for_its_phases_is_refused(
    tmp_path: Path, one_run: tuple[Path, TrainSpec, dict[str, Any]]
) -> None:
    with pytest.raises(AttarError, match="The 3 phases of InDistill take 3 epochs and leave none of 3"):
        fit(spec_of("InDistill", one_run[0], epochs=3), tmp_path / "run", console=quiet())


def test_check_looks_at_every_phase(
    capsys: pytest.CaptureFixture[str], one_run: tuple[Path, TrainSpec, dict[str, Any]]
) -> None:
    words = [
        "check",
        "InDistill+SRM",
        "--model",
        "cifar_resnet20",
        "--model-options",
        "width=0.125",
        "--data",
        "digits",
    ]
    given = [word for method in ("indistill", "srm") for word in (f"--{method}.teachers", str(one_run[0]))]
    assert main([*words, *given]) == 0
    said = capsys.readouterr().out
    assert "InDistill.mse (layer 2)" in said
    assert "SRM begins with the phase 'dictionary', 21.7% of the run." in said
    assert "0 parameters without a gradient." in said
    assert "All is well." in said
