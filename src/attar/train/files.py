"""Files that are whole or not there: written aside, synchronised, renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attar.errors import AttarError

__all__ = ["read_json", "storage_errors", "write_atomically", "write_json"]


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that at any moment, a crash included, it has its old content or its new one.

    Raises:
        AttarError: no space left, or the folder cannot be written; nothing of the attempt stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what storage refuses into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise AttarError(
                f"No space is left for '{path}': free some and run the same command again, which goes on from the "
                "last checkpoint."
            ) from error
        reason = error.strerror or type(error).__name__
        raise AttarError(f"'{path}' cannot be written ({reason}): choose a folder that can.") from error


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        AttarError: the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise AttarError(f"'{path}' cannot be read ({reason}): is this a folder that attar wrote?") from error
