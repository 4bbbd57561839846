"""SCD beside the methods that its abstract compares it with, by the settings of winycg/Self-KD-Lib.

SCD's own figures per network could not be obtained; those of Self-KD-Lib are yardsticks for the others.
"""

from __future__ import annotations

from typing import Any

from attar.recipes.recipe import Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = ["scd_resnet18_cifar100", "scd_resnet18_cifar100_all_comparisons"]

KNOWN = "README of winycg/Self-KD-Lib"

_NOTES = (
    "SCD is a reconstruction, and its abstract tells averages over unnamed networks only: 1.42 points more than SAD "
    "and SPKD, 1.13 more than BYOT and ONE, 1.23 more than DDGSD and CS-KD on CIFAR-100 and Tiny-ImageNet. Networks, "
    "settings and figures here are Self-KD-Lib's, whose other methods' forms may differ from these defaults.",
    "2 % of the training images choose the epoch, and the test set is read once.",
)


def _run(*methods: MethodSpec) -> TrainSpec:
    return step_run(
        *methods,
        model="cifar_resnet18",
        data="cifar100",
        epochs=200,
        warmup=5 / 200,
    )


def _with(name: str, **options: Any) -> TrainSpec:
    return _run(MethodSpec(name=name, options=options))


def _recipe(name: str, against: str, others: tuple[TrainSpec, ...], figures: dict[str, float]) -> Recipe:
    return Recipe(
        name,
        f"ResNet-18 on CIFAR-100: plain, {against} and SCD",
        "SCD (Wan et al., Computer Science 50(11), 2023, doi 10.11896/jsjkx.221000009)",
        "no table: its per-network figures could not be obtained",
        _with("SCD"),
        tuple(Published(run, value, KNOWN, metric="top-1 accuracy") for run, value in figures.items()),
        beside=(_run(), *others),
        notes=_NOTES,
    )


def scd_resnet18_cifar100() -> Recipe:
    """ResNet-18 on CIFAR-100 with SCD and its parents, SAD and SPKD."""
    others = (_with("SAD", upsample="features"), _with("SPKD"))
    figures = {"plain": 76.24, "SAD(upsample=features)": 76.40}
    return _recipe("scd_resnet18_cifar100", "SAD, SPKD", others, figures)


def scd_resnet18_cifar100_all_comparisons() -> Recipe:
    """ResNet-18 on CIFAR-100 with SCD and the other methods of its abstract."""
    others = tuple(map(_with, ("BYOT", "ONE", "DDGSD", "CSKD")))
    figures = {"plain": 76.24, "BYOT": 77.88, "DDGSD": 76.61, "CSKD": 78.66}
    return _recipe("scd_resnet18_cifar100_all_comparisons", "BYOT, ONE, DDGSD, CS-KD", others, figures)
