"""DML's CIFAR-100 table (Zhang et al., CVPR 2018, arXiv 1706.00384), and its re-runs by others.

The table's rows with MobileNet are left out: how that network was made to fit small images is unknown. So are the
re-runs' VGG-16, of which attar has none for small images, and the experiments on person re-identification.
"""

from __future__ import annotations

from typing import Any

from attar.compare.protocol import label_of
from attar.recipes.recipe import FROM_MEMORY, Published, Recipe
from attar.spec import MethodSpec, TrainSpec, parse

__all__ = [
    "dml_pair_resnet32_cifar100",
    "dml_pair_wrn_28_10_cifar100",
    "dml_rerun_densenet_40_12_cifar100",
    "dml_rerun_resnet32_cifar100",
    "dml_rerun_resnet110_cifar100",
    "dml_rerun_wrn_20_8_cifar100",
    "dml_thirdparty_resnet32_cifar100",
    "dml_wrn_28_10_with_resnet32_cifar100",
]

PAPER = "DML (Zhang, Xiang, Hospedales, Lu, CVPR 2018, arXiv 1706.00384)"
TABLE = "CIFAR-100 table"
THIRD_PARTY = "README of chxy95/Deep-Mutual-Learning"
RERUN = (
    "PCL's tables as repeated in the README of shaoeric/Peer-Collaborative-Learning-for-Online-Knowledge-Distillation"
)

_SELECTION = "2 % of the training images choose the epoch, by the student's accuracy, and the test set is read once."
_SETTINGS = (
    "From memory: batch 64, 200 epochs, the rate falls to a tenth every 60; the weight decay is unknown, 5e-4 is a "
    "third party's.",
    "Networks are updated at once from one forward; the paper, as remembered, updates them in turn.",
    _SELECTION,
)


def _run(model: str, *methods: MethodSpec, **fields: Any) -> TrainSpec:
    values: dict[str, Any] = {
        "methods": methods,
        "model": model,
        "data": "cifar100",
        "augment": "crop-flip",
        "holdout": 0.02,
        "epochs": 200,
        "batch": 64,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": "step",
        "milestones": (0.3, 0.6, 0.9),
        "gamma": 0.1,
        "warmup": 0.0,
    }
    return parse(TrainSpec, {**values, **fields})


def _dml(**options: Any) -> MethodSpec:
    return MethodSpec(name="DML", options=options)


def _accuracy(run: str, value: float, network: str = "student", known: str = FROM_MEMORY) -> Published:
    return Published(run, value, known, metric="top-1 accuracy", network=network)


def _pair(name: str, title: str, model: str, method: MethodSpec, alone: float, figures: tuple[float, float]) -> Recipe:
    label = label_of([method])
    student, peer = figures
    return Recipe(
        name,
        f"{title} on CIFAR-100: plain and DML",
        PAPER,
        TABLE,
        _run(model, method),
        (_accuracy("plain", alone), _accuracy(label, student), _accuracy(label, peer, network="DML.peer1")),
        beside=(_run(model),),
        notes=_SETTINGS,
    )


def dml_pair_resnet32_cifar100() -> Recipe:
    """Two ResNet-32."""
    return _pair("dml_pair_resnet32_cifar100", "Two ResNet-32", "cifar_resnet32", _dml(), 68.99, (71.19, 70.75))


def dml_pair_wrn_28_10_cifar100() -> Recipe:
    """Two WRN-28-10."""
    return _pair("dml_pair_wrn_28_10_cifar100", "Two WRN-28-10", "cifar_wrn_28_10", _dml(), 78.69, (80.28, 80.08))


def dml_wrn_28_10_with_resnet32_cifar100() -> Recipe:
    """WRN-28-10 beside ResNet-32."""
    method = _dml(peers=["cifar_resnet32"])
    title = "WRN-28-10 with ResNet-32"
    return _pair("dml_wrn_28_10_with_resnet32_cifar100", title, "cifar_wrn_28_10", method, 78.69, (78.96, 70.73))


def dml_thirdparty_resnet32_cifar100() -> Recipe:
    """Two ResNet-32 by the settings of a third-party re-implementation."""
    return Recipe(
        "dml_thirdparty_resnet32_cifar100",
        "Two ResNet-32 on CIFAR-100: plain and DML, third-party re-implementation",
        PAPER,
        "not the paper's own table",
        _run("cifar_resnet32", _dml(), batch=256),
        (_accuracy("plain", 69.83, known=THIRD_PARTY), _accuracy("DML", 71.03, known=THIRD_PARTY)),
        beside=(_run("cifar_resnet32", batch=256),),
        notes=("71.03 is the average of both networks.", _SELECTION),
    )


# DML as the authors of PCL trained it.


def _rerun(name: str, title: str, model: str, accuracy: float, spread: float, *notes: str) -> Recipe:
    schedule: dict[str, Any] = {"epochs": 300, "batch": 128, "milestones": (0.5, 0.75)}
    return Recipe(
        name,
        f"{title} on CIFAR-100: plain and DML, re-run by PCL's authors",
        "PCL (Wu, Gong, AAAI 2021, arXiv 2006.04147)",
        "comparison on CIFAR-100",
        _run(model, _dml(), **schedule),
        (Published("DML", accuracy, RERUN, metric="top-1 accuracy", spread=spread),),
        beside=(_run(model, **schedule),),
        notes=(
            *notes,
            "How many networks and which temperature the re-run had is unknown: here two networks and none. Other "
            "settings are those of a third-party re-implementation of PCL.",
            _SELECTION,
        ),
    )


def dml_rerun_resnet32_cifar100() -> Recipe:
    """ResNet-32."""
    return _rerun("dml_rerun_resnet32_cifar100", "ResNet-32", "cifar_resnet32", 73.68, 0.14)


def dml_rerun_resnet110_cifar100() -> Recipe:
    """ResNet-110 of 12 bottlenecks a stage."""
    note = "This ResNet-110 has 12 bottlenecks a stage; the one of ONE's code has 18."
    return _rerun("dml_rerun_resnet110_cifar100", "ResNet-110", "cifar_resnet74_bottleneck", 77.86, 0.50, note)


def dml_rerun_densenet_40_12_cifar100() -> Recipe:
    """DenseNet-40-12."""
    note = "The BC form, by the 132 channels that OKDDip's code gives for its embedding; the plain form would have 448."
    return _rerun("dml_rerun_densenet_40_12_cifar100", "DenseNet-40-12", "cifar_densenet_bc_40_12", 73.06, 0.31, note)


def dml_rerun_wrn_20_8_cifar100() -> Recipe:
    """WRN-20-8."""
    note = "Not a WRN in the usual sense: a ResNet of 3 x 2 bottlenecks, 8 times as wide inside."
    return _rerun("dml_rerun_wrn_20_8_cifar100", "WRN-20-8", "cifar_wrn_20_8", 79.77, 0.07, note)
