"""SPKD by the settings and figures of RepDistiller's README, for the pairs of which attar has both networks.

resnet32x4, resnet8x4, VGG, MobileNetV2 and ShuffleNetV2 for small images it has not.
"""

from __future__ import annotations

from attar.recipes.recipe import Published, Recipe
from attar.recipes.repdistiller import run
from attar.spec import MethodSpec

__all__ = [
    "spkd_resnet20_resnet20_cifar100",
    "spkd_resnet56_resnet20_cifar100",
    "spkd_resnet110_resnet20_cifar100",
    "spkd_resnet110_resnet32_cifar100",
    "spkd_wrn_40_2_wrn_16_2_cifar100",
    "spkd_wrn_40_2_wrn_40_1_cifar100",
]

PAPER = "SPKD (Tung and Mori, ICCV 2019, arXiv 1907.09682)"
REPDISTILLER = "RepDistiller's README"
KD_ZOO = "README of AberHu/Knowledge-Distillation-Zoo"

_NOTES = (
    "The student's settings train the teacher too, once for all seeds.",
    "2 % of the training images choose the epoch of student and teacher, and the test set is read once.",
)


def _pair(name: str, teacher: tuple[str, str, float], student: tuple[str, str, float], taught: float) -> Recipe:
    def accuracy(run: str, value: float) -> Published:
        return Published(run, value, REPDISTILLER, metric="top-1 accuracy")

    return Recipe(
        name,
        f"{teacher[0]} teaches {student[0]} on CIFAR-100: plain and SPKD",
        PAPER,
        "RepDistiller's benchmark, column SP",
        run(student[1], MethodSpec(name="SPKD")),
        (accuracy("teacher", teacher[2]), accuracy("plain", student[2]), accuracy("SPKD", taught)),
        beside=(run(student[1]),),
        teacher=run(teacher[1]),
        notes=("RepDistiller gives trained teachers, and reads the last stage before pooling, as here.", *_NOTES),
    )


def spkd_wrn_40_2_wrn_16_2_cifar100() -> Recipe:
    """WRN-40-2 teaches WRN-16-2."""
    networks = ("WRN-40-2", "cifar_wrn_40_2", 75.61), ("WRN-16-2", "cifar_wrn_16_2", 73.26)
    return _pair("spkd_wrn_40_2_wrn_16_2_cifar100", *networks, 73.83)


def spkd_wrn_40_2_wrn_40_1_cifar100() -> Recipe:
    """WRN-40-2 teaches WRN-40-1."""
    networks = ("WRN-40-2", "cifar_wrn_40_2", 75.61), ("WRN-40-1", "cifar_wrn_40_1", 71.98)
    return _pair("spkd_wrn_40_2_wrn_40_1_cifar100", *networks, 72.43)


def spkd_resnet56_resnet20_cifar100() -> Recipe:
    """ResNet-56 teaches ResNet-20."""
    networks = ("ResNet-56", "cifar_resnet56", 72.34), ("ResNet-20", "cifar_resnet20", 69.06)
    return _pair("spkd_resnet56_resnet20_cifar100", *networks, 69.67)


def spkd_resnet110_resnet20_cifar100() -> Recipe:
    """ResNet-110 teaches ResNet-20."""
    networks = ("ResNet-110", "cifar_resnet110", 74.31), ("ResNet-20", "cifar_resnet20", 69.06)
    return _pair("spkd_resnet110_resnet20_cifar100", *networks, 70.04)


def spkd_resnet110_resnet32_cifar100() -> Recipe:
    """ResNet-110 teaches ResNet-32."""
    networks = ("ResNet-110", "cifar_resnet110", 74.31), ("ResNet-32", "cifar_resnet32", 71.14)
    return _pair("spkd_resnet110_resnet32_cifar100", *networks, 72.69)


def spkd_resnet20_resnet20_cifar100() -> Recipe:
    """ResNet-20 taught by its own earlier training, three stages averaged."""
    label = "SPKD(layers=all,average=true)"
    return Recipe(
        "spkd_resnet20_resnet20_cifar100",
        "ResNet-20 on CIFAR-100, taught by its own earlier training: plain and SPKD",
        PAPER,
        "not the paper's own table",
        run("cifar_resnet20", MethodSpec(name="SPKD", options={"layers": "all", "average": True})),
        (
            Published("plain", 68.92, KD_ZOO, metric="top-1 accuracy"),
            Published(label, 69.85, KD_ZOO, metric="top-1 accuracy"),
        ),
        beside=(run("cifar_resnet20"),),
        teacher=run("cifar_resnet20"),
        notes=("Its optimiser, batch and epochs are unknown: RepDistiller's are taken.", *_NOTES),
    )
