"""A recipe: one row of a paper's table as a run that anyone can start, with the number that was published for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from attar.compare.protocol import label_of
from attar.methods import available
from attar.spec import MethodSpec, TrainSpec, parse

__all__ = [
    "CLASSES",
    "FROM_MEMORY",
    "IMAGENET",
    "NOTES",
    "UNITS",
    "Metric",
    "Published",
    "Recipe",
    "methods_of",
    "missing_methods",
    "runs_of",
    "step_run",
]

Metric = Literal["top-1 error", "top-1 accuracy", "mAP (cosine)", "mAP (euclidean)", "parameters", "FLOPs"]
UNITS: dict[Metric, str] = {
    "top-1 error": "%",
    "top-1 accuracy": "%",
    "mAP (cosine)": "%",
    "mAP (euclidean)": "%",
    "parameters": "M",
    "FLOPs": "1e8 an image",
}

# How a figure is known, where several recipes say the same.
FROM_MEMORY = "from memory, unverified"
NOTES = "third-party notes"

# ImageNet has no name under which it could be downloaded: the user says where it is.
IMAGENET = "imagenet"
CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10, IMAGENET: 1000}


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        run: which of the recipe's runs it is about: the label of a key of `runs_of`.
        value: in the unit of the metric.
        known: how it is known; nobody should trust a figure further than this.
        metric: of the test images; "FLOPs" are those of the deployed network, twice the multiply-adds. "mAP" is of
            retrieval by a distance, as the released code computes it (`Retrieval.batch_interpolated_map`).
        network: "student", or another network that the run yields, as `result.json` calls it ("ONE.ensemble").
        table: where it stands, if not in the recipe's table.
        spread: what was printed after +-.
    """

    run: str
    value: float
    known: str
    metric: Metric = "top-1 error"
    network: str = "student"
    table: str | None = None
    spread: float | None = None


@dataclass(frozen=True)
class Recipe:
    """One row of a paper's table.

    Attributes:
        name: of the function that returns it, and on the command line.
        title: what is trained on what, in a line.
        paper: short citation.
        table: where the row stands in the paper.
        spec: the row's own run, with seed 0.
        beside: what is trained for comparison, plain training mostly.
        teacher: what is trained first (seed 0) and given to the methods that want a teacher.
        published: the figures.
        notes: what is unknown, what differs from the paper and what cannot be trained here.
        scale: "small" for what `small` made of it.
    """

    name: str
    title: str
    paper: str
    table: str
    spec: TrainSpec
    published: tuple[Published, ...]
    beside: tuple[TrainSpec, ...] = ()
    teacher: TrainSpec | None = None
    notes: tuple[str, ...] = ()
    scale: Literal["full", "small"] = "full"


def runs_of(recipe: Recipe) -> dict[str, TrainSpec]:
    """Return what a recipe trains by label, in the order of its table: teacher, comparison, the row itself."""
    runs = {} if recipe.teacher is None else {"teacher": recipe.teacher}
    return runs | {label_of(spec.methods): spec for spec in (*recipe.beside, recipe.spec)}


def methods_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the methods that a recipe's own run is trained with."""
    return tuple(method.name for method in recipe.spec.methods)


def missing_methods(recipe: Recipe) -> tuple[str, ...]:
    """Return the methods that any run of a recipe needs and attar does not have."""
    needed = [method.name for spec in runs_of(recipe).values() for method in spec.methods]
    return tuple(name for name in dict.fromkeys(needed) if name not in available())


def step_run(*methods: MethodSpec, model: str, data: str, epochs: int, **others: Any) -> TrainSpec:
    """Return a run by the protocol that most papers on small images share, with what differs from it.

    Crops and flips, batches of 128, Nesterov momentum, weight decay 5e-4, rate 0.1, a tenth of it from half and from
    three quarters of the run on, no warm-up; 2 % of the training images choose the epoch.
    """
    common = {
        "augment": "crop-flip",
        "holdout": 0.02,
        "batch": 128,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": "step",
        "milestones": (0.5, 0.75),
        "gamma": 0.1,
        "warmup": 0.0,
    }
    return parse(TrainSpec, {**common, "methods": methods, "model": model, "data": data, "epochs": epochs, **others})
