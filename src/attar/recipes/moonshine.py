"""Moonshine: WRN-40-2 with cheap convolutions, taught by the WRN-40-2 that it was made of."""

from __future__ import annotations

from typing import Any

from attar.recipes.recipe import FROM_MEMORY, Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = ["moonshine_wrn_40_2_g8b2_cifar10", "moonshine_wrn_40_2_g8b2_cifar100"]


def _run(data: str, methods: tuple[MethodSpec, ...], **options: Any) -> TrainSpec:
    return step_run(
        *methods,
        model="cifar_wrn_40_2",
        model_options=options,
        data=data,
        epochs=200,
        nesterov=False,
        milestones=(0.3, 0.6, 0.8),
        gamma=0.2,
    )


def _recipe(name: str, title: str, data: str, millions: tuple[float, float], teacher: Published) -> Recipe:
    student = {"cheap": "G8B2"}
    known = "recomputed from the architecture"
    return Recipe(
        name,
        f"WRN-40-2 teaches its cheap form G8B2 on {title}: plain and Moonshine",
        "Moonshine (Crowley, Gray, Storkey, NeurIPS 2018, arXiv 1711.02613)",
        "README of BayesWatch/pytorch-moonshine, the example",
        _run(data, (MethodSpec(name="Moonshine"),), **student),
        (
            teacher,
            Published("teacher", millions[0], known, metric="parameters"),
            Published("Moonshine", millions[1], known, metric="parameters"),
        ),
        beside=(_run(data, (), **student),),
        teacher=_run(data, ()),
        notes=(
            "The paper's tables could not be checked, so no accuracy of the student is given and the teacher's is "
            "another paper's, by other settings. Settings here are the released code's.",
            "2 % of the training images choose the epoch of student and teacher, and the test set is read once.",
        ),
    )


def moonshine_wrn_40_2_g8b2_cifar10() -> Recipe:
    """WRN-40-2 teaches its cheap form on CIFAR-10."""
    teacher = Published("teacher", 5.33, FROM_MEMORY, table="WRN (Zagoruyko and Komodakis, BMVC 2016)")
    return _recipe("moonshine_wrn_40_2_g8b2_cifar10", "CIFAR-10", "cifar10", (2.243546, 0.372698), teacher)


def moonshine_wrn_40_2_g8b2_cifar100() -> Recipe:
    """WRN-40-2 teaches its cheap form on CIFAR-100."""
    readme = "RepDistiller's README"
    teacher = Published("teacher", 75.61, readme, metric="top-1 accuracy", table=readme)
    return _recipe("moonshine_wrn_40_2_g8b2_cifar100", "CIFAR-100", "cifar100", (2.255156, 0.384308), teacher)
