"""A student that shrinks while it trains: saved, loaded, stopped, killed, on two processes, and plain where asked."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from attar.cli.training import loading
from attar.errors import AttarError
from attar.spec import TrainSpec
from attar.train import Interrupted, evaluate_run, fit, load_student, load_teacher
from attar.train.models import load_weights, make_model
from runs import assert_same_run, kill_after_lines, lines, quiet, tiny, train_as_rank, two_ranks

WIDTH = {"width": 0.25}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network, which teaches itself."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    fit(tiny(), folder, console=quiet())
    return folder


def spec_of(trained: Path, *others: str, options: dict[str, Any] | None = None, **fields: Any) -> TrainSpec:
    """Two epochs: structure, recovery."""
    method = {"name": "Blockwise", "options": {"teachers": [str(trained)], "min_channels": 2, "divisor": 2}}
    method["options"] |= options or {}
    weights = str(trained / "student/model.safetensors")
    return tiny(method, *others, **{"weights": weights, "train_limit": 160, "log_every": 1, **fields})


def kept_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "student/config.json").read_text())["attar"]["kept"]


@pytest.fixture(scope="module")
def finished(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainSpec, Path, dict[str, Any]]:
    spec = spec_of(trained, ema=0.9, epochs=3)
    folder = tmp_path_factory.mktemp("finished") / "run"
    return spec, folder, fit(spec, folder, console=quiet())


def test_the_saved_student_is_small_and_gives_the_same_numbers(
    trained: Path, finished: tuple[TrainSpec, Path, dict[str, Any]]
) -> None:
    _, folder, result = finished
    whole = json.loads((trained / "result.json").read_text())
    assert 0.98 * 0.5 * whole["flops"]["deployed"] <= result["flops"]["deployed"] <= 0.5 * whole["flops"]["deployed"]
    student = load_student(folder)
    parameters = sum(p.numel() for p in student.network.parameters())
    assert parameters == result["parameters"]["deployed"] < whole["parameters"]["deployed"]
    assert student.kept == kept_in(folder)
    assert type(student.network) is type(load_student(trained).network)
    assert list(student.network.state_dict()) == list(load_student(trained).network.state_dict())
    assert evaluate_run(folder).as_dict() == result["test"]
    assert evaluate_run(folder, split="holdout").top1 == result["holdout"]["top1"]
    # The best epoch is one of the small student: of the first epoch it is not, whatever the hold-out said then.
    assert result["best_epoch"] >= 1
    epochs = lines(folder, "epoch")
    assert "Blockwise.ce" in epochs[0]["losses"]
    assert "Blockwise.block.layer3" in epochs[1]["losses"]
    assert result["exportable"]
    assert "attar.train.load_student" in loading("cifar_resnet20", folder)
    assert "timm.create_model" in loading("cifar_resnet20", trained)
    assert "kept" not in json.loads((trained / "student/config.json").read_text())["attar"]


def test_a_best_epoch_before_the_removal_is_forgotten(trained: Path, tmp_path: Path) -> None:
    """The student starts trained, and one bad recovery epoch makes it worse than it was."""
    spec = spec_of(trained, lr=1e-6, schedule="constant", options={"alpha": 0.0, "block_weight": 0.0, "budget": 0.4})
    result = fit(spec, tmp_path / "run", console=quiet())
    first, second = (line["holdout"]["top1"] for line in lines(tmp_path / "run", "epoch"))
    assert first > second
    assert (result["best_epoch"], result["holdout"]["top1"]) == (1, second)


def test_it_teaches_and_is_measured_as_any_other(
    trained: Path, finished: tuple[TrainSpec, Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, folder, result = finished
    teacher = load_teacher(str(folder), 10)
    assert sum(p.numel() for p in teacher.network.parameters()) == result["parameters"]["deployed"]
    kd = tiny({"name": "KD", "options": {"teachers": [str(folder)]}}, train_limit=64, epochs=1)
    fit(kd, tmp_path / "kd", console=quiet())


def test_its_weights_alone_are_of_no_use_for_the_whole_model(
    finished: tuple[TrainSpec, Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, folder, _ = finished
    with pytest.raises(AttarError, match=r"of shape .* but the model's is"):
        load_weights(make_model("cifar_resnet20", 10, WIDTH), folder / "student/model.safetensors")
    config = json.loads((folder / "student/config.json").read_text())
    config["attar"]["kept"] = {"nowhere": {"out": [0]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "student/model.safetensors").read_bytes())
    with pytest.raises(AttarError, match="does not fit 'nowhere'"):
        load_student(tmp_path)


@pytest.mark.parametrize("behind", [-1, 0, 1])
def test_stopped_before_at_and_behind_the_removal_it_ends_bit_identical(
    behind: int, finished: tuple[TrainSpec, Path, dict[str, Any]], tmp_path: Path
) -> None:
    spec, folder, result = finished
    with pytest.raises(Interrupted):
        fit(spec, tmp_path / "run", console=quiet(), stop_after=result["steps"] // 3 + behind)
    fit(spec, tmp_path / "run", console=quiet())
    assert_same_run(tmp_path / "run", folder)
    assert kept_in(tmp_path / "run") == kept_in(folder)


def test_with_another_method_it_stops_and_goes_on_as_well(trained: Path, tmp_path: Path) -> None:
    spec = spec_of(trained, "ONE")
    result = fit(spec, tmp_path / "whole", console=quiet())
    with pytest.raises(Interrupted):
        fit(spec, tmp_path / "run", console=quiet(), stop_after=result["steps"] // 2 + 1)
    fit(spec, tmp_path / "run", console=quiet())
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_sigkill_around_the_removal_ends_bit_identical(
    finished: tuple[TrainSpec, Path, dict[str, Any]], tmp_path: Path
) -> None:
    spec, folder, _ = finished
    often = spec.model_copy(update={"checkpoint_seconds": 0.0})
    third = (folder / "metrics.jsonl").read_bytes().count(b"\n") // 3
    draw = random.Random(0)
    killed = sum(kill_after_lines(often, tmp_path / "run", third + more, draw.random() * 0.05) for more in (0, 2))
    assert killed
    fit(often, tmp_path / "run", console=quiet())
    assert_same_run(tmp_path / "run", folder)


def test_without_terms_and_with_the_whole_budget_it_is_plain_training_to_the_last_bit(
    trained: Path, tmp_path: Path
) -> None:
    nothing = {"strength": 0.0, "alpha": 0.0, "block_weight": 0.0, "budget": 1.0, "structure": 0.5}
    fit(spec_of(trained, options=nothing), tmp_path / "blockwise", console=quiet())
    plain = spec_of(trained).model_copy(update={"methods": ()})
    fit(plain, tmp_path / "plain", console=quiet())
    one, other = (load_file(tmp_path / name / "student/model.safetensors") for name in ("blockwise", "plain"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    tops = [[line["holdout"] for line in lines(tmp_path / name, "epoch")] for name in ("blockwise", "plain")]
    assert tops[0] == tops[1]


def test_two_processes_shrink_alike_stop_and_go_on(trained: Path, tmp_path: Path) -> None:
    spec = spec_of(trained, log_every=2, ema=0.9)
    assert two_ranks(train_as_rank, spec, tmp_path / "whole", None) == [0, 0]
    behind = len(lines(tmp_path / "whole", "step")) + 1
    assert two_ranks(train_as_rank, spec, tmp_path / "run", behind) == [130, 130]
    assert two_ranks(train_as_rank, spec, tmp_path / "run", None) == [0, 0]
    whole, run = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "run"))
    weights = [(tmp_path / name / "student/model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
    assert run["test"] == whole["test"]
    assert run["processes"] == 2
    assert evaluate_run(tmp_path / "run").top1 == run["test"]["top1"]
