"""SLA's settings (Lee, Hwang, Shin, ICML 2020); its own tables are known from memory alone."""

from __future__ import annotations

from typing import Any

from attar.compare.protocol import label_of
from attar.recipes.recipe import FROM_MEMORY, Published, Recipe
from attar.spec import MethodSpec, TrainSpec, parse

__all__ = ["sla_resnet18_cifar100", "sla_resnet32_cifar10_aggregated", "sla_resnet32_cifar100_aggregated"]


def _run(model: str, data: str, *methods: MethodSpec, **fields: Any) -> TrainSpec:
    """One run by the settings of SLA's released code: 80,000 steps of 128 images on 45,000."""
    settings: dict[str, Any] = {
        "methods": methods,
        "model": model,
        "data": data,
        "augment": "crop-flip",
        "holdout": 0.1,
        "epochs": 228,
        "batch": 128,
        "lr": 0.1,
        "weight_decay": 1e-4,
        "nesterov": False,
        "schedule": "step",
        "milestones": (0.5, 0.75),
        "gamma": 0.1,
        "warmup": 0.0,
    }
    return parse(TrainSpec, settings | fields)


def _aggregated(name: str, title: str, data: str, plain: float, aggregated: float) -> Recipe:
    method = MethodSpec(name="SLA", options={"distil": False})
    return Recipe(
        name,
        f"ResNet-32 on {title}: plain and SLA with aggregation (SLA+AG)",
        "SLA (Lee, Hwang, Shin, ICML 2020, arXiv 1910.05872)",
        title,
        _run("cifar_resnet32", data, method),
        (
            Published("plain", plain, FROM_MEMORY, metric="top-1 accuracy"),
            Published(label_of([method]), aggregated, FROM_MEMORY, metric="top-1 accuracy", network="SLA.aggregated"),
        ),
        beside=(_run("cifar_resnet32", data),),
        notes=(
            "The figure is of the ensemble over four rotations, which runs the network four times; the student's own "
            "classifier is not trained here (SLA+SD trains it).",
            "The released code draws 80,000 random batches without epochs: 228 epochs of 45,000 images are as many.",
            "The code's network has the shortcuts of its own library; which of ResNet-32's forms is unknown.",
        ),
    )


def sla_resnet32_cifar10_aggregated() -> Recipe:
    """ResNet-32 on CIFAR-10, the ensemble."""
    return _aggregated("sla_resnet32_cifar10_aggregated", "CIFAR-10", "cifar10", 92.39, 94.50)


def sla_resnet32_cifar100_aggregated() -> Recipe:
    """ResNet-32 on CIFAR-100, the ensemble."""
    return _aggregated("sla_resnet32_cifar100_aggregated", "CIFAR-100", "cifar100", 68.27, 74.14)


def sla_resnet18_cifar100() -> Recipe:
    """ResNet-18 on CIFAR-100, the plain classifier (SLA+SD), as FRSKD's paper trained it."""
    settings: dict[str, Any] = {"holdout": 0.02, "epochs": 200}
    return Recipe(
        "sla_resnet18_cifar100",
        "ResNet-18 on CIFAR-100: plain and SLA with self-distillation (SLA+SD)",
        "FRSKD (Ji et al., CVPR 2021, arXiv 2103.08273)",
        "Table 1",
        _run("cifar_resnet18", "cifar100", MethodSpec(name="SLA"), **settings),
        (
            Published("plain", 73.80, "read off the paper's Table 7", metric="top-1 accuracy", spread=0.60),
            Published("SLA", 77.52, FROM_MEMORY, metric="top-1 accuracy"),
        ),
        beside=(_run("cifar_resnet18", "cifar100", **settings),),
        notes=(
            "Settings are FRSKD's; its temperature for SLA is unknown, here SLA's own default of 1.",
            "2 % of the training images choose the epoch, and the test set is read once.",
        ),
    )
