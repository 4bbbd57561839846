"""PS-KD's table on CIFAR-100 (Kim, Ji, Yoon, Hwang, ICCV 2021), for the networks that attar has."""

from __future__ import annotations

from attar.recipes.recipe import Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = ["ps_kd_resnet18_cifar100", "ps_kd_resnext29_8x64d_cifar100"]

PAPER = "PS-KD (Kim, Ji, Yoon, Hwang, ICCV 2021)"
README = "README of lgcnsai/PS-KD-Pytorch"


def _run(model: str, *methods: MethodSpec) -> TrainSpec:
    return step_run(
        *methods,
        model=model,
        data="cifar100",
        epochs=300,
    )


def _recipe(name: str, title: str, model: str, plain: float, taught: float, *notes: str) -> Recipe:
    return Recipe(
        name,
        f"{title} on CIFAR-100: plain and PS-KD",
        PAPER,
        "CIFAR-100",
        _run(model, MethodSpec(name="PSKD")),
        (Published("plain", plain, README), Published("PSKD", taught, README)),
        beside=(_run(model),),
        notes=(
            *notes,
            "The released code keeps the epoch with the best test accuracy; here 2 % of the training images choose it "
            "and the test set is read once.",
        ),
    )


def ps_kd_resnet18_cifar100() -> Recipe:
    """ResNet-18 on CIFAR-100."""
    note = "The paper's ResNet-18 is pre-activated, attar's is not."
    return _recipe("ps_kd_resnet18_cifar100", "ResNet-18", "cifar_resnet18", 24.18, 20.82, note)


def ps_kd_resnext29_8x64d_cifar100() -> Recipe:
    """ResNeXt-29 on CIFAR-100."""
    note = "Which ResNeXt-29 the paper has is not said: 8x64d is the usual one."
    return _recipe("ps_kd_resnext29_8x64d_cifar100", "ResNeXt-29", "cifar_resnext29_8x64d", 18.65, 17.28, note)
