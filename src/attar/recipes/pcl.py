"""PCL's tables (Wu and Gong, AAAI 2021, arXiv 2006.04147), in accuracy; ONE and OKDDip in them have recipes too.

Left out: VGG-16, since attar has no VGG for small images; ImageNet (ResNet-18, 29.58 % error), whose setting is
unknown.
"""

from __future__ import annotations

from attar.recipes.recipe import Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = [
    "pcl_densenet_40_12_cifar10",
    "pcl_densenet_40_12_cifar100",
    "pcl_resnet32_cifar10",
    "pcl_resnet32_cifar100",
    "pcl_resnet110_cifar10",
    "pcl_resnet110_cifar100",
    "pcl_wrn_20_8_cifar10",
    "pcl_wrn_20_8_cifar100",
]

PAPER = "PCL (Wu, Gong, AAAI 2021, arXiv 2006.04147)"
REPEATED = "as repeated in the README of shaoeric/Peer-Collaborative-Learning-for-Online-Knowledge-Distillation"

_SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
_RESNET32 = ("ResNet-32", "cifar_resnet32")
_RESNET110 = ("ResNet-110", "cifar_resnet74_bottleneck")
_DENSENET = ("DenseNet-40-12", "cifar_densenet_bc_40_12")
_WRN = ("WRN-20-8", "cifar_wrn_20_8")

_SETTINGS = (
    "Settings are those of shaoeric's re-implementation; no official code is known. The paper is said to report the "
    "first branch, here the student."
)
_SELECTION = "2 % of the training images choose the epoch, and the test set is read once."
_OF_NETWORK = {
    _RESNET110[1]: "This ResNet-110 has 12 bottlenecks a stage; the one of ONE's code has 18.",
    _DENSENET[1]: "The BC form, by the 132 channels that OKDDip's code gives for its embedding.",
    _WRN[1]: "Not a WRN in the usual sense: a ResNet of 3 x 2 bottlenecks, 8 times as wide inside.",
}


def _run(model: str, data: str, *methods: MethodSpec) -> TrainSpec:
    """One run by the settings of shaoeric's re-implementation."""
    return step_run(
        *methods,
        model=model,
        data=data,
        epochs=300,
        progress="epoch",
    )


def _pcl(
    name: str,
    network: tuple[str, str],
    data: str,
    accuracy: float,
    spread: float | None = None,
    repeated: float | None = None,
) -> Recipe:
    title, model = network
    own = (_OF_NETWORK[model],) if model in _OF_NETWORK else ()
    if repeated is not None:
        own = (
            *own,
            f"The re-implementation reports {repeated} %: the best of three averages on the test set, one run.",
        )
    return Recipe(
        name,
        f"{title} on {_SETS[data]}: plain and PCL",
        PAPER,
        _SETS[data],
        _run(model, data, MethodSpec(name="PCL")),
        (Published("PCL", accuracy, REPEATED, metric="top-1 accuracy", spread=spread),),
        beside=(_run(model, data),),
        notes=(*own, _SETTINGS, _SELECTION),
    )


def pcl_resnet32_cifar100() -> Recipe:
    """ResNet-32 on CIFAR-100."""
    return _pcl("pcl_resnet32_cifar100", _RESNET32, "cifar100", 74.14, 0.16, 74.77)


def pcl_resnet110_cifar100() -> Recipe:
    """ResNet-110 of 12 bottlenecks a stage on CIFAR-100."""
    return _pcl("pcl_resnet110_cifar100", _RESNET110, "cifar100", 79.98, 0.55)


def pcl_densenet_40_12_cifar100() -> Recipe:
    """DenseNet-40-12 on CIFAR-100."""
    return _pcl("pcl_densenet_40_12_cifar100", _DENSENET, "cifar100", 73.09, 0.16, 73.11)


def pcl_wrn_20_8_cifar100() -> Recipe:
    """WRN-20-8 on CIFAR-100."""
    return _pcl("pcl_wrn_20_8_cifar100", _WRN, "cifar100", 80.51, 0.49)


def pcl_resnet32_cifar10() -> Recipe:
    """ResNet-32 on CIFAR-10."""
    return _pcl("pcl_resnet32_cifar10", _RESNET32, "cifar10", 94.33, repeated=94.35)


def pcl_resnet110_cifar10() -> Recipe:
    """ResNet-110 of 12 bottlenecks a stage on CIFAR-10."""
    return _pcl("pcl_resnet110_cifar10", _RESNET110, "cifar10", 95.53)


def pcl_densenet_40_12_cifar10() -> Recipe:
    """DenseNet-40-12 on CIFAR-10."""
    return _pcl("pcl_densenet_40_12_cifar10", _DENSENET, "cifar10", 94.13, repeated=93.69)


def pcl_wrn_20_8_cifar10() -> Recipe:
    """WRN-20-8 on CIFAR-10."""
    return _pcl("pcl_wrn_20_8_cifar10", _WRN, "cifar10", 95.42)
