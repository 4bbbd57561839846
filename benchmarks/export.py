"""What exports are worth: parity, agreement, size, latency and accuracy of artefacts in their own runtimes.

    python benchmarks/export.py RUN ... --markdown benchmarks/export.md

Two tables. *Runs*: every run folder that is given is exported whole (strip, ONNX and ExecuTorch, each in float32 and
int8), as `attar export` does it, with its gate and its test set. *Architectures*: the networks of
`tests/architectures.py` with random weights go through ONNX in float32 and int8 and through ExecuTorch, past the same
gate, on digits resized to their image size. Batch norms have statistics of their own, and what is initialised with
zeros or tiny scales is moved away from there: a fault in folding them would show. Random weights say nothing about
accuracy, and little about the agreement of int8.

It goes on where it was stopped: one JSON file for each network and run lies in `--work`, and what has an answer there,
refusals included, is not done again. A network during which the process died twice is a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from architectures import ARCHITECTURES, Architecture
from attar.data import Normalization, open_source
from attar.deploy.artefact import Images, Settings
from attar.deploy.export import export_run
from attar.deploy.formats import find_format
from attar.deploy.gate import gate
from attar.deploy.latency import measure_latency, measure_memory
from attar.deploy.running import load_images, some_of
from attar.errors import AttarError
from attar.train.files import read_json, write_json
from attar.train.timing_loop import processor

CLASSES, GATED, CALIBRATION = 10, 64, 32
NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
NETWORK_FORMATS = ("onnx", "onnx-int8", "executorch")
RUN_FORMATS = ("torch", "onnx", "onnx-int8", "executorch", "executorch-int8")

# By format what was found, or {"refused": the sentence}.
Found = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="finished run folders")
    parser.add_argument("--data", help="the runs' images, where they lie elsewhere now")
    parser.add_argument("--work", type=Path, default=Path("export-benchmark"), help="where answers and artefacts are")
    parser.add_argument("--only", nargs="*", help="names of architectures; default: all")
    parser.add_argument("--limit", type=int, help="at most so many architectures, small images first; 0: none")
    parser.add_argument("--seconds", type=int, default=1200, help="until one format of one network is given up")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    options = parser.parse_args()

    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    networks = sorted(ARCHITECTURES, key=lambda architecture: architecture.size)
    if options.only is not None:
        unknown = set(options.only) - {architecture.name for architecture in networks}
        if unknown:
            parser.error(f"there is no architecture {', '.join(sorted(unknown))} in tests/architectures.py")
        networks = [architecture for architecture in networks if architecture.name in options.only]
    networks = networks[: options.limit]
    of_runs = {run.name: study_run(run, options) for run in options.runs}
    of_networks = {architecture.name: study_network(architecture, options) for architecture in networks}
    text = written(of_runs, of_networks, " ".join(["python benchmarks/export.py", *sys.argv[1:]]))
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")
    print(text)


def study_run(run: Path, options: argparse.Namespace) -> Found:
    """Export a run in every format."""

    def study(name: str) -> dict[str, Any]:
        kind, _, int8 = name.partition("-")
        out = options.work / "runs" / run.name / name
        report = export_run(run, kind, int8=bool(int8), data=options.data, out=out, overwrite=True).report
        return dict(report)

    return answered(options.work / f"run-{run.name}.json", RUN_FORMATS, study, options.seconds)


def study_network(architecture: Architecture, options: argparse.Namespace) -> Found:
    """Export a network of random weights in every format and gate it."""
    made: list[tuple[nn.Module, Images, Images]] = []

    def study(name: str) -> dict[str, Any]:
        if not made:
            made.append((random_network(architecture), *digits(architecture.size)))
        network, calibration, images = made[0]
        kind, int8 = find_format(name.partition("-")[0]), name.endswith("-int8")
        size = (architecture.size, architecture.size)
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            path = Path(folder) / kind.file
            told = kind.write(network, Settings(size, int8=int8), path, calibration if int8 else None)
            # What int8 does to random weights is measured, and not demanded.
            parity = gate(network, kind.load(path), images, least_agreement=0.0 if int8 else None, name=name)
            load = partial(kind.load, path)
            return {
                "parity": parity.as_dict(),
                "size_bytes": sum(file.stat().st_size for file in Path(folder).iterdir()),
                "latency": measure_latency(load, (1, 3, *size)),
                "memory": measure_memory(load, (1, 3, *size)),
                "parameters": sum(parameter.numel() for parameter in network.parameters()),
                "image_size": architecture.size,
                **told,
            }

    path = options.work / f"{architecture.name.replace(':', '-')}.json"
    return answered(path, NETWORK_FORMATS, study, options.seconds)


def answered(path: Path, formats: tuple[str, ...], study: Callable[[str], dict[str, Any]], seconds: int) -> Found:
    """Return a file's answers after adding those that are missing, each written as soon as it is known."""
    kept = read_json(path) if path.is_file() else {"found": {}, "begun": {}}
    found: Found = kept["found"]
    for name in formats:
        if name in found:
            continue
        kept["begun"][name] = kept["begun"].get(name, 0) + 1
        if kept["begun"][name] > 2:
            found[name] = {"refused": "The process died twice meanwhile."}
        else:
            write_json(path, kept)
            print(f"{datetime.datetime.now():%H:%M:%S} {path.stem}: {name}", file=sys.stderr, flush=True)
            try:
                with at_most(seconds):
                    found[name] = study(name)
            except AttarError as error:
                found[name] = {"refused": str(error)}
            except _LateError:
                found[name] = {"refused": f"It took more than {seconds} s."}
            except (
                Exception
            ) as error:  # a fault of ours: the others are measured, and it is a row that nobody overlooks
                traceback.print_exc()
                found[name] = {"refused": f"FAULT: {type(error).__name__}: {error}"}
        write_json(path, kept)
    return found


class _LateError(BaseException):
    """No `Exception`, which exporters take for a refusal."""


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise _LateError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def digits(size: int) -> tuple[Images, Images]:
    """Return real images, resized: those that calibrate, and those that are asked for."""
    source = open_source("digits", image_size=(size, size))
    splits = (some_of(source.train, CALIBRATION), some_of(source.test, GATED))
    calibration, images = (load_images(split, NORMALIZATION) for split in splits)
    return calibration, images


def random_network(architecture: Architecture) -> nn.Module:
    """Return a network in which every layer has its say, with statistics that no batch norm is initialised with."""
    torch.manual_seed(0)
    network = architecture.make(CLASSES)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.numel() == max(parameter.shape, default=1):  # scales and shifts, some of them zero or tiny
                parameter.add_(0.2 * torch.randn_like(parameter))
        norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        # What its images give them first, since signals of depth would vanish or explode otherwise.
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        network.train()(torch.from_numpy(digits(architecture.size)[0]))
        for norm in norms:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.add_(0.3 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
            norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.6, 1.6))
    return network.eval().requires_grad_(False)


def written(of_runs: dict[str, Found], of_networks: dict[str, Found], command: str) -> str:
    """Return the page."""
    packages = ("torch", "timm", "onnxruntime", "executorch")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    lines = [
        "# Export",
        "",
        f"## {datetime.date.today()}, {processor()}, {os.cpu_count()} cores, {versions}",
        "",
        f"`{command}`",
        "",
        "Error: largest difference of a logit from PyTorch's float32 ones, relative to the largest logit; for int8",
        "that of its float32 twin. Agreement: share of images that both name alike. Time: one image in the artefact's",
        "runtime, median (95th percentile) after a warm-up. Memory: what loading and answering adds to a process, at",
        "its peak.",
        "",
    ]
    if of_runs:
        lines += ["### Runs", "", *run_table(of_runs), "", *refusals(of_runs)]
    if of_networks:
        lines += ["### Architectures, random weights", "", *network_table(of_networks), "", *refusals(of_networks)]
    return "\n".join(lines).rstrip() + "\n"


def run_table(of_runs: dict[str, Found]) -> list[str]:
    rows = []
    for run, found in of_runs.items():
        for name, report in found.items():
            if "refused" in report:
                continue
            accuracy, latency = report["accuracy"], report["latency"]
            rows.append(
                [
                    run,
                    name,
                    error(report),
                    share(accuracy["agreement"]),
                    kilobytes(report),
                    *(milliseconds(latency[threads]) for threads in ("one_thread", "all_threads")),
                    megabytes(report["memory"]),
                    share(accuracy["artefact"]),
                    f"{100 * (accuracy['fp32'] - accuracy['artefact']):+.2f}",
                ]
            )
    head = [
        "run",
        "format",
        "error",
        "agreement",
        "kB",
        "ms, 1 thread",
        "ms, all threads",
        "MB",
        "top-1",
        "points lost",
    ]
    return table(head, rows)


def network_table(of_networks: dict[str, Found]) -> list[str]:
    rows = []
    for name, found in of_networks.items():
        ok = {kind: values for kind, values in found.items() if "refused" not in values}
        if not ok:
            continue
        one = next(iter(ok.values()))

        def cells(show: Callable[[dict[str, Any]], str], kinds: tuple[str, ...], ok: Found = ok) -> list[str]:
            return [show(ok[kind]) if kind in ok else "refused" for kind in kinds]

        rows.append(
            [
                name,
                str(one["image_size"]),
                f"{one['parameters'] / 1e6:.2f}",
                *cells(error, ("onnx", "executorch")),
                *cells(lambda values: share(values["parity"]["agreement"]), NETWORK_FORMATS),
                *cells(kilobytes, NETWORK_FORMATS),
                *cells(lambda values: milliseconds(values["latency"]["one_thread"]), NETWORK_FORMATS),
            ]
        )
    three = ("ONNX", "int8", "ExecuTorch")
    head = ["network", "pixels", "M parameters", "error, ONNX", "error, ExecuTorch"]
    head += [f"{what}, {kind}" for what in ("agreement", "kB", "ms") for kind in three]
    passed = [name for name, found in of_networks.items() if not any("refused" in values for values in found.values())]
    return [f"{len(passed)} of {len(of_networks)} pass the gate in every format.", "", *table(head, rows)]


def refusals(of: dict[str, Found]) -> list[str]:
    said = [
        f"- {name}, {kind}: {values['refused']}"
        for name, found in of.items()
        for kind, values in found.items()
        if "refused" in values
    ]
    return ["Refused:", "", *said, ""] if said else []


def error(values: dict[str, Any]) -> str:
    return f"{values['parity']['relative_error']:.1e}"


def share(value: float) -> str:
    return f"{100 * value:.2f} %"


def kilobytes(values: dict[str, Any]) -> str:
    return f"{values['size_bytes'] / 1000:.0f}"


def megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:.1f}"


def milliseconds(timing: dict[str, Any]) -> str:
    return f"{1000 * timing['median_seconds']:.2f} ({1000 * timing['p95_seconds']:.2f})"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    main()
