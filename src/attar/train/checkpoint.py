"""Checkpoints: tensors and plain types, whole or not there, the last two and the best."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from attar.errors import AttarError
from attar.train.files import write_atomically

__all__ = ["Checkpoints"]

_KEPT = 2
_FORMAT = 1


class Checkpoints:
    """The checkpoints of one run, in one folder.

    `step_00000042.pt` is everything needed to go on after 42 steps, `best.pt` the weights that the hold-out liked most.
    Each is readable with `torch.load(path, weights_only=True)`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best = folder / "best.pt"

    def all(self) -> list[Path]:
        """Return the checkpoints to go on from, newest first."""
        found = [path for path in self.folder.glob("step_*.pt") if re.fullmatch(r"step_\d+\.pt", path.name)]
        return sorted(found, key=_step, reverse=True)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, then drop all but the last two.

        Raises:
            AttarError: it cannot be written (no space); the earlier ones are kept.
        """
        self._write(self.folder / f"step_{step:08d}.pt", state)
        for old in self.all()[_KEPT:]:
            old.unlink(missing_ok=True)

    def save_best(self, state: dict[str, Any]) -> None:
        """Write the best weights."""
        self._write(self.best, state)

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save({"format": _FORMAT, **state}, buffer)
        write_atomically(path, buffer.getbuffer())

    def latest(self) -> dict[str, Any] | None:
        """Return the newest checkpoint that is whole, on the CPU; None before the first.

        A damaged one is passed over with a warning: its predecessor is there for that.

        Raises:
            AttarError: there are checkpoints, but every one is damaged.
        """
        paths = self.all()
        for path in paths:
            state = _load(path)
            if state is not None:
                return state
            warnings.warn(f"Checkpoint '{path}' is damaged or cut short: it is passed over.", stacklevel=2)
        if paths:
            raise AttarError(
                f"Every checkpoint in '{self.folder}' is damaged or cut short: delete that folder and run the same "
                "command again to train from the beginning."
            )
        return None

    def load_best(self) -> dict[str, Any]:
        """Return the best weights.

        Raises:
            AttarError: the file is missing or damaged.
        """
        state = _load(self.best)
        if state is None:
            raise AttarError(
                f"'{self.best}' is missing, damaged or cut short: delete '{self.folder}' and run the same command "
                "again to train from the beginning."
            )
        return state


def _step(path: Path) -> int:
    return int(path.stem.partition("_")[2])


def _load(path: Path) -> dict[str, Any] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # checksums, which torch.load does not look at
                return None
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged archive raises many kinds
        return None
    return state if isinstance(state, dict) and state.get("format") == _FORMAT else None
