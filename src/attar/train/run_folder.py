"""The run folder: what a run leaves behind, and who may go on with it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

from attar import __version__
from attar.errors import AttarError
from attar.spec import FREE, TrainSpec
from attar.train.checkpoint import Checkpoints
from attar.train.distributed import Ranks
from attar.train.files import read_json, storage_errors, write_json

__all__ = ["RunFolder", "environment"]

# In the order of removal: no result without what it tells of, and last the spec, by which a run is recognised.
_OWN = (
    *("export", "result.json", "predictions.npz", "student", "checkpoints", "teacher_logits", "tensorboard"),
    *("metrics.jsonl", "environment.json", "measured.json", "failure.json", "masks.npz"),
    "spec.json",
)


class RunFolder:
    """The files of one run.

    `spec.json`, `environment.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `student/`, `predictions.npz`
    (what the student answered for every test image) and `result.json`, which is there when the run is finished; with
    `cache_teachers` also `teacher_logits/`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")
        self.student = path / "student"
        self.teacher_logits = path / "teacher_logits"
        self.predictions = path / "predictions.npz"

    def examine(self, spec: TrainSpec, overwrite: bool) -> dict[str, Any] | None:
        """Look at what is there, changing nothing; return the result of a run that is finished.

        Raises:
            AttarError: the folder holds something else, or a run of another spec.
        """
        if self.path.exists() and not self.path.is_dir():
            raise AttarError(f"'{self.path}' is a file: choose another run folder.")
        present = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        if not (self.path / "spec.json").is_file():
            if any(not name.startswith(".") for name in present):
                raise AttarError(f"'{self.path}' is not empty and holds no run: choose another run folder.")
            return None
        if overwrite:
            return None
        before, now = TrainSpec.load(self.path / "spec.json").model_dump(), spec.model_dump()
        different = [name for name in now if name not in FREE and now[name] != before[name]]
        if different:
            said = ", ".join(f"{name} ({_shown(before[name])} there, {_shown(now[name])} now)" for name in different)
            raise AttarError(
                f"'{self.path}' holds a run of another spec, which differs in {said}: "
                "choose another run folder, or overwrite it."
            )
        result = self.path / "result.json"
        return read_json(result) if result.is_file() else None

    def begin(self, spec: TrainSpec, environment: dict[str, Any], overwrite: bool) -> None:
        """Create the folder, or go on in it; `overwrite` first removes what an earlier run left."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for name in _OWN:
                    entry = self.path / name
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
        write_json(self.path / "spec.json", spec.model_dump(mode="json"))
        earlier = self.path / "environment.json"
        sessions = read_json(earlier) if earlier.is_file() else []
        write_json(earlier, [*sessions, environment])

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write `result.json`, whose presence says that the run is finished, and return what it says."""
        write_json(self.path / "result.json", result)
        return result


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def environment(ranks: Ranks, **more: Any) -> dict[str, Any]:
    """Return what the numbers of a run may depend on besides its spec."""
    device = ranks.device
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.cpu.get_capabilities().get("cpu_name", "")
    )
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "attar": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.type,
        "device_name": name,
        "processes": ranks.world,
        "threads": torch.get_num_threads(),
        "process": os.getpid(),
        "command": sys.argv,
        **more,
    }
