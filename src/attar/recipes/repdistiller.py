"""RepDistiller's benchmark on CIFAR-100: one setting and several teacher-student pairs, shared by many methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attar.compare.protocol import label_of
from attar.recipes.recipe import Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = ["README", "benchmark", "run"]

README = "RepDistiller's README"

# Name, model and accuracy of teacher and of plain student, for the pairs of which attar has both networks.
_PAIRS = {
    "wrn_40_2_wrn_16_2": (("WRN-40-2", "cifar_wrn_40_2", 75.61), ("WRN-16-2", "cifar_wrn_16_2", 73.26)),
    "wrn_40_2_wrn_40_1": (("WRN-40-2", "cifar_wrn_40_2", 75.61), ("WRN-40-1", "cifar_wrn_40_1", 71.98)),
    "resnet56_resnet20": (("ResNet-56", "cifar_resnet56", 72.34), ("ResNet-20", "cifar_resnet20", 69.06)),
    "resnet110_resnet20": (("ResNet-110", "cifar_resnet110", 74.31), ("ResNet-20", "cifar_resnet20", 69.06)),
    "resnet110_resnet32": (("ResNet-110", "cifar_resnet110", 74.31), ("ResNet-32", "cifar_resnet32", 71.14)),
}


def run(model: str, *methods: MethodSpec) -> TrainSpec:
    """Return a run with RepDistiller's settings."""
    return step_run(
        *methods,
        model=model,
        data="cifar100",
        epochs=240,
        batch=64,
        lr=0.05,
        nesterov=False,
        milestones=(150 / 240, 180 / 240, 210 / 240),
    )


def benchmark(
    method: str,
    pair: str,
    taught: float,
    *notes: str,
    paper: str,
    column: str,
    options: Mapping[str, Any] | None = None,
) -> Recipe:
    """Return the recipe of one method on one pair.

    Args:
        method: as attar calls it.
        pair: a key of the table above.
        taught: the student's published accuracy in percent.
        notes: what else is to be said.
        paper: short citation of the method.
        column: what RepDistiller calls the method.
        options: of the method, where they differ from its defaults.
    """
    (teacher, teacher_model, teacher_accuracy), (student, model, accuracy) = _PAIRS[pair]
    given = MethodSpec(name=method, options=dict(options or {}))

    def published(of: str, value: float) -> Published:
        return Published(of, value, README, metric="top-1 accuracy")

    return Recipe(
        f"{method.casefold()}_{pair}_cifar100",
        f"{teacher} teaches {student} on CIFAR-100: plain and {method}",
        paper,
        f"RepDistiller's benchmark, column {column}",
        run(model, given),
        (published("teacher", teacher_accuracy), published("plain", accuracy), published(label_of((given,)), taught)),
        beside=(run(model),),
        teacher=run(teacher_model),
        notes=(
            *notes,
            "RepDistiller gives trained teachers; here the teacher is trained by the student's settings, once for all "
            "seeds. Of student and teacher 2 % of the training images choose the epoch, and the test set is read once.",
        ),
    )
