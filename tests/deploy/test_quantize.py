"""int8 files of a small trained network: what is in them, what they answer, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from torch import nn

import quantised
from attar.data import Normalization
from attar.deploy.artefact import Candidate
from attar.deploy.onnx import ONNX
from attar.deploy.quantize import FEWEST_IMAGES, calibrate, calibration_images, quantize_onnx
from attar.deploy.running import load_images
from attar.errors import AttarError
from quantised import resnet, write_onnx


@pytest.fixture(scope="module")
def candidate() -> Candidate:
    return resnet()


@pytest.fixture(scope="module")
def normalization() -> Normalization:
    return quantised.normalization()


@pytest.fixture(scope="module")
def calibration(candidate: Candidate, normalization: Normalization) -> np.ndarray:
    return calibration_images(candidate.source, 128, 0, normalization, (8, 8))


@pytest.fixture(scope="module")
def float32(candidate: Candidate, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_onnx(candidate.network, tmp_path_factory.mktemp("onnx") / "model.onnx")
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"classes": "ten"})
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def int8(float32: Path, calibration: np.ndarray) -> Path:
    quantize_onnx(float32, float32.with_name("int8.onnx"), calibration)
    return float32.with_name("int8.onnx")


def weights_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def operators(path: Path) -> list[str]:
    """What onnxruntime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_name("optimised.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path.with_name("optimised.onnx")).graph.node]


def test_weights_are_int8_with_a_scale_per_channel(int8: Path, candidate: Candidate) -> None:
    model = onnx.load(int8)
    onnx.checker.check_model(model, full_check=True)
    weights = weights_of(model)
    quantised = {name: value for name, value in weights.items() if name.endswith("weight_quantized")}
    layers = [module for module in candidate.network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(quantised) == len(layers)
    for name, value in quantised.items():
        assert value.dtype == np.int8
        assert 2 * 255 * int(np.abs(value.astype(int)).max()) < 2**15
        scale = weights[name.replace("_quantized", "_scale")]
        if value.ndim == 4:
            assert scale.shape == (len(value),)
            # Symmetric, and every channel uses the whole range.
            assert (np.abs(value.astype(int)).reshape(len(value), -1).max(1) >= 63).all()
        assert not weights[name.replace("_quantized", "_zero_point")].any()
    left = [name for name, value in weights.items() if value.dtype == np.float32 and value.ndim > 1]
    assert left == []


def test_onnxruntime_computes_with_integers_from_image_to_logits(int8: Path) -> None:
    found = operators(int8)
    assert "Conv" not in found
    assert "Gemm" not in found
    assert {"QLinearConv", "QLinearAdd", "QGemm"} <= set(found)


def test_answers_are_those_of_float32_but_for_rounding(
    int8: Path, float32: Path, candidate: Candidate, normalization: Normalization
) -> None:
    images = load_images(candidate.source.test, normalization)
    exact, rounded = ONNX().load(float32)(images), ONNX().load(int8)(images)
    assert np.linalg.norm(rounded - exact) < 0.1 * np.linalg.norm(exact - exact.mean(0))
    assert (rounded.argmax(1) == exact.argmax(1)).mean() > 0.95
    assert np.abs(rounded - exact).max() > 1e-4  # it is another network
    # What the integer kernels of this processor say is what the file means: nothing saturates.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    meant = onnxruntime.InferenceSession(str(int8), options, providers=["CPUExecutionProvider"])
    told = meant.run(None, {meant.get_inputs()[0].name: images})[0]
    assert np.abs(rounded - told).mean() < 0.3 * np.abs(rounded - exact).mean()


def test_the_file_is_a_function_of_its_arguments(
    int8: Path, float32: Path, calibration: np.ndarray, tmp_path: Path
) -> None:
    quantize_onnx(float32, tmp_path / "again.onnx", calibration)
    assert (tmp_path / "again.onnx").read_bytes() == int8.read_bytes()
    quantize_onnx(float32, tmp_path / "other.onnx", calibration[:64])
    assert (tmp_path / "other.onnx").read_bytes() != int8.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.onnx", "other.onnx"]


def test_metadata_travels_and_no_tool_leaves_its_mark(int8: Path) -> None:
    model = onnx.load(int8)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"classes": "ten"}
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]


def test_excluded_nodes_stay_in_float32(float32: Path, calibration: np.ndarray, tmp_path: Path) -> None:
    nodes = [node for node in onnx.load(float32).graph.node if node.op_type in ("Conv", "Gemm")]
    chosen = [nodes[0], nodes[5], nodes[-1]]
    target = tmp_path / "mixed.onnx"
    quantize_onnx(float32, target, calibration, excluded=[node.name for node in chosen])
    model = onnx.load(target)
    weights = weights_of(model)
    for node in nodes:
        assert (node.input[1] in weights) == (node in chosen)
        assert (f"{node.input[1]}_quantized" in weights) == (node not in chosen)
    by_name = {node.name: node for node in model.graph.node}
    assert all(by_name[node.name].input[1] == node.input[1] for node in chosen)
    found = operators(target)
    assert found.count("QLinearConv") == len(nodes) - len(chosen)  # Gemm is among the chosen


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_other_calibrations(method: str, int8: Path, float32: Path, calibration: np.ndarray, tmp_path: Path) -> None:
    target = tmp_path / "int8.onnx"
    quantize_onnx(float32, target, calibration, method=method)
    assert target.read_bytes() != int8.read_bytes()
    exact, rounded = ONNX().load(float32)(calibration), ONNX().load(target)(calibration)
    assert (rounded.argmax(1) == exact.argmax(1)).mean() > 0.9


def test_one_scale_per_weight_and_eight_bits(float32: Path, calibration: np.ndarray, tmp_path: Path) -> None:
    target = tmp_path / "int8.onnx"
    quantize_onnx(float32, target, calibration, per_channel=False, weight_bits=8)
    weights = weights_of(onnx.load(target))
    quantised = [name for name in weights if name.endswith("weight_quantized")]
    assert all(weights[name.replace("_quantized", "_scale")].ndim == 0 for name in quantised)
    assert all(np.abs(weights[name].astype(int)).max() == 127 for name in quantised)


def test_a_fixed_batch_takes_any_number_of_images(
    candidate: Candidate, int8: Path, calibration: np.ndarray, tmp_path: Path
) -> None:
    path = write_onnx(candidate.network, tmp_path / "batch.onnx", batch=24)
    ranges = calibrate(path, calibration).ranges  # 128 is no multiple of 24
    free = calibrate(int8.with_name("model.onnx"), calibration).ranges
    (low, high), (free_low, free_high) = (each[each_name(each)].range_value for each in (ranges, free))
    assert low == pytest.approx(free_low, rel=1e-5)
    assert high == pytest.approx(free_high, rel=1e-5)


def each_name(ranges: object) -> str:
    return next(name for name in ranges.keys() if name.startswith("relu"))  # type: ignore[attr-defined]  # noqa: SIM118


def test_calibration_images_are_training_images_of_all_classes(
    candidate: Candidate, normalization: Normalization
) -> None:
    source = candidate.source
    # Images whose pixels tell which they are: the number in the original data, and the split.
    marked = {}
    for name, mark in (("train", 10), ("holdout", 100), ("test", 200)):
        split = getattr(source, name)
        pixels = np.full((len(split), 8, 8, 3), mark, np.uint8)
        pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = split.targets, np.arange(len(split)) % 256
        marked[name] = dataclasses.replace(split, pixels=pixels, rows=np.arange(len(split)))
    source = dataclasses.replace(source, **marked)
    plain = Normalization((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
    images = calibration_images(source, 200, 0, plain, (8, 8))
    assert images.shape == (200, 3, 8, 8)
    assert images.dtype == np.float32
    assert (images[:, :, 4, 4] == 10).all()
    counts = np.bincount(images[:, 0, 0, 0].astype(int), minlength=10)
    share = np.bincount(source.train.targets, minlength=10) * 200 / len(source.train)
    assert np.abs(counts - share).max() <= 1
    # No image twice, though the mark is the same for one in 256; a function of the seed.
    assert len(np.unique(images.reshape(200, -1), axis=0)) > 180
    assert np.array_equal(images, calibration_images(source, 200, 0, plain, (8, 8)))
    assert not np.array_equal(images, calibration_images(source, 200, 1, plain, (8, 8)))


def test_more_images_than_there_are(candidate: Candidate, normalization: Normalization) -> None:
    images = calibration_images(candidate.source, 10**6, 3, normalization, (8, 8))
    assert np.array_equal(images, load_images(candidate.source.train, normalization))


def test_a_calibration_set_too_small_is_refused(
    candidate: Candidate, normalization: Normalization, float32: Path, calibration: np.ndarray, tmp_path: Path
) -> None:
    with pytest.raises(
        AttarError, match=f"20 calibration images are too few .* 10 classes: give at least {FEWEST_IMAGES}"
    ):
        calibration_images(candidate.source, 20, 0, normalization, (8, 8))
    many = dataclasses.replace(candidate.source, classes=tuple(str(label) for label in range(5000)))
    with pytest.raises(AttarError, match=r"of 'digits' are too few .*: give at least 5000"):
        calibration_images(many, 5000, 0, normalization, (8, 8))
    with pytest.raises(AttarError, match="31 calibration images are too few"):
        quantize_onnx(float32, tmp_path / "int8.onnx", calibration[:31])
    many_logits = write_onnx(nn.Sequential(nn.Flatten(), nn.Linear(192, 150)), tmp_path / "many.onnx")
    with pytest.raises(AttarError, match="150 classes: give at least 150"):
        quantize_onnx(many_logits, tmp_path / "int8.onnx", calibration)
    assert not (tmp_path / "int8.onnx").exists()


def test_other_mistakes(
    candidate: Candidate,
    normalization: Normalization,
    float32: Path,
    int8: Path,
    calibration: np.ndarray,
    tmp_path: Path,
) -> None:
    target = tmp_path / "int8.onnx"
    noise = tmp_path / "noise.onnx"
    for content in (b"", b"no model at all", float32.read_bytes()[:5000]):
        noise.write_bytes(content)
        with pytest.raises(AttarError, match="is no ONNX model"):
            quantize_onnx(noise, target, calibration)
    with pytest.raises(AttarError, match="There is no file"):
        quantize_onnx(tmp_path / "nowhere.onnx", target, calibration)
    with pytest.raises(AttarError, match="quantised already"):
        quantize_onnx(int8, target, calibration)
    with pytest.raises(AttarError, match="takes images of 3 x 8 x 8, not of 3 x 16 x 16"):
        quantize_onnx(float32, target, np.zeros((64, 3, 16, 16), np.float32))
    with pytest.raises(AttarError, match="There is no node 'node_Conv': did you mean 'node_Conv_"):
        quantize_onnx(float32, target, calibration, excluded=["node_Conv"])
    with pytest.raises(AttarError, match="no calibration method 'entropie': did you mean 'entropy'"):
        quantize_onnx(float32, target, calibration, method="entropie")
    with pytest.raises(AttarError, match="open it anew"):
        calibration_images(candidate.source, 64, 0, normalization, (16, 16))
    assert not target.exists()


def test_a_missing_package_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, float32: Path, calibration: np.ndarray, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(AttarError, match=r'pip install "attar\[export\]"'):
        quantize_onnx(float32, tmp_path / "int8.onnx", calibration)
