"""Finished runs to export in tests, trained once a process; pickles that would tell if they were ever executed."""

from __future__ import annotations

import atexit
import functools
import io
import os
import pickle
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from attar.train import fit
from runs import quiet, tiny


@functools.cache
def finished_run(*methods: str, epochs: int = 2) -> Path:
    """Return the folder of a run on digits; copy it before writing into it."""
    home = Path(tempfile.mkdtemp(prefix="attar-run-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    fit(tiny(*methods, epochs=epochs), home / "run", console=quiet())
    return home / "run"


def copied_run(folder: Path, *methods: str) -> Path:
    """Return a copy of a finished run that a test may damage."""
    return Path(shutil.copytree(finished_run(*methods), folder / "run"))


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def evil_pickle(mark: Path) -> bytes:
    """Return a pickle that makes the folder `mark` when it is loaded."""
    return pickle.dumps(_Evil(mark), protocol=2)


def evil_checkpoint(mark: Path) -> bytes:
    """Return the same in the archive that `torch.save` writes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", evil_pickle(mark))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()
