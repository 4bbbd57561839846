"""What a run leaves behind, what it refuses, and how its terms and weights are logged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from attar.errors import AttarError
from attar.method import Method
from attar.spec import TrainSpec
from attar.train import Interrupted, fit
from runs import lines, quiet, tiny


def test_run_folder(one_run: tuple[Path, TrainSpec, dict[str, Any]]) -> None:
    folder, spec, result = one_run
    assert sorted(path.name for path in folder.iterdir()) == [
        *("checkpoints", "environment.json", "metrics.jsonl", "predictions.npz", "result.json", "spec.json", "student"),
        "tensorboard",
    ]
    assert TrainSpec.load(folder / "spec.json") == spec
    assert json.loads((folder / "result.json").read_text()) == result
    assert sorted(path.name for path in (folder / "student").iterdir()) == ["config.json", "model.safetensors"]
    session = json.loads((folder / "environment.json").read_text())
    assert len(session) == 1
    assert session[0]["torch"] == torch.__version__
    assert session[0]["images"] == {"train": 256, "holdout": 144, "test": 360}
    assert [line["step"] for line in lines(folder, "step")] == [4, 8, 12, 16]
    epochs = lines(folder, "epoch")
    assert [line["epoch"] for line in epochs] == [0, 1]
    assert epochs[result["best_epoch"]]["holdout"] == result["holdout"]
    assert set(result["terms"]) == {"task", "ONE.ce_branches", "ONE.ce_ensemble", "ONE.kl"}
    assert result["terms"]["task"]["loss"] == epochs[-1]["losses"]["task"]
    assert result["parameters"]["deployed"] < result["parameters"]["training"]
    ensemble = result["deployables"]["ONE.ensemble"]
    assert ensemble["parameters"] == result["parameters"]["training"]
    assert ensemble["test"]["images"] == 360
    assert result["exportable"] is True


def test_epoch_means_are_those_of_the_steps(tmp_path: Path) -> None:
    fit(tiny("ONE", log_every=1, epochs=1), tmp_path, console=quiet())
    steps, epoch = lines(tmp_path, "step"), lines(tmp_path, "epoch")[0]
    for name, mean in epoch["losses"].items():
        assert mean == pytest.approx(sum(line["losses"][name] for line in steps) / len(steps), rel=1e-6)


def test_tensorboard_events(one_run: tuple[Path, TrainSpec, dict[str, Any]]) -> None:
    folder, _, _ = one_run
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for line in lines(folder, "step"):
        for name, loss in line["losses"].items():
            found = {event.step: event.value for event in events.Scalars(f"loss/{name}")}
            assert found[line["step"]] == pytest.approx(loss)
    assert [event.step for event in events.Scalars("holdout/top1")] == [8, 16]


def ramp(progress: float, length: float) -> float:
    """The specification: exp(-5 (1 - min(e, R) / R)^2)."""
    return math.exp(-5 * (1 - min(progress, length) / length) ** 2)


@pytest.mark.parametrize("moves", ["step", "epoch"])
def test_weight_of_one_follows_the_specification_also_on_resume(moves: str, tmp_path: Path) -> None:
    one = {"name": "ONE", "options": {"ramp": 0.5, "branches": 2}}
    spec = tiny(one, epochs=4, log_every=1, progress=moves, train_limit=128)
    with pytest.raises(Interrupted):
        fit(spec, tmp_path, console=quiet(), stop_after=6)
    fit(spec, tmp_path, console=quiet())
    rows = lines(tmp_path, "step")
    assert [row["step"] for row in rows] == list(range(1, 17))
    for row in rows:
        done = row["epoch"] / 4 if moves == "epoch" else (row["step"] - 1) / 16
        assert row["progress"] == done
        assert row["weights"]["ONE.kl"] == pytest.approx(ramp(done, 0.5), rel=1e-6)
        assert row["weights"]["ONE.ce_branches"] == row["weights"]["task"] == 1.0
    start, half, after = (rows[step]["weights"]["ONE.kl"] for step in (0, 4, 8))
    assert [start, half, after] == pytest.approx([math.exp(-5), math.exp(-1.25), 1.0])


class Explodes(Method):
    """A term that is NaN from a given step on."""

    def __init__(self, *, at: int = 5) -> None:
        super().__init__()
        self.at = at

    def build(self, probe: Any) -> None:
        self.register_buffer("steps", torch.zeros(()))

    def taps(self, anatomy: Any) -> list[Any]:
        return []

    def losses(self, outputs: Any, batch: Any, progress: torch.Tensor) -> dict[str, torch.Tensor]:
        self.steps += 1
        good = outputs.logits.square().mean()
        bad = torch.where(self.steps > self.at, torch.tensor(float("nan")), torch.tensor(0.0))
        return {"fine": good, "bad": good + bad}


@pytest.mark.parametrize(
    ("at", "said"), [(5, "no checkpoint was written yet"), (13, "the checkpoint of step 8 is kept")]
)
def test_nan_stops_and_names_term_and_step(at: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attar.methods.Explodes", Explodes, raising=False)
    spec = tiny({"name": "Explodes", "options": {"at": at}}, log_every=50)
    with pytest.raises(AttarError, match=rf"^Term Explodes.bad became NaN or infinite at step {at}: {said}"):
        fit(spec, tmp_path, console=quiet())
    kept = sorted((tmp_path / "checkpoints").glob("step_*.pt"))
    assert [path.name for path in kept] == ([] if at == 5 else ["step_00000008.pt"])
    for path in kept:
        for value in torch.load(path, weights_only=True)["distiller"].values():
            assert value.isfinite().all()
    assert not (tmp_path / "result.json").exists()


class BadGradient(Method):
    """A finite term with an infinite gradient: the square root at zero."""

    def taps(self, anatomy: Any) -> list[Any]:
        return []

    def losses(self, outputs: Any, batch: Any, progress: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"root": (outputs.logits * 0.0).square().sum().sqrt()}


def test_a_gradient_that_is_not_finite_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attar.methods.BadGradient", BadGradient, raising=False)
    with pytest.raises(AttarError, match="became NaN or infinite"):
        fit(tiny("BadGradient", checkpoint_seconds=0.0), tmp_path, console=quiet())
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_batch_norm_with_a_last_batch_of_one_image(tmp_path: Path) -> None:
    # 97 images in batches of 32 leave one; the gate of ONE takes it, the last stage's 2 x 2 maps do too.
    fit(tiny("ONE", train_limit=97, keep_last=True, epochs=1), tmp_path / "run", console=quiet())
    assert lines(tmp_path / "run", "epoch")[0]["step"] == 4
    spec = tiny(model="test_resnet", model_options={}, train_limit=97, keep_last=True, epochs=1, image_size=16)
    with pytest.raises(AttarError, match=r"1 image that step 3 holds: leave the last, smaller batch out"):
        fit(spec, tmp_path / "other", console=quiet())


def test_options_of_the_loop(tmp_path: Path) -> None:
    spec = tiny(
        {"name": "Supervised", "options": {"cutmix": 1.0}},
        *("ONE",),
        precision="bf16",
        clip_grad=1.0,
        ema=0.99,
        schedule="step",
        channels_last=False,
        augment="strong",
        epochs=1,
    )
    result = fit(spec, tmp_path, console=quiet())
    assert result["precision"] == "bf16"
    epoch = lines(tmp_path, "epoch")[0]
    better = max(("student", "ema"), key=lambda name: epoch["holdout" if name == "student" else "holdout_ema"]["top1"])
    assert result["selected"] == better


def test_training_learns(tmp_path: Path) -> None:
    result = fit(tiny(train_limit=None, epochs=3, model_options={"width": 0.5}), tmp_path, console=quiet())
    assert result["test"]["top1"] > 0.8


def test_console_says_one_line_an_epoch(tmp_path: Path) -> None:
    console = quiet()
    fit(tiny(), tmp_path, console=console)
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(said) == 2
    assert said[1].startswith("epoch 2/2  loss ")
    assert "hold-out top-1" in said[1]


@pytest.mark.slow
def test_a_compiled_run_gives_the_numbers_of_an_eager_one(tmp_path: Path) -> None:
    """Compiling a step takes about a minute on a CPU."""
    rows = []
    for mode in ("on", "off"):
        fit(tiny("ONE", compile=mode, epochs=1, log_every=1), tmp_path / mode, console=quiet())
        rows.append(lines(tmp_path / mode, "step")[0]["losses"])
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)


def test_the_last_epoch_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    # At this rate the last epoch is the best of four in few runs; in which of them, the processor's rounding decides.
    for seed in range(8):
        restless: dict[str, Any] = {"epochs": 4, "lr": 1.0, "schedule": "constant", "seed": seed}
        result = fit(tiny(**restless), tmp_path / f"best{seed}", console=quiet())
        if result["best_epoch"] < 3:
            break
    assert result["best_epoch"] < 3  # else the other run would show nothing
    held = [line["holdout"]["top1"] for line in lines(tmp_path / f"best{seed}", "epoch")]
    assert result["holdout"]["top1"] == max(held)
    last = fit(tiny(**restless, select="last"), tmp_path / "last", console=quiet())
    assert last["best_epoch"] == 3
    assert last["holdout"]["top1"] == held[-1]
