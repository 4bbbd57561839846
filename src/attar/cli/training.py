"""`attar train` and `evaluate`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attar.cli.words import PLAIN_TABLE, count, make_console, names_of, rank, read_run
from attar.errors import AttarError
from attar.options import Parser

if TYPE_CHECKING:
    from rich.console import Console

    from attar.spec import TrainSpec

__all__ = ["evaluate", "loading", "train"]


def train(words: list[str]) -> int:
    """Train one run."""
    parser = Parser(
        "attar train",
        "Train a student. A run that was interrupted goes on when the same command is given again.",
        usage="attar train METHOD[+METHOD...] --model MODEL --data DATA [options]",
    )
    parser.add_argument("--out", metavar="FOLDER", help="run folder; default: runs/METHODS-MODEL-DATA-FINGERPRINT")
    parser.add_argument("--overwrite", action="store_true", help="remove what an earlier run left there")
    spec, given = read_run(parser, words, None)
    folder = Path(given["out"] or Path("runs") / _run_name(spec))
    console = make_console()
    from attar.train import fit

    if given["overwrite"] or not (folder / "result.json").is_file():
        _announce(spec, folder, console)
    result = fit(spec, folder, overwrite=given["overwrite"], console=console)
    _show_result(result, folder, console)
    return 0


def _run_name(spec: TrainSpec) -> str:
    data = spec.data.rstrip("/").rpartition("/")[2]
    name = f"{names_of(spec.methods)}-{spec.model}-{data}-{spec.fingerprint()[:8]}"
    return re.sub(r"[^\w.+-]+", "-", name)


def _announce(spec: TrainSpec, folder: Path, console: Console) -> None:
    """Say what the run will do, in five lines; the first process only."""
    if rank() != 0:
        return
    import torch

    from attar.train import build_model, build_source
    from attar.train.precision import resolved

    source = build_source(spec)
    student = build_model(spec, source.num_classes)
    parameters = sum(p.numel() for p in student.parameters())
    batch = min(spec.batch, len(source.train))
    steps = -(-len(source.train) // batch) if spec.keep_last else len(source.train) // batch
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    height, width = source.image_size
    sizes = {name: len(split) for name, split in source.splits.items()}
    lines = {
        "student": f"{spec.model}, {count(parameters)} parameters",
        "methods": names_of(spec.methods),
        "data": f"{spec.data}: {source.num_classes} classes, {height} x {width}; {sizes['train']} training, "
        f"{sizes['holdout']} hold-out and {sizes['test']} test images"
        + (f", {len(source.skipped)} unreadable ones skipped" if source.skipped else ""),
        "training": f"{spec.epochs} epochs of {steps} steps of {batch} images, {device.type}, "
        f"{resolved(spec.precision, device, student)}",
        "run": str(folder),
    }
    for name, line in lines.items():
        console.print(f"{name:9}{line}", markup=False, soft_wrap=True)
    for remark in source.remarks:
        console.print(f"note: {remark}", markup=False, soft_wrap=True)


def _show_result(result: dict[str, Any], folder: Path, console: Console) -> None:
    from rich.table import Table

    table = Table("", "images", *_metric_names(result["test"]), "parameters", **PLAIN_TABLE)
    parameters = result["parameters"]["deployed"]
    table.add_row("student, hold-out", *_metric_cells(result["holdout"]), count(parameters))
    table.add_row("student, test", *_metric_cells(result["test"]), count(parameters))
    for name, other in result["deployables"].items():
        table.add_row(f"{name}, test", *_metric_cells(other["test"]), count(other["parameters"]))
    console.print()
    console.print(table)
    console.print(
        f"\nbest epoch {result['best_epoch'] + 1} of {result['epochs']}, "
        f"{result['training_seconds']:.0f} s of training, "
        f"{result['images_per_second']:.0f} images/s"
    )
    if not result["exportable"]:
        console.print(f"note: {result['export_refusal']}", markup=False)
    console.print(f"The plain student is in {folder / 'student'}. To load it:\n", markup=False, soft_wrap=True)
    console.print(loading(str(result["model"]), folder), markup=False, soft_wrap=True)


def loading(model: str, folder: Path) -> str:
    """Return the Python lines that load the student of a run, without attar where the model is not attar's own."""
    from attar.train.files import read_json

    # timm would make the model at its original widths.
    own = read_json(folder / "student" / "config.json")["attar"]
    narrowed = "kept" in own
    if narrowed or ":" in model or "task" in own:
        return f'import attar.train\nstudent = attar.train.load_student("{folder}").network'
    imports = "import timm, attar.zoo" if model.startswith("cifar_") else "import timm"
    return f'{imports}\nstudent = timm.create_model("local-dir:{folder / "student"}", pretrained=True)'


def _metric_names(metrics: dict[str, Any]) -> tuple[str, ...]:
    shares = ("mIoU", "pixel accuracy") if "miou" in metrics else ("top-1", "top-5")
    return (*shares, "NLL", "calibration error")


def _metric_cells(metrics: dict[str, Any]) -> list[str]:
    if "miou" in metrics:
        shares = [f"{metrics['miou']:.2%}", f"{metrics['pixel_accuracy']:.2%}"]
        return [str(metrics["images"]), *shares, f"{metrics['nll']:.4f}", f"{metrics['calibration_error']:.4f}"]
    top5 = f"{metrics['top5']:.2%}" if metrics["top5"] is not None else ""
    cells = [f"{metrics['top1']:.2%}", top5, f"{metrics['nll']:.4f}", f"{metrics['calibration_error']:.4f}"]
    return [str(metrics["images"]), *cells]


def evaluate(words: list[str]) -> int:
    """Measure a trained student."""
    parser = Parser("attar evaluate", "Measure the plain student of a run on images it was not trained on.")
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run, or its student folder with --data")
    parser.add_argument("--data", metavar="TEXT", help="other images of the same classes; default: the run's")
    parser.add_argument("--split", default="test", metavar="TEXT", help="test, holdout or train (default: test)")
    parser.add_argument(
        "--retrieval", action="store_true", help="also let the images search the training images: mAP, top-k precision"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    given = parser.read(words)
    from rich.table import Table

    from attar.train import evaluate_run, retrieve_run

    if not Path(given["folder"]).is_dir():
        raise AttarError(f"There is no folder '{given['folder']}': give the folder of a finished run.")
    if given["retrieval"] and given["split"] == "train":
        raise AttarError("Retrieval searches the training images: take the queries from split test or holdout.")
    chosen = {"data": given["data"], "split": given["split"]}
    metrics = evaluate_run(given["folder"], **chosen).as_dict()
    retrieval = {}
    if given["retrieval"]:
        with _share_bar("retrieval") as progress:
            found = retrieve_run(given["folder"], **chosen, progress=progress)
        retrieval = {distance: scores.as_dict() for distance, scores in found.items()}
    console = make_console()
    if given["json"]:
        told = {**metrics, "retrieval": retrieval} if retrieval else metrics
        console.print(json.dumps(told), markup=False, soft_wrap=True)
        return 0
    table = Table("", "images", *_metric_names(metrics), **PLAIN_TABLE)
    table.add_row(given["split"], *_metric_cells(metrics))
    console.print(table)
    if retrieval:
        _show_retrieval(retrieval, console)
    return 0


@contextmanager
def _share_bar(said: str) -> Iterator[Callable[[float], None]]:
    """Show on a terminal how much of some work is done; elsewhere nothing."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = make_console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(said, total=1.0)
        yield lambda share: progress.update(task, completed=share)


def _show_retrieval(retrieval: dict[str, dict[str, Any]], console: Console) -> None:
    from rich.table import Table

    first = next(iter(retrieval.values()))
    table = Table("retrieval", "queries", "database", "mAP", *(f"top-{k}" for k in first["precision"]), **PLAIN_TABLE)
    for name, prefix in (("", ""), (", batch-interpolated", "batch_interpolated_")):
        for distance, scores in retrieval.items():
            shares = [scores[f"{prefix}map"], *scores[f"{prefix}precision"].values()]
            sizes = (str(scores["queries"]), str(scores["database"]))
            table.add_row(f"{distance}{name}", *sizes, *(f"{share:.2%}" for share in shares))
    console.print()
    console.print(table)
    console.print(
        f"\nBatch-interpolated is what released code computes, {first['batch']} queries at a time: "
        "for comparison with published tables only.",
        soft_wrap=True,
    )
