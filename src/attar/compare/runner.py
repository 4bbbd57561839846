"""Many runs on one machine: each in a process of its own, each exactly once, whoever else works in the same folder."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess, SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from attar.compare.primary import primary
from attar.compare.records import FAILURE
from attar.errors import AttarError
from attar.spec import TrainSpec
from attar.train.files import read_json, storage_errors, write_json
from attar.train.stopping import Interrupted, StopRequest

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Cell", "context", "default_jobs", "lock", "threads_per_run", "train_all"]

# How a child tells that another process is at its run, and that it was interrupted and has saved itself.
_BUSY, _INTERRUPTED = 75, 130
_POLL = 0.5
_LIBRARIES = (
    "attar.train",
    "torchmetrics.classification",
    "torch.utils.tensorboard",
    "sklearn.datasets",
    "sklearn.model_selection",
)


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        label: of its entry.
        spec: what to train.
        folder: its run folder.
    """

    label: str
    spec: TrainSpec
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether its result is there."""
        return (self.folder / "result.json").is_file()

    def __str__(self) -> str:
        return f"{self.label}, seed {self.spec.seed}"


def default_jobs() -> int:
    """Return how many runs share this machine: one per GPU, else one per processor with one thread each.

    Small networks gain little from more threads, and several runs at a time gain all that there is.
    """
    import torch

    return torch.cuda.device_count() or os.cpu_count() or 1


def threads_per_run(jobs: int) -> int:
    """Return how many of torch's threads each of several runs at a time gets (OMP_NUM_THREADS bounds them all)."""
    import torch

    return max(torch.get_num_threads() // jobs, 1)


def _gpus() -> list[str]:
    """Return the GPUs of this process by the names that CUDA_VISIBLE_DEVICES knows them by."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(number) for number in range(torch.cuda.device_count())]


def lock(folder: Path) -> FileLock:
    """Return the lock on one run folder; it is released when the process that holds it ends, however it ends."""
    aside = folder.parent / ".attar"
    with storage_errors(aside):
        aside.mkdir(parents=True, exist_ok=True)
    return FileLock(aside / f"{folder.name}.lock")


def train_all(cells: Sequence[Cell], *, jobs: int | None = None, console: Console) -> None:
    """Train every run that is not finished yet, several at a time; come back when none is left.

    A run that fails leaves its reason in its folder (`failure.json`) and the others go on; the next call tries it
    again. Runs that another process is at are waited for.

    Args:
        cells: the runs; those that come first begin first.
        jobs: how many at a time; default: `default_jobs()`.
        console: where progress is shown.

    Raises:
        AttarError: fewer than one job.
        Interrupted: Ctrl-C or SIGTERM; all runs have saved themselves, and the same call goes on.
    """
    if jobs is not None and jobs < 1:
        raise AttarError(f"At least 1 run at a time must be trained, not {jobs}.")
    missing = [cell for cell in cells if not cell.finished]
    if missing:
        with StopRequest() as stop:
            _Crew(missing, jobs or default_jobs(), console, stop).work()


@dataclass
class _Crew:
    """The parent of all processes that train."""

    cells: Sequence[Cell]
    jobs: int
    console: Console
    stop: StopRequest
    running: dict[int, tuple[ForkServerProcess | SpawnProcess, Cell, int]] = field(default_factory=dict)

    def work(self) -> None:
        self.began = time.time()
        self.gpus = _gpus()
        self.threads = threads_per_run(self.jobs)
        self.left = deque(self.cells)
        self.settled = 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        shown = self.console.is_terminal and not self.console.quiet
        total = sum(cell.spec.epochs for cell in self.cells)
        self.found = sum(map(_epochs_done, self.cells))
        with Progress(*columns, console=self.console, transient=True, disable=not shown) as self.bar:
            self.task = self.bar.add_task("training", total=total, completed=self.found)
            try:
                while self.left or self.running:
                    self._fill()
                    self._collect()
                    if self.stop.made:
                        raise Interrupted("Stopped, every run has saved itself: give the same command again to go on.")
            finally:
                self._end()

    def _fill(self) -> None:
        """Give every free place a run; what another process is at goes to the back of the line."""
        while self.left and len(self.running) < self.jobs:
            cell = self.left.popleft()
            if cell.finished or _failed_since(cell, self.began):
                self._settle(cell)
                continue
            taken = {place for _, _, place in self.running.values()}
            place = next(number for number in range(self.jobs) if number not in taken)
            gpu = self.gpus[place % len(self.gpus)] if self.gpus else None
            process = context().Process(target=_train, args=(cell, self.threads, gpu), name=str(cell))
            process.start()
            self.running[process.sentinel] = (process, cell, place)

    def _collect(self) -> None:
        """Wait a moment for runs to end."""
        for sentinel in wait(list(self.running), timeout=_POLL):
            assert isinstance(sentinel, int)
            process, cell, _ = self.running.pop(sentinel)
            process.join()
            if process.exitcode == _BUSY:
                self.left.append(cell)
                if len(self.left) + len(self.running) <= self.jobs:
                    time.sleep(_POLL)  # nothing else is left to do: ask again a little later
                continue
            if process.exitcode == _INTERRUPTED:
                self.stop.made = True
                continue
            if not cell.finished and not _failed_since(cell, self.began):
                _fail(cell, _ended(process.exitcode))
            self._settle(cell)
        done = sum(map(_epochs_done, self.cells))
        here = f"{self.settled} of {len(self.cells)} runs"
        self.bar.update(self.task, completed=done, description=here)

    def _settle(self, cell: Cell) -> None:
        """Say what became of a run."""
        self.settled += 1
        if cell.finished:
            result, main = read_json(cell.folder / "result.json"), primary(cell.spec.task)
            said = f"test {main.name} {result['test'][main.key]:.2%}, {result['training_seconds']:.1f} s of training"
        else:
            said = f"FAILED: {read_json(cell.folder / FAILURE)['reason']}"
        if not self.console.is_terminal or not cell.finished:
            counted = f"{self.settled} of {len(self.cells)}"
            self.console.print(f"{cell}: {said} ({counted}{self._time_left()})", markup=False, soft_wrap=True)

    def _time_left(self) -> str:
        done, total = sum(map(_epochs_done, self.cells)), sum(cell.spec.epochs for cell in self.cells)
        if done <= self.found or done >= total:
            return ""
        seconds = (time.time() - self.began) * (total - done) / (done - self.found)
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"

    def _end(self) -> None:
        """Let runs that are still at work save themselves."""
        for process, _, _ in self.running.values():
            process.terminate()
        for process, _, _ in self.running.values():
            process.join()


def context() -> Any:
    """Return how processes are started: from a server that has imported everything, where the system can."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_LIBRARIES))
    return context


def _train(cell: Cell, threads: int, gpu: str | None) -> None:
    """Train one run; this is the child's whole life."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is the parent's matter: it ends its children in order
    threading.Thread(target=_outlive_no_parent, daemon=True).start()
    held = lock(cell.folder)
    try:
        held.acquire(timeout=0)
    except Timeout:
        sys.exit(_BUSY)
    with held:
        if cell.finished:
            return
        (cell.folder / FAILURE).unlink(missing_ok=True)
        _redirect(Path(held.lock_file).with_suffix(".log"))
        try:
            _fit(cell, threads, gpu)
        except KeyboardInterrupt:
            sys.exit(_INTERRUPTED)
        except AttarError as error:
            _fail(cell, str(error))
        except Exception as error:  # whatever it is, the other runs go on and the report says it
            traceback.print_exc()
            _fail(cell, f"{type(error).__name__}: {error}", traceback.format_exc())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def _fit(cell: Cell, threads: int, gpu: str | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before CUDA starts: the run sees one GPU, as it would alone
    import torch
    from rich.console import Console

    from attar.train import fit

    torch.set_num_threads(threads)
    fit(cell.spec, cell.folder, console=Console(file=io.StringIO()))


def _outlive_no_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    with suppress(OSError):
        os.kill(os.getpid(), signal.SIGTERM)  # the run saves itself


def _redirect(path: Path) -> None:
    """Send all that libraries print to a file, so that it does not tear up the display."""
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _fail(cell: Cell, reason: str, trace: str | None = None) -> None:
    """Leave the reason in the run's folder, and what the run was to be: it may have failed before it began."""
    with storage_errors(cell.folder):
        cell.folder.mkdir(parents=True, exist_ok=True)
    if not (cell.folder / "spec.json").is_file():
        write_json(cell.folder / "spec.json", cell.spec.model_dump(mode="json"))
    told = {"reason": reason, "time": time.time(), **({"traceback": trace} if trace else {})}
    write_json(cell.folder / FAILURE, told)


def _failed_since(cell: Cell, began: float) -> bool:
    """Whether a run failed in this call, here or in another process; earlier failures are tried again."""
    with suppress(AttarError):
        return bool(read_json(cell.folder / FAILURE)["time"] >= began)
    return False


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return f"Its process was ended from outside ({name}), perhaps for lack of memory."
    return f"Its process ended with code {code} and left no result."


def _epochs_done(cell: Cell) -> int:
    if cell.finished:
        return cell.spec.epochs
    try:
        history = (cell.folder / "metrics.jsonl").read_bytes()
    except OSError:
        return 0
    return history.count(b'"kind": "epoch"')
