"""OSKD on CIFAR-10: a setting of ours, for no figure of the papers could be verified."""

from __future__ import annotations

from attar.recipes.recipe import FROM_MEMORY, Published, Recipe
from attar.spec import MethodSpec, TrainSpec, parse

__all__ = ["oskd_resnet32_cifar10"]


def _run(*methods: MethodSpec) -> TrainSpec:
    values = {
        "methods": methods,
        "model": "cifar_resnet32",
        "data": "cifar10",
        "augment": "crop-flip",
        "holdout": 0.02,
        "epochs": 200,
        "batch": 128,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": "step",
        "milestones": (0.5, 0.75),
        "gamma": 0.1,
        "warmup": 0.0,
    }
    return parse(TrainSpec, values)


def oskd_resnet32_cifar10() -> Recipe:
    """ResNet-32 on CIFAR-10."""
    return Recipe(
        "oskd_resnet32_cifar10",
        "ResNet-32 on CIFAR-10: plain and OSKD",
        "OSKD (Tzelepi, Passalis, Tefas, ICPR 2020 and ESWA 2021)",
        "no table: a setting of ours",
        _run(MethodSpec(name="OSKD")),
        (Published("plain", 6.93, FROM_MEMORY, table="ONE, Table 1"),),
        beside=(_run(),),
        notes=(
            "OSKD is a reconstruction: no setting, network or figure of its papers could be verified. Plain training's "
            "figure is that of ONE's paper, which trained longer, as a yardstick.",
            "2 % of the training images choose the epoch, and the test set is read once.",
        ),
    )
