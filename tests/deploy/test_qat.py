"""Quantisation-aware distillation: the same network comes back, and int8 hurts it less."""

from __future__ import annotations

import copy
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from attar.deploy import qat
from attar.deploy.artefact import Candidate
from attar.deploy.onnx import ONNX
from attar.deploy.qat import LikeOnnxruntime, prepare, quantization_aware
from attar.deploy.quantize import calibration_images, quantize_onnx
from attar.deploy.running import load_images
from attar.errors import AttarError
from attar.functional import kl_divergence
from quantised import SIZE, Chain, chain, digits, harden, normalization, resnet, write_onnx
from runs import tiny

HARD = 32.0


@pytest.fixture(scope="module")
def candidate() -> Candidate:
    network = harden(chain().network, HARD)
    return dataclasses.replace(chain(), network=network)


@pytest.fixture(scope="module")
def trained(candidate: Candidate) -> nn.Module:
    return quantization_aware(candidate, epochs=6, lr=1e-3, batch=32)


def int8_logits(network: nn.Module, folder: Path) -> np.ndarray:
    path = write_onnx(network, folder / "model.onnx")
    quantize_onnx(path, folder / "int8.onnx", calibration_images(digits(), 256, 0, normalization(), SIZE))
    return ONNX().load(folder / "int8.onnx")(load_images(digits().test, normalization()))


def distance(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(kl_divergence(logits, wanted))


def test_int8_loses_less_than_after_training_alone(candidate: Candidate, trained: nn.Module, tmp_path: Path) -> None:
    images, targets = load_images(digits().test, normalization()), digits().test.targets
    with torch.no_grad():
        wanted = candidate.network(torch.from_numpy(images))
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    before = torch.from_numpy(int8_logits(candidate.network, tmp_path / "before"))
    after = torch.from_numpy(int8_logits(trained, tmp_path / "after"))
    assert distance(before, wanted) > 0.02  # it is hard
    assert distance(after, wanted) < 0.5 * distance(before, wanted)
    top1, top1_before, top1_after = ((z.argmax(1).numpy() == targets).mean() for z in (wanted, before, after))
    assert top1 - top1_before > 0.1
    assert top1 - top1_after < 0.4 * (top1 - top1_before)


def test_the_same_class_and_keys_come_back(candidate: Candidate, trained: nn.Module) -> None:
    assert type(trained) is Chain
    assert not trained.training
    state, before = trained.state_dict(), candidate.network.state_dict()
    assert list(state) == list(before)
    assert all(value.dtype == before[name].dtype for name, value in state.items())
    assert not torch.equal(state["conv2.weight"], before["conv2.weight"])
    for name in ("bn2.running_mean", "bn2.running_var", "conv3.bias", "bn1.weight"):
        assert torch.equal(state[name], before[name])
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    # The student itself has not been touched.
    assert torch.equal(before["conv2.weight"], harden(chain().network, HARD).conv2.weight)


def test_it_is_a_function_of_its_arguments(candidate: Candidate) -> None:
    one, two, other = (quantization_aware(candidate, epochs=1, batch=64, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["conv2.weight"], other["conv2.weight"])


def test_labels_may_teach_too(candidate: Candidate) -> None:
    one, two = (
        quantization_aware(candidate, epochs=1, batch=64, label_weight=weight).state_dict() for weight in (0.0, 1.0)
    )
    assert not torch.equal(one["fc.weight"], two["fc.weight"])


@pytest.mark.parametrize("weight_bits", [7, 8])
def test_training_rounds_what_the_int8_file_rounds(weight_bits: int, tmp_path: Path) -> None:
    """The prepared network on the calibration images and onnxruntime on the file say the same, but for rounding."""
    from torchao.quantization.pt2e import disable_fake_quant, disable_observer, enable_fake_quant

    network = chain().network
    images = calibration_images(digits(), 128, 0, normalization(), SIZE)
    prepared = prepare(network, torch.zeros(128, 3, *SIZE), LikeOnnxruntime(weight_bits))
    with torch.no_grad():
        prepared.apply(disable_fake_quant)
        prepared(torch.from_numpy(images))  # one batch: the observers have its minimum and maximum
        prepared.apply(disable_observer)
        prepared.apply(enable_fake_quant)
        told = prepared(torch.from_numpy(images)).numpy()
        exact = network(torch.from_numpy(images)).numpy()
    path = write_onnx(network, tmp_path / "model.onnx")
    quantize_onnx(path, tmp_path / "int8.onnx", images, weight_bits=weight_bits)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(tmp_path / "int8.onnx"), options, providers=["CPUExecutionProvider"])
    answered = session.run(None, {session.get_inputs()[0].name: images})[0]
    rounding = np.linalg.norm(answered - exact)
    assert rounding > 0
    # Roundings that had nothing to do with each other would be 1.4 of them apart.
    assert np.linalg.norm(told - answered) < 0.6 * rounding


def test_shortcuts_and_projections(tmp_path: Path) -> None:
    network = quantization_aware(resnet(), epochs=1, batch=256)
    state = resnet().network.state_dict()
    assert list(network.state_dict()) == list(state)
    assert not torch.equal(network.state_dict()["layer2.0.downsample.0.weight"], state["layer2.0.downsample.0.weight"])
    prepared = prepare(resnet().network, torch.zeros(2, 3, *SIZE), LikeOnnxruntime())
    rounded = [node for node in prepared.graph.nodes if node.op == "call_module" and "post_process" in str(node.target)]
    read = {user.target for node in rounded for user in node.users}
    assert torch.ops.aten.add.Tensor in read
    assert torch.ops.aten.conv2d.default in read


def test_a_channel_without_scale_is_put_back_too(candidate: Candidate) -> None:
    network = copy.deepcopy(candidate.network)
    network.bn1.weight[3], network.bn1.bias[3] = 0.0, 0.5
    trained = quantization_aware(dataclasses.replace(candidate, network=network), epochs=1, batch=64, lr=1e-2)
    assert all(bool(value.isfinite().all()) for value in trained.state_dict().values())


def test_the_runs_augmentation_is_used(candidate: Candidate, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(tiny(augment="crop").model_dump_json())
    assert qat._loader(dataclasses.replace(candidate, folder=tmp_path), 32, 0).augmentation.name == "crop"
    assert qat._loader(candidate, 32, 0).augmentation.name == digits().default_augmentation
    assert qat._loader(candidate, 32, 0).split is digits().train


def test_progress_is_shown_and_taken_away(candidate: Candidate) -> None:
    with Progress(console=Console(file=io.StringIO(), force_terminal=True)) as progress:
        quantization_aware(candidate, epochs=1, batch=512, progress=progress)
        assert progress.tasks == []


class Unwilling(nn.Module):
    """torch.export cannot tell which way it goes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_mistakes(candidate: Candidate, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"epochs": 0}, {"lr": -1.0}, {"temperature": 0.0}, {"lr": float("nan")}):
        with pytest.raises(AttarError, match=f"needs {next(iter(wrong))} above 0"):
            quantization_aware(candidate, **wrong)  # type: ignore[arg-type]
    with pytest.raises(AttarError, match="Unwilling cannot be exported"):
        quantization_aware(dataclasses.replace(candidate, network=Unwilling()))
    with pytest.raises(AttarError, match="has lost its way: choose a learning rate below"):
        quantization_aware(candidate, epochs=1, batch=256, lr=1e30)
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization.pt2e", None)
    with pytest.raises(AttarError, match=r'needs the package torchao: pip install "attar\[executorch\]"'):
        quantization_aware(candidate)
