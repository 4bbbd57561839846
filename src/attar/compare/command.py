"""How to do it again: a comparison as the command that makes it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from attar.compare.groups import smoothing
from attar.compare.protocol import SMOOTHING, label_of
from attar.spec import FREE, TrainSpec, parse

__all__ = ["command"]


def command(specs: Sequence[TrainSpec], seeds: Sequence[int], labels: Sequence[str]) -> str:
    """Write the `attar compare` command of a comparison: its methods, and every setting that is not the default.

    Args:
        specs: of its runs.
        seeds: of its runs; the command counts from 0.
        labels: of its entries, in order; plain training and label smoothing come by themselves.
    """
    shares = {share for spec in specs if (share := smoothing(spec.methods)) is not None}
    methods = {label_of(spec.methods) for spec in specs if spec.methods and smoothing(spec.methods) is None}
    base = next((spec for spec in specs if not spec.methods), specs[0])
    # The defaults of some fields depend on the optimiser; that the spec knows.
    usual = parse(TrainSpec, {"methods": (), "model": base.model, "data": base.data, "optimizer": base.optimizer})
    words = ["attar", "compare", *(label for label in dict.fromkeys(labels) if label in methods)]
    for name, field in TrainSpec.model_fields.items():
        value = getattr(base, name)
        default = field.default if name in ("model", "data", "optimizer") else getattr(usual, name)
        if name not in ("methods", "seed", *FREE) and value != default:
            words += _option(name, value)
    if shares and shares != set(SMOOTHING):
        words += ["--smoothing", *map(str, sorted(shares))]
    if len({spec.epochs for spec in specs}) > 1:
        words += ["--equal", "cost"]
    return shlex.join([*words, "--seeds", str(max(seeds) + 1)])


def _option(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    if isinstance(value, Mapping):
        return [option, *(f"{key}={json.dumps(one)}" for key, one in value.items())]
    if isinstance(value, tuple):
        return [option, *map(str, value)]
    return [option, "none" if value is None else str(value)]
