"""Blockwise on CIFAR-100: a setting of attar's own, for its design is attar's own too."""

from __future__ import annotations

from attar.recipes.recipe import FROM_MEMORY, Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = ["blockwise_resnet32_cifar100"]


def _run(*methods: MethodSpec) -> TrainSpec:
    return step_run(
        *methods,
        model="cifar_resnet32",
        data="cifar100",
        epochs=200,
    )


def blockwise_resnet32_cifar100() -> Recipe:
    """ResNet-32 on CIFAR-100 at half of its multiply-adds."""
    return Recipe(
        "blockwise_resnet32_cifar100",
        "ResNet-32 on CIFAR-100: plain, and at half of its multiply-adds by Blockwise",
        "inspired by Ahmed, Zunino, Morerio, Murino, ICPR 2020, arXiv 2104.09191",
        "no table: a setting of ours",
        _run(MethodSpec(name="Blockwise")),
        (Published("plain", 31.18, FROM_MEMORY, table="ONE, Table 1"),),
        beside=(_run(),),
        teacher=_run(),
        notes=(
            "Blockwise is attar's own reference design, not the paper's algorithm: of the paper nothing but the "
            "abstract could be read, so that its tables could not be checked and none of its figures stands here. "
            "Plain training's figure is that of ONE's paper, which trained longer, as a yardstick.",
            "The aim, which is attar's: at half of the multiply-adds no more than half a point below plain training.",
            "The student begins untrained here. In use it begins as its own teacher, with --weights: shrinking a "
            "trained network needs fewer epochs and a tenth of the learning rate while widths are learnt.",
            "2 % of the training images choose the epoch, and the test set is read once.",
        ),
    )
