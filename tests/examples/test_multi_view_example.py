"""The multi-view example: small runs of the whole script, and the theory's predictions as a slow test."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from attar.data import EvalLoader, Normalization, open_source
from attar.lab import Ensemble
from attar.train import load_student

SCRIPT = Path(__file__).parents[2] / "examples" / "multi_view.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("multi_view_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where timm and dataclasses look names up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny_run(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "multi_view"
    assert script.main(["--seeds", "2", "--steps", "2", "--jobs", "2", "--out", str(folder)]) == 0
    return folder


def networks(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_a_run_leaves_a_table_a_plot_and_numbers(script: ModuleType, tiny_run: Path) -> None:
    told = json.loads((tiny_run / "result.json").read_text())
    assert list(told["summary"]) == script.kinds(script.Setting())
    assert [row["networks"] for row in told["summary"].values()] == [10, 4, 20, 20, 2, 4, 4, 4]
    assert (tiny_run / "multi_view.png").read_bytes().startswith(b"\x89PNG")
    first = told["seeds"]["0"]
    assert len(first["single network"]) == 5
    mean = sum(n["single_view"] for seed in told["seeds"].values() for n in seed["ensemble of 2"]) / 20
    assert told["summary"]["ensemble of 2"]["single_view"] == pytest.approx(mean)
    assert len(networks(tiny_run)) == 26


def test_what_went_on_is_held_against_where_it_started(script: ModuleType, tiny_run: Path) -> None:
    told = json.loads((tiny_run / "result.json").read_text())
    gains = []
    for seed in told["seeds"].values():
        start = [network["single_view"] for network in seed[script.SINGLE][:2]]
        gains.append(sum(n["single_view"] for n in seed[script.LONGER]) / 2 - sum(start) / 2)
    assert told["summary"][script.LONGER]["over_single"] == pytest.approx(sum(gains) / 2)


def test_an_interrupted_run_goes_on_to_the_same_numbers(script: ModuleType, tiny_run: Path, tmp_path: Path) -> None:
    """Half of the networks are there: only the others are trained, and all are as they were."""
    before = networks(tiny_run)
    folder = tmp_path / "again"
    (folder / "seed0").mkdir(parents=True)
    kept = [name for name in before if name.startswith("seed0") and "single" in name]
    for name in kept:
        (folder / name).write_bytes(before[name])
    times = {name: (folder / name).stat().st_mtime_ns for name in kept}
    assert script.main(["--seeds", "2", "--steps", "2", "--jobs", "1", "--out", str(folder)]) == 0
    assert networks(folder) == before
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == times


def test_ctrl_c_leaves_whole_networks_only(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = threading.Semaphore(3)

    def interrupted(path: Path, content: bytes) -> None:
        if not made.acquire(blocking=False):
            raise KeyboardInterrupt
        path.write_bytes(content)

    monkeypatch.setattr(script, "write_atomically", interrupted)
    assert script.main(["--seeds", "1", "--steps", "1", "--jobs", "1", "--out", str(tmp_path / "run")]) == 130
    assert len(networks(tmp_path / "run")) == 3
    assert not (tmp_path / "run/result.json").exists()


def test_other_settings_and_senseless_ones_are_refused(
    script: ModuleType, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--seeds", "2", "--steps", "3", "--out", str(tiny_run)]) == 2
    assert "holds an experiment of other settings: choose another --out." in capsys.readouterr().err
    assert script.main(["--steps", "0", "--out", str(tiny_run)]) == 2
    assert script.main(["--controls", "--members", "1", "--out", str(tiny_run)]) == 2
    assert "members at least 2" in capsys.readouterr().err


def test_a_remembering_teacher_answers_as_any_other(script: ModuleType) -> None:
    calls = []

    class Network(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            return x.sum(dim=(2, 3))

    teacher = script.RememberingTeacher(Network())
    batch, other = torch.randn(4, 2, 3, 3), torch.randn(5, 2, 3, 3)
    for images in (other, batch, batch, batch):
        torch.testing.assert_close(teacher(images), images.sum(dim=(2, 3)))
    assert calls == [5, 4]


CONTROLS = ["--controls", "--data", "digits", "--model-options", "width=0.25", "--members", "2", "--epochs", "1"]


@pytest.mark.slow
def test_the_controls_run_on_digits_and_again(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "controls"
    words = [*CONTROLS, "--images", "200", "--out", str(folder)]
    assert script.main(words) == 0
    told = json.loads((folder / "result.json").read_text())
    assert list(told) == [
        "single network",
        "ensemble of 2",
        "distilled from the ensemble",
        "the average, trained jointly",
        "the average of the weights",
        "random features",
        "random features, ensemble of 2",
        "random features, distilled from their ensemble",
    ]
    results = [json.loads((folder / f"single-{seed}" / "result.json").read_text()) for seed in (0, 1)]
    assert told["single network"] == pytest.approx(sum(result["test"]["top1"] for result in results) / 2)
    spec = json.loads((folder / "distilled-100/spec.json").read_text())
    assert spec["methods"][0]["options"]["teachers"] == [str(folder / f"single-{seed}") for seed in (0, 1)]
    # Only the classifier of a random-feature network has moved.
    torch.manual_seed(0)
    drawn = script.random_features(width=0.25).state_dict()
    trained = load_student(folder / "random-0").network.state_dict()
    moved = {name for name, value in trained.items() if not torch.equal(value, drawn[name]) and "running" not in name}
    assert {name for name in moved if "num_batches" not in name} == {"fc.weight", "fc.bias"}
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("student/*")}
    assert script.main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("student/*")} == before


def test_a_joint_average_is_one_network_of_several(script: ModuleType) -> None:
    torch.manual_seed(0)
    network = script.joint_average(members=2, width=0.25).eval()
    assert isinstance(network, Ensemble)
    images = torch.randn(3, 3, 16, 16)
    first, second = network.networks
    torch.testing.assert_close(network(images), (first(images) + second(images)) / 2)
    assert not torch.equal(first.fc.weight, second.fc.weight)


def test_averaging_the_weights_of_one_network_gives_it_back(script: ModuleType) -> None:
    """Also its batch statistics, which are taken anew from the training images."""
    source = open_source("digits")
    normalization = Normalization(source.mean, source.std)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    other: Any = script.copy.deepcopy(network)
    with torch.no_grad():
        other[0].weight.mul_(3.0)
    same = script.weight_average([network, network], source, normalization)
    torch.testing.assert_close(dict(same.named_parameters()), dict(network.named_parameters()))
    averaged = script.weight_average([network, other], source, normalization)
    torch.testing.assert_close(averaged[0].weight, 2.0 * network[0].weight)
    with torch.no_grad():
        maps = [
            averaged[0](sample.images).mean(dim=(0, 2, 3)) for sample in EvalLoader(source.train, 250, normalization)
        ]
    torch.testing.assert_close(averaged[1].running_mean, torch.stack(maps).mean(dim=0))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_the_theory_predicts(script: ModuleType, tmp_path: Path) -> None:
    """One data seed and a third of the steps: docs/multi_view.md says how this setting was chosen."""
    setting = script.Setting(steps=500, pairs=0, temperatures=(4.0,))
    results = script.run([1], setting, tmp_path, 2, Console())
    rows = script.summary(results)
    single, distilled = rows[script.SINGLE], rows[script.distilled(4.0)]
    assert single["single_view"] < 0.88
    assert rows["ensemble of 5"]["single_view"] > 0.97
    assert distilled["single_view"] - single["single_view"] >= 0.08
    assert all(row["multi_view_lowest"] > 0.99 for row in rows.values())
