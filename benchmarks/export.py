"""What exports are worth: parity, agreement, size, latency and accuracy of artefacts in their own runtimes.

    python benchmarks/export.py RUN ... --work FOLDER
    python benchmarks/export.py RUN ... --work FOLDER --time --markdown benchmarks/export.md

Two passes, since a busy machine spoils times and memory and nothing else: the first exports and compares, the second,
with `--time`, measures what lies in the work folder and takes about a second for each artefact.

Two tables. *Runs*: every run folder that is given is exported whole (strip, ONNX in float32 and int8, ExecuTorch; the
first also as ExecuTorch in int8 and OpenVINO in both), as `attar export` does it, with its gate and its test set.
*Architectures*: the networks of `tests/architectures.py` with random weights go through ONNX in float32 and int8 and
through ExecuTorch, past the same gate, on digits resized to their image size. Batch norms have statistics of their own,
and what is initialised with zeros or tiny scales is moved away from there: a fault in folding them would show. Random
weights say nothing about accuracy, and little about the agreement of int8.

It goes on where it was stopped: one JSON file for each network and run lies in `--work`, and what has an answer there,
refusals included, is not done again; nor is what has been timed. A network during which the process died twice is a row
that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from architectures import ARCHITECTURES, Architecture
from attar.data import Normalization, open_source
from attar.deploy.artefact import Images, Settings
from attar.deploy.export import export_run
from attar.deploy.formats import find_format
from attar.deploy.gate import _LEAST, _ROUNDINGS, gate
from attar.deploy.latency import measure_latency, measure_memory
from attar.deploy.running import load_images, some_of
from attar.errors import AttarError
from attar.train.files import read_json, write_json
from attar.train.timing_loop import processor, time_answers

CLASSES, GATED, CALIBRATION = 10, 64, 32
NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
NETWORK_FORMATS = ("onnx", "onnx-int8", "executorch")
RUN_FORMATS = ("torch", "onnx", "onnx-int8", "executorch")
MORE_FORMATS = ("executorch-int8", "openvino", "openvino-int8")

# Where the tables begin in the page; what stands above it is written by hand.
TABLES = "## Tables"

# By format what was found, or {"refused": the sentence}.
Found = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="finished run folders")
    parser.add_argument("--data", help="the runs' images, where they lie elsewhere now")
    parser.add_argument("--work", type=Path, default=Path("export-benchmark"), help="where answers and artefacts are")
    parser.add_argument("--only", nargs="*", help="names of architectures; default: all")
    parser.add_argument("--formats", nargs="*", help="of these alone, the others another time; default: all")
    parser.add_argument("--limit", type=int, help="at most so many architectures, small images first; 0: none")
    parser.add_argument("--seconds", type=int, default=1200, help="until one format of one network is given up")
    parser.add_argument("--time", action="store_true", help="measure times and memory of what is in the work folder")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, below what is there by hand")
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
    study = (time_run, time_network) if options.time else (study_run, study_network)
    of_runs = {run.name: study[0](run, options) for run in options.runs}
    of_networks = {architecture.name: study[1](architecture, options) for architecture in networks}
    text = written(of_runs, {name: found for name, found in of_networks.items() if found})
    if options.markdown is not None:
        kept = options.markdown.read_text(encoding="utf-8") if options.markdown.is_file() else f"# Export\n\n{TABLES}"
        options.markdown.write_text(kept.partition(TABLES)[0] + text, encoding="utf-8")
    print(text)


def study_run(run: Path, options: argparse.Namespace) -> Found:
    """Export a run in every format."""

    def study(name: str) -> dict[str, Any]:
        kind, _, int8 = name.partition("-")
        out = home_of_run(run, options) / name
        report = export_run(run, kind, int8=bool(int8), data=options.data, out=out, overwrite=True).report
        # Its times are those of this pass: of a machine that may be busy.
        return {**report, "latency": None, "memory": None}

    formats = RUN_FORMATS + MORE_FORMATS if run == options.runs[0] else RUN_FORMATS
    return answered(file_of_run(run, options), chosen(formats, options), study, options.seconds)


def time_run(run: Path, options: argparse.Namespace) -> Found:
    """Measure time and memory of a run's artefacts."""

    def measure(name: str, found: dict[str, Any]) -> dict[str, Any]:
        kind = find_format(found["format"])
        load, shape = partial(kind.load, home_of_run(run, options) / name / kind.file), (1, 3, *found["image_size"])
        return {"latency": measure_latency(load, shape), "memory": measure_memory(load, shape)}

    return timed(file_of_run(run, options), measure)


def file_of_run(run: Path, options: argparse.Namespace) -> Path:
    return Path(options.work / f"run-{run.name}.json")


def home_of_run(run: Path, options: argparse.Namespace) -> Path:
    return Path(options.work / "runs" / run.name)


def study_network(architecture: Architecture, options: argparse.Namespace) -> Found:
    """Export a network of random weights in every format and gate it."""

    @cache
    def made() -> tuple[nn.Module, Images, Images]:
        return random_network(architecture), *digits(architecture.size)

    def study(name: str) -> dict[str, Any]:
        network, calibration, images = made()
        kind, int8 = find_format(name.partition("-")[0]), name.endswith("-int8")
        path = home_of_network(architecture, options) / name / kind.file
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir(parents=True)
        settings = Settings((architecture.size, architecture.size), int8=int8)
        told = kind.write(network, settings, path, calibration if int8 else None)
        # What int8 does to random weights is measured, and not demanded.
        parity = gate(network, kind.load(path), images, least_agreement=0.0 if int8 else None, name=name)
        return {
            "parity": parity.as_dict(),
            "size_bytes": sum(file.stat().st_size for file in path.parent.iterdir()),
            "latency": None,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "image_size": architecture.size,
            **told,
        }

    formats = chosen(NETWORK_FORMATS, options)
    return answered(file_of_network(architecture, options), formats, study, options.seconds)


def time_network(architecture: Architecture, options: argparse.Namespace) -> Found:
    """Measure the time that a network's artefacts take on one thread."""

    def measure(name: str, found: dict[str, Any]) -> dict[str, Any]:
        kind, size = find_format(name.partition("-")[0]), found["image_size"]
        runtime = kind.load(home_of_network(architecture, options) / name / kind.file, 1)
        images = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
        return {"latency": {"one_thread": time_answers(lambda: runtime(images))}}

    return timed(file_of_network(architecture, options), measure)


def file_of_network(architecture: Architecture, options: argparse.Namespace) -> Path:
    return Path(options.work / f"{architecture.name.replace(':', '-')}.json")


def home_of_network(architecture: Architecture, options: argparse.Namespace) -> Path:
    return Path(options.work / "networks" / architecture.name.replace(":", "-"))


def timed(path: Path, measure: Callable[[str, dict[str, Any]], dict[str, Any]]) -> Found:
    """Return a file's answers after measuring those that have not been."""
    kept = read_json(path) if path.is_file() else {"found": {}, "begun": {}}
    found: Found = kept["found"]
    for name, values in found.items():
        if "refused" not in values and values["latency"] is None:
            print(f"{datetime.datetime.now():%H:%M:%S} {path.stem}: {name}", file=sys.stderr, flush=True)
            values.update(measure(name, values))
            write_json(path, kept)
    return found


def chosen(formats: tuple[str, ...], options: argparse.Namespace) -> tuple[str, ...]:
    return tuple(name for name in formats if options.formats is None or name in options.formats)


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
            elif not parameter.any():  # some networks' classifiers
                parameter.normal_(std=0.1)
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


def written(of_runs: dict[str, Found], of_networks: dict[str, Found]) -> str:
    """Return the tables."""
    packages = ("torch", "timm", "onnxruntime", "executorch", "openvino")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    lines = [
        f"{TABLES}, {datetime.date.today()}",
        "",
        f"{processor()}, {os.cpu_count()} cores, {versions}.",
        "",
        "Error: largest difference of a logit from PyTorch's float32 ones, relative to the largest logit; for int8",
        "that of its float32 twin. Roundings: that error in units of the network's own, which is the difference of",
        f"its float32 and float64 logits; the gate refuses more than {_ROUNDINGS:g}, but no error below {_LEAST:g}.",
        "Agreement: share of images that both name alike. Time: one image in the artefact's runtime, median (95th",
        "percentile) after a warm-up. Memory: what loading and answering adds to a process, at its peak.",
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
            accuracy, int8 = report["accuracy"], report["int8"]
            rows.append(
                [
                    run,
                    name,
                    error(report),
                    roundings(report),
                    share(accuracy["agreement"]),
                    kilobytes(report),
                    *(milliseconds(report, threads) for threads in ("one_thread", "all_threads")),
                    megabytes(report["memory"]),
                    share(accuracy["artefact"]),
                    f"{100 * (accuracy['fp32'] - accuracy['artefact']):+.2f}",
                    "" if int8 is None else str(len(int8["left_in_float32"])),
                ]
            )
    head = ["run", "format", "error", "roundings", "agreement", "kB", "ms, 1 thread", "ms, all threads", "MB", "top-1"]
    return table([*head, "points lost", "layers left in float32"], rows)


def network_table(of_networks: dict[str, Found]) -> list[str]:
    rows = []
    for name, found in of_networks.items():
        ok = {kind: values for kind, values in found.items() if "refused" not in values}
        if not ok:
            continue
        one = next(iter(ok.values()))

        def cells(
            show: Callable[[dict[str, Any]], str], kinds: tuple[str, ...], ok: Found = ok, found: Found = found
        ) -> list[str]:
            return [show(ok[kind]) if kind in ok else "refused" if kind in found else "" for kind in kinds]

        rows.append(
            [
                name,
                str(one["image_size"]),
                f"{one['parameters'] / 1e6:.2f}",
                *cells(error, ("onnx", "executorch")),
                *cells(roundings, ("onnx", "executorch")),
                *cells(lambda values: share(values["parity"]["agreement"]), NETWORK_FORMATS),
                *cells(kilobytes, NETWORK_FORMATS),
                *cells(lambda values: milliseconds(values, "one_thread"), NETWORK_FORMATS),
            ]
        )
    three = ("ONNX", "int8", "ExecuTorch")
    head = ["network", "pixels", "M parameters"]
    head += [f"{what}, {kind}" for what in ("error", "roundings") for kind in ("ONNX", "ExecuTorch")]
    head += [f"{what}, {kind}" for what in ("agreement", "kB", "ms") for kind in three]
    passed = [name for name, found in of_networks.items() if not any("refused" in values for values in found.values())]
    tried = "An empty cell is a format that has not been tried."
    return [f"{len(passed)} of {len(of_networks)} pass the gate in every format tried. {tried}", "", *table(head, rows)]


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


def roundings(values: dict[str, Any]) -> str:
    parity = values["parity"]
    return f"{parity['relative_error'] / parity['rounding']:.1f}" if parity["rounding"] else "–"


def milliseconds(values: dict[str, Any], threads: str) -> str:
    if values["latency"] is None:
        return "–"
    timing = values["latency"][threads]
    return f"{1000 * timing['median_seconds']:.2f} ({1000 * timing['p95_seconds']:.2f})"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    main()
