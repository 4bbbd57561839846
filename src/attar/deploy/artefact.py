"""What is exported, what it becomes, and who runs it: the words that every format shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import nn

from attar.data import Source
from attar.train.student import Student

__all__ = ["Candidate", "Format", "Images", "Logits", "Report", "Runtime", "Settings"]

Images = NDArray[np.float32]  # [N, 3, H, W], normalised as in training
Logits = NDArray[np.float32]  # [N, K]

# Answers images with logits: a loaded artefact in its own runtime, any number of images at a time.
Runtime = Callable[[Images], Logits]


@dataclass(frozen=True)
class Candidate:
    """A network that a run yields and that is to leave attar.

    Attributes:
        network: in evaluation mode, float32, on the CPU, contiguous: images [N, 3, H, W] -> logits [N, K].
        student: whose classes, normalisation and image size it shares.
        source: the run's images: the training images calibrate, the test images measure.
        result: the run's `result.json`; empty for a network that comes from no run folder.
        folder: of the run; an export goes below it unless told otherwise.
        deployable: None for the plain student, else its name in `Distiller.deployables` ("BYOT.exit1").
    """

    network: nn.Module
    student: Student
    source: Source
    result: dict[str, Any]
    folder: Path
    deployable: str | None = None


@dataclass(frozen=True)
class Settings:
    """How a network is exported.

    Attributes:
        image_size: (H, W) the artefact takes.
        batch: images at a time; None: any number.
        int8: whether weights and activations are quantised.
        calibration: how many training images fix the ranges of activations.
        most_drop: share of accuracy that quantisation may cost before layers are left in float32, in 0..1.
        seed: chooses the calibration images.
        student: names and normalisation that travel with the artefact, where its format has a place for them.
        accuracy: tells the accuracy, in 0..1 on hold-out images, of an artefact that has been written to a path; None
            where nobody asks how much quantisation costs.
        options: what only one format knows (`opset`).
    """

    image_size: tuple[int, int]
    batch: int | None = 1
    int8: bool = False
    calibration: int = 256
    most_drop: float = 0.01
    seed: int = 0
    student: Student | None = None
    accuracy: Callable[[Path], float] | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Report(TypedDict):
    """All that is known of an export: `export.json`, from which the card and the columns of comparisons are made.

    Attributes:
        format: as `--format` takes it.
        int8: whether it is quantised.
        deployable: None for the plain student.
        file: name of the artefact in the folder.
        batch: images at a time; None: any number.
        packaged: whether preprocessing is inside: uint8 RGB [N, H, W, 3] in, probabilities [N, K] out.
        image_size: (H, W).
        mean: of the channels of images in 0..1; std likewise.
        crop: share of the image's side that evaluation looks at (1.0: the whole image).
        classes: their names.
        model: name of the student's model.
        methods: that trained it, as in `spec.json`.
        data: name of its images.
        run: name of the run folder.
        test: metrics of the artefact on the test images, in its own runtime (`images`, `top1`, `top5`, `nll`,
            `calibration_error`).
        student: the same metrics of the fp32 network in torch.
        accuracy_drop: top-1 of the network less that of the artefact.
        agreement: share of the test images that both name alike.
        parity: what the gate found (see `Parity`).
        calibration: {"images", "seed", "split"} of an int8 artefact, else None.
        written: what the format says of the file (`opset`, layers left in float32).
        parameters: numbers that the network learnt.
        size_bytes: of the artefact's files.
        sha256: of `file`, in hexadecimal digits.
        latency: as `measure_latency` returns it.
        versions: of attar, torch and the format's packages.
    """

    format: str
    int8: bool
    deployable: str | None
    file: str
    batch: int | None
    packaged: bool
    image_size: list[int]
    mean: list[float]
    std: list[float]
    crop: float
    classes: list[str]
    model: str
    methods: list[dict[str, Any]]
    data: str
    run: str
    test: dict[str, Any]
    student: dict[str, Any]
    accuracy_drop: float
    agreement: float
    parity: dict[str, Any]
    calibration: dict[str, Any] | None
    written: dict[str, Any]
    parameters: int
    size_bytes: int
    sha256: str
    latency: dict[str, Any]
    versions: dict[str, str]


class Format(Protocol):
    """A file format with its runtime.

    Attributes:
        name: as `--format` takes it.
        file: name of the artefact inside the export's folder.
        extra: of the package's extras, that which installs what the format needs.
    """

    name: str
    file: str
    extra: str

    def write(self, network: nn.Module, settings: Settings, path: Path, calibration: Images | None) -> dict[str, Any]:
        """Write the artefact; return what is worth remembering about it (opset, nodes left in float32).

        Raises:
            AttarError: the network holds an operator that the format has not (named), or a package is missing.
        """
        ...

    def load(self, path: Path, threads: int = 1) -> Runtime:
        """Load an artefact in its own runtime."""
        ...
