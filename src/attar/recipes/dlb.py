"""DLB on CIFAR-10 (Shen, Xu, Yang, Li, Guo, CVPR 2022, arXiv 2203.16172)."""

from __future__ import annotations

from attar.recipes.recipe import FROM_MEMORY, Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = ["dlb_resnet32_cifar10"]


def _run(epochs: int, *methods: MethodSpec) -> TrainSpec:
    return step_run(
        *methods,
        model="cifar_resnet32",
        data="cifar10",
        epochs=epochs,
        batch=128 if methods else 64,
        lr=0.05,
        milestones=(150 / 240, 180 / 240, 210 / 240),
    )


def dlb_resnet32_cifar10() -> Recipe:
    """ResNet-32 on CIFAR-10, at equal exposures."""
    return Recipe(
        "dlb_resnet32_cifar10",
        "ResNet-32 on CIFAR-10: plain and DLB",
        "DLB (Shen, Xu, Yang, Li, Guo, CVPR 2022, arXiv 2203.16172)",
        "CIFAR-10",
        _run(120, MethodSpec(name="DLB")),
        (Published("plain", 6.93, FROM_MEMORY, table="ONE, Table 1"),),
        beside=(_run(240),),
        notes=(
            "The paper's tables could not be checked: it reports errors lower by 0.37 to 1.01 points on CIFAR-10 over "
            "VGG, ResNets, WRN and DenseNet. Plain training's figure is that of ONE's paper, as a yardstick.",
            "64 new images a step; DLB has half the epochs, since it shows every image twice in each.",
            "2 % of the training images choose the epoch, and the test set is read once.",
        ),
    )
