"""OSKD and OSAKD on CIFAR-10: settings of ours, for no figure of their papers could be verified."""

from __future__ import annotations

from attar.recipes.recipe import FROM_MEMORY, Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = ["osakd_resnet32_cifar10", "oskd_resnet32_cifar10"]


def _run(*methods: MethodSpec) -> TrainSpec:
    return step_run(
        *methods,
        model="cifar_resnet32",
        data="cifar10",
        epochs=200,
    )


def _recipe(name: str, method: str, paper: str) -> Recipe:
    return Recipe(
        name,
        f"ResNet-32 on CIFAR-10: plain and {method}",
        paper,
        "no table: a setting of ours",
        _run(MethodSpec(name=method)),
        (Published("plain", 6.93, FROM_MEMORY, table="ONE, Table 1"),),
        beside=(_run(),),
        notes=(
            f"{method} is a reconstruction: no setting, network or figure of its paper could be verified. Plain "
            "training's figure is that of ONE's paper, which trained longer, as a yardstick.",
            "2 % of the training images choose the epoch, and the test set is read once.",
        ),
    )


def oskd_resnet32_cifar10() -> Recipe:
    """ResNet-32 on CIFAR-10 with OSKD."""
    return _recipe("oskd_resnet32_cifar10", "OSKD", "OSKD (Tzelepi, Passalis, Tefas, ICPR 2020 and ESWA 2021)")


def osakd_resnet32_cifar10() -> Recipe:
    """ResNet-32 on CIFAR-10 with OSAKD."""
    return _recipe("osakd_resnet32_cifar10", "OSAKD", "OSAKD (Tzelepi, Tefas, ICME 2021, arXiv 2108.11798)")
