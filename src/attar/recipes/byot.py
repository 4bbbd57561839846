"""BYOT's figures on CIFAR-100 (Zhang et al., ICCV 2019, arXiv 1905.08094), and those of code that repeats them.

Left out: winycg/Self-KD-Lib's rows, whose heads are copies of the network's own stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attar.compare.protocol import label_of
from attar.recipes.recipe import FROM_MEMORY, Published, Recipe
from attar.spec import MethodSpec, TrainSpec, parse

__all__ = [
    "byot_journal_resnet18_cifar100",
    "byot_rerun_resnet18_cifar100",
    "byot_rerun_resnet50_cifar100",
    "byot_resnet18_cifar100",
    "byot_resnet50_cifar100",
]

PAPER = "BYOT (Zhang et al., ICCV 2019, arXiv 1905.08094)"
REPEATED = "README of luanyunteng/pytorch-be-your-own-teacher, column Original"
SURGERY = "README of Deep Feature Surgery (ECCV 2024)"
RERUN = "README of luanyunteng/pytorch-be-your-own-teacher"
USER = "a user in ArchipLab-LinfengZhang/pytorch-self-distillation-final, issue 3"

_RESNET18 = ("ResNet-18", "cifar_resnet18")
_RESNET50 = ("ResNet-50", "cifar_resnet50")
_SELECTION = "2 % of the training images choose the epoch, and the test set is read once."
_UNKNOWN = (
    "The paper prints neither its heads nor alpha, lambda and T: heads, weights and training are those of "
    "luanyunteng/pytorch-be-your-own-teacher, with the paper's loss."
)


def _run(model: str, *methods: MethodSpec, **fields: Any) -> TrainSpec:
    """One run by the settings of luanyunteng's script."""
    values = {
        "methods": methods,
        "model": model,
        "data": "cifar100",
        "augment": "crop-flip",
        "holdout": 0.02,
        "epochs": 200,
        "batch": 128,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "nesterov": False,
        "schedule": "step",
        "milestones": (75 / 200, 130 / 200, 180 / 200),
        "gamma": 0.1,
        "warmup": 0.0,
    }
    return parse(TrainSpec, {**values, **fields})


def _exits(method: MethodSpec, values: Sequence[float], known: str) -> tuple[Published, ...]:
    """The accuracy of exits 1 to 4; the last is the student."""
    networks = ("BYOT.exit1", "BYOT.exit2", "BYOT.exit3", "student")
    return tuple(
        Published(label_of([method]), value, known, metric="top-1 accuracy", network=network)
        for network, value in zip(networks, values, strict=True)
    )


def _ensemble(method: MethodSpec, value: float, known: str) -> Published:
    return Published(label_of([method]), value, known, metric="top-1 accuracy", network="BYOT.ensemble")


def _paper(name: str, network: tuple[str, str], plain: float, exits: Sequence[float], ensemble: Published) -> Recipe:
    title, model = network
    method = MethodSpec(name="BYOT")
    return Recipe(
        name,
        f"{title} on CIFAR-100: plain and BYOT",
        PAPER,
        "CIFAR-100",
        _run(model, method),
        (
            Published("plain", plain, FROM_MEMORY, metric="top-1 accuracy"),
            *_exits(method, exits, REPEATED),
            ensemble,
        ),
        beside=(_run(model),),
        notes=(_UNKNOWN, _SELECTION),
    )


def byot_resnet18_cifar100() -> Recipe:
    """ResNet-18 on CIFAR-100, all exits."""
    ensemble = _ensemble(MethodSpec(name="BYOT"), 79.67, SURGERY)
    return _paper("byot_resnet18_cifar100", _RESNET18, 77.09, (67.85, 74.57, 78.23, 78.64), ensemble)


def byot_resnet50_cifar100() -> Recipe:
    """ResNet-50 on CIFAR-100, all exits."""
    ensemble = _ensemble(MethodSpec(name="BYOT"), 81.04, FROM_MEMORY)
    return _paper("byot_resnet50_cifar100", _RESNET50, 77.68, (68.23, 74.21, 75.23, 80.56), ensemble)


def _rerun(name: str, network: tuple[str, str], exits: Sequence[float], *notes: str) -> Recipe:
    title, model = network
    options = {"soft": "cross-entropy", "hint": "masked-sum", "hint_weight": 1e-6, "task_weight": 0.9}
    method = MethodSpec(name="BYOT", options=options)
    return Recipe(
        name,
        f"{title} on CIFAR-100: plain and BYOT, by luanyunteng",
        PAPER,
        "luanyunteng's table of CIFAR-100",
        _run(model, method),
        _exits(method, exits, RERUN),
        beside=(_run(model),),
        notes=(*notes, "Loss, heads and training are those of luanyunteng's code.", _SELECTION),
    )


def byot_rerun_resnet18_cifar100() -> Recipe:
    """ResNet-18 on CIFAR-100, trained by a third party."""
    note = "A user (issue 3) reports 72.17, 76.25, 78.32 and 79.17 % with wider heads."
    return _rerun("byot_rerun_resnet18_cifar100", _RESNET18, (66.57, 74.69, 78.04, 78.73), note)


def byot_rerun_resnet50_cifar100() -> Recipe:
    """ResNet-50 on CIFAR-100, trained by a third party."""
    return _rerun("byot_rerun_resnet50_cifar100", _RESNET50, (71.84, 77.75, 80.14, 80.64))


def byot_journal_resnet18_cifar100() -> Recipe:
    """ResNet-18 on CIFAR-100, the journal version's released code."""
    method = MethodSpec(name="BYOT", options={"form": "journal"})
    settings = {"epochs": 250, "milestones": (1 / 3, 2 / 3, 240 / 250)}
    return Recipe(
        "byot_journal_resnet18_cifar100",
        "ResNet-18 on CIFAR-100: plain and BYOT, journal form",
        "BYOT, journal version (ArchipLab-LinfengZhang/pytorch-self-distillation-final)",
        "CIFAR-100",
        _run("cifar_resnet18", method, **settings),
        (*_exits(method, (76.25, 79.30, 81.06, 81.33), USER), _ensemble(method, 82.32, USER)),
        beside=(_run("cifar_resnet18", **settings),),
        notes=(
            "The released code trains with AutoAugment's CIFAR-10 policy and Cutout, which attar does not have: lower "
            "figures are to be expected.",
            "It chooses the epoch by the ensemble's accuracy on the test set; here 2 % of the training images choose "
            "it by the student's, and the test set is read once.",
            "The same user reports 75.28, 78.18, 81.30, 81.71 and 82.57 % without the hint (hint_weight=0).",
        ),
    )
