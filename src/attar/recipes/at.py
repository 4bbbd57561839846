"""AT by the settings of its released code, of RepDistiller's benchmark (CIFAR-100) and on ImageNet."""

from __future__ import annotations

from attar.recipes import repdistiller
from attar.recipes.recipe import FROM_MEMORY, IMAGENET, Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = [
    "at_resnet34_resnet18_imagenet",
    "at_resnet56_resnet20_cifar100",
    "at_resnet110_resnet32_cifar100",
    "at_wrn_16_2_wrn_16_1_cifar10",
    "at_wrn_40_2_wrn_16_2_cifar100",
    "at_wrn_40_2_wrn_40_1_cifar100",
]

PAPER = "AT (Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928)"

_AT = MethodSpec(name="AT")  # its default is the released code's beta = 1000
_KD = MethodSpec(name="KD")  # alpha = 0.9 and T = 4, as the released code's


def _pair(pair: str, taught: float) -> Recipe:
    note = "RepDistiller reads three stages, as here."
    return repdistiller.benchmark("AT", pair, taught, note, paper=PAPER, column="AT")


def at_wrn_40_2_wrn_16_2_cifar100() -> Recipe:
    """WRN-40-2 teaches WRN-16-2."""
    return _pair("wrn_40_2_wrn_16_2", 74.08)


def at_wrn_40_2_wrn_40_1_cifar100() -> Recipe:
    """WRN-40-2 teaches WRN-40-1."""
    return _pair("wrn_40_2_wrn_40_1", 72.77)


def at_resnet56_resnet20_cifar100() -> Recipe:
    """ResNet-56 teaches ResNet-20."""
    return _pair("resnet56_resnet20", 70.55)


def at_resnet110_resnet32_cifar100() -> Recipe:
    """ResNet-110 teaches ResNet-32."""
    return _pair("resnet110_resnet32", 72.31)


def at_wrn_16_2_wrn_16_1_cifar10() -> Recipe:
    """WRN-16-2 teaches WRN-16-1 on CIFAR-10: AT, KD and both."""

    def run(model: str, *methods: MethodSpec) -> TrainSpec:
        return step_run(
            *methods,
            model=model,
            data="cifar10",
            epochs=200,
            nesterov=False,
            milestones=(0.3, 0.6, 0.8),
            gamma=0.2,
        )

    student = "cifar_wrn_16_1"
    figures = {"plain": 8.77, "AT": 7.93, "KD": 7.41, "AT+KD": 7.51}
    return Recipe(
        "at_wrn_16_2_wrn_16_1_cifar10",
        "WRN-16-2 teaches WRN-16-1 on CIFAR-10: plain, AT, KD and both",
        PAPER,
        "the CIFAR-10 table",
        run(student, _AT),
        tuple(Published(label, value, FROM_MEMORY) for label, value in figures.items()),
        beside=(run(student), run(student, _KD), run(student, _AT, _KD)),
        teacher=run("cifar_wrn_16_2"),
        notes=(
            "Settings are the released code's, which pads by reflection and forgets the optimiser's momentum at every "
            "fall of the rate; attar pads with zeros and keeps it. Whether momentum is Nesterov's is not known.",
            "2 % of the training images choose the epoch of student and teacher, and the test set is read once.",
        ),
    )


def at_resnet34_resnet18_imagenet() -> Recipe:
    """ResNet-34 teaches ResNet-18 on ImageNet."""

    def run(model: str, *methods: MethodSpec) -> TrainSpec:
        return step_run(
            *methods,
            model=model,
            data=IMAGENET,
            image_size=224,
            holdout=0.01,
            epochs=100,
            batch=256,
            weight_decay=1e-4,
            nesterov=False,
            milestones=(0.3, 0.6, 0.9),
        )

    known = "README of szagoruyko/attention-transfer"
    return Recipe(
        "at_resnet34_resnet18_imagenet",
        "ResNet-34 teaches ResNet-18 on ImageNet: plain and AT",
        PAPER,
        "README of the released code",
        run("resnet18", _AT),
        (Published("plain", 30.4, known), Published("AT", 29.3, known)),
        beside=(run("resnet18"),),
        teacher=run("resnet34"),
        notes=(
            "torchdistill reproduced 29.10 (plain 30.24). The validation images are the test images of the figures.",
            "Batch and rate are the usual ones of ImageNet, not known to be the authors'.",
            "The teacher is trained by the student's settings; 1 % of the training images choose the epoch.",
        ),
    )
