"""The columns of a comparison: what is told of every entry, and how a run is asked for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attar.compare.primary import CLASSIFICATION, SEGMENTATION, Primary
from attar.compare.records import Record
from attar.compare.statistics import Summary, summary
from attar.compare.teachers import teacher_seconds
from attar.train.predictions import Predictions

__all__ = ["COLUMNS", "DENSE_COLUMNS", "Column", "at", "class_iou", "confusion", "figures", "recall"]


@dataclass(frozen=True)
class Column:
    """One figure that every entry has.

    Attributes:
        key: as in the CSV and JSON files.
        title: as in tables.
        kind: how it is written: `share` (0..1, as percent), `number`, `seconds`, `milliseconds`, `bytes`, `flops`,
            `count` or `rate`.
        better: which way is better; None where neither is.
        meaning: one sentence.
        group: `quality`, `training` or `deployment`.
    """

    key: str
    title: str
    kind: Literal["share", "number", "seconds", "milliseconds", "bytes", "flops", "count", "rate"]
    better: Literal["high", "low"] | None
    meaning: str
    group: Literal["quality", "training", "deployment"]


_QUALITY = (
    Column("top1", "Top-1", "share", "high", "Share of test images whose class the student names.", "quality"),
    Column(
        "top5",
        "Top-5",
        "share",
        "high",
        "Share of test images whose class is among the student's first five.",
        "quality",
    ),
    Column("nll", "NLL", "number", "low", "Mean of -log p(true class) over the test images, in nats.", "quality"),
    Column(
        "calibration_error",
        "Calibration error",
        "share",
        "low",
        "Expected difference of confidence and accuracy over 15 equal bins of confidence.",
        "quality",
    ),
    Column(
        "class_spread",
        "Per-class spread",
        "share",
        "low",
        "Standard deviation of the accuracies of the single classes: how unevenly the student serves them.",
        "quality",
    ),
    Column(
        "agreement",
        "Agreement",
        "share",
        "high",
        "Share of test images to which students of two seeds give the same class, mean over pairs of seeds.",
        "quality",
    ),
    Column(
        "corruption_top1",
        "Corrupted top-1",
        "share",
        "high",
        "Top-1 on corrupted test images, mean over kinds and severities.",
        "quality",
    ),
)
_DENSE_QUALITY = (
    Column(
        "miou",
        "mIoU",
        "share",
        "high",
        "Mean of intersection over union over the classes that labels or answers hold, pixels counted over all test "
        "images, void ones left out.",
        "quality",
    ),
    Column(
        "pixel_accuracy",
        "Pixel accuracy",
        "share",
        "high",
        "Share of the test images' pixels whose class the student names, void ones left out.",
        "quality",
    ),
    Column("nll", "NLL", "number", "low", "Mean of -log p(true class) over the valid test pixels, in nats.", "quality"),
    Column(
        "calibration_error",
        "Calibration error",
        "share",
        "low",
        "Expected difference of confidence and accuracy over 15 equal bins of confidence, over valid pixels.",
        "quality",
    ),
    Column(
        "class_spread",
        "Per-class spread",
        "share",
        "low",
        "Standard deviation of the IoUs of the single classes: how unevenly the student serves them.",
        "quality",
    ),
    Column(
        "corruption_miou",
        "Corrupted mIoU",
        "share",
        "high",
        "mIoU on corrupted test images, mean over severities and the kinds that leave pixels in place.",
        "quality",
    ),
)
_COSTS = (
    Column(
        "training_seconds",
        "Training time",
        "seconds",
        "low",
        "Time spent in training steps, that of its teachers included where their run folders are there.",
        "training",
    ),
    Column(
        "step",
        "Step time",
        "number",
        "low",
        "Time of one training step in times of plain training's, the two measured in turn in one process.",
        "training",
    ),
    Column(
        "images_per_second",
        "Images/s",
        "rate",
        "high",
        "Training images per second, teachers' training left out.",
        "training",
    ),
    Column(
        "peak_memory",
        "Peak memory",
        "bytes",
        "low",
        "Most memory in use while training: on a GPU what was allocated there, else what the process gained.",
        "training",
    ),
    Column(
        "training_flops",
        "Training FLOPs",
        "flops",
        "low",
        "Operations of all training steps, forward and backward, teachers' answers included but not their training.",
        "training",
    ),
    Column(
        "extra_parameters",
        "Extra parameters",
        "count",
        "low",
        "Parameters that training needs and deployment drops.",
        "training",
    ),
    Column("deployed_parameters", "Parameters", "count", "low", "Parameters of the student as deployed.", "deployment"),
    Column("deployed_flops", "FLOPs", "flops", "low", "Operations of the student for one image.", "deployment"),
    Column(
        "latency",
        "Latency",
        "milliseconds",
        "low",
        "Median time of the student for one image on one CPU thread.",
        "deployment",
    ),
)


def _exports(main: Primary, meaning: str) -> tuple[Column, ...]:
    """Return what is told of exports, `main` measured on the int8 one, whose meaning that is."""
    return (
        Column(
            "onnx_latency",
            "ONNX latency",
            "milliseconds",
            "low",
            "Median time of the float32 ONNX export for one image on one CPU thread, in onnxruntime.",
            "deployment",
        ),
        Column("onnx_size", "ONNX size", "bytes", "low", "Size of the float32 ONNX export.", "deployment"),
        Column(f"int8_{main.key}", f"int8 {main.name}", "share", "high", meaning, "deployment"),
        Column(
            "int8_drop",
            "int8 drop",
            "share",
            "low",
            f"{main.title} of the student in float32 less that of its int8 ONNX export.",
            "deployment",
        ),
        Column(
            "int8_left",
            "Left in float32",
            "count",
            "low",
            "Nodes of the int8 ONNX export that stay in float32, since they cost too much accuracy in int8.",
            "deployment",
        ),
        Column(
            "int8_latency",
            "int8 latency",
            "milliseconds",
            "low",
            "Median time of the int8 ONNX export for one image on one CPU thread, in onnxruntime.",
            "deployment",
        ),
        Column("int8_size", "int8 size", "bytes", "low", "Size of the int8 ONNX export.", "deployment"),
        Column(
            "outliers",
            "Outliers",
            "number",
            "low",
            "Largest magnitude of an activation in times of that which 0.1 % of all reach, at the worst tap.",
            "deployment",
        ),
    )


COLUMNS = (
    *_QUALITY,
    *_COSTS,
    *_exports(CLASSIFICATION, "Share of test images whose class the int8 ONNX export names, in onnxruntime."),
)
# Dense tasks keep counts instead of the answers that agreement would compare.
DENSE_COLUMNS = (
    *_DENSE_QUALITY,
    *_COSTS,
    *_exports(SEGMENTATION, "Mean IoU on the test images of the int8 ONNX export, in onnxruntime."),
)


def figures(runs: Sequence[Record]) -> dict[str, Summary]:
    """Return every figure over the finished runs that have it, by column key."""
    if runs and runs[0].primary.dense:
        return _over(runs, _DENSE_MEASURES)
    measured = _over(runs, _MEASURES)
    agreement = _agreement(runs)
    return measured if agreement is None else {**measured, "agreement": agreement}


def _over(runs: Sequence[Record], measures: Mapping[str, Callable[[Record], float | None]]) -> dict[str, Summary]:
    return {
        key: summary(values)
        for key, measure in measures.items()
        if (values := [value for run in runs if (value := measure(run)) is not None])
    }


def at(values: Any, *keys: str) -> Any:
    """Return what lies at the end of the keys; None where one is missing: older runs recorded less."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _agreement(runs: Sequence[Record]) -> Summary | None:
    """Compare the answers of every two seeds; no interval, since pairs that share a seed are not independent."""
    answers = [run.predictions.predicted for run in runs if isinstance(run.predictions, Predictions)]
    shares = tuple(float(np.mean(one == two)) for one, two in itertools.combinations(answers, 2))
    return Summary(shares, fmean(shares), fmean(shares), fmean(shares)) if shares else None


def confusion(run: Record, classes: int) -> NDArray[np.float64]:
    """Return the [K, K] counts of test images by true class (rows) and answer."""
    assert isinstance(run.predictions, Predictions)
    cells = run.predictions.targets * classes + run.predictions.predicted
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes).astype(np.float64)


def recall(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of every class's images that were answered rightly, [K]; NaN for a class without images."""
    images = counts.sum(axis=1)
    shares: NDArray[np.float64] = np.divide(
        counts.diagonal(), images, out=np.full(len(images), np.nan), where=images > 0
    )
    return shares


def class_iou(run: Record) -> NDArray[np.float64]:
    """Return the intersection over union of every class on the test images, [K]; NaN for one that occurs nowhere."""
    found = at(run.result, "test", "class_iou")
    return np.array([np.nan if share is None else share for share in found], dtype=np.float64)


def _class_spread(run: Record) -> float | None:
    if not isinstance(run.predictions, Predictions):
        return None
    top = int(max(run.predictions.targets.max(), run.predictions.predicted.max())) + 1
    return float(np.nanstd(recall(confusion(run, top))))


def _training_flops(run: Record) -> float | None:
    """Return the FLOPs of all steps; a batch never holds more images than there are."""
    per_image = at(run.result, "flops", "training")
    batch = min([run.spec.batch, *(at(about, "images", "train") or run.spec.batch for about in run.environment)])
    return None if per_image is None else float(per_image * at(run.result, "steps") * batch)


def _export(run: Record, *, int8: bool) -> dict[str, Any] | None:
    """Return the ONNX export of the plain student; other formats and networks would be another figure."""
    alike = (each for each in run.exports if at(each, "format") == "onnx" and at(each, "deployable") is None)
    return next((each for each in alike if (at(each, "int8") is not None) == int8), None)


def _exported(*keys: str, int8: bool) -> Callable[[Record], float | None]:
    return lambda run: at(_export(run, int8=int8), *keys)


def _export_measures(main: Primary) -> dict[str, Callable[[Record], float | None]]:
    return {
        "onnx_latency": _exported("latency", "one_thread", "median_seconds", int8=False),
        "onnx_size": _exported("size_bytes", int8=False),
        f"int8_{main.key}": _exported("accuracy", "artefact", int8=True),
        "int8_drop": _exported("int8", "drop", int8=True),
        "int8_left": _left_in_float32,
        "int8_latency": _exported("latency", "one_thread", "median_seconds", int8=True),
        "int8_size": _exported("size_bytes", int8=True),
        "outliers": _outliers,
    }


def _left_in_float32(run: Record) -> float | None:
    left = at(_export(run, int8=True), "int8", "left_in_float32")
    return None if left is None else float(len(left))


def _outliers(run: Record) -> float | None:
    found = [each["outliers"] for each in run.measured.get("ranges", ()) if each["outliers"] is not None]
    return max(found, default=None)


def _seconds(run: Record) -> float:
    return float(at(run.result, "training_seconds")) + teacher_seconds(run.spec)


def _extra(run: Record) -> float:
    return float(at(run.result, "parameters", "training") - at(run.result, "parameters", "deployed"))


_COST_MEASURES: dict[str, Callable[[Record], float | None]] = {
    "training_seconds": _seconds,
    "step": lambda run: at(run.measured, "step", "relative"),
    "images_per_second": lambda run: at(run.result, "images_per_second"),
    "peak_memory": lambda run: at(run.result, "peak_memory_bytes"),
    "training_flops": _training_flops,
    "extra_parameters": _extra,
    "deployed_parameters": lambda run: at(run.result, "parameters", "deployed"),
    "deployed_flops": lambda run: at(run.result, "flops", "deployed"),
    "latency": lambda run: at(run.measured, "latency", "median_seconds"),
}
_MEASURES: dict[str, Callable[[Record], float | None]] = {
    "top1": lambda run: at(run.result, "test", "top1"),
    "top5": lambda run: at(run.result, "test", "top5"),
    "nll": lambda run: at(run.result, "test", "nll"),
    "calibration_error": lambda run: at(run.result, "test", "calibration_error"),
    "class_spread": _class_spread,
    "corruption_top1": lambda run: at(run.measured, "corruptions", "top1"),
    **_COST_MEASURES,
    **_export_measures(CLASSIFICATION),
}
_DENSE_MEASURES: dict[str, Callable[[Record], float | None]] = {
    "miou": lambda run: at(run.result, "test", "miou"),
    "pixel_accuracy": lambda run: at(run.result, "test", "pixel_accuracy"),
    "nll": lambda run: at(run.result, "test", "nll"),
    "calibration_error": lambda run: at(run.result, "test", "calibration_error"),
    "class_spread": lambda run: float(np.nanstd(class_iou(run))),
    "corruption_miou": lambda run: at(run.measured, "corruptions", "miou"),
    **_COST_MEASURES,
    **_export_measures(SEGMENTATION),
}
