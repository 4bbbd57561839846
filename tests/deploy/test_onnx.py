"""ONNX files: what is in them, how many images they take, and networks and files that are refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from attar.deploy import Settings
from attar.deploy.gate import gate
from attar.deploy.onnx import ONNX, annotate
from attar.errors import AttarError
from attar.train.models import make_model
from exports import evil_checkpoint, evil_pickle

onnx = pytest.importorskip("onnx", reason='pip install "attar[export]"')
pytest.importorskip("onnxscript", reason='pip install "attar[export]"')
pytest.importorskip("onnxruntime", reason='pip install "attar[export]"')

IMAGES = np.random.default_rng(0).standard_normal((11, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return make_model("cifar_resnet20", 10, {"width": 0.25}).eval()


def written(network: nn.Module, path: Path, **settings: Any) -> Path:
    ONNX().write(network, Settings((8, 8), **settings), path, None)
    return path


@pytest.fixture(scope="module")
def four(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(network, tmp_path_factory.mktemp("onnx") / "model.onnx", batch=4)


def dimensions(value: Any) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_a_fixed_number_of_images(network: nn.Module, four: Path) -> None:
    annotate(four, {"classes": '["cat"]', "mean": "[0.5]"})
    model = onnx.load(four)
    graph = model.graph
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    assert ([value.name for value in graph.input], dimensions(graph.input[0])) == (["images"], [4, 3, 8, 8])
    assert ([value.name for value in graph.output], dimensions(graph.output[0])) == (["logits"], [4, 10])
    assert {entry.key: entry.value for entry in model.metadata_props} == {"classes": '["cat"]', "mean": "[0.5]"}
    # Nothing of this machine is in the file.
    content = four.read_bytes()
    assert not any(word in content for word in (b"stack_trace", b".py", b"site-packages", b"/home", b"forward"))
    assert [path.name for path in four.parent.iterdir()] == ["model.onnx"]
    # Any number of images at a time, though the file takes four.
    runtime = ONNX().load(four)
    with torch.no_grad():
        expected = network(torch.from_numpy(IMAGES)).numpy()
    for count in (1, 4, 7, 11):
        assert runtime(IMAGES[:count]).shape == (count, 10)
        assert np.allclose(runtime(IMAGES[:count]), expected[:count], atol=1e-5)
    gate(network, runtime, IMAGES)


def test_any_number_of_images(network: nn.Module, tmp_path: Path) -> None:
    path = written(network, tmp_path / "model.onnx", batch=None)
    annotate(path, {})
    graph = onnx.load(path).graph
    assert dimensions(graph.input[0]) == ["batch", 3, 8, 8]
    assert dimensions(graph.output[0]) == ["batch", 10]
    gate(network, ONNX().load(path), IMAGES, batch_sizes=(1, 2, 3, 11))


def test_an_operator_that_onnx_has_not() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j1(x.mean(dim=(2, 3)))

    with pytest.raises(AttarError, match=r"ONNX has no operator for \w+::\w*bessel_j1, which Odd uses"):
        written(Odd().eval(), Path("unwritten.onnx"))
    assert not Path("unwritten.onnx").exists()


def test_a_network_with_a_branch_on_values() -> None:
    class Choosy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(2, 3)) if x.sum() > 0 else x.amax(dim=(2, 3))

    with pytest.raises(AttarError, match="Choosy") as caught:
        written(Choosy().eval(), Path("unwritten.onnx"))
    assert "\n" not in str(caught.value)


def test_a_network_for_two_images_only() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 3, -1).mean(dim=2)

    with pytest.raises(AttarError, match="leave out --dynamic-batch"):
        written(Two().eval(), Path("unwritten.onnx"), batch=None)


@pytest.mark.parametrize("opset", [11, 99])
def test_operator_sets_that_are_not_written(network: nn.Module, opset: int) -> None:
    with pytest.raises(AttarError, match=f"opset {opset} cannot be written: choose one from 18 to"):
        written(network, Path("unwritten.onnx"), options={"opset": opset})


def test_a_missing_package(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(AttarError, match=r'needs the package onnxscript: pip install "attar\[export\]"\.'):
        written(network, Path("unwritten.onnx"))


def test_files_that_are_no_onnx(tmp_path: Path) -> None:
    mark, path = tmp_path / "executed", tmp_path / "model.onnx"
    with pytest.raises(AttarError, match="no file"):
        ONNX().load(path)
    for content in (b"", b"not a model", evil_pickle(mark), evil_checkpoint(mark)):
        path.write_bytes(content)
        with pytest.raises(AttarError, match="is no ONNX model that onnxruntime can run") as caught:
            ONNX().load(path)
        assert "\n" not in str(caught.value)
    assert not mark.exists()
