"""OpenVINO: converted from ONNX, run by its own runtime and compared with PyTorch."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("openvino", reason="the extra openvino is not installed")
pytest.importorskip("onnxruntime", reason="the extra export is not installed")

from attar.data import Normalization, open_source
from attar.deploy.artefact import Images, Logits, Runtime, Settings
from attar.deploy.openvino import OpenVINO
from attar.errors import AttarError
from attar.train import load_student
from exports import finished_run
from networks import Net

FORMAT = OpenVINO()


@pytest.fixture(scope="module")
def student() -> nn.Module:
    return load_student(finished_run(epochs=6)).network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def digits() -> dict[str, Images]:
    from attar.deploy.running import load_images, some_of

    student = load_student(finished_run(epochs=6))
    source = open_source("digits", image_size=student.image_size)
    normalization = Normalization(student.mean, student.std)
    return {
        "train": load_images(some_of(source.train, 64), normalization),
        "test": load_images(some_of(source.test, 100), normalization),
    }


@pytest.fixture(scope="module")
def float32(student: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float32") / "model.xml"
    FORMAT.write(student, Settings(image_size=(8, 8)), path, None)
    return path


def expected(network: nn.Module, images: Images) -> Logits:
    with torch.no_grad():
        logits: Logits = network(torch.from_numpy(images)).numpy()
    return logits


def off(runtime: Runtime, network: nn.Module, images: Images) -> float:
    """Return the largest error of a logit, relative to the largest logit."""
    wanted = expected(network, images)
    return float(np.abs(runtime(images) - wanted).max() / np.abs(wanted).max())


def test_float32_answers_as_pytorch(student: nn.Module, float32: Path, digits: dict[str, Images]) -> None:
    assert sorted(path.name for path in float32.parent.iterdir()) == ["model.bin", "model.xml"]
    runtime = FORMAT.load(float32)
    answers = runtime(digits["test"])
    assert answers.dtype == np.float32
    assert off(runtime, student, digits["test"]) < 1e-5
    np.testing.assert_array_equal(answers[:1], runtime(digits["test"][:1]))


def test_int8_names_what_the_network_names(
    student: nn.Module, float32: Path, digits: dict[str, Images], tmp_path: Path
) -> None:
    path = tmp_path / "model.xml"
    FORMAT.write(student, Settings(image_size=(8, 8), int8=True), path, digits["train"])
    answers, wanted = FORMAT.load(path)(digits["test"]), expected(student, digits["test"])
    assert (answers.argmax(1) == wanted.argmax(1)).mean() >= 0.9  # it has learnt little, and its logits are near
    assert 1e-4 < np.abs(answers - wanted).max() / np.abs(wanted).max() < 0.2  # it is quantised, and not broken
    weights, quantised = (each.with_suffix(".bin").stat().st_size for each in (float32, path))
    assert quantised < 0.5 * weights
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.bin", "model.xml"]


def test_any_number_of_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Net().eval()
    path = tmp_path / "model.xml"
    FORMAT.write(network, Settings(image_size=(16, 16), batch=None), path, None)
    runtime = FORMAT.load(path)
    images = torch.randn(70, 3, 16, 16).numpy()
    for count in (1, 5, 70):
        assert off(runtime, network, images[:count]) < 1e-5


class SignalStack(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> int | None:
    """Return where this thread's signals are handled."""
    stack = SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.start


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what memory is there")
def test_artefacts_that_come_and_go_leave_signals_a_stack(float32: Path) -> None:
    one = FORMAT.load(float32)
    stack = signal_stack()
    two = FORMAT.load(float32)
    assert signal_stack() == stack  # each engine would bring its own
    del one
    gc.collect()
    del two
    gc.collect()
    now = signal_stack()
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    assert now is None or any(int(low, 16) <= now < int(high, 16) for low, high in ranges)


class Eigen(nn.Module):
    """Asks for eigenvalues, which no graph format computes."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(images.flatten(2) @ images.flatten(2).mT)


def test_a_network_that_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AttarError, match=r"no operator for aten::_?linalg_eig.*, which Eigen uses") as refused:
        FORMAT.write(Eigen().eval(), Settings(image_size=(8, 8)), tmp_path / "model.xml", None)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["missing", "text", "weights missing", "weights truncated"])
def test_a_file_that_is_no_model_is_refused(damage: str, float32: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    if damage == "text":
        path.write_text("no model")
    elif damage != "missing":
        shutil.copy(float32, path)
    if damage == "weights truncated":
        path.with_suffix(".bin").write_bytes(float32.with_suffix(".bin").read_bytes()[:-100])
    with pytest.raises(AttarError, match=re.escape(str(path))) as refused:
        FORMAT.load(path)
    assert "\n" not in str(refused.value)


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(AttarError, match=r'needs the package openvino: pip install "attar\[openvino\]"'):
        FORMAT.load(tmp_path / "model.xml")
