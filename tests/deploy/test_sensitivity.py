"""Layers that int8 hurts are found and left in float32, as few as the bound takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from attar.deploy.onnx import ONNX
from attar.deploy.quantize import calibrate, calibration_images, quantize_onnx
from attar.deploy.running import load_images
from attar.deploy.sensitivity import _search, quantize_within, sensitivities
from attar.errors import AttarError
from quantised import SIZE, chain, digits, harden, normalization, write_onnx

HARD = 2.0**12


@pytest.fixture(scope="module")
def calibration() -> np.ndarray:
    return calibration_images(digits(), 128, 0, normalization(), SIZE)


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(harden(chain().network, HARD), tmp_path_factory.mktemp("hard") / "model.onnx")


@pytest.fixture(scope="module")
def accuracy() -> Callable[[Path], float]:
    images, targets = load_images(digits().holdout, normalization()), digits().holdout.targets
    return lambda path: float((ONNX().load(path)(images).argmax(1) == targets).mean())


def layer(path: Path, weight: str) -> str:
    """The node that has a weight."""
    return next(node.name for node in onnx.load(path).graph.node if weight in node.input)


def test_a_layer_that_is_sensitive_on_purpose_is_left_in_float32(
    hard: Path, calibration: np.ndarray, accuracy: Callable[[Path], float], tmp_path: Path
) -> None:
    target = tmp_path / "int8.onnx"
    told = []

    def judged(path: Path) -> float:
        told.append(path)
        return accuracy(path)

    found = quantize_within(hard, target, calibration, judged, 0.02)
    # The channel stands between the second and the third convolution: both must not round it.
    needed = {layer(hard, "conv2.weight"), layer(hard, "conv3.weight")}
    assert found["holds"]
    assert needed <= set(found["left_in_float32"])
    assert {entry["layer"] for entry in found["sensitivity"][:2]} == needed
    assert found["sensitivity"][0]["error"] > 10 * found["sensitivity"][2]["error"]
    assert [entry["left"] for entry in found["attempts"]] == [0, 1, 2]
    assert found["holdout_float32"] - found["attempts"][0]["accuracy"] > 0.2
    assert found["holdout_float32"] - found["attempts"][1]["accuracy"] > 0.02
    assert found["holdout_int8"] == accuracy(target) >= found["holdout_float32"] - 0.02
    kept = {tensor.name for tensor in onnx.load(target).graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    assert {"conv2.weight", "conv3.weight"} <= kept
    assert "conv1.weight" not in kept
    assert "conv4.weight" not in kept
    # The float32 file is judged once, and nothing besides the file stays.
    assert told.count(hard) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]


def test_nothing_is_left_where_the_bound_holds_at_once(
    hard: Path, calibration: np.ndarray, accuracy: Callable[[Path], float], tmp_path: Path
) -> None:
    found = quantize_within(hard, tmp_path / "int8.onnx", calibration, accuracy, 0.99)
    assert found["holds"]
    assert found["left_in_float32"] == found["sensitivity"] == []
    assert len(found["attempts"]) == 1
    quantize_onnx(hard, tmp_path / "plain.onnx", calibration)
    assert (tmp_path / "int8.onnx").read_bytes() == (tmp_path / "plain.onnx").read_bytes()


def test_a_bound_that_cannot_hold_is_told(hard: Path, calibration: np.ndarray, tmp_path: Path) -> None:
    calls = []

    def worse_and_worse(path: Path) -> float:
        calls.append(path)
        return 1.0 if len(calls) == 1 else 0.5 - 0.1 * len(calls)

    target = tmp_path / "int8.onnx"
    found = quantize_within(hard, target, calibration, worse_and_worse, 0.02)
    assert not found["holds"]
    assert found["left_in_float32"] == []  # the most accurate of those that were tried
    assert max(entry["left"] for entry in found["attempts"]) == found["layers"] // 2
    assert target.is_file()


def test_ranking_tells_what_each_layer_costs_alone(hard: Path, calibration: np.ndarray, tmp_path: Path) -> None:
    calibrated = calibrate(hard, calibration)
    ranking = sensitivities(calibrated, hard, calibration)
    assert sorted(name for name, _ in ranking) == sorted(calibrated.layers)
    (worst, error), exact = ranking[0], ONNX().load(hard)(calibration[::2])
    calibrated.write(tmp_path / "one.onnx", only=worst)
    off = ONNX().load(tmp_path / "one.onnx")(calibration[::2]) - exact
    assert error == pytest.approx(np.linalg.norm(off) / np.linalg.norm(exact - exact.mean(0)), rel=0.3)
    assert all(later <= earlier for (_, earlier), (_, later) in itertools.pairwise(ranking))


def test_what_fails_leaves_nothing(hard: Path, calibration: np.ndarray, tmp_path: Path) -> None:
    def fails(path: Path) -> float:
        if path != hard:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        quantize_within(hard, tmp_path / "int8.onnx", calibration, fails, 0.01)
    with pytest.raises(AttarError, match="too few"):
        quantize_within(hard, tmp_path / "int8.onnx", calibration[:8], fails, 0.01)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("enough", range(1, 13))
@pytest.mark.parametrize("most", [1, 2, 3, 7, 11])
def test_the_search_finds_the_fewest(enough: int, most: int) -> None:
    asked: dict[int, bool] = {}

    def holds(left: int) -> bool:
        assert 1 <= left <= most
        assert left not in asked
        return asked.setdefault(left, left >= enough)

    _search(holds, most)
    within = [left for left, held in asked.items() if held]
    assert (min(within) == enough) if enough <= most else (not within and most in asked)
    assert len(asked) <= 7
