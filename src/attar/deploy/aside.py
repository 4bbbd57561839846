"""Folders that are whole or not there: filled under a hidden name, synchronised, renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from attar.errors import AttarError
from attar.train.files import storage_errors, sync_folder

__all__ = ["refuse_present", "written_aside"]

# What a folder must hold to be an export, which alone may be overwritten.
_MARK = "export.json"


def refuse_present(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something which must not be replaced.

    Raises:
        AttarError: an export that is not to be overwritten, or anything that is no export.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_dir() and (folder / _MARK).is_file():
        if not overwrite:
            raise AttarError(f"'{folder}' holds this export already: overwrite it with --overwrite, or give --out.")
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise AttarError(f"'{folder}' holds something that is no export: give another folder with --out.")


@contextlib.contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill; it takes the place of `folder` once everything has gone well, and else it vanishes.

    What a killed process has left of an earlier attempt is removed.

    Raises:
        AttarError: the place cannot be written, or no space is left.
    """
    made = _missing_parents(folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    before = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        with storage_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        yield aside
        with storage_errors(folder):
            for path in sorted(aside.rglob("*")):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            sync_folder(aside)
            if folder.exists():
                folder.rename(before)
            aside.rename(folder)
            sync_folder(folder.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            if before.exists() and not folder.exists():
                before.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # only where it is empty
        raise
    finally:
        shutil.rmtree(before, ignore_errors=True)


def _missing_parents(folder: Path) -> list[Path]:
    """Return the folders above that do not exist yet, the innermost first."""
    return [parent for parent in folder.parents if not parent.exists()]


def _remove_leftovers(folder: Path) -> None:
    prefix = f".{folder.name}."
    for path in folder.parent.iterdir():
        middle, _, ending = path.name.removeprefix(prefix).rpartition(".")
        if path.name.startswith(prefix) and middle.isdecimal() and ending in ("tmp", "old") and not _alive(int(middle)):
            if ending == "old" and not folder.exists():
                path.rename(folder)  # killed between the two renames
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    if os.name == "nt":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
