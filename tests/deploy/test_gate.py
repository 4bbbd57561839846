"""The gate lets the faultless artefact through and finds faults: in a weight, in a bias, in the normalisation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from attar.data import Normalization
from attar.deploy import Candidate, Settings, load_candidate
from attar.deploy.gate import gate, refuse_drop, rounding_error
from attar.deploy.onnx import ONNX, annotate
from attar.deploy.packaged import package
from attar.deploy.running import PIXELS, as_pixels, load_images, some_of
from attar.errors import AttarError
from exports import finished_run

onnx = pytest.importorskip("onnx", reason='pip install "attar[export]"')
pytest.importorskip("onnxscript", reason='pip install "attar[export]"')
pytest.importorskip("onnxruntime", reason='pip install "attar[export]"')


@pytest.fixture(scope="module")
def candidate() -> Candidate:
    return load_candidate(finished_run("BYOT"))


@pytest.fixture(scope="module")
def images(candidate: Candidate) -> np.ndarray:
    normalization = Normalization(candidate.student.mean, candidate.student.std)
    return load_images(some_of(candidate.source.test, 256), normalization)


@pytest.fixture(scope="module")
def artefact(candidate: Candidate, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    ONNX().write(candidate.network, Settings(candidate.source.image_size), path, None)
    annotate(path, {})
    return path


def changed(path: Path, where: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Write the same graph with one initialiser changed."""
    model = onnx.load(path)
    tensor = next(each for each in model.graph.initializer if each.name == name)
    values = change(onnx.numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
    onnx.save(model, where)
    return where


def initialisers(path: Path, dimensions: int) -> list[str]:
    return [each.name for each in onnx.load(path).graph.initializer if len(each.dims) == dimensions]


def one_weight(values: np.ndarray) -> np.ndarray:
    """The weight of median size, 5 % larger."""
    flat = values.reshape(-1)
    flat[np.argsort(np.abs(flat))[len(flat) // 2]] *= 1.05
    return values


def test_faultless(candidate: Candidate, images: np.ndarray, artefact: Path) -> None:
    found = gate(candidate.network, ONNX().load(artefact), images)
    assert found.images == len(images) == 256
    assert found.max_error > 0
    assert found.relative_error == found.max_error / found.largest_logit
    assert found.rounding is not None
    assert found.tolerance == max(3e-6, 20 * found.rounding)
    assert found.relative_error < found.tolerance / 2
    assert (found.agreement, found.ties, found.batch_sizes) == (1.0, 0, (1, 5, 64))


def test_every_layer_is_watched(candidate: Candidate, images: np.ndarray, artefact: Path, tmp_path: Path) -> None:
    kernels = initialisers(artefact, 4)
    assert len(kernels) == 21
    for name in [*kernels, *initialisers(artefact, 2)]:
        faulty = changed(artefact, tmp_path / "faulty.onnx", name, one_weight)
        with pytest.raises(AttarError, match="its logits are off by"):
            gate(candidate.network, ONNX().load(faulty), images)


def test_biases_and_kernels_the_wrong_way_round(
    candidate: Candidate, images: np.ndarray, artefact: Path, tmp_path: Path
) -> None:
    # Batch norm has become the convolutions' biases.
    biases = [name for name in initialisers(artefact, 1) if name.endswith("bias")]
    assert len(biases) == 22
    for name in biases:
        faulty = changed(artefact, tmp_path / "faulty.onnx", name, lambda values: values[::-1])
        with pytest.raises(AttarError, match="its logits are off by"):
            gate(candidate.network, ONNX().load(faulty), images)
    for name in ("conv1.weight", "layer3.2.conv2.weight"):
        faulty = changed(artefact, tmp_path / "faulty.onnx", name, lambda values: values.swapaxes(2, 3))
        with pytest.raises(AttarError, match="its logits are off by"):
            gate(candidate.network, ONNX().load(faulty), images)


def test_wrong_normalisation(candidate: Candidate, images: np.ndarray, artefact: Path, tmp_path: Path) -> None:
    mean, std = candidate.student.mean, candidate.student.std
    pixels = as_pixels(load_images(some_of(candidate.source.test, 256), PIXELS))
    assert (pixels.dtype, pixels.shape) == (np.uint8, (256, 8, 8, 3))

    def packaged(normalization: Normalization) -> Any:
        path = Path(shutil.copy(artefact, tmp_path / "packaged.onnx"))
        package(path, normalization)
        annotate(path, {})
        return ONNX().load(path)

    def through(runtime: Any) -> Any:
        return gate(candidate.network, runtime, images, shown=pixels, probabilities=True)

    right = packaged(Normalization(mean, std))
    found = through(right)
    assert found.agreement == 1.0
    answers = right(pixels)
    assert np.allclose(answers.sum(axis=1), 1, atol=1e-5)
    with torch.no_grad():
        expected = candidate.network(torch.from_numpy(images)).softmax(dim=1).numpy()
    assert np.allclose(answers, expected, atol=1e-5)
    wrong = [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (mean, tuple(1.001 * value for value in std)),
        (tuple(value + 0.5 / 255 for value in mean), std),
        (std, mean),
    ]
    for normalization in wrong:
        with pytest.raises(AttarError, match=r"its logits are off by|names"):
            through(packaged(Normalization(*normalization)))


def test_answers_that_are_none(candidate: Candidate, images: np.ndarray) -> None:
    def answering(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        def runtime(shown: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return change(candidate.network(torch.from_numpy(shown)).numpy().copy())

        return runtime

    assert gate(candidate.network, answering(lambda z: z), images).agreement == 1.0
    with pytest.raises(AttarError, match="not finite in batches of 1;"):
        gate(candidate.network, answering(lambda z: z * np.nan), images)
    with pytest.raises(AttarError, match=r"answers \[1, 9\] to 8 images|answers \[8, 9\]"):
        gate(candidate.network, answering(lambda z: z[:, 1:]), images)
    # A fault that larger batches alone show.
    with pytest.raises(AttarError, match="off by"):
        gate(candidate.network, answering(lambda z: z if len(z) == 1 else z[::-1]), images)
    gate(candidate.network, answering(lambda z: z), images, exact=True)


def test_exact(candidate: Candidate, images: np.ndarray) -> None:
    def runtime(shown: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return candidate.network(torch.from_numpy(shown)).numpy() * np.float32(1 + 1e-6)

    gate(candidate.network, runtime, images)
    with pytest.raises(AttarError, match="off by"):
        gate(candidate.network, runtime, images, exact=True)


def test_near_ties_may_fall_either_way() -> None:
    class Tied(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x[:, 0, 0, 0], x[:, 0, 0, 0] + 1e-7 * x[:, 0, 0, 1]], dim=1)

    shown = np.ones((4, 3, 1, 2), np.float32)

    def swapped(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return Tied()(torch.from_numpy(images)).numpy()[:, ::-1]

    found = gate(Tied(), swapped, shown)
    assert (found.agreement, found.ties) == (0.0, 4)


def test_int8_is_judged_by_agreement(candidate: Candidate, images: np.ndarray) -> None:
    def coarse(shown: np.ndarray, step: float) -> np.ndarray:
        with torch.no_grad():
            return np.round(candidate.network(torch.from_numpy(shown)).numpy() / step) * np.float32(step)

    found = gate(candidate.network, lambda shown: coarse(shown, 0.01), images, least_agreement=0.9)
    assert found.tolerance is None
    assert 0.9 <= found.agreement <= 1
    with pytest.raises(AttarError, match="agrees with the float32 network on"):
        gate(candidate.network, lambda shown: coarse(shown, 1e3), images, least_agreement=0.9)


def test_drop() -> None:
    expected = np.ones(1000, bool)
    right = expected.copy()
    right[:10] = False
    assert refuse_drop(right, expected, 0.01) == 0.01
    assert refuse_drop(expected, right, 0.0) == -0.01
    right[:100] = False
    with pytest.raises(AttarError, match=r"loses 10\.0 points of accuracy, and 1\.0 are allowed"):
        refuse_drop(right, expected, 0.01)
    # One image more than the bound is luck.
    lucky = expected.copy()
    lucky[:11] = False
    refuse_drop(lucky, expected, 0.01)


def test_rounding_of_networks_without_float64(candidate: Candidate, images: np.ndarray) -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.float().mean(dim=(2, 3)))

    torch.manual_seed(0)
    network = Casting()
    assert rounding_error(network, images[:8]) is None
    assert 0 < (rounding_error(candidate.network, images[:8]) or 0) < 1e-5

    def runtime(shown: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.from_numpy(shown)).numpy()

    assert gate(network, runtime, images).tolerance == 1e-4
