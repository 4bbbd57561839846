"""The `student/` folder: the plain network as timm loads it, with what its images must look like."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from attar import __version__
from attar.anatomy import Kept, slice_
from attar.errors import AttarError
from attar.train.files import read_json, storage_errors, write_atomically
from attar.train.models import load_weights, make_model

__all__ = ["Student", "load_student", "save_student"]


@dataclass(frozen=True)
class Student:
    """A trained network and what it expects.

    Attributes:
        network: in evaluation mode.
        model: the name it was made by.
        options: the keyword arguments it was made with.
        classes: names of its classes.
        mean: per-channel mean of images in 0..1.
        std: per-channel standard deviation.
        image_size: (height, width) of the images it was trained on.
        kept: the channels that training has left it, by module; None: the widths it was made with.
        task: what it was trained for (`TrainSpec.task`).
    """

    network: nn.Module
    model: str
    options: dict[str, Any]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    kept: Kept | None = None
    task: str = "classification"


def save_student(folder: Path, student: Student, *, crop: float = 1.0) -> None:
    """Write `model.safetensors` and `config.json`; the folder appears only when both are whole.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads a timm model. torchvision has no such format: its
    models are loaded by `load_student`, or from the safetensors file, whose keys are the model's own. A student that
    has lost channels is loaded by `load_student` alone.

    Args:
        folder: replaced when it exists.
        student: what to save.
        crop: share of the image's side that evaluation looks at.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with storage_errors(folder):
            aside.mkdir(parents=True)
            weights = {
                key: value.detach().cpu().contiguous().clone() for key, value in student.network.state_dict().items()
            }
            write_atomically(aside / "model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
            _write_config(aside / "config.json", student, crop)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_config(path: Path, student: Student, crop: float) -> None:
    own = {
        "version": __version__,
        "model": student.model,
        "options": student.options,
        "classes": list(student.classes),
        "mean": list(student.mean),
        "std": list(student.std),
        "image_size": list(student.image_size),
        **({"kept": student.kept} if student.kept else {}),
        **({"task": student.task} if student.task != "classification" else {}),
    }
    if not hasattr(student.network, "pretrained_cfg"):
        write_atomically(path, (json.dumps({"attar": own}, indent=2) + "\n").encode())
        return
    from timm.models._hub import save_config_for_hf  # the part of timm.models.save_for_hf that writes no weights

    preprocessing = {"mean": own["mean"], "std": own["std"], "input_size": [3, *student.image_size], "crop_pct": crop}
    config = {"pretrained_cfg": preprocessing, "label_names": list(student.classes), "attar": own}
    save_config_for_hf(student.network, str(path), model_config=config, model_args=student.options)


def load_student(folder: str | Path) -> Student:
    """Load a saved student from its folder, or from the run folder that holds it.

    Raises:
        AttarError: the folder holds no student (an unfinished run has none), or a damaged one.
    """
    folder = Path(folder)
    inside = folder / "student"
    if not (folder / "config.json").is_file() and inside.is_dir():
        folder = inside
    if not (folder / "config.json").is_file():
        unfinished = (folder / "spec.json").is_file()
        told = "its run has not finished, run the same command again" if unfinished else "give a finished run's folder"
        raise AttarError(f"'{folder}' holds no student: {told}.")
    config = read_json(folder / "config.json")
    own = config.get("attar") if isinstance(config, dict) else None
    if own is None:
        raise AttarError(f"'{folder / 'config.json'}' was not written by attar: give a finished run's folder.")
    # Its weights are here: none are fetched to begin with.
    options = {name: value for name, value in own["options"].items() if name not in ("pretrained", "weights")}
    task = own.get("task", "classification")
    network = make_model(own["model"], len(own["classes"]), options, task=task)
    kept = own.get("kept")
    if kept:
        slice_(network, kept)
    load_weights(network, folder / "model.safetensors")
    height, width = own["image_size"]
    return Student(
        network.eval(),
        own["model"],
        own["options"],
        tuple(own["classes"]),
        tuple(own["mean"]),
        tuple(own["std"]),
        (height, width),
        kept,
        task,
    )
