"""Small runs for tests: specs of about a second, children that import nothing anew, and a run's history."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from attar.compare.runner import Cell, train_all
from attar.spec import TrainSpec, parse
from attar.train import fit

# Children that are killed, and pairs of ranks, start from a server that has imported everything already.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["attar.train", "torchmetrics.classification", "torch.utils.tensorboard", "sklearn"])


def tiny(*methods: str | dict[str, Any], **fields: Any) -> TrainSpec:
    """A run of about a second: a quarter-width ResNet-20 on 8 x 8 digits."""
    chosen = [{"name": method} if isinstance(method, str) else method for method in methods]
    defaults: dict[str, Any] = {
        "methods": chosen,
        "model": "cifar_resnet20",
        "model_options": {"width": 0.25},
        "data": "digits",
        "train_limit": 256,
        "epochs": 2,
        "batch": 32,
        "lr": 0.05,
        "log_every": 4,
        "precision": "fp32",
    }
    return parse(TrainSpec, {**defaults, **fields})


def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of one kind of a run's history."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def in_child(work: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """Start a process that imported everything beforehand."""
    child = CHILDREN.Process(target=work, args=arguments)
    child.start()
    return child


def train_all_in_child(cells: list[Cell], jobs: int) -> None:
    """What a child with children of its own does: train all runs."""
    torch.set_num_threads(1)
    train_all(cells, jobs=jobs, console=quiet())


def compare_in_child(plan: Any, home: Path) -> None:
    """What a child with children of its own does: a whole comparison."""
    from attar.compare.comparison import compare

    torch.set_num_threads(1)
    compare(plan, home, jobs=1, console=quiet())


def train_in_child(spec: TrainSpec, folder: Path) -> None:
    """What a child does: train; leave with 130 when interrupted."""
    torch.set_num_threads(1)
    try:
        fit(spec, folder, console=quiet())
    except KeyboardInterrupt as stopped:
        (folder / "said.txt").write_text(str(stopped))
        os._exit(130)
