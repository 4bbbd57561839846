"""FitNet by the settings and figures of RepDistiller's README, for the pairs of which attar has both networks."""

from __future__ import annotations

from attar.recipes import repdistiller
from attar.recipes.recipe import Recipe

__all__ = [
    "fitnet_resnet56_resnet20_cifar100",
    "fitnet_resnet110_resnet32_cifar100",
    "fitnet_wrn_40_2_wrn_16_2_cifar100",
    "fitnet_wrn_40_2_wrn_40_1_cifar100",
]

PAPER = "FitNets (Romero et al., ICLR 2015, arXiv 1412.6550)"


def _pair(pair: str, taught: float) -> Recipe:
    note = "The form in one stage with the second of three stages as hint and weight 100, as RepDistiller's."
    return repdistiller.benchmark("FitNet", pair, taught, note, paper=PAPER, column="FitNet")


def fitnet_wrn_40_2_wrn_16_2_cifar100() -> Recipe:
    """WRN-40-2 teaches WRN-16-2."""
    return _pair("wrn_40_2_wrn_16_2", 73.58)


def fitnet_wrn_40_2_wrn_40_1_cifar100() -> Recipe:
    """WRN-40-2 teaches WRN-40-1."""
    return _pair("wrn_40_2_wrn_40_1", 72.24)


def fitnet_resnet56_resnet20_cifar100() -> Recipe:
    """ResNet-56 teaches ResNet-20."""
    return _pair("resnet56_resnet20", 69.21)


def fitnet_resnet110_resnet32_cifar100() -> Recipe:
    """ResNet-110 teaches ResNet-32."""
    return _pair("resnet110_resnet32", 71.06)
