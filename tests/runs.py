"""Small runs for tests: specs of about a second, children that import nothing anew, and a run's history."""

from __future__ import annotations

import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from attar.compare.runner import Cell, context, train_all
from attar.errors import AttarError
from attar.spec import TrainSpec, parse
from attar.train import Interrupted, fit

# Children that are killed, and pairs of ranks, start from a server that has imported everything already.
CHILDREN = context()

Said = subprocess.CompletedProcess[str]


def tiny(*methods: str | dict[str, Any], **fields: Any) -> TrainSpec:
    """A run of about a second: a quarter-width ResNet-20 on 8 x 8 digits."""
    chosen = [{"name": method} if isinstance(method, str) else method for method in methods]
    defaults: dict[str, Any] = {
        "methods": chosen,
        "model": "cifar_resnet20",
        "model_options": {"width": 0.25},
        "data": "digits",
        "train_limit": 256,
        "epochs": 2,
        "batch": 32,
        "lr": 0.05,
        "log_every": 4,
        "precision": "fp32",
    }
    return parse(TrainSpec, {**defaults, **fields})


def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of one kind of a run's history."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def in_child(work: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """Start a process that imported everything beforehand."""
    child: ForkServerProcess = CHILDREN.Process(target=work, args=arguments)
    child.start()
    return child


def said_in_child(
    work: Callable[..., None], *arguments: Any, folder: Path, signal_at: tuple[str, int] | None = None, **variables: str
) -> Said:
    """Do `work` in `folder` as a program of its own; return its exit code and what it printed.

    With `signal_at`, a text and a signal, it gets the signal once it has printed the text.
    """
    with tempfile.TemporaryDirectory() as aside:
        out, err = Path(aside, "out"), Path(aside, "err")
        child = in_child(as_program, folder, out, err, variables, work, *arguments)
        try:
            if signal_at is not None:
                text, number = signal_at
                while child.is_alive() and not (out.exists() and text in out.read_text()):
                    time.sleep(0.01)
                assert child.pid is not None
                os.kill(child.pid, number)
            child.join(300)
        finally:
            child.kill()
            child.join()
        assert child.exitcode is not None
        return subprocess.CompletedProcess(arguments, child.exitcode, out.read_text(), err.read_text())


def as_program(
    folder: Path, out: Path, err: Path, variables: dict[str, str], work: Callable[..., None], *arguments: Any
) -> None:
    """From here on print into two files, and end as `work` ends."""
    os.environ.update(variables)
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    torch.set_num_threads(1)
    work(*arguments)


def attar_command(words: Sequence[str]) -> None:
    """Do what `attar WORDS` does."""
    from attar.cli import main

    sys.argv = ["attar", *words]
    sys.exit(main(list(words)))


def python_code(code: str) -> None:
    """Do what `python -c CODE` does."""
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def python_script(path: Path, words: Sequence[str]) -> None:
    """Do what `python PATH WORDS` does."""
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")


def command_as_rank(words: Sequence[str], folder: Path) -> None:
    """What one of several processes does: an attar command, whose words go into files of its own in `folder`."""
    rank = os.environ["RANK"]
    as_program(folder, folder / f"out{rank}.txt", folder / f"err{rank}.txt", {}, attar_command, words)


def train_all_in_child(cells: list[Cell], jobs: int) -> None:
    """What a child with children of its own does: train all runs."""
    torch.set_num_threads(1)
    train_all(cells, jobs=jobs, console=quiet())


def compare_in_child(plan: Any, home: Path) -> None:
    """What a child with children of its own does: a whole comparison."""
    from attar.compare.comparison import compare

    torch.set_num_threads(1)
    compare(plan, home, jobs=1, console=quiet())


def train_in_child(spec: TrainSpec, folder: Path) -> None:
    """What a child does: train; leave with 130 when interrupted."""
    torch.set_num_threads(1)
    try:
        fit(spec, folder, console=quiet())
    except KeyboardInterrupt as stopped:
        (folder / "said.txt").write_text(str(stopped))
        os._exit(130)


def history(folder: Path) -> list[dict[str, Any]]:
    """Return every line of a run's history without what was timed."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]


def assert_same_run(folder: Path, reference: Path) -> None:
    """Weights to the last bit, every line of the history, the measured numbers."""
    assert (folder / "student/model.safetensors").read_bytes() == (reference / "student/model.safetensors").read_bytes()
    assert history(folder) == history(reference)
    one, other = (json.loads((path / "result.json").read_text()) for path in (folder, reference))
    for timed in ("training_seconds", "images_per_second", "peak_memory_bytes"):
        one.pop(timed), other.pop(timed)
    assert one == other


def kill_after_lines(spec: TrainSpec, folder: Path, count: int, delay: float) -> bool:
    """Start the run, kill it once its history has `count` lines; return whether it was killed before its end."""
    child = in_child(train_in_child, spec, folder)
    path = folder / "metrics.jsonl"
    limit = time.monotonic() + 120
    while child.is_alive() and time.monotonic() < limit:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            time.sleep(delay)
            break
        time.sleep(0.002)
    assert time.monotonic() < limit
    if child.is_alive():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    return child.exitcode == -signal.SIGKILL


def two_ranks(
    work: Callable[..., None], *arguments: Any, meanwhile: Callable[[list[ForkServerProcess]], None] | None = None
) -> list[int | None]:
    """Run `work` in two processes as torchrun would start them; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [in_child(as_rank, rank, port, work, *arguments) for rank in range(2)]
    if meanwhile is not None:
        meanwhile(children)
    for child in children:
        child.join(120)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes


def as_rank(rank: int, port: int, work: Callable[..., None], *arguments: Any) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    work(*arguments)


def only_rank_0_writes(folder: Path) -> None:
    """From here on let every opening for writing, making or renaming below `folder` be an error in other processes."""
    if os.environ["RANK"] == "0":
        return

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        if event == "open" and isinstance(arguments[2], int):
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and str(folder) in str(arguments[0]):
            os.write(2, f"rank {os.environ['RANK']}: {event} {arguments}\n".encode())
            os._exit(77)

    sys.addaudithook(watch)


def train_as_rank(spec: TrainSpec, folder: Path, stop_after: int | None) -> None:
    """What one of several processes does: train, write nothing unless it is the first, say how it went."""
    only_rank_0_writes(folder)
    try:
        fit(spec, folder, console=quiet(), stop_after=stop_after)
    except Interrupted:
        os._exit(130)
    except AttarError as error:
        (folder.parent / f"said{os.environ['RANK']}.txt").write_text(str(error))
        os._exit(2)
