"""Supervised: label smoothing, the baseline that distillation must beat, as the tables of Tf-KD have it."""

from __future__ import annotations

from attar.recipes.recipe import Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = ["smoothing_resnet18_cifar100"]

README = "README of yuanli2333/Teacher-free-Knowledge-Distillation"


def _run(*methods: MethodSpec) -> TrainSpec:
    return step_run(
        *methods,
        model="cifar_resnet18",
        data="cifar100",
        epochs=200,
        nesterov=False,
        milestones=(0.3, 0.6, 0.8),
        gamma=0.2,
        warmup=1 / 200,
    )


def smoothing_resnet18_cifar100() -> Recipe:
    """ResNet-18 on CIFAR-100 with smoothed labels."""
    return Recipe(
        "smoothing_resnet18_cifar100",
        "ResNet-18 on CIFAR-100: plain and label smoothing",
        "Tf-KD (Yuan et al., CVPR 2020, arXiv 1909.11723)",
        "CIFAR-100, column LSR",
        _run(MethodSpec(name="Supervised", options={"label_smoothing": 0.1})),
        (
            Published("plain", 75.87, README, metric="top-1 accuracy"),
            Published("Supervised(label_smoothing=0.1)", 77.26, README, metric="top-1 accuracy"),
        ),
        beside=(_run(),),
        notes=(
            "How much the labels were smoothed is unknown: 0.1 is the usual share.",
            "The released code also turns images by up to 15 degrees, which attar's augmentation does not.",
            "2 % of the training images choose the epoch, and the test set is read once.",
        ),
    )
