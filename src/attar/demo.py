"""The demo: a whole comparison, small enough for a minute, on images that come with scikit-learn."""

from __future__ import annotations

from attar.compare.comparison import Plan
from attar.compare.protocol import read_entry
from attar.errors import AttarError
from attar.spec import TrainSpec, parse

__all__ = ["EPOCHS", "SEEDS", "demo_plan"]

SEEDS, EPOCHS = 3, 16


def demo_plan(seeds: int = SEEDS, epochs: int = EPOCHS) -> Plan:
    """Plan plain training, label smoothing and ONE for timm's smallest ResNet on 300 labelled digits.

    With all 1,293 digits every way of training makes almost no mistakes, and there would be nothing to compare.

    Raises:
        AttarError: fewer than two seeds, or no epoch.
    """
    if seeds < 2:
        raise AttarError(f"The demo needs at least 2 seeds to tell an effect from chance, not {seeds}.")
    if epochs < 1:
        raise AttarError(f"The demo needs at least 1 epoch, not {epochs}.")
    values = {
        "methods": [],
        "model": "test_resnet",
        "data": "digits",
        "image_size": 32,
        "train_limit": 300,
        "epochs": epochs,
        "batch": 64,
        "lr": 0.05,
        "precision": "fp32",
    }
    return Plan((read_entry("ONE"),), parse(TrainSpec, values), tuple(range(seeds)), smoothing=(0.1,))
