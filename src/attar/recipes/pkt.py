"""PKT by the settings and figures of RepDistiller's README, for the pairs of which attar has both networks."""

from __future__ import annotations

from attar.recipes import repdistiller
from attar.recipes.recipe import Recipe

__all__ = [
    "pkt_resnet56_resnet20_cifar100",
    "pkt_resnet110_resnet20_cifar100",
    "pkt_resnet110_resnet32_cifar100",
    "pkt_wrn_40_2_wrn_16_2_cifar100",
    "pkt_wrn_40_2_wrn_40_1_cifar100",
]

PAPER = "PKT (Passalis and Tefas, ECCV 2018, arXiv 1803.10837)"


def _pair(pair: str, taught: float) -> Recipe:
    note = "RepDistiller compares pooled embeddings with weight 30000 beside the labels, as here."
    return repdistiller.benchmark("PKT", pair, taught, note, paper=PAPER, column="PKT")


def pkt_wrn_40_2_wrn_16_2_cifar100() -> Recipe:
    """WRN-40-2 teaches WRN-16-2."""
    return _pair("wrn_40_2_wrn_16_2", 74.54)


def pkt_wrn_40_2_wrn_40_1_cifar100() -> Recipe:
    """WRN-40-2 teaches WRN-40-1."""
    return _pair("wrn_40_2_wrn_40_1", 73.45)


def pkt_resnet56_resnet20_cifar100() -> Recipe:
    """ResNet-56 teaches ResNet-20."""
    return _pair("resnet56_resnet20", 70.34)


def pkt_resnet110_resnet20_cifar100() -> Recipe:
    """ResNet-110 teaches ResNet-20."""
    return _pair("resnet110_resnet20", 70.25)


def pkt_resnet110_resnet32_cifar100() -> Recipe:
    """ResNet-110 teaches ResNet-32."""
    return _pair("resnet110_resnet32", 72.61)
