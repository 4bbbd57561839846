"""Exports of networks that answer for every pixel: gated pixel by pixel, measured by mean IoU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attar import Segmentation
from attar.data import Normalization, Source, open_source
from attar.deploy import Candidate, Settings, candidate_from, export_run, load_candidate, load_export
from attar.deploy.gate import gate, refuse_miou_drop
from attar.deploy.onnx import ONNX
from attar.deploy.running import load_images, measure_runtime
from attar.errors import AttarError
from attar.spec import TrainSpec, parse
from attar.train import evaluate_run, fit, load_student
from attar.train.segmentation import PixelPredictions
from pictures import write_discs
from runs import quiet


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("discs")
    write_discs(home / "data", train=40, test=6)
    spec = parse(
        TrainSpec,
        {
            "methods": [],
            "model": "lraspp_mobilenet_v3_large",
            "data": str(home / "data"),
            "task": "segmentation",
            "epochs": 2,
            "batch": 8,
            "lr": 0.05,
            "holdout": 0.2,
        },
    )
    fit(spec, home / "run", console=quiet())
    return home / "run"


def test_onnx(run: Path, tmp_path: Path) -> None:
    done = export_run(run, "onnx", out=tmp_path / "onnx")
    report = json.loads((tmp_path / "onnx" / "export.json").read_text())
    test = evaluate_run(run).as_dict()
    assert report["task"] == "segmentation"
    assert report["accuracy"]["metric"] == "miou"
    assert report["accuracy"]["fp32"] == test["miou"]
    assert report["accuracy"]["artefact"] == pytest.approx(test["miou"], abs=1e-3)
    assert report["accuracy"]["agreement"] > 0.999
    assert report["parity"]["relative_error"] <= report["parity"]["tolerance"] <= 1e-3
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 48)).astype(np.float32)
    with torch.no_grad():
        expected = load_student(run).network(torch.from_numpy(images))["out"].numpy()
    np.testing.assert_allclose(done.runtime(images), expected, atol=1e-3 * np.abs(expected).max())
    assert not (tmp_path / "onnx" / "inference.py").exists()
    card = (tmp_path / "onnx" / "model_card.md").read_text()
    assert "A network that segments images into 3 classes" in card
    assert "Mean IoU" in card
    assert "[1, 3, 32, 48], float32" in card
    assert "inference" not in card.split("## Loading it")[1].split("```")[0]
    load_export(tmp_path / "onnx")


def test_pytorch_folder(run: Path, tmp_path: Path) -> None:
    done = export_run(run, "torch", out=tmp_path / "torch")
    assert done.report["parity"]["max_error"] == 0
    assert done.report["accuracy"]["agreement"] == 1
    loaded = load_student(tmp_path / "torch")
    assert loaded.task == "segmentation"
    assert list(loaded.network.state_dict()) == list(load_student(run).network.state_dict())


def test_int8(run: Path, tmp_path: Path) -> None:
    done = export_run(run, "onnx", int8=True, out=tmp_path / "int8", calibration=32, most_drop=0.9)
    assert done.report["size_bytes"] < 0.5 * (run / "student" / "model.safetensors").stat().st_size
    assert done.report["int8"] is not None
    assert done.report["int8"]["drop"] == done.report["accuracy"]["fp32"] - done.report["accuracy"]["artefact"]
    assert 0.8 < done.report["accuracy"]["agreement"] <= 1


@pytest.fixture(scope="module")
def written(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Candidate, Path, NDArray[np.float32]]:
    """A candidate, its float32 ONNX file and the test images."""
    candidate = load_candidate(run)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    ONNX().write(candidate.network, Settings(image_size=(32, 48), batch=None), path, None)
    student = candidate.student
    return candidate, path, load_images(candidate.source.test, Normalization(student.mean, student.std))


@pytest.mark.parametrize("fault", ["weight", "bias", "normalisation"])
def test_faults_are_caught(fault: str, written: tuple[Candidate, Path, NDArray[np.float32]], tmp_path: Path) -> None:
    candidate, path, images = written
    gate(candidate.network, ONNX().load(path), images)
    model = onnx.load(str(path))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    first = next(node for node in model.graph.node if node.op_type == "Conv" and len(node.input) > 2)
    if fault == "weight":
        change(tensors[first.input[1]], lambda w: np.where(np.abs(w) == np.abs(w).max(), 1.05 * w, w))
    if fault == "bias":
        change(tensors[first.input[2]], lambda b: b[::-1])
    onnx.save(model, str(tmp_path / "faulty.onnx"))
    shown = images * np.float32(1.05) if fault == "normalisation" else images
    with pytest.raises(AttarError, match="is not the network it was made from"):
        gate(candidate.network, ONNX().load(tmp_path / "faulty.onnx"), images, shown=shown)


def change(tensor: Any, how: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    values = onnx.numpy_helper.to_array(tensor)
    changed = np.ascontiguousarray(how(values).astype(values.dtype))
    assert not np.array_equal(changed, values)
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))


class Bright(nn.Module):
    """Answers by brightness, and in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(3.0))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        bright = self.slope * images.mean(dim=1)
        return {"out": torch.stack([-bright, bright, bright - 9], dim=1), "aux": images}


@pytest.fixture(scope="module")
def source(run: Path) -> Source:
    return open_source(run.parent / "data", holdout=0.2, task="segmentation")


def test_networks_in_memory(source: Source, tmp_path: Path) -> None:
    candidate = candidate_from(Bright(), source, folder=tmp_path)
    assert candidate.task.dense
    assert candidate.network(torch.zeros(1, 3, 32, 48)).shape == (1, 3, 32, 48)
    assert export_run(candidate, "onnx").report["accuracy"]["agreement"] == 1


def test_agreement_is_the_share_of_pixels(source: Source) -> None:
    network = candidate_from(Bright(), source).network.eval()
    images = load_images(source.test, Normalization(source.mean, source.std))

    def answer(shown: NDArray[Any]) -> NDArray[np.float32]:
        with torch.no_grad():
            logits: NDArray[np.float32] = network(torch.from_numpy(shown)).numpy()
        return logits

    def other(shown: NDArray[Any]) -> NDArray[np.float32]:
        logits = answer(shown)
        logits[:, :, :4, :6] = logits[
            :, ::-1, :4, :6
        ]  # 24 of 1536 pixels; where classes 0 and 2 are not the best: equal
        return logits

    named = answer(images).argmax(axis=1)
    changed = float((named != other(images).argmax(axis=1)).mean())
    found = gate(network, other, images, least_agreement=0.5)
    assert found.agreement == pytest.approx(1 - changed)
    assert 0 < changed < 0.02
    with pytest.raises(AttarError, match=r"off by|of 9216 pixels"):
        gate(network, other, images)


def counts(common: list[int], labelled: list[int], found: list[int]) -> PixelPredictions:
    shape = (4, 2)
    parts = (np.array(values, dtype=np.int64).reshape(shape) for values in (common, labelled, found))
    return PixelPredictions(*parts, np.zeros(4))


def test_the_drop_in_mean_iou() -> None:
    labelled = [10, 10] * 4
    perfect = counts(labelled, labelled, labelled)
    assert refuse_miou_drop(perfect, perfect, 0.0) == 0
    # In every image 2 of 10 pixels of class 0 are found as class 1: IoU 8 / 10 and 10 / 12, and no spread over images.
    worse = counts([8, 10] * 4, labelled, [8, 12] * 4)
    expected = 1 - (8 / 10 + 10 / 12) / 2
    assert refuse_miou_drop(worse, perfect, expected) == pytest.approx(expected)
    with pytest.raises(AttarError, match=r"loses 18.3 points of mean IoU, and 18.0 are allowed"):
        refuse_miou_drop(worse, perfect, 0.18)
    # All of it in one image: so few images do not tell.
    once = counts([2, 10, *[10, 10] * 3], labelled, [2, 18, *[10, 10] * 3])
    assert refuse_miou_drop(once, perfect, 0.1) > 0.1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"packaged": True}, "Option --packaged is for classification"),
        ({"int8": True, "qat": 1}, "Option --qat is for classification"),
        ({"image_size": (0, 8)}, "must be at least 1 pixel a side"),
    ],
)
def test_refusals(options: dict[str, Any], said: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(AttarError, match=said):
        export_run(run, "onnx", out=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_candidate_answers_with_logits_alone(run: Path) -> None:
    candidate: Candidate = load_candidate(run)
    assert isinstance(candidate.task, Segmentation)
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(candidate.network(images), load_student(run).network(images)["out"])
    measured = measure_runtime(
        lambda shown: candidate.network(torch.from_numpy(shown)).numpy(),
        replace(candidate.source.test),
        Normalization(candidate.student.mean, candidate.student.std),
        candidate.task,
    )
    assert measured.found.shape == (6, 32, 48)
    assert measured.found.dtype == np.uint8
