"""From a spec to the objects of a run: network, methods with their teachers, images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from attar.data import Source, Split, open_source
from attar.errors import AttarError
from attar.method import Method
from attar.methods import find
from attar.spec import MethodSpec, TrainSpec, method_options, parse, peer_options, teacher_options
from attar.tasks import Task
from attar.teacher import Normalization, Teacher
from attar.train.evaluate import make_task
from attar.train.models import load_weights, make_model
from attar.train.student import load_student

__all__ = ["build_methods", "build_model", "build_source", "build_task", "load_teacher"]


def build_model(spec: TrainSpec, num_classes: int, in_chans: int = 3) -> nn.Module:
    """Make the student; its weights come from torch's global generator, or from the spec's file.

    Raises:
        AttarError: as `make_model` and `load_weights`.
    """
    network = make_model(spec.model, num_classes, spec.model_options, in_chans, spec.task)
    if spec.weights is not None:
        load_weights(network, spec.weights)
    return network


def build_methods(spec: TrainSpec, num_classes: int) -> list[Method]:
    """Make the methods, their options checked against their constructors, their teachers loaded, their peers drawn.

    Raises:
        AttarError: an unknown method, option or model (with the nearest name), a value of the wrong type, a teacher
            that cannot be loaded.
    """
    return [_method(chosen, num_classes, spec.task) for chosen in spec.methods]


def _method(chosen: MethodSpec, num_classes: int, task: str) -> Method:
    kind = find(chosen.name)
    teachers = teacher_options(kind)
    try:
        options = parse(method_options(kind), chosen.options)
    except AttarError as error:
        raise AttarError(f"{kind.__name__}: {error}") from error
    arguments: dict[str, Any] = {name: getattr(options, name) for name in type(options).model_fields}
    for name in teachers & arguments.keys():
        if arguments[name] is not None:
            arguments[name] = [load_teacher(text, num_classes, task) for text in arguments[name]]
    for name in peer_options(kind) & arguments.keys():
        if isinstance(arguments[name], tuple):
            arguments[name] = [make_model(model, num_classes, task=task) for model in arguments[name]]
    return kind(**arguments)


def load_teacher(text: str, num_classes: int, task: str = "classification") -> Teacher:
    """Load a teacher: the folder of a finished run, or MODEL=FILE with a weights file.

    A run's teacher knows how its images were normalised and how large they were; one from MODEL=FILE takes the
    student's images as they are.

    Raises:
        AttarError: no such folder or file, or weights of another model.
    """
    if Path(text).is_dir():
        student = load_student(text)
        if len(student.classes) != num_classes:
            raise AttarError(
                f"The teacher '{text}' knows {len(student.classes)} classes, but the data have {num_classes}: "
                "train it on the same classes."
            )
        if student.task != task:
            raise AttarError(f"The teacher '{text}' was trained for {student.task}, not {task}: give another one.")
        height, width = student.image_size
        # Square images only are resized; a teacher of other shapes takes what comes.
        size = height if height == width else None
        return Teacher(student.network, Normalization(student.mean, student.std), size, name=f"teacher '{text}'")
    model, equals, file = text.partition("=")
    if not equals:
        raise AttarError(f"There is no teacher '{text}': give the folder of a finished run, or MODEL=FILE.")
    network = make_model(model, num_classes, task=task)
    load_weights(network, file)
    return Teacher(network, name=f"teacher '{text}'")


def build_task(spec: TrainSpec, num_classes: int) -> Task:
    """Make what the spec's labels and supervised loss mean.

    Raises:
        AttarError: options of another task, or values that it refuses.
    """
    chosen = {name: getattr(spec, name) for name in ("class_weights", "dice_weight")}
    given = {name: value for name, value in chosen.items() if value}
    if spec.task == "classification" and given:
        raise AttarError(f"Option '{next(iter(given))}' belongs to segmentation: give --task segmentation too.")
    return make_task(spec.task, num_classes, **given)


def build_source(spec: TrainSpec) -> Source:
    """Open the spec's images; `train_limit` keeps a stratified part of the training images."""
    source = open_source(spec.data, image_size=spec.image_size, task=spec.task, **spec.opening())
    if spec.train_limit is None or spec.train_limit >= len(source.train):
        return source
    return dataclasses.replace(source, train=_limited(source.train, spec.train_limit, spec.split_seed))


def _limited(split: Split, images: int, seed: int) -> Split:
    from sklearn.model_selection import train_test_split

    classes = len(np.unique(split.targets))
    if images < classes or len(split) - images < classes:
        raise AttarError(
            f"{images} of {len(split)} training images cannot be chosen with every class on both sides: "
            f"let train_limit be from {classes} to {len(split) - classes}."
        )
    kept, _ = train_test_split(np.arange(len(split)), train_size=images, stratify=split.targets, random_state=seed)
    kept.sort()
    return dataclasses.replace(split, rows=split.rows[kept], targets=split.targets[kept], index=split.index[kept])
