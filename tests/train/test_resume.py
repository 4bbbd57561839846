"""A run killed, interrupted or stopped anywhere ends as one that never was; what must not be mixed up is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attar.errors import AttarError
from attar.method import Method
from attar.methods import available, find
from attar.spec import TrainSpec, method_options, teacher_options
from attar.train import Interrupted, fit
from attar.train.checkpoint import Checkpoints
from runs import assert_same_run, in_child, kill_after_lines, lines, quiet, tiny, train_in_child


def small_run(method: str, teacher: Path, **fields: Any) -> TrainSpec:
    """A run of a method with what it cannot do without, and with what makes it remember or draw most."""
    options = method_options(find(method)).model_fields
    taught = {name: [str(teacher)] for name in teacher_options(find(method)) if options[name].is_required()}
    chosen = {"name": method, "options": {**taught, **({"sampler": "balanced"} if method == "OSKD" else {})}}
    epochs = 2 if find(method).phases is Method.phases else 6  # every phase takes one
    return tiny(chosen, train_limit=160, log_every=1, epochs=epochs, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(available()))
def test_sigkill_at_a_random_moment_every_method_ends_bit_identical(
    method: str, tmp_path: Path, one_run: tuple[Path, TrainSpec, dict[str, Any]]
) -> None:
    fit(small_run(method, one_run[0]), tmp_path / "whole", console=quiet())
    draw = random.Random(method)
    count = draw.randrange(2, len(lines(tmp_path / "whole", "step")) + 1)
    spec = small_run(method, one_run[0], checkpoint_seconds=0.0)
    assert kill_after_lines(spec, tmp_path / "killed", count, draw.random() * 0.05)
    fit(spec, tmp_path / "killed", console=quiet())
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("method", ["Supervised", pytest.param("KD", marks=pytest.mark.slow), "ONE"])
def test_sigkill_at_random_moments_ends_bit_identical(
    method: str, tmp_path: Path, one_run: tuple[Path, TrainSpec, dict[str, Any]]
) -> None:
    chosen: dict[str, Any] = {
        "Supervised": {"name": "Supervised", "options": {"label_smoothing": 0.1, "mixup": 0.2}},
        "KD": {"name": "KD", "options": {"teachers": [str(one_run[0])]}},
        "ONE": {"name": "ONE"},
    }[method]
    # Dropout and mixing draw random numbers; a checkpoint at every step leaves none of them to luck.
    often = {"log_every": 1, "checkpoint_seconds": 0.0}
    common: dict[str, Any] = {"model_options": {"width": 0.25, "drop_rate": 0.1}, "ema": 0.9, "keep_last": True}
    spec = tiny(chosen, **common, **often)
    fit(tiny(chosen, **common, log_every=1), tmp_path / "whole", console=quiet())
    draw = random.Random(method)
    steps = len(lines(tmp_path / "whole", "step"))
    killed = 0
    for count in sorted(draw.sample(range(1, steps + 2), 3)):
        killed += kill_after_lines(spec, tmp_path / "killed", count, draw.random() * 0.05)
    assert killed == 3
    fit(spec, tmp_path / "killed", console=quiet())
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


# Of these a checkpoint keeps the weights alone, as of ONE and KD: no memory of samples or steps, no phases, no copies,
# nothing that an epoch's start changes, no sampler but OSKD's. All others, and what is new, are stopped by default.
WEIGHTS_ALONE = {
    *("AT", "BAKE", "BYOT", "DDGSD", "DML", "FRSKD", "InformationFlow", "Moonshine", "OKDDip", "OSAKD"),
    *("OnlineEnsemble", "PKT", "SAD", "SCD", "SLA", "SPKD", "Supervised", "TfKD"),
}


def default_or_slow() -> list[Any]:
    assert available().keys() >= WEIGHTS_ALONE
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name in WEIGHTS_ALONE else []) for name in sorted(available())
    ]


@pytest.mark.parametrize("method", default_or_slow())
def test_stopped_inside_an_epoch_every_method_ends_bit_identical(
    method: str, tmp_path: Path, one_run: tuple[Path, TrainSpec, dict[str, Any]]
) -> None:
    """Samplers, memories of samples and of the last step, schedules: all of it goes on where it stopped."""
    spec = small_run(method, one_run[0])
    fit(spec, tmp_path / "whole", console=quiet())
    with pytest.raises(Interrupted):
        fit(spec, tmp_path / "stopped", console=quiet(), stop_after=len(lines(tmp_path / "whole", "step")) // 2 + 1)
    fit(spec, tmp_path / "stopped", console=quiet())
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_resumes(number: int, tmp_path: Path) -> None:
    spec = tiny(log_every=1, checkpoint_seconds=3600.0)
    child = in_child(train_in_child, spec, tmp_path / "run")
    path = tmp_path / "run/metrics.jsonl"
    while child.is_alive() and not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        time.sleep(0.002)
    assert child.pid is not None
    os.kill(child.pid, number)
    child.join()
    assert child.exitcode == 130
    said = (tmp_path / "run/said.txt").read_text()
    (tmp_path / "run/said.txt").unlink()
    assert said.endswith("run the same command again to go on.")
    assert list((tmp_path / "run/checkpoints").glob("step_*.pt"))
    fit(spec, tmp_path / "run", console=quiet())
    fit(spec, tmp_path / "whole", console=quiet())
    assert_same_run(tmp_path / "run", tmp_path / "whole")


class Curriculum(Method):
    """Keeps a phase as a plain attribute and a count in a buffer: both must survive a stop inside an epoch."""

    def build(self, probe: Any) -> None:
        self.register_buffer("seen", torch.zeros(()))
        self.phase = 0.0

    def taps(self, anatomy: Any) -> list[Any]:
        return []

    def epoch_start(self, epoch: int, epochs: int) -> None:
        self.phase = float(epoch)
        self.seen.zero_()

    def losses(self, outputs: Any, batch: Any, progress: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen += 1
        return {"phase": outputs.logits.square().mean() * 0.01 * (self.phase + self.seen)}


def test_what_held_out_images_have_taught_survives_a_stop(tmp_path: Path) -> None:
    spec = tiny({"name": "KDCL", "options": {"target": "general"}}, train_limit=160, log_every=1, epochs=3)
    fit(spec, tmp_path / "whole", console=quiet())
    steps = len(lines(tmp_path / "whole", "step"))
    with pytest.raises(Interrupted):
        fit(spec, tmp_path / "stopped", console=quiet(), stop_after=steps // 3 + 2)
    state = Checkpoints(tmp_path / "stopped/checkpoints").latest()
    assert state is not None
    (mixture,) = (value for name, value in state["distiller"].items() if name.endswith("mixture"))
    assert not torch.equal(mixture, torch.full((2,), 0.5))
    fit(spec, tmp_path / "stopped", console=quiet())
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_methods_that_change_with_the_epoch_resume_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attar.methods.Curriculum", Curriculum, raising=False)
    spec = tiny("Curriculum")
    with pytest.raises(Interrupted, match=r"step 13 of 16 \(epoch 2 of 2\)"):
        fit(spec, tmp_path / "run", console=quiet(), stop_after=13)
    fit(spec, tmp_path / "run", console=quiet())
    fit(spec, tmp_path / "whole", console=quiet())
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_stop_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    spec = tiny(optimizer="adamw", lr=0.001)
    with pytest.raises(Interrupted, match=r"step 8 of 16"):
        fit(spec, tmp_path / "run", console=quiet(), stop_after=8)
    fit(spec, tmp_path / "run", console=quiet())
    fit(spec, tmp_path / "whole", console=quiet())
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_gives_its_result_at_once(one_run: tuple[Path, TrainSpec, dict[str, Any]]) -> None:
    folder, spec, result = one_run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    console = quiet()
    assert fit(spec, folder, console=console) == json.loads(json.dumps(result))
    assert "is finished: this is its stored result." in console.file.getvalue()  # type: ignore[attr-defined]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_folder_of_another_spec_is_refused(one_run: tuple[Path, TrainSpec, dict[str, Any]]) -> None:
    folder, spec, _ = one_run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(AttarError, match=r"another spec, which differs in epochs \(2 there, 9 now\), lr \(0.05 there"):
        fit(spec.model_copy(update={"epochs": 9, "lr": 0.1}), folder, console=quiet())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    # How often a run writes changes nothing of its result.
    fit(spec.model_copy(update={"log_every": 1}), folder, console=quiet())


def test_overwrite_begins_anew(tmp_path: Path) -> None:
    spec = tiny(seed=1, epochs=1)
    fit(tiny(epochs=1), tmp_path / "run", console=quiet())
    (tmp_path / "run/notes.txt").write_text("mine")
    fit(spec, tmp_path / "run", console=quiet(), overwrite=True)
    fit(spec, tmp_path / "whole", console=quiet())
    assert (tmp_path / "run/notes.txt").read_text() == "mine"
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(AttarError, match="is not empty and holds no run: choose another run folder"):
            fit(tiny(), tmp_path, console=quiet(), overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(AttarError, match="is a file: choose another run folder"):
        fit(tiny(), tmp_path / "thesis.tex", console=quiet())


def test_a_mistake_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(AttarError, match="did you mean 'cifar_resnet"):
        fit(tiny(model="cifar_resnet21"), tmp_path / "run", console=quiet())
    with pytest.raises(AttarError, match=r"let train_limit be from 10 to \d+"):
        fit(tiny(train_limit=3), tmp_path / "run", console=quiet())
    assert not (tmp_path / "run").exists()


def test_changed_images_are_refused(tmp_path: Path, photos: Callable[[int], Path]) -> None:
    spec = tiny(data=str(photos(0)), train_limit=None, batch=8)
    with pytest.raises(Interrupted):
        fit(spec, tmp_path / "run", console=quiet(), stop_after=3)
    photos(1)
    with pytest.raises(AttarError, match="have changed since the run"):
        fit(spec, tmp_path / "run", console=quiet())
