"""What stands beside an artefact for people: `model_card.md`, and `inference.py` for an ONNX file."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from attar import methods
from attar.deploy.report import Latency, Report
from attar.errors import AttarError
from attar.train.files import read_json, write_atomically

__all__ = ["card_text", "write_card", "write_inference"]

_FORMATS = {"onnx": "ONNX", "executorch": "ExecuTorch", "openvino": "OpenVINO", "torch": "PyTorch"}
_RUNTIMES = {"onnx": "onnxruntime", "executorch": "ExecuTorch", "openvino": "OpenVINO", "torch": "PyTorch"}
_LISTED = 100  # classes; the others are in export.json


def write_card(folder: Path, report: Report) -> None:
    """Write `model_card.md`.

    Args:
        folder: of the export.
        report: what `export.json` says.

    Raises:
        AttarError: the folder cannot be written.
    """
    text = card_text(report, timm=report["format"] == "torch" and _timm_loads(folder))
    write_atomically(folder / "model_card.md", text.encode("utf-8", "replace"))


def write_inference(folder: Path) -> None:
    """Write `inference.py`, which answers with `model.onnx` and needs neither torch nor attar.

    Raises:
        AttarError: the folder cannot be written.
    """
    script = resources.files("attar.deploy").joinpath("inference_onnx.py")
    write_atomically(folder / "inference.py", script.read_bytes())


def card_text(report: Report, *, timm: bool = False) -> str:
    """Return the card in Markdown; the same report gives the same text.

    Args:
        report: what `export.json` says.
        timm: whether timm alone loads it, which is of format torch.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("attar.deploy", "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(code=_code, plain=_plain, percent=_percent, size=_size, time=_time, numbers=_numbers)
    text = environment.get_template("model_card.md").render(
        report=report,
        names=_FORMATS,
        runtime=_RUNTIMES.get(report["format"], "Its own runtime"),
        trained=_trained(report),
        classes=_classes(report["classes"]),
        speed=_speed(report["latency"], report["memory"]),
        methods=[_method(each["name"], each.get("options", {})) for each in report["methods"]],
        timm=timm,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def _timm_loads(folder: Path) -> bool:
    """Say whether a saved student is a timm model with all its channels (see `attar.train.student.save_student`)."""
    config = read_json(folder / "config.json")
    return "architecture" in config and "kept" not in config.get("attar", {})


def _trained(report: Report) -> str:
    names = " and ".join(_plain(each["name"]) for each in report["methods"])
    return f"trained with {names} on {_code(report['data'])}" if names else f"trained on {_code(report['data'])}"


def _classes(classes: Sequence[str]) -> str:
    listed = ", ".join(f"{number} {_code(name)}" for number, name in enumerate(classes[:_LISTED]))
    more = len(classes) - _LISTED
    return f"{listed}, and {more:,} more in `export.json`" if more > 0 else listed


def _method(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what its docstring says of a method, with all its hyper-parameters."""
    try:
        kind = methods.find(name)
    except AttarError:  # a user's own
        return {"name": name, "idea": "", "source": "", "options": dict(options)}
    said = inspect.cleandoc(kind.__doc__ or "")
    source = re.search(r"^Sources?: (.+?)(?:\n\n|\Z)", said, re.MULTILINE | re.DOTALL)
    usual = {
        each.name: each.default
        for each in inspect.signature(kind).parameters.values()
        if each.default is not inspect.Parameter.empty
    }
    return {
        "name": kind.__name__,
        "idea": said.split("\n\n", 1)[0].replace("\n", " "),
        # A path that the docstring breaks at a slash is one word again.
        "source": " ".join(re.sub(r"(?<=\S)/\n\s*", "/", source[1]).split()) if source else "",
        "options": {**usual, **options},
    }


def _speed(latency: Latency | None, memory: int | None) -> list[tuple[str, str]]:
    """Return rows of the table: how long the artefact takes, what it needs, and where that was measured."""
    rows: dict[str, str] = {}
    for timing in () if latency is None else (latency["one_thread"], latency["all_threads"]):
        threads = "1 thread" if timing["threads"] == 1 else f"{timing['threads']} threads"
        told = f"median {_time(timing['median_seconds'])}, 95th percentile {_time(timing['p95_seconds'])}"
        rows.setdefault(f"Latency, 1 image, {threads}", told)
    if memory is not None:
        rows["Memory"] = f"{_size(memory)} to load it and answer one image"
    if latency is not None:
        rows["Measured on"] = _plain(latency["device"])
    return list(rows.items())


def _code(value: Any) -> str:
    """Write a value as inline code that no name, however odd, breaks out of."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    edge = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{edge}{text}{edge}{fence}"


def _plain(text: str) -> str:
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _size(count: float) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} bytes"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.9g}" for value in values) + "]"
