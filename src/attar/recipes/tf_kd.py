"""Tf-KD's tables on CIFAR-100 (Yuan et al., CVPR 2020, arXiv 1909.11723), for the networks that attar has.

MobileNetV2, ShuffleNetV2, GoogLeNet and DenseNet-121 for small images it has not.
"""

from __future__ import annotations

from attar.recipes.recipe import Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = [
    "tf_kd_reg_resnet18_cifar100",
    "tf_kd_self_resnet18_cifar100",
    "tf_kd_self_resnext29_8x64d_cifar100",
]

PAPER = "Tf-KD (Yuan et al., CVPR 2020, arXiv 1909.11723)"
README = "README of yuanli2333/Teacher-free-Knowledge-Distillation"

_NOTES = (
    "The released code also turns images by up to 15 degrees, which attar's augmentation does not.",
    "2 % of the training images choose the epoch, and the test set is read once.",
)


def _run(model: str, *methods: MethodSpec, batch: int = 128) -> TrainSpec:
    return step_run(
        *methods,
        model=model,
        data="cifar100",
        epochs=200,
        batch=batch,
        lr=0.1 * batch / 128,
        nesterov=False,
        milestones=(0.3, 0.6, 0.8),
        gamma=0.2,
        warmup=1 / 200,
    )


def _figures(plain: float, taught: float) -> tuple[Published, Published]:
    return (
        Published("plain", plain, README, metric="top-1 accuracy"),
        Published("TfKD", taught, README, metric="top-1 accuracy"),
    )


def tf_kd_reg_resnet18_cifar100() -> Recipe:
    """ResNet-18 on CIFAR-100 with the hand-made teacher."""
    return Recipe(
        "tf_kd_reg_resnet18_cifar100",
        "ResNet-18 on CIFAR-100: plain and Tf-KD_reg",
        PAPER,
        "CIFAR-100, Tf-KD_reg",
        _run("cifar_resnet18", MethodSpec(name="TfKD")),
        _figures(75.87, 77.36),
        beside=(_run("cifar_resnet18"),),
        notes=_NOTES,
    )


def _self(name: str, title: str, model: str, plain: float, taught: float, batch: int, *notes: str) -> Recipe:
    return Recipe(
        name,
        f"{title} on CIFAR-100: plain and Tf-KD_self",
        PAPER,
        "CIFAR-100, Tf-KD_self",
        _run(model, MethodSpec(name="TfKD"), batch=batch),
        _figures(plain, taught),
        beside=(_run(model, batch=batch),),
        teacher=_run(model, batch=batch),
        notes=(*notes, "The earlier training is the teacher of all seeds.", *_NOTES),
    )


def tf_kd_self_resnet18_cifar100() -> Recipe:
    """ResNet-18 on CIFAR-100 taught by its own earlier training."""
    return _self("tf_kd_self_resnet18_cifar100", "ResNet-18", "cifar_resnet18", 75.87, 77.10, 128)


def tf_kd_self_resnext29_8x64d_cifar100() -> Recipe:
    """ResNeXt-29 8x64d on CIFAR-100 taught by its own earlier training."""
    note = "Temperature and weights of this row are unknown: ResNet-18's."
    network = ("ResNeXt-29 8x64d", "cifar_resnext29_8x64d")
    return _self("tf_kd_self_resnext29_8x64d_cifar100", *network, 81.03, 82.08, 64, note)
