"""BAKE on CIFAR-100 (Ge et al., 2021)."""

from __future__ import annotations

from attar.recipes.recipe import Published, Recipe
from attar.spec import MethodSpec, TrainSpec, parse

__all__ = ["bake_resnet18_cifar100"]


def _run(*methods: MethodSpec) -> TrainSpec:
    values = {
        "methods": methods,
        "model": "cifar_resnet18",
        "data": "cifar100",
        "augment": "crop-flip",
        "holdout": 0.02,
        "epochs": 200,
        "batch": 128,
        "lr": 0.1,
        "weight_decay": 1e-4,
        "schedule": "step",
        "milestones": (0.5, 0.75),
        "gamma": 0.1,
        "warmup": 0.0,
    }
    return parse(TrainSpec, values)


def bake_resnet18_cifar100() -> Recipe:
    """ResNet-18 on CIFAR-100."""
    return Recipe(
        "bake_resnet18_cifar100",
        "ResNet-18 on CIFAR-100: plain and BAKE",
        "BAKE (Ge et al., 2021)",
        "CIFAR-100",
        _run(MethodSpec(name="BAKE")),
        (Published("BAKE", 21.28, "README of yxgeee/BAKE, small scale"),),
        beside=(_run(),),
        notes=(
            "Of the setting only T, omega and the four images of each class are known; the rest is the usual.",
            "2 % of the training images choose the epoch, and the test set is read once.",
        ),
    )
