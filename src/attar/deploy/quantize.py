"""int8 for onnxruntime's CPU kernels: activations' ranges from training images, weights per channel, as Q/DQ pairs.

Weights are symmetric int8 in -64..64, activations asymmetric uint8. x86 processors with AVX2 and without VNNI multiply
uint8 by int8 and add two neighbouring products in 16 bits (`vpmaddubsw`): 2 x 255 x 127 does not fit and is cut off
silently, 2 x 255 x 64 = 32640 < 2^15 does. So the file answers the same on AVX2, on VNNI and on ARM, whose kernels add
in 32 bits; what it costs is one bit of the weights. The two other ways out, uint8 weights or int8 activations, are
exact as well, but onnxruntime has no kernels for them on AVX2 that are faster than float32's. Asymmetric activations
also let ReLU and Clip vanish into the ranges. `weight_bits=8` uses -127..127, for files that will run on ARM or VNNI
alone.

What has an integer kernel is quantised, softmax and normalisations are not, and the last linear layer answers in
float32: its logits are not rounded to 256 values.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attar.data import Normalization, Source
from attar.data.hashing import hash_counters
from attar.deploy.artefact import Images
from attar.deploy.candidate import first_line
from attar.deploy.program import require, silence
from attar.deploy.running import load_images
from attar.errors import AttarError, unknown_name
from attar.train.files import write_atomically

__all__ = ["CALIBRATIONS", "FEWEST_IMAGES", "Calibrated", "calibrate", "calibration_images", "quantize_onnx"]

# How ranges are told from images, with what onnxruntime's calibrators are told. Percentile and entropy cut rare large
# activations off for finer steps; batch norm and ReLU leave little to gain there, and they keep all activations.
CALIBRATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "minmax": ("MinMax", {}),
    "percentile": ("Percentile", {"percentile": 99.99, "symmetric": False}),
    "entropy": ("Entropy", {"symmetric": False}),
}
FEWEST_IMAGES = 32

_CALIBRATION = 7  # separates this draw from others of the same seed
_TOGETHER = 32  # images whose activations are in memory at a time

# Layers that compute, and what carries integers on from one to the next.
_COMPUTE = (
    "Conv",
    "Gemm",
    "MatMul",
    "Add",
    "Mul",
    "LeakyRelu",
    "Sigmoid",
    "AveragePool",
    "GlobalAveragePool",
    "Concat",
)
_ACTIVATIONS = ("Relu", "Clip")
_CARRY = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Split", "Slice", "Pad", "Resize")


def calibration_images(
    source: Source, count: int, seed: int, normalization: Normalization, image_size: tuple[int, int]
) -> Images:
    """Choose training images to calibrate on, every class in its share, prepared as for evaluation.

    Neither test nor hold-out images are among them: those tell afterwards what quantisation costs. The choice is a
    function of (source, count, seed) alone; a larger count keeps nearly all images of a smaller one.

    Args:
        source: opened at the size that the network takes.
        count: images; all training images if there are fewer.
        seed: of the choice.
        normalization: of the network's images.
        image_size: (H, W) that the network takes.

    Raises:
        AttarError: fewer images than `FEWEST_IMAGES` or than classes, or a source opened at another size.
    """
    train = source.train
    if image_size != source.image_size:
        asked, opened = (" x ".join(map(str, size)) for size in (image_size, source.image_size))
        raise AttarError(f"Images of {asked} are to calibrate, but '{source.name}' is open at {opened}: open it anew.")
    needed = max(FEWEST_IMAGES, source.num_classes)
    _refuse_few(min(count, len(train)), source.num_classes, f"of '{source.name}' " if len(train) < needed else "")
    counts = np.bincount(train.targets, minlength=source.num_classes)
    order = np.lexsort((hash_counters(seed, _CALIBRATION, train.index), train.targets))
    rank = np.empty(len(train), dtype=np.int64)
    rank[order] = np.arange(len(train)) - np.repeat(np.cumsum(counts) - counts, counts)
    # The first of every class, then the second of every class, larger classes more often.
    share = (rank + 0.5) / counts[train.targets]
    chosen = np.sort(np.lexsort((hash_counters(seed, _CALIBRATION, train.index), share))[:count])
    rows, targets, index = train.rows[chosen], train.targets[chosen], train.index[chosen]
    return load_images(dataclasses.replace(train, rows=rows, targets=targets, index=index), normalization)


def quantize_onnx(
    source: Path,
    target: Path,
    calibration: Images,
    *,
    excluded: Sequence[str] = (),
    per_channel: bool = True,
    method: str = "minmax",
    weight_bits: int = 7,
) -> None:
    """Write an ONNX network in int8 (static, Q/DQ pairs): the same file for the same arguments, to the last byte.

    Args:
        source: float32 ONNX network of one batch of images [N, 3, H, W].
        target: replaced when it exists, or left as it was if anything is refused.
        calibration: training images [N, 3, H, W], prepared as for evaluation.
        excluded: names of nodes that stay in float32.
        per_channel: a scale for every output channel of a weight, else one for all.
        method: how ranges are told from images: `minmax`, `percentile` (99.99 % of the values lie inside) or `entropy`
            (least information lost).
        weight_bits: 7 is exact on every processor; 8 is finer, but wrong on x86 without VNNI.

    Raises:
        AttarError: no ONNX network or one that takes something else, too few or other images, no such node or method,
            a package that is missing.
    """
    calibrated = calibrate(source, calibration, per_channel=per_channel, method=method, weight_bits=weight_bits)
    calibrated.write(target, excluded=excluded)


@dataclass(frozen=True)
class Calibrated:
    """A float32 network whose activations' ranges are known: what int8 files with different layers are written from.

    Attributes:
        model: ONNX, constants folded, shapes known.
        ranges: onnxruntime's, of every activation.
        metadata: of the source file; travels along.
        per_channel: a scale for every output channel of a weight.
        weight_bits: 7 or 8.
    """

    model: Any
    ranges: Any
    metadata: tuple[tuple[str, str], ...]
    per_channel: bool
    weight_bits: int

    @property
    def layers(self) -> list[tuple[str, ...]]:
        """What can stay in float32 by itself, in the graph's order: a node, and the ReLU or Clip it alone feeds."""
        readers: dict[str, list[Any]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        outputs = {value.name for value in self.model.graph.output}
        layers: list[tuple[str, ...]] = []
        for node in self.model.graph.node:
            if node.op_type in _COMPUTE:
                after = readers.get(node.output[0], [])
                fused = len(after) == 1 and after[0].op_type in _ACTIVATIONS and node.output[0] not in outputs
                layers.append((node.name, after[0].name) if fused else (node.name,))
        return layers

    def write(self, target: Path, *, only: Iterable[str] = (), excluded: Sequence[str] = ()) -> None:
        """Write an int8 file.

        Args:
            target: replaced when it exists.
            only: names of the nodes to quantise; default: all.
            excluded: names of nodes that stay in float32.

        Raises:
            AttarError: no node of that name, or a folder that cannot be written.
        """
        from onnxruntime.quantization import QDQQuantizer, QuantType

        names = {node.name for node in self.model.graph.node}
        only = list(only)
        for name in (*only, *excluded):
            if name not in names:
                raise unknown_name("node", name, names)
        with silence():
            quantizer = QDQQuantizer(
                copy.deepcopy(self.model),
                self.per_channel,
                self.weight_bits == 7,
                QuantType.QInt8,
                QuantType.QUInt8,
                self.ranges,
                only,
                list(excluded),
                [*_COMPUTE, *_ACTIVATIONS, *_CARRY],
                {"OpTypesToExcludeOutputQuantization": ["Gemm"]},
            )
            quantizer.quantize_model()
            _keep_float(quantizer.model)
            quantizer.model.topological_sort()
        model = quantizer.model.model
        _tidy(model, self.metadata)
        write_atomically(target, model.SerializeToString(deterministic=True))


def calibrate(
    source: Path, calibration: Images, *, per_channel: bool = True, method: str = "minmax", weight_bits: int = 7
) -> Calibrated:
    """Learn the ranges of a network's activations; arguments and errors as of `quantize_onnx`."""
    require(("onnx", "onnxruntime"), "ONNX in int8", "export")
    if method not in CALIBRATIONS:
        raise unknown_name("calibration method", method, CALIBRATIONS)
    if weight_bits not in (7, 8):
        raise AttarError(f"Weights of {weight_bits} bits are not to be had: choose 7 or 8.")
    metadata, batch = _checked(source, calibration)
    with tempfile.TemporaryDirectory() as folder, silence():
        prepared = Path(folder) / "prepared.onnx"
        try:
            ranges = _ranges(source, prepared, calibration, batch, method)
        except Exception as error:  # onnxruntime's own kinds, which have no common base
            raise AttarError(
                f"onnxruntime cannot calibrate '{source}' ({first_line(error)}): export it anew."
            ) from error
        from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

        model = load_model_with_shape_infer(prepared)
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    return Calibrated(model, ranges, metadata, per_channel, weight_bits)


def _ranges(source: Path, prepared: Path, calibration: Images, batch: int | None, method: str) -> Any:
    from onnxruntime.quantization import create_calibrator, quant_pre_process
    from onnxruntime.quantization.calibrate import CalibrationMethod

    # Batch norm that still stands alone goes into its convolution, constants are folded. Symbolic shapes are for
    # networks of text.
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    kind, options = CALIBRATIONS[method]
    calibrator = create_calibrator(
        prepared,
        [*_COMPUTE, *_ACTIVATIONS, *_CARRY],
        augmented_model_path=str(prepared.with_name("augmented.onnx")),
        calibrate_method=getattr(CalibrationMethod, kind),
        extra_options=options,
    )
    name = calibrator.infer_session.get_inputs()[0].name
    size = batch or _TOGETHER
    starts = list(range(0, len(calibration), size))
    at_a_time = max(1, _TOGETHER // size)
    for first in range(0, len(starts), at_a_time):
        batches = [_part(calibration, start, size, batch is not None) for start in starts[first : first + at_a_time]]
        calibrator.collect_data(_Feeds(name, batches))
    return calibrator.compute_data()


def _part(images: Images, start: int, size: int, whole: bool) -> Images:
    """Return the images from `start` on; a whole batch begins again at the first image, which widens no range."""
    if whole:
        return images[np.arange(start, start + size) % len(images)]
    return images[start : start + size]


class _Feeds:
    """onnxruntime's CalibrationDataReader."""

    def __init__(self, name: str, batches: list[Images]) -> None:
        self._feeds = iter([{name: np.ascontiguousarray(batch)} for batch in batches])

    def get_next(self) -> dict[str, Images] | None:
        return next(self._feeds, None)


def _checked(source: Path, calibration: Images) -> tuple[tuple[tuple[str, str], ...], int | None]:
    """Refuse what cannot be quantised; return the file's metadata and how many images it takes at a time."""
    import onnx

    if not source.is_file():
        raise AttarError(f"There is no file '{source}': give a float32 ONNX model.")
    try:
        model = onnx.load(str(source))
        onnx.checker.check_model(model)
    except Exception as error:  # the parser's and the checker's own kinds
        raise AttarError(
            f"'{source}' is no ONNX model ({first_line(error)}): give the float32 file of an export."
        ) from error
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        raise AttarError(f"'{source}' is quantised already: give the float32 file it was made from.")
    initial = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initial]
    kind = inputs[0].type.tensor_type if len(inputs) == 1 else None
    if kind is None or kind.elem_type != onnx.TensorProto.FLOAT or len(kind.shape.dim) != 4:
        raise AttarError(
            f"'{source}' does not take one batch of float32 images [N, 3, H, W]: give a network that does."
        )
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    shown = list(calibration.shape[1:])
    if calibration.ndim != 4 or any(size not in (None, got) for size, got in zip(sizes[1:], shown, strict=True)):
        wanted = " x ".join(str(size or "any") for size in sizes[1:])
        raise AttarError(
            f"'{source}' takes images of {wanted}, not of {' x '.join(map(str, shown))}: give such images."
        )
    answer = model.graph.output[0].type.tensor_type.shape.dim
    _refuse_few(len(calibration), answer[-1].dim_value if len(answer) == 2 else 0, "")
    return tuple((entry.key, entry.value) for entry in model.metadata_props), sizes[0]


def _refuse_few(images: int, classes: int, whose: str) -> None:
    needed = max(FEWEST_IMAGES, classes)
    if images < needed:
        raise AttarError(
            f"The {images} calibration images {whose}are too few to know the ranges of activations with {classes} "
            f"classes: give at least {needed}."
        )


def _keep_float(model: Any) -> None:
    """Keep onnxruntime from quantising the weights that are left in float32.

    It does so by itself, with one scale for a whole weight, where a convolution or linear layer stands between a
    DequantizeLinear and a QuantizeLinear (with ReLU or Clip in between). The maximum of one tensor, which is the tensor
    and which no optimiser takes away, ends that pattern.
    """
    import onnx

    writers = {name: node for node in model.nodes() for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in model.nodes():
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in list(model.nodes()):
        if node.op_type not in ("Conv", "Gemm"):
            continue
        weight = writers.get(node.input[1])
        if weight is not None and weight.op_type == "DequantizeLinear":
            continue
        last = node
        while len(after := readers.get(last.output[0], [])) == 1 and after[0].op_type in _ACTIVATIONS:
            last = after[0]
        for reader in after:
            if reader.op_type == "QuantizeLinear":
                same = f"{last.output[0]}_float32"
                model.add_node(onnx.helper.make_node("Max", [last.output[0]], [same], f"{last.name}_float32"))
                reader.input[0] = same


def _tidy(model: Any, metadata: tuple[tuple[str, str], ...]) -> None:
    """Leave out the operator sets that no node uses and what tools have noted; put the source's metadata back."""
    used = {node.domain for node in model.graph.node}
    opsets = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:], model.metadata_props[:]
    model.opset_import.extend(opsets)
    for key, value in metadata:
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
