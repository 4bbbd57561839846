"""Small scale: a recipe reduced until it runs in seconds on one processor, to see that it runs at all."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from attar.errors import AttarError
from attar.method import Method
from attar.methods import available
from attar.recipes.recipe import Recipe, runs_of
from attar.spec import TrainSpec

__all__ = ["small"]

_THIN: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}
# What model stands for what at small scale, with its options and the side of its images: the first that matches.
_RELATIVES: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    (r"cifar_cnn_16_32_64", "cifar_cnn_16_32_64", {"width": 0.25}, 32),
    (r"cifar_cnn_8_16_32", "cifar_cnn_8_16_32", {"width": 0.25}, 32),
    (r"cifar_resnet(18|50)", "cifar_resnet18", {"width": 1 / 16}, 8),
    (r"cifar_resnet\d+_bottleneck", "cifar_resnet20_bottleneck", {"width": 0.25}, 8),
    (r"cifar_resnet\d+", "cifar_resnet20", {"width": 0.25}, 8),
    (r"cifar_wrn_20_8", "cifar_wrn_20_8", {"width": 0.125}, 8),
    (r"cifar_wrn_\d+_\d+", "cifar_wrn_16_1", {"width": 0.25}, 8),
    (r"cifar_resnext\d+_\w+", "cifar_resnext29_8x64d", {"width": 1 / 16}, 8),
    (r"cifar_densenet_bc_\d+_\d+", "cifar_densenet_bc_40_12", {"width": 0.25}, 8),
    (r"cifar_densenet_\d+_\d+", "cifar_densenet_40_12", {"width": 0.25}, 8),
    (r"resnext\d+_\w+", "resnext50_32x4d", {**_THIN, "cardinality": 4, "base_width": 16}, 32),
    (r"seresnet\d+", "seresnet18", _THIN, 32),
    (r"resnet\d+", "resnet18", _THIN, 32),
)


def small(recipe: Recipe) -> Recipe:
    """Return the recipe on 128 handwritten digits, with the smallest relatives of its networks, for 2 epochs.

    Where a method trains in phases, of which each takes an epoch at least, for 6.

    Methods, their options and the shape of the schedule stay. Its numbers are comparable with nothing.

    Raises:
        AttarError: a network of which no smaller relative is known.
    """
    methods = (available().get(method.name, Method) for spec in runs_of(recipe).values() for method in spec.methods)
    epochs = 6 if any(kind.phases is not Method.phases for kind in methods) else 2

    def reduced(spec: TrainSpec) -> TrainSpec:
        return _reduced(spec, epochs)

    return dataclasses.replace(
        recipe,
        title=f"SMALL SCALE, comparable with nothing: {recipe.title}",
        spec=reduced(recipe.spec),
        beside=tuple(map(reduced, recipe.beside)),
        teacher=None if recipe.teacher is None else reduced(recipe.teacher),
        notes=(
            f"SMALL SCALE: a much smaller network learns 128 handwritten digits for {epochs} epochs. This shows that "
            "the recipe runs; its numbers are comparable with nothing, the published ones least of all.",
            *recipe.notes,
        ),
        scale="small",
    )


def _reduced(spec: TrainSpec, epochs: int) -> TrainSpec:
    model, options, size = _relative(spec.model)
    if "cheap" in spec.model_options:
        options["cheap"] = "A2B2"  # what so few channels can be divided into
    return spec.model_copy(
        update={
            "model": model,
            "model_options": options,
            "data": "digits",
            "image_size": size,
            "augment": None,
            "train_limit": 128,
            "holdout": 0.1,
            "epochs": epochs,
            "batch": 32,
            "lr": 0.05,
            "weight_decay": 5e-4,
        }
    )


def _relative(model: str) -> tuple[str, dict[str, Any], int]:
    for pattern, name, options, size in _RELATIVES:
        if re.fullmatch(pattern, model):
            return name, dict(options), size
    raise AttarError(f"There is no small scale for '{model}': add its smallest relative to attar.recipes.scale.")
