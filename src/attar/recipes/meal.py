"""MEAL and MEAL V2 on ImageNet by the figures of their READMEs."""

from __future__ import annotations

from typing import Any

from attar.recipes.recipe import IMAGENET, Metric, Published, Recipe
from attar.spec import MethodSpec, TrainSpec, parse

__all__ = ["meal_resnet50_imagenet", "meal_v2_resnet18_imagenet", "meal_v2_resnet50_imagenet"]

_ONE_TEACHER = (
    "A recipe trains one teacher: several that are trained already are given to `attar train MEAL --MEAL.teachers`."
)
_KEPT = "1 % of the training images choose the epoch, and the test set is read once."


def _run(model: str, methods: tuple[MethodSpec, ...], **values: Any) -> TrainSpec:
    common = {
        "methods": methods,
        "model": model,
        "data": IMAGENET,
        "augment": "crop-flip",
        "image_size": 224,
        "holdout": 0.01,
        "nesterov": False,
        "schedule": "step",
        "gamma": 0.1,
        "warmup": 0.0,
    }
    return parse(TrainSpec, {**common, **values})


def meal_resnet50_imagenet() -> Recipe:
    """ResNet-50 on ImageNet, taught at four stages and the logits."""
    # Of the published runs on CIFAR-10.
    values = {
        "epochs": 350,
        "batch": 128,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "milestones": (150 / 350, 250 / 350),
    }
    label = "MEAL(adversarial=joint)"
    return Recipe(
        "meal_resnet50_imagenet",
        "ResNet-50 on ImageNet: plain and MEAL, without labels",
        "MEAL (Shen, He, Xue, AAAI 2019, arXiv 1812.02425)",
        "README, the table of ImageNet",
        _run("resnet50", (MethodSpec(name="MEAL", options={"adversarial": "joint"}),), **values),
        _figures("README of AaronHeee/MEAL", "top-1 error", {"plain": 23.85, label: 21.79}),
        beside=(_run("resnet50", (), **values),),
        teacher=_run("resnet152", (), **values),
        notes=(
            "Neither the teachers nor the depths, bins and settings of this run are known: a ResNet-152 teaches, and "
            "the rest is that of the published runs on CIFAR-10. The paper's own tables could not be checked.",
            "The discriminators learn with the student, not against it (joint), as released.",
            _ONE_TEACHER,
            _KEPT,
        ),
    )


def _v2(name: str, network: str, model: str, accuracy: float) -> Recipe:
    values = {
        "epochs": 180,
        "batch": 512,
        "lr": 0.01,
        "weight_decay": 0.0,
        "milestones": (100 / 180,),
    }
    label = "MEAL(variant=v2,adversarial=joint)"
    return Recipe(
        name,
        f"{network} on ImageNet: MEAL V2, logits alone, without labels",
        "MEAL V2 (Shen and Savvides, 2020, arXiv 2009.08453)",
        "README of szq0214/MEAL-V2",
        _run(model, (MethodSpec(name="MEAL", options={"variant": "v2", "adversarial": "joint"}),), **values),
        _figures("README of szq0214/MEAL-V2", "top-1 accuracy", {label: accuracy}),
        # The teacher is not fine-tuned but trained, so it is by the other recipe's settings.
        teacher=_run(
            "resnet152", (), epochs=350, batch=128, lr=0.1, weight_decay=5e-4, milestones=(150 / 350, 250 / 350)
        ),
        notes=(
            "The published student is trained already when it begins, which its small rate presupposes: give the run "
            "such weights (--weights). Its teachers are SENet-154 and ResNet-152-v1s; here one ResNet-152 stands for "
            "both, so that the figure is not to be expected.",
            _ONE_TEACHER,
            _KEPT,
        ),
    )


def meal_v2_resnet18_imagenet() -> Recipe:
    """ResNet-18 on ImageNet with MEAL V2."""
    return _v2("meal_v2_resnet18_imagenet", "ResNet-18", "resnet18", 73.19)


def meal_v2_resnet50_imagenet() -> Recipe:
    """ResNet-50 on ImageNet with MEAL V2."""
    return _v2("meal_v2_resnet50_imagenet", "ResNet-50", "resnet50", 80.67)


def _figures(known: str, metric: Metric, values: dict[str, float]) -> tuple[Published, ...]:
    return tuple(Published(run, value, known, metric=metric) for run, value in values.items())
