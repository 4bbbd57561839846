"""ExecuTorch: lowered, run by its own runtime and compared with PyTorch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("executorch", reason="the extra executorch is not installed")
pytest.importorskip("torchao", reason="the extra executorch is not installed")

from attar.data import Normalization, open_source
from attar.deploy.artefact import Images, Logits, Runtime, Settings
from attar.deploy.executorch import ExecuTorch
from attar.errors import AttarError
from attar.train import load_student
from exports import finished_run
from networks import Net

FORMAT = ExecuTorch()
SMALL = Settings(image_size=(8, 8))


@pytest.fixture(scope="module")
def student() -> nn.Module:
    return load_student(finished_run(epochs=6)).network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def digits() -> dict[str, Images]:
    """Digits as the run's student sees them, to calibrate on and to ask for."""
    from attar.deploy.running import load_images, some_of

    student = load_student(finished_run(epochs=6))
    source = open_source("digits", image_size=student.image_size)
    normalization = Normalization(student.mean, student.std)
    return {
        "train": load_images(some_of(source.train, 64), normalization),
        "test": load_images(some_of(source.test, 100), normalization),
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("executorch")


@pytest.fixture(scope="module")
def float32(student: nn.Module, home: Path) -> tuple[Path, dict[str, Any]]:
    path = home / "float32.pte"
    return path, FORMAT.write(student, SMALL, path, None)


@pytest.fixture(scope="module")
def int8(student: nn.Module, home: Path, digits: dict[str, Images]) -> tuple[Path, dict[str, Any]]:
    path = home / "int8.pte"
    settings = Settings(image_size=(8, 8), int8=True, options={"float32_modules": ("fc",)})
    return path, FORMAT.write(student, settings, path, digits["train"])


def expected(network: nn.Module, images: Images) -> Logits:
    with torch.no_grad():
        logits: Logits = network(torch.from_numpy(images)).numpy()
    return logits


def off(runtime: Runtime, network: nn.Module, images: Images) -> float:
    """Return the largest error of a logit, relative to the largest logit."""
    wanted = expected(network, images)
    return float(np.abs(runtime(images) - wanted).max() / np.abs(wanted).max())


def test_float32_answers_as_pytorch(
    student: nn.Module, float32: tuple[Path, dict[str, Any]], digits: dict[str, Images]
) -> None:
    runtime = FORMAT.load(float32[0])
    answers = runtime(digits["test"])
    assert answers.dtype == np.float32
    assert answers.shape == (100, 10)
    assert off(runtime, student, digits["test"]) < 1e-5
    assert float32[1]["outside_xnnpack"] == []


def test_images_do_not_hear_one_another(float32: tuple[Path, dict[str, Any]], digits: dict[str, Images]) -> None:
    runtime = FORMAT.load(float32[0])
    answers = runtime(digits["test"])
    np.testing.assert_array_equal(answers[7:10], runtime(digits["test"][7:10]))
    np.testing.assert_array_equal(answers[:1], runtime(digits["test"][:1]))


def test_runtimes_with_other_threads_live_side_by_side(
    float32: tuple[Path, dict[str, Any]], int8: tuple[Path, dict[str, Any]], digits: dict[str, Images]
) -> None:
    images = digits["test"][:3]
    one = FORMAT.load(float32[0], threads=1)
    first = one(images)
    two = FORMAT.load(int8[0], threads=2)
    second = two(images)
    again = FORMAT.load(float32[0], threads=1)  # the pool has as many threads as at first, and is another
    for _ in range(2):
        np.testing.assert_array_equal(one(images), first)
        np.testing.assert_array_equal(two(images), second)
        np.testing.assert_array_equal(again(images), first)


def test_int8_names_what_the_network_names(
    student: nn.Module,
    float32: tuple[Path, dict[str, Any]],
    int8: tuple[Path, dict[str, Any]],
    digits: dict[str, Images],
) -> None:
    runtime = FORMAT.load(int8[0])
    answers, wanted = runtime(digits["test"]), expected(student, digits["test"])
    assert (answers.argmax(1) == wanted.argmax(1)).mean() >= 0.9  # it has learnt little, and its logits are near
    assert 1e-4 < np.abs(answers - wanted).max() / np.abs(wanted).max() < 0.2  # it is quantised, and not broken
    assert int8[0].stat().st_size < float32[0].stat().st_size
    assert int8[1]["left_in_float32"] == ["fc"]


def test_what_a_module_keeps_in_float32_is_not_quantised(student: nn.Module, digits: dict[str, Images]) -> None:
    from attar.deploy.executorch import quantize_program
    from attar.deploy.program import export_program

    images = torch.from_numpy(digits["train"][:1])
    program = export_program(student, images, None, "ExecuTorch")
    everything = [name for name, _ in student.named_children()]
    left = quantize_program(student, program, images, None, digits["train"][:2], everything)
    # Sums at the top level of a network and in its blocks' modules go with them: nothing is rounded.
    operators = {str(node.target) for node in left.graph.nodes if node.op == "call_function"}
    assert not any("quantize" in operator for operator in operators)
    torch.testing.assert_close(left.module()(images), student(images), rtol=0, atol=1e-5)


def test_any_number_of_images_up_to_a_bound_and_beyond(home: Path) -> None:
    torch.manual_seed(0)
    network = Net().eval()
    path = home / "any.pte"
    FORMAT.write(network, Settings(image_size=(16, 16), batch=None), path, None)
    runtime = FORMAT.load(path)
    images = torch.randn(70, 3, 16, 16).numpy()
    for count in (1, 5, 32, 33, 70):
        assert off(runtime, network, images[:count]) < 1e-5


def test_several_images_at_a_time(home: Path) -> None:
    torch.manual_seed(0)
    network = Net().eval()
    path = home / "four.pte"
    FORMAT.write(network, Settings(image_size=(16, 16), batch=4), path, None)
    assert off(FORMAT.load(path), network, torch.randn(7, 3, 16, 16).numpy()) < 1e-5


class Eigen(nn.Module):
    """Asks for eigenvalues, which no kernel of ExecuTorch computes."""

    def forward(self, images: Tensor) -> Tensor:
        grams = images.flatten(2) @ images.flatten(2).mT
        return torch.linalg.eigvalsh(grams)


class Branching(nn.Module):
    """Goes another way when the images say so."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3)) if images.sum() > 0 else images.amax(dim=(2, 3))


class OneImage(nn.Module):
    """Takes two images, no other number."""

    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(2, 3, -1).mean(2)


@pytest.mark.parametrize(
    ("network", "batch", "said"),
    [
        (Eigen(), 1, "ExecuTorch has no operator for aten::_?linalg_eig.*, which Eigen uses"),
        (Branching(), 1, "Branching cannot be exported to ExecuTorch"),
        (OneImage(), None, "OneImage takes a fixed number of images only .*: leave out --dynamic-batch"),
    ],
)
def test_a_network_that_cannot_be_lowered_is_refused(
    network: nn.Module, batch: int | None, said: str, tmp_path: Path
) -> None:
    with pytest.raises(AttarError, match=said) as refused:
        FORMAT.write(network.eval(), Settings(image_size=(8, 8), batch=batch), tmp_path / "model.pte", None)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "overwritten"])
def test_a_file_that_is_no_program_is_refused(
    damage: str, float32: tuple[Path, dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, whole = tmp_path / "model.pte", float32[0].read_bytes()
    contents = {
        "empty": b"",
        "text": b"no program " * 100,
        "truncated": whole[:-100],
        "overwritten": whole[:200] + bytes(400) + whole[600:],
    }
    if damage in contents:
        path.write_bytes(contents[damage])
    with pytest.raises(AttarError, match=re.escape(str(path))) as refused:
        FORMAT.load(path)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "executorch.runtime", None)
    with pytest.raises(AttarError, match=r'needs the package executorch: pip install "attar\[executorch\]"'):
        FORMAT.write(Net(), SMALL, tmp_path / "model.pte", None)
    with pytest.raises(AttarError, match=r'pip install "attar\[executorch\]"'):
        FORMAT.load(tmp_path / "model.pte")
