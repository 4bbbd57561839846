"""What int8 costs students, and what quantisation-aware distillation gives back: a Markdown table.

    python benchmarks/int8.py RUN ... --markdown benchmarks/int8.md

Each run's student is written as ONNX in float32, quantised after training by every calibration, with layers left in
float32 until the drop on hold-out images is within the bound, and after quantisation-aware distillation. Test
accuracies are measured once each, in onnxruntime; they choose nothing. It goes on where it was stopped: `--work` has
what is known.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import attar.zoo  # noqa: F401 - its networks are registered with timm
from attar.data import Normalization
from attar.deploy.artefact import Candidate, Settings
from attar.deploy.candidate import load_candidate
from attar.deploy.onnx import ONNX
from attar.deploy.qat import quantization_aware
from attar.deploy.quantize import CALIBRATIONS, calibration_images, quantize_onnx
from attar.deploy.running import measure_runtime, some_of
from attar.deploy.sensitivity import quantize_within
from attar.train.files import read_json, write_json
from attar.train.timing_loop import processor

# Where the table begins in the page; what stands above it is written by hand.
TABLE = "## Table"

COLUMNS = ("student", "weights and activations", "top-1", "drop", "agreement", "KiB", "left in float32", "seconds")


def rows(run: Path, options: argparse.Namespace) -> list[list[str]]:
    """Return a run's rows, from the work folder where they have been found before."""
    path = options.work / f"int8-{run.name}.json"
    options.work.mkdir(parents=True, exist_ok=True)
    known = read_json(path) if path.is_file() else []
    if [row[1] for row in known] == kinds(options):
        return [list(row) for row in known]
    found: list[tuple[str, ...]] = []
    for row in measured(run, options, {row[1]: tuple(row) for row in known}):
        print(f"| {' | '.join(row)} |", file=sys.stderr, flush=True)
        found.append(row)
        left = [each for each in known if each[1] not in {one[1] for one in found}]
        write_json(path, [*found, *left])
    return [list(row) for row in found]


def kinds(options: argparse.Namespace) -> list[str]:
    """Return the rows of a run by name, in order."""
    bound = f"drop of at most {100 * options.most_drop:g} points on hold-out images"
    spent = "1 epoch" if options.epochs == 1 else f"{options.epochs} epochs"
    after = [f"{spent} of training for int8 from {lr:g}" for lr in options.lr if options.epochs]
    return [
        "float32",
        *(f"int8, {method}" for method in CALIBRATIONS),
        "int8, minmax, weights of 8 bits",
        f"int8, {bound}",
        *(f"{kind}, after {each}" for each in after for kind in ("float32", "int8")),
    ]


def measured(run: Path, options: argparse.Namespace, known: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    names = iter(kinds(options))
    candidate = load_candidate(run, data=options.data)
    if options.images:
        limit = some_of(candidate.source.test, options.images)
        candidate = dataclasses.replace(candidate, source=dataclasses.replace(candidate.source, test=limit))
    source, student = candidate.source, candidate.student
    normalization = Normalization(student.mean, student.std)
    settings = Settings(image_size=source.image_size, batch=None)
    calibration = calibration_images(source, options.calibration, 0, normalization, source.image_size)

    def accuracy(path: Path) -> float:
        split = some_of(source.holdout, options.images) if options.images else source.holdout
        runtime = ONNX().load(path, options.threads)
        return measure_runtime(runtime, split, normalization, candidate.task).metrics.score

    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        told = _Told(candidate, normalization, options.threads, run.name, known)
        plain = folder / "float32.onnx"
        ONNX().write(candidate.network, settings, plain, None)
        yield told.row(next(names), plain)
        for method in CALIBRATIONS:
            path = folder / f"{method}.onnx"
            yield told.row(next(names), path, lambda: quantize_onnx(plain, path, calibration, method=method))  # noqa: B023
        path = folder / "eight.onnx"
        yield told.row(next(names), path, lambda: quantize_onnx(plain, path, calibration, weight_bits=8))
        path = folder / "within.onnx"
        yield told.row(
            next(names), path, lambda: quantize_within(plain, path, calibration, accuracy, options.most_drop)
        )
        for lr in options.lr if options.epochs else ():
            pair = next(names), next(names)
            if all(kind in known for kind in pair):
                yield from (known[kind] for kind in pair)
                continue
            began = time.perf_counter()
            network = quantization_aware(candidate, epochs=options.epochs, lr=lr, console=Console(stderr=True))
            spent = time.perf_counter() - began
            learnt = folder / "aware.onnx"
            ONNX().write(network, settings, learnt, None)
            yield told.row(pair[0], learnt, spent=spent)
            path = folder / "aware-int8.onnx"
            yield told.row(pair[1], path, lambda: quantize_onnx(learnt, path, calibration))  # noqa: B023


class _Told:
    """Measures a student's files, each against the first."""

    def __init__(
        self,
        candidate: Candidate,
        normalization: Normalization,
        threads: int,
        name: str,
        known: dict[str, tuple[str, ...]],
    ) -> None:
        self.known = known
        self.candidate, self.normalization, self.threads, self.name = candidate, normalization, threads, name
        self.first: Any = None

    def row(
        self, kind: str, path: Path, write: Callable[[], dict[str, Any] | None] | None = None, spent: float = 0.0
    ) -> tuple[str, ...]:
        if kind in self.known and self.first is not None:
            return self.known[kind]
        began = time.perf_counter()
        found = (write() if write is not None else None) or {}
        spent += time.perf_counter() - began
        runtime = ONNX().load(path, self.threads)
        measured = measure_runtime(runtime, self.candidate.source.test, self.normalization, self.candidate.task)
        self.first = self.first or measured
        top1 = measured.metrics.score
        drop = 100 * (self.first.metrics.score - top1)
        agreement = 100 * (measured.found == self.first.found).mean()
        left = f"{len(found['left_in_float32'])} nodes" if "left_in_float32" in found else "0"
        size = f"{path.stat().st_size / 1024:.0f}"
        shown = f"{100 * top1:.2f} %", f"{drop:+.2f}", f"{agreement:.2f} %", size, left, f"{spent:.0f}"
        return (self.name, kind, *shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--data", help="where the runs' images lie now")
    parser.add_argument("--images", type=int, default=0, help="test and hold-out images; 0: all")
    parser.add_argument("--calibration", type=int, default=256, help="training images that calibrate")
    parser.add_argument("--most-drop", type=float, default=0.01, help="share of accuracy that int8 may cost")
    parser.add_argument("--epochs", type=int, default=3, help="of quantisation-aware distillation; 0: none")
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[5e-5, 3e-4], help="of its first step; several to compare"
    )
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime")
    parser.add_argument("--work", type=Path, default=Path("int8-benchmark"), help="where what is known is kept")
    parser.add_argument("--markdown", type=Path, help="where the table goes, below what is there by hand")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [f"| {' | '.join(row)} |" for run in options.runs for row in rows(run, options)]
    names = ("torch", "onnxruntime", "torchao")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    tested = f"{options.images} test images" if options.images else "all test images"
    text = "\n".join(
        [
            f"{TABLE}, {datetime.date.today()}",
            "",
            f"{processor()}, {versions}. {options.calibration} training images calibrate; {tested}; seed 0.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|{'---|' * len(COLUMNS)}",
            *lines,
            "",
        ]
    )
    if options.markdown is not None:
        kept = options.markdown.read_text(encoding="utf-8") if options.markdown.is_file() else f"# int8\n\n{TABLE}"
        options.markdown.write_text(kept.partition(TABLE)[0] + text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
