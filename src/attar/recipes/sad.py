"""SAD on CIFAR-100, as a third party measured it; the paper's own tables are about lanes, a task attar has not."""

from __future__ import annotations

from attar.recipes.recipe import Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = ["sad_resnet18_cifar100", "sad_resnet50_cifar100"]


def _run(model: str, *methods: MethodSpec) -> TrainSpec:
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
        f"{title} on CIFAR-100: plain and SAD",
        "SAD (Hou, Ma, Liu, Loy, ICCV 2019, arXiv 1908.00821)",
        "not the paper's own table",
        _run(model, MethodSpec(name="SAD", options={"upsample": "features"})),
        (
            Published("plain", plain, known, metric="top-1 accuracy"),
            Published("SAD(upsample=features)", taught, known, metric="top-1 accuracy"),
        ),
        beside=(_run(model),),
        notes=(
            "upsample=features is the way of the code that gave the figure; the definition resizes squared maps.",
            "The rate falls at epochs 100 and 150; whether the 5 epochs of warm-up stood before these is not certain.",
            "2 % of the training images choose the epoch, and the test set is read once.",
        ),
    )


def sad_resnet18_cifar100() -> Recipe:
    """ResNet-18 on CIFAR-100."""
    known = "README of winycg/Self-KD-Lib"
    return _recipe("sad_resnet18_cifar100", "ResNet-18", "cifar_resnet18", 76.24, 76.40, known)


def sad_resnet50_cifar100() -> Recipe:
    """ResNet-50 on CIFAR-100."""
    known = "an older README of winycg/Self-KD-Lib, in public notes"
    return _recipe("sad_resnet50_cifar100", "ResNet-50", "cifar_resnet50", 77.79, 78.33, known)
