"""BAKE on CIFAR-100 (Ge et al., 2021)."""

from __future__ import annotations

from attar.recipes.recipe import Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = ["bake_resnet18_cifar100"]


def _run(*methods: MethodSpec) -> TrainSpec:
    return step_run(
        *methods,
        model="cifar_resnet18",
        data="cifar100",
        epochs=200,
        weight_decay=1e-4,
    )


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
