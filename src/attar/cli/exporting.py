"""`attar export`: the last mile, from a run folder to a file that runs on the board."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attar.cli.words import PLAIN_TABLE, count, make_console
from attar.errors import AttarError
from attar.options import Parser

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["export"]

_FORMATS = ("onnx", "executorch", "openvino", "torch")
_OPTIONS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("--format", {"metavar": "{" + ",".join(_FORMATS) + "}", "default": "onnx"}, "file format (default: onnx)"),
    ("--int8", {"action": "store_true"}, "quantise weights and activations, calibrated on training images"),
    (
        "--image-size",
        {"type": int, "nargs": "+", "metavar": "N"},
        "side of the images, or height and width; default: the training's",
    ),
    ("--exit", {"type": int, "metavar": "K"}, "the K-th early exit instead of the plain student, 1 the shallowest"),
    ("--branch", {"type": int, "metavar": "K"}, "the K-th other branch or peer"),
    ("--ensemble", {"action": "store_true"}, "all branches, exits or peers together"),
    ("--deployable", {"metavar": "NAME"}, "any network that the run yields, by its name in result.json"),
    ("--batch", {"type": int, "default": 1, "metavar": "N"}, "images at a time (default: 1)"),
    ("--dynamic-batch", {"action": "store_true"}, "any number of images at a time"),
    ("--packaged", {"action": "store_true"}, "ONNX: preprocessing inside; uint8 images in, probabilities out"),
    ("--opset", {"type": int, "metavar": "N"}, "ONNX operator set (default: 18)"),
    (
        "--calibration",
        {"type": int, "default": 256, "metavar": "N"},
        "training images that calibrate, at least 32 and one of every class (default: 256)",
    ),
    (
        "--most-drop",
        {"type": float, "default": 0.01, "metavar": "X"},
        "share of accuracy that int8 may cost (default: 0.01); layers that cost more stay in float32, but ExecuTorch "
        "takes all of them or is refused",
    ),
    (
        "--qat",
        {"type": int, "metavar": "N"},
        "train for int8 during N epochs, the float32 student teaching its int8 self",
    ),
    ("--seed", {"type": int, "default": 0, "metavar": "N"}, "chooses the calibration images (default: 0)"),
    ("--data", {"metavar": "TEXT"}, "the run's images, where they lie elsewhere now"),
    ("--out", {"metavar": "FOLDER"}, "default: RUN/export/FORMAT[-int8][-NAME]"),
    ("--overwrite", {"action": "store_true"}, "replace an export that is there"),
    ("--json", {"action": "store_true"}, "print one line of JSON"),
)


def export(words: list[str]) -> int:
    """Export the student of a run."""
    parser = Parser(
        "attar export",
        "Export the plain student of a finished run: written, compared with PyTorch on real images, measured in its\n"
        "own runtime, with a card that tells how to load it. The folder appears whole or not at all.",
        usage="attar export RUN [options]",
    )
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run")
    for option, settings, meaning in _OPTIONS:
        parser.add_argument(option, help=meaning, **settings)
    given = parser.read(words)
    settings = {
        "int8": given["int8"],
        "image_size": _size(given["image_size"]),
        "batch": None if given["dynamic_batch"] else given["batch"],
        "deployable": _deployable(given),
        **{
            name: given[name]
            for name in ("packaged", "opset", "calibration", "most_drop", "qat", "seed", "data", "out", "overwrite")
        },
    }
    if not Path(given["folder"]).is_dir():
        raise AttarError(f"There is no folder '{given['folder']}': give the folder of a finished run.")
    from attar.deploy.export import export_run

    with _progress() as tell:
        done = export_run(given["folder"], given["format"], **settings, progress=tell)
    console = make_console()
    if given["json"]:
        console.print(json.dumps({"folder": str(done.folder), **done.report}), markup=False, soft_wrap=True)
    else:
        _show(dict(done.report), done.folder, console)
    return 0


def _size(given: list[int] | None) -> tuple[int, int] | None:
    if given is None:
        return None
    if len(given) > 2:
        raise AttarError(f"Option '--image-size' takes a side, or height and width, not {len(given)} numbers.")
    return given[0], given[-1]


def _deployable(given: dict[str, Any]) -> str | None:
    asked = {
        f"--exit {given['exit']}": f"exit{given['exit']}" if given["exit"] is not None else None,
        f"--branch {given['branch']}": f"branch{given['branch']}" if given["branch"] is not None else None,
        "--ensemble": "ensemble" if given["ensemble"] else None,
        f"--deployable {given['deployable']}": given["deployable"],
    }
    chosen = {option: name for option, name in asked.items() if name is not None}
    if len(chosen) > 1:
        raise AttarError(f"{' and '.join(chosen)} name different networks: give one of them.")
    return next(iter(chosen.values()), None)


@contextmanager
def _progress() -> Iterator[Callable[[str, float | None], None]]:
    """Show on a terminal what is being done; elsewhere nothing."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = make_console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def tell(said: str, share: float | None) -> None:
            progress.update(task, description=said, total=None if share is None else 1.0, completed=share or 0.0)

        yield tell


def _show(report: dict[str, Any], folder: Path, console: Console) -> None:
    from rich.table import Table

    kind = f"{report['format']} int8" if report["int8"] else report["format"]
    accuracy, timings = report["accuracy"], _timings(report["latency"] or {})
    metric = {"top1": "top-1", "miou": "mIoU"}[accuracy["metric"]]
    table = Table("", metric, "agreement", "largest error", "size", *timings, **PLAIN_TABLE)
    table.add_row("PyTorch", f"{accuracy['fp32']:.2%}")
    error = "" if report["int8"] else f"{report['parity']['relative_error']:.1e}"
    cells = (f"{accuracy['artefact']:.2%}", f"{accuracy['agreement']:.2%}", error, f"{count(report['size_bytes'])}B")
    table.add_row(kind, *cells, *timings.values())
    console.print(table)
    if report["int8"] and report["int8"]["bound_held"] is False:
        said = "On hold-out images int8 costs more than --most-drop allows, with half of the layers in float32 too"
        console.print(f"\n{said}: --qat may help.", markup=False, soft_wrap=True)
    left = report["int8"]["left_in_float32"] if report["int8"] else []
    if left:
        console.print(f"\n{len(left)} layers stay in float32: {', '.join(left)}.", markup=False, soft_wrap=True)
    console.print(
        f"\nThe export is in {folder}; {folder / 'model_card.md'} tells all about it. To load it:\n",
        markup=False,
        soft_wrap=True,
    )
    console.print(loading(report, folder), markup=False, soft_wrap=True)


def _timings(latency: dict[str, Any]) -> dict[str, str]:
    """Return the median time of one image by the number of threads."""
    timed = [timing for timing in latency.values() if isinstance(timing, dict) and "median_seconds" in timing]
    return {
        f"{timing['threads']} thread{'s' if timing['threads'] > 1 else ''}": f"{1e3 * timing['median_seconds']:.3g} ms"
        for timing in timed
    }


def loading(report: dict[str, Any], folder: Path) -> str:
    """Return the lines that load an export: without attar where the format has a Python of its own."""
    path = folder / report["file"]
    if report["format"] == "onnx":
        lines = f'import onnxruntime\nsession = onnxruntime.InferenceSession("{path}")'
        script = folder / "inference.py"
        alone = f"\n# or, without any code: python {script} IMAGE" if report["task"] == "classification" else ""
        return lines + alone
    if report["format"] == "executorch":
        return (
            "from executorch.runtime import Runtime\n"
            f'method = Runtime.get().load_program("{path}").load_method("forward")'
        )
    if report["format"] == "openvino":
        return f'import openvino\nmodel = openvino.compile_model("{path}", "CPU")'
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "architecture" not in config or "kept" in config["attar"]:
        return f'import attar.train\nstudent = attar.train.load_student("{folder}").network'
    imports = "import timm, attar.zoo" if re.match("cifar_", report["model"]) else "import timm"
    return f'{imports}\nstudent = timm.create_model("local-dir:{folder}", pretrained=True)'
