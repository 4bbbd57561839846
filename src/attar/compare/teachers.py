"""The teachers of a run: trained before it, and part of its price."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attar.methods import find
from attar.spec import MethodSpec, TrainSpec, method_options, parse, teacher_options
from attar.train.files import read_json

__all__ = ["resolved", "teacher_seconds", "teachers"]


def resolved(method: MethodSpec) -> dict[str, Any]:
    """Return all options of a method, defaults included, as JSON has them."""
    return parse(method_options(find(method.name)), method.options).model_dump(mode="json")


def teachers(spec: TrainSpec) -> list[str]:
    """Return the teachers of all methods as they were named."""
    named: list[str] = []
    for method in spec.methods:
        options = resolved(method)
        for name in sorted(teacher_options(find(method.name)) & options.keys()):
            named += options[name] or ()
    return list(dict.fromkeys(named))


def teacher_seconds(spec: TrainSpec) -> float:
    """Return how long the teachers trained, and theirs: it is part of what the student costs.

    Teachers that are no finished run's folder count nothing.
    """
    seconds = 0.0
    for folder in map(Path, teachers(spec)):
        if (folder / "result.json").is_file():
            seconds += read_json(folder / "result.json")["training_seconds"]
            seconds += teacher_seconds(TrainSpec.load(folder / "spec.json"))
    return seconds
