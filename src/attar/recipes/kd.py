"""KD by the settings and figures of RepDistiller's README (CIFAR-100) and torchdistill's benchmark (ImageNet).

Of RepDistiller's pairs those are here whose networks attar has; resnet32x4, resnet8x4, VGG, MobileNetV2 and
ShuffleNetV2 for small images it has not.
"""

from __future__ import annotations

from attar.recipes.recipe import IMAGENET, Published, Recipe, step_run
from attar.recipes.repdistiller import run
from attar.spec import MethodSpec, TrainSpec

__all__ = [
    "kd_resnet34_resnet18_imagenet",
    "kd_resnet56_resnet20_cifar100",
    "kd_resnet110_resnet32_cifar100",
    "kd_wrn_40_2_wrn_16_2_cifar100",
    "kd_wrn_40_2_wrn_40_1_cifar100",
]

README = "RepDistiller's README"


def _pair(
    name: str, teacher: tuple[str, str, float], student: tuple[str, str, float], taught: float, *notes: str
) -> Recipe:
    method = MethodSpec(name="KD")  # its defaults are RepDistiller's: 0.1 CE + 0.9 T^2 KL, T = 4

    def accuracy(run: str, value: float) -> Published:
        return Published(run, value, README, metric="top-1 accuracy")

    return Recipe(
        name,
        f"{teacher[0]} teaches {student[0]} on CIFAR-100: plain and KD",
        "KD (Hinton, Vinyals, Dean, 2015, arXiv 1503.02531)",
        "RepDistiller's benchmark",
        run(student[1], method),
        (accuracy("teacher", teacher[2]), accuracy("plain", student[2]), accuracy("KD", taught)),
        beside=(run(student[1]),),
        teacher=run(teacher[1]),
        notes=(
            *notes,
            "RepDistiller gives trained teachers; here the teacher is trained by the student's settings, once for all "
            "seeds. Of student and teacher 2 % of the training images choose the epoch, and the test set is read once.",
        ),
    )


def kd_wrn_40_2_wrn_16_2_cifar100() -> Recipe:
    """WRN-40-2 teaches WRN-16-2."""
    networks = ("WRN-40-2", "cifar_wrn_40_2", 75.61), ("WRN-16-2", "cifar_wrn_16_2", 73.26)
    return _pair("kd_wrn_40_2_wrn_16_2_cifar100", *networks, 74.92)


def kd_wrn_40_2_wrn_40_1_cifar100() -> Recipe:
    """WRN-40-2 teaches WRN-40-1."""
    networks = ("WRN-40-2", "cifar_wrn_40_2", 75.61), ("WRN-40-1", "cifar_wrn_40_1", 71.98)
    return _pair("kd_wrn_40_2_wrn_40_1_cifar100", *networks, 73.54)


def kd_resnet56_resnet20_cifar100() -> Recipe:
    """ResNet-56 teaches ResNet-20."""
    networks = ("ResNet-56", "cifar_resnet56", 72.34), ("ResNet-20", "cifar_resnet20", 69.06)
    return _pair("kd_resnet56_resnet20_cifar100", *networks, 70.66)


def kd_resnet110_resnet32_cifar100() -> Recipe:
    """ResNet-110 teaches ResNet-32."""
    networks = ("ResNet-110", "cifar_resnet110", 74.31), ("ResNet-32", "cifar_resnet32", 71.14)
    note = "This ResNet-110 has 54 basic blocks, unlike the one of ONE's code."
    return _pair("kd_resnet110_resnet32_cifar100", *networks, 73.08, note)


def kd_resnet34_resnet18_imagenet() -> Recipe:
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

    known = "torchdistill's benchmark"
    options = {"temperature": 1.0, "weight": 0.5, "task_weight": 0.5}
    label = "KD(temperature=1.0,weight=0.5,task_weight=0.5)"
    return Recipe(
        "kd_resnet34_resnet18_imagenet",
        "ResNet-34 teaches ResNet-18 on ImageNet: plain and KD",
        "KD (Hinton, Vinyals, Dean, 2015, arXiv 1503.02531)",
        known,
        run("resnet18", MethodSpec(name="KD", options=options)),
        (
            Published("plain", 69.76, known, metric="top-1 accuracy"),
            Published(label, 71.37, known, metric="top-1 accuracy"),
        ),
        beside=(run("resnet18"),),
        teacher=run("resnet34"),
        notes=(
            "Settings are those of torchdistill's sample configuration (weights 0.5, T = 1); that they gave the "
            "benchmark's figure is likely, not certain. The teacher is trained by the student's settings.",
            "1 % of the training images choose the epoch, and the test set is read once.",
        ),
    )
