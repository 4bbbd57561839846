"""CS-KD on CIFAR-100 (Yun et al., CVPR 2020, arXiv 2003.13964), as others measured it."""

from __future__ import annotations

from attar.recipes.recipe import Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = ["cs_kd_resnet18_cifar100", "cs_kd_resnet50_cifar100"]

PAPER = "CS-KD (Yun, Park, Lee, Shin, CVPR 2020, arXiv 2003.13964)"


def _run(model: str, *methods: MethodSpec) -> TrainSpec:
    """One run by the settings of the collection that published the figures."""
    return step_run(
        *methods,
        model=model,
        data="cifar100",
        epochs=200,
        warmup=5 / 200,
    )


def _recipe(name: str, title: str, model: str, plain: float, taught: float, known: str) -> Recipe:
    return Recipe(
        name,
        f"{title} on CIFAR-100: plain and CS-KD",
        PAPER,
        "not the paper's own table",
        _run(model, MethodSpec(name="CSKD")),
        (
            Published("plain", plain, known, metric="top-1 accuracy"),
            Published("CSKD", taught, known, metric="top-1 accuracy"),
        ),
        beside=(_run(model),),
        notes=(
            "Weight decay 5e-4 and Nesterov momentum as in winycg/Self-KD-Lib; the authors' code has 1e-4 and none, "
            "which moves plain training by more than a point.",
            "The paper's own table could not be checked.",
            "2 % of the training images choose the epoch, and the test set is read once.",
        ),
    )


def cs_kd_resnet18_cifar100() -> Recipe:
    """ResNet-18 on CIFAR-100."""
    known = "README of winycg/Self-KD-Lib"
    return _recipe("cs_kd_resnet18_cifar100", "ResNet-18", "cifar_resnet18", 76.24, 78.66, known)


def cs_kd_resnet50_cifar100() -> Recipe:
    """ResNet-50 on CIFAR-100."""
    known = "an older README of winycg/Self-KD-Lib, in public notes"
    return _recipe("cs_kd_resnet50_cifar100", "ResNet-50", "cifar_resnet50", 77.79, 79.99, known)
