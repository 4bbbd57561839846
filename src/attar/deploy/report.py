"""What is told of an exported artefact: `export.json`, and what of it travels inside an ONNX file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypedDict

__all__ = ["METADATA", "Accuracy", "Int8", "Latency", "Parity", "Report", "Timing", "metadata"]

# What of a report an artefact needs wherever it goes.
METADATA = ("attar", "model", "deployable", "classes", "image_size", "mean", "std", "crop", "preprocessing_inside")
_TOLD = ("methods", "data", "accuracy")


class Parity(TypedDict):
    """How the artefact, in its own runtime, compares with the network in PyTorch (for int8: before quantisation).

    Attributes:
        max_error: largest difference of two logits.
        relative_error: that divided by the largest magnitude of a logit.
        agreement: share of real images that both name the same class, in 0..1.
        images: how many real images.
        batch_sizes: that were tried.
    """

    max_error: float
    relative_error: float
    agreement: float
    images: int
    batch_sizes: list[int]


class Accuracy(TypedDict):
    """What the artefact does on test images; shares in 0..1.

    Attributes:
        metric: `top1`, or `miou` (mean intersection over union) in segmentation.
        fp32: that of the network in PyTorch.
        artefact: that of the artefact in its own runtime.
        agreement: share of images (in segmentation: of pixels) that both name the same class.
        images: how many.
        calibration_error: of the artefact, over 15 equal bins of confidence.
    """

    metric: str
    fp32: float
    artefact: float
    agreement: float
    images: int
    calibration_error: float


class Int8(TypedDict):
    """How the artefact was quantised.

    Attributes:
        left_in_float32: nodes or modules that were not, since that costs too much accuracy.
        calibration_images: training images that fixed the ranges of activations.
        drop: `fp32` less `artefact` of the accuracy on the test images, in 0..1; negative for a gain.
        trained: whether quantisation-aware distillation made it, rather than calibration alone.
        bound_held: whether the drop on hold-out images is within the bound; False: not with half of the layers in
            float32 either; None: nobody has asked, for the format quantises all layers or none.
    """

    left_in_float32: list[str]
    calibration_images: int
    drop: float
    trained: bool
    bound_held: bool | None


class Timing(TypedDict):
    """Answers to one image on a number of threads, after a warm-up."""

    median_seconds: float
    p95_seconds: float
    repeats: int
    threads: int


class Latency(TypedDict):
    """How long the artefact takes for one image in its own runtime.

    Attributes:
        one_thread: on one thread.
        all_threads: on all of the machine's, which may be the same.
        device: name of the processor.
    """

    one_thread: Timing
    all_threads: Timing
    device: str


class Report(TypedDict):
    """All that is told of an artefact.

    Attributes:
        attar: version that exported it.
        format: as `--format` takes it.
        file: name of the artefact inside the export's folder.
        size_bytes: of the artefact, its weights in a second file included.
        sha256: of `file`, in hexadecimal digits.
        task: `classification` or `segmentation`.
        model: the name that made the student.
        parameters: numbers that the network learnt.
        deployable: None for the plain student, else its name ("BYOT.exit1").
        methods: `name` and `options` (those that are not the default) of each that trained it; none: plain training.
        data: the images it was trained on.
        classes: K names in the order of the logits.
        image_size: [H, W].
        mean: per channel, of images in 0..1.
        std: likewise.
        crop: share of the resized image's side that the artefact sees.
        preprocessing_inside: whether the artefact takes uint8 RGB [N, H, W, 3] and gives probabilities [N, K], rather
            than normalised float32 [N, 3, H, W] and logits.
        batch: images at a time; None: any number.
        opset: of ONNX; None for other formats.
        parity: the gate that it passed.
        accuracy: on the test images.
        int8: None for float32.
        latency: None where it was not measured.
        memory: bytes that loading the artefact and answering one image adds to a process; None where not measured.
        versions: of the packages that wrote and ran it, by name.
    """

    attar: str
    format: str
    file: str
    size_bytes: int
    sha256: str
    task: str
    model: str
    parameters: int
    deployable: str | None
    methods: list[dict[str, Any]]
    data: str
    classes: list[str]
    image_size: list[int]
    mean: list[float]
    std: list[float]
    crop: float
    preprocessing_inside: bool
    batch: int | None
    opset: int | None
    parity: Parity
    accuracy: Accuracy
    int8: Int8 | None
    latency: Latency | None
    memory: int | None
    versions: dict[str, str]


def metadata(report: Mapping[str, Any]) -> dict[str, str]:
    """Return what an ONNX file carries as its metadata: JSON texts by key, all that `inference.py` needs among them.

    Args:
        report: with the keys `METADATA` at least; `methods`, `data` and `accuracy` go along where they are known.
    """
    keys = (*METADATA, *(key for key in _TOLD if key in report))
    return {key: json.dumps(report[key], ensure_ascii=False) for key in keys}
