"""What is exported, what it becomes, and who runs it: the words that every format shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from attar.data import Source
from attar.tasks import Task
from attar.train.evaluate import make_task
from attar.train.student import Student

__all__ = ["Candidate", "Format", "Images", "Logits", "Runtime", "Settings"]

Images = NDArray[np.float32]  # [N, 3, H, W], normalised as in training
Logits = NDArray[np.float32]  # [N, K], in dense tasks [N, K, H, W]

# Answers images with logits: a loaded artefact in its own runtime, any number of images at a time.
Runtime = Callable[[Images], Logits]


@dataclass(frozen=True)
class Candidate:
    """A network that a run yields and that is to leave attar.

    Attributes:
        network: in evaluation mode, float32, on the CPU, contiguous: images [N, 3, H, W] -> logits [N, K], in dense
            tasks [N, K, H, W]; nothing else, whatever else the student returns.
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

    @property
    def task(self) -> Task:
        """What its answers mean."""
        return make_task(self.student.task, len(self.student.classes))


@dataclass(frozen=True)
class Settings:
    """How a network is exported.

    Attributes:
        image_size: (H, W) the artefact takes.
        batch: images at a time; None: any number.
        int8: whether weights and activations are quantised.
        calibration: how many training images fix the ranges of activations.
        most_drop: share of accuracy that quantisation may cost before layers are left in float32, in 0..1; ExecuTorch
            leaves none.
        seed: chooses the calibration images.
        student: names and normalisation that travel with the artefact, where its format has a place for them.
        accuracy: tells the accuracy, in 0..1 on images that are not reported, of an artefact that has been written to a
            path; None where nobody asks how much quantisation costs.
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
