"""Metrics against their definitions, and the numbers of result.json again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attar.data import EvalLoader, Normalization, open_source
from attar.errors import AttarError
from attar.spec import TrainSpec
from attar.tasks import Classification
from attar.train import evaluate, evaluate_run, load_student


def test_metrics_follow_their_definitions() -> None:
    source = open_source("digits")
    normalization = Normalization(source.mean, source.std)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with torch.no_grad():
        # Nearest class mean: good enough that the bins of confidence are not empty.
        batches = list(EvalLoader(source.train, 10_000, normalization))
        images, targets = batches[0].images.flatten(1), batches[0].targets
        means = torch.stack([images[targets == k].mean(0) for k in range(10)])
        network[1].weight.copy_(means * 0.1)
        network[1].bias.copy_(-means.square().sum(1) * 0.05)
    metrics = evaluate(network, source.test, normalization, Classification(10))
    sample = next(iter(EvalLoader(source.test, 10_000, normalization)))
    with torch.no_grad():
        logits = network(sample.images)
    top = logits.topk(5).indices
    assert metrics.images == 360
    assert metrics.top1 == (logits.argmax(1) == sample.targets).sum().item() / 360
    assert metrics.top5 == (top == sample.targets[:, None]).sum().item() / 360
    assert metrics.nll == pytest.approx(F.cross_entropy(logits.double(), sample.targets).item(), rel=1e-6)
    confidence, predicted = (values.numpy() for values in logits.softmax(1).max(1))
    right = predicted == sample.targets.numpy()
    bins = np.ceil(confidence * 15).astype(int)
    error = sum(abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    assert metrics.calibration_error == pytest.approx(error, abs=1e-6)


def test_few_classes_have_no_top5_and_modes_are_restored() -> None:
    source = open_source("digits")
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 10))
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluate(network, source.holdout, Normalization(source.mean, source.std), Classification(10))
    assert [module.training for module in network] == [True, False, True]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_a_run_gives_its_result_again(one_run: tuple[Path, TrainSpec, dict[str, Any]]) -> None:
    folder, _, result = one_run
    assert evaluate_run(folder).as_dict() == result["test"]
    assert evaluate_run(folder / "student").as_dict() == result["test"]
    held = evaluate_run(folder, split="holdout")
    assert held.top1 == result["holdout"]["top1"]


def test_mistakes(one_run: tuple[Path, TrainSpec, dict[str, Any]], tmp_path: Path) -> None:
    folder, _, _ = one_run
    with pytest.raises(AttarError, match="no split 'tests': did you mean 'test'"):
        evaluate_run(folder, split="tests")
    shutil.copytree(folder / "student", tmp_path / "alone")
    with pytest.raises(AttarError, match="name the data"):
        evaluate_run(tmp_path / "alone")
    assert evaluate_run(tmp_path / "alone", data="digits").images == 360
    with pytest.raises(AttarError, match=r"holds no student: give a finished run"):
        evaluate_run(tmp_path)
    shutil.copytree(folder, tmp_path / "unfinished", ignore=shutil.ignore_patterns("student"))
    with pytest.raises(AttarError, match="its run has not finished"):
        evaluate_run(tmp_path / "unfinished")
    config = json.loads((tmp_path / "alone/config.json").read_text())
    config["attar"]["classes"] = list("abcdefghij")
    (tmp_path / "alone/config.json").write_text(json.dumps(config))
    with pytest.raises(AttarError, match="has other classes"):
        evaluate_run(tmp_path / "alone", data="digits")
    (tmp_path / "alone/model.safetensors").write_bytes(b"cut")
    with pytest.raises(AttarError, match=r"model.safetensors' cannot be read as weights"):
        load_student(tmp_path / "alone")
