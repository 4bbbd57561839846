"""The plain student as safetensors with the config by which timm, or attar for other networks, loads it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from attar.deploy.artefact import Images, Runtime, Settings
from attar.deploy.candidate import LogitsAlone, first_line, logits_alone
from attar.errors import AttarError
from attar.train.student import Student, load_student, save_student

__all__ = ["Torch"]


class Torch:
    """A folder as a run's `student/`: weights by the network's own names, and what its images must look like.

    `Settings.options` knows `crop`, the share of the image's side that evaluation looks at.
    """

    name = "torch"
    file = "model.safetensors"
    extra = ""

    def write(self, network: nn.Module, settings: Settings, path: Path, calibration: Images | None) -> dict[str, Any]:
        """Write weights and config, and prove that loading them gives the same logits to the last bit.

        Raises:
            AttarError: int8 is asked for, the network is not what its model's name makes, or the proof fails.
        """
        if settings.int8:
            raise AttarError("Format torch holds float32 weights: export int8 to onnx, executorch or openvino.")
        if settings.student is None:
            raise TypeError("Settings.student is what the config is made of.")
        plain = network.network if isinstance(network, LogitsAlone) else network
        student = dataclasses.replace(settings.student, network=plain, image_size=settings.image_size)
        # Saved beside and moved, since a folder that exists already is to hold more than the student.
        inside = path.with_name(f".{path.name}.folder")
        try:
            save_student(inside, student, crop=settings.options.get("crop", 1.0))
            loaded_by = _prove(inside, student)
            for file in inside.iterdir():
                file.rename(path.with_name(file.name))
        finally:
            shutil.rmtree(inside, ignore_errors=True)
        return {"loaded_by": loaded_by}

    def load(self, path: Path, threads: int = 1) -> Runtime:
        """Load the student in PyTorch.

        Raises:
            AttarError: as `load_student`.
        """
        network = logits_alone(load_student(path.parent))

        def answer(images: NDArray[Any]) -> NDArray[np.float32]:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with torch.no_grad():
                    logits: NDArray[np.float32] = network(torch.from_numpy(images)).numpy()
            finally:
                torch.set_num_threads(before)
            return logits

        return answer


def _prove(folder: Path, saved: Student) -> list[str]:
    """Load the folder as its users do, demand the same logits, and return the ways that work."""
    network = saved.network
    images = torch.rand(2, 3, *saved.image_size, generator=torch.Generator().manual_seed(0))
    try:
        student = load_student(folder)
    except AttarError as error:
        raise AttarError(
            f"{type(network).__name__} is not what its model's name makes ({str(error).rstrip('.')}): give the model "
            "and its options, or export to another format."
        ) from error
    ways = {"attar.train.load_student": student.network}
    if hasattr(network, "pretrained_cfg") and not student.kept:
        try:
            ways["timm.create_model"] = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        except Exception as error:  # timm raises many kinds
            raise AttarError(
                f"timm cannot load the saved student ({first_line(error)}): use another format."
            ) from error
    with torch.no_grad():
        expected = logits_alone(saved)(images)
        for way, loaded in ways.items():
            if not torch.equal(logits_alone(dataclasses.replace(saved, network=loaded))(images), expected):
                raise AttarError(f"The student that {way} loads does not give the same logits: it is not handed out.")
    return list(ways)
