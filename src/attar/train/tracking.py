"""What a run says while it trains: metrics.jsonl, TensorBoard events, a progress bar or one line an epoch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from attar.train.files import storage_errors

__all__ = ["Tracker"]


class Tracker:
    """The only writer of a run's history; in all processes but the first it does nothing.

    Args:
        folder: the run folder.
        console: where progress is shown.
        active: whether this process writes.
        total: steps of the whole run.
    """

    def __init__(self, folder: Path, console: Console, *, active: bool, total: int) -> None:
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.console = console
        self.active = active
        self.total = total
        self._progress: Progress | None = None

    def start(self, step: int, position: int) -> None:
        """Begin, or go on after `step` steps: what was written beyond `position` bytes of the history is cut off."""
        if not self.active:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        with storage_errors(self.path):
            self._file = self.path.open("ab")
            self._file.truncate(min(position, self._file.tell()))
            self._file.seek(0, os.SEEK_END)
            # Events of the same steps from before an interruption are hidden by the ones that follow.
            self._events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1 if step else None)
        if self.console.is_terminal and not self.console.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[said]}"),
            )
            self._progress = Progress(*columns, console=self.console, transient=True, refresh_per_second=4)
            self._task = self._progress.add_task("training", total=self.total, completed=step, said="")
            self._progress.start()

    def advance(self) -> None:
        """Count one step on the progress bar."""
        if self._progress is not None:
            self._progress.advance(self._task)

    def step(self, line: dict[str, Any]) -> None:
        """Record what happened since the last line."""
        if self._progress is not None:
            total = sum(line["weights"][name] * loss for name, loss in line["losses"].items())
            said = f"loss {total:.3g}  {line['images_per_second']:.0f} images/s"
            self._progress.update(self._task, description=f"epoch {line['epoch'] + 1}{_phase(line)}", said=said)
        scalars = {f"loss/{name}": loss for name, loss in line["losses"].items()}
        scalars |= {f"weight/{name}": weight for name, weight in line["weights"].items()}
        scalars |= {"lr": line["lr"], "images_per_second": line["images_per_second"]}
        self._write({"kind": "step", **line}, scalars)

    def epoch(self, line: dict[str, Any]) -> None:
        """Record one epoch and what the hold-out said after it."""
        scalars = {
            f"{where}/{name}": value
            for where in ("holdout", "holdout_ema")
            for name, value in line.get(where, {}).items()
            if isinstance(value, float)
        }
        self._write({"kind": "epoch", **line}, scalars)
        if self.active and self._progress is None:
            self.console.print(epoch_line(line), markup=False, highlight=False, soft_wrap=True)

    def _write(self, line: dict[str, Any], scalars: dict[str, float]) -> None:
        if not self.active:
            return
        with storage_errors(self.path):
            self._file.write((json.dumps(line) + "\n").encode())
            self._file.flush()
            for name, value in scalars.items():
                self._events.add_scalar(name, value, line["step"])

    @property
    def position(self) -> int:
        """How many bytes of history are written."""
        return self._file.tell() if self.active else 0

    def close(self) -> None:
        """Finish the files and take the progress bar away."""
        if self._progress is not None:
            self._progress.stop()
        if self.active and hasattr(self, "_file"):
            self._file.close()
            if hasattr(self, "_events"):
                self._events.close()


def epoch_line(line: dict[str, Any]) -> str:
    """Say one epoch in one line."""
    held, losses = line["holdout"], line["losses"]
    # A phase has no supervised loss: what is learnt from is shown instead.
    loss = losses["task"] if "task" in losses else sum(line["weights"][name] * value for name, value in losses.items())
    name, label = ("miou", "mIoU") if "miou" in held else ("top1", "top-1")
    ema = f" (ema {line['holdout_ema'][name]:.1%})" if "holdout_ema" in line else ""
    return (
        f"epoch {line['epoch'] + 1}/{line['epochs']}{_phase(line)}  loss {loss:.4f}  "
        f"hold-out {label} {held[name]:.1%}{ema}  nll {held['nll']:.4f}  lr {line['lr']:.2g}  "
        f"{line['images_per_second']:.0f} images/s"
    )


def _phase(line: dict[str, Any]) -> str:
    return f" ({line['phase']})" if "phase" in line else ""
