"""The demo: plain training against ONE on embedded digits, paired over seeds, with an honest verdict."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from attar.errors import AttarError
from attar.spec import TrainSpec, parse

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["EPOCHS", "METHODS", "SEEDS", "Difference", "demo", "demo_spec", "interval", "paired", "verdict"]

SEEDS, EPOCHS = 3, 16
METHODS: dict[str, list[dict[str, Any]]] = {"plain": [], "ONE": [{"name": "ONE"}]}

# The paired difference is called a finding from here on.
_SIGNIFICANT = 0.05


def demo_spec(method: str, seed: int, epochs: int) -> TrainSpec:
    """Return one run of the demo: timm's smallest ResNet on 300 labelled digits, the same budget for every method.

    With all 1,293 digits both ways of training make almost no mistakes, and there would be nothing to compare.
    """
    values = {
        "methods": METHODS[method],
        "model": "test_resnet",
        "data": "digits",
        "image_size": 32,
        "train_limit": 300,
        "epochs": epochs,
        "batch": 64,
        "lr": 0.05,
        "precision": "fp32",
        "seed": seed,
    }
    return parse(TrainSpec, values)


@dataclass(frozen=True)
class Difference:
    """What one method gains over another, paired over n seeds.

    Attributes:
        mean: of the differences.
        low: lower end of the 95 % interval.
        high: upper end.
        p: of the paired t-test, two-sided.
        seeds: n.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean by Student's t, `mean -+ t_{0.975, n-1} s / sqrt(n)`, for n >= 2 values."""
    from scipy import stats

    if max(values) == min(values):
        return values[0], values[0]
    low, high = stats.t.interval(0.95, len(values) - 1, loc=fmean(values), scale=stats.sem(values))
    return float(low), float(high)


def paired(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Compare two methods seed by seed (paired t-test).

    Args:
        values: one number per seed, n >= 2.
        baseline: the same seeds under the other method.
    """
    from scipy import stats

    # Accuracies are counts over counts: what differs by rounding alone does not differ.
    differences = [round(value - base, 12) for value, base in zip(values, baseline, strict=True)]
    low, high = interval(differences)
    if low == high:  # the test has no answer without spread
        return Difference(low, low, high, 1.0 if low == 0 else 0.0, len(differences))
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Difference(fmean(differences), low, high, p, len(differences))


def verdict(method: str, difference: Difference) -> str:
    """Say in words whether a method helped; differences are shares of the test images."""
    points = f"{100 * difference.mean:+.2f} points of test top-1"
    evidence = (
        f"95 % interval {100 * difference.low:+.2f} to {100 * difference.high:+.2f}, p = {difference.p:.2g}, "
        f"paired over {difference.seeds} seeds"
    )
    if difference.p < _SIGNIFICANT:
        effect = "helped" if difference.mean > 0 else "hurt"
        return f"{method} {effect} here: {points} ({evidence})."
    return f"No evidence that {method} helped at {difference.seeds} seeds: {points} ({evidence})."


def demo(out: Path, seeds: int, epochs: int, overwrite: bool, console: Console) -> None:
    """Train every method with every seed into `out`, going on from where an earlier call stopped; print the verdict.

    Raises:
        AttarError: fewer than two seeds, a folder that holds other runs, or a process that was ended from outside.
    """
    if seeds < 2:
        raise AttarError(f"The demo needs at least 2 seeds to tell an effect from chance, not {seeds}.")
    if epochs < 1:
        raise AttarError(f"The demo needs at least 1 epoch, not {epochs}.")
    # Interleaved, so that a demo that is stopped half way has pairs.
    runs = [(method, seed) for seed in range(seeds) for method in METHODS]
    console.print(
        f"{len(runs)} short trainings of timm's test_resnet on 300 handwritten digits, {epochs} epochs each, "
        f"{' against '.join(METHODS)}, into {out}",
        markup=False,
        soft_wrap=True,
    )
    began = time.monotonic()
    results = _train_all(runs, out, epochs, overwrite, console)
    _report(results, out, seeds, console)
    console.print(f"\n{time.monotonic() - began:.0f} s in all; run the same command again: finished runs are kept.")


def _folder(out: Path, method: str, seed: int) -> Path:
    return out / f"{method}-seed{seed}"


def _train_all(
    runs: Sequence[tuple[str, int]], out: Path, epochs: int, overwrite: bool, console: Console
) -> dict[tuple[str, int], dict[str, Any]]:
    """Train several runs at a time, one thread each: small networks gain nothing from more threads."""
    results = {run: stored for run in runs if (stored := _stored(run, out, epochs)) is not None and not overwrite}
    missing = [run for run in runs if run not in results]
    if not missing:
        return results
    workers = min(len(missing), os.cpu_count() or 1, 4)
    # spawn: a fork would copy threads that exist already in a program that has torch loaded.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    with ExitStack() as stack:
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        pending: dict[Future[dict[str, Any]], tuple[str, int]] = {}
        for method, seed in missing:
            folder = _folder(out, method, seed)
            pending[pool.submit(_train_one, method, seed, epochs, str(folder), overwrite)] = (method, seed)
        try:
            for future in _watched(list(pending), missing, out, epochs, console):
                method, seed = run = pending[future]
                results[run] = future.result()
                if not console.is_terminal:
                    top1, seconds = results[run]["test"]["top1"], results[run]["training_seconds"]
                    console.print(f"{method}, seed {seed}: test top-1 {top1:.2%}, {seconds:.1f} s of training")
        except BrokenProcessPool as error:
            raise AttarError(
                "A training process was ended from outside, perhaps for lack of memory: run the same command again to "
                "go on."
            ) from error
    return results


def _stored(run: tuple[str, int], out: Path, epochs: int) -> dict[str, Any] | None:
    """Return the result of a finished run without waiting for torch; None leaves the judgement to `fit`."""
    folder = _folder(out, *run)
    try:
        if TrainSpec.load(folder / "spec.json") != demo_spec(*run, epochs):
            return None
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (AttarError, OSError, ValueError):
        return None
    assert isinstance(result, dict)
    return result


def _train_one(method: str, seed: int, epochs: int, folder: str, overwrite: bool) -> dict[str, Any]:
    """Train one run in a process of its own."""
    import torch
    from rich.console import Console

    from attar.train import fit

    torch.set_num_threads(1)
    return fit(demo_spec(method, seed, epochs), folder, overwrite=overwrite, console=Console(file=io.StringIO()))


def _watched(
    futures: Sequence[Future[dict[str, Any]]],
    runs: Sequence[tuple[str, int]],
    out: Path,
    epochs: int,
    console: Console,
) -> Any:
    """Yield futures as they finish, showing a bar of epochs that the run folders tell."""
    from concurrent.futures import FIRST_COMPLETED, wait

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("epochs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    waiting = set(futures)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=len(runs) * epochs)
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(task, completed=sum(_epochs_done(_folder(out, *run)) for run in runs))
            yield from sorted(done, key=list(futures).index)


def _epochs_done(folder: Path) -> int:
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum('"kind": "epoch"' in line for line in lines)


def _report(results: dict[tuple[str, int], dict[str, Any]], out: Path, seeds: int, console: Console) -> None:
    from rich.table import Table

    scores = {method: [results[method, seed]["test"]["top1"] for seed in range(seeds)] for method in METHODS}
    seconds = {method: fmean(results[method, seed]["training_seconds"] for seed in range(seeds)) for method in METHODS}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("method", "test top-1", "95 % interval", "parameters", "in training", "time of training"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method in METHODS:
        low, high = (min(max(end, 0.0), 1.0) for end in interval(scores[method]))
        sizes = results[method, 0]["parameters"]
        table.add_row(
            method,
            f"{fmean(scores[method]):.2%}",
            f"{low:.2%} to {high:.2%}",
            f"{sizes['deployed']:,}",
            f"{sizes['training']:,}",
            f"{seconds[method]:.1f} s",
        )
    console.print()
    console.print(table)
    console.print()
    images = results["plain", 0]["test"]["images"]
    console.print(verdict("ONE", paired(scores["ONE"], scores["plain"])), soft_wrap=True)
    console.print(
        f"Both students are the same network; ONE trained {seconds['ONE'] / seconds['plain']:.1f} times as long for "
        f"the same epochs. There are {images} test images, so one image is {1 / images:.2%}.",
        soft_wrap=True,
    )
    example = _folder(out, "ONE", 0) / "student"
    loading = f"student = timm.create_model({json.dumps(f'local-dir:{example}')}, pretrained=True)"
    console.print(f"\nEvery run left its folder in {out}; timm alone loads a student:\n", markup=False, soft_wrap=True)
    console.print(f"import timm\n{loading}", markup=False, soft_wrap=True)
