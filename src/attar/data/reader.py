"""What every origin of images offers to the cache and the workers: random access to encoded images and labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from attar.data.images import BadImageError, Pixels
from attar.errors import AttarError

__all__ = ["ArrayReader", "FileReader", "Origin", "Reader", "check_labels", "digest", "stat_key"]


class Reader(Protocol):
    """Random access to one split as it lies on disk or in memory; rows are numbered 0..N-1 in a fixed order."""

    @property
    def targets(self) -> NDArray[np.int64]:
        """The label of each row, [N]."""

    @property
    def key(self) -> str | None:
        """A string that changes whenever the images may have; None: in memory already, not worth caching on disk."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """Say which image `row` is, in the user's terms: a path or a row of a table."""

    def read(self, row: int) -> bytes | Pixels:
        """Return the encoded image, or its pixels [H, W] or [H, W, 3] where nothing is encoded."""


@dataclass(frozen=True)
class Origin:
    """The training images, the test images where they come apart, and the class names that labels index."""

    name: str
    classes: tuple[str, ...]
    train: Reader
    test: Reader | None
    default_augmentation: str = "crop-flip"


class ArrayReader:
    """Images that are one uint8 array [N, H, W] or [N, H, W, 3] in memory."""

    def __init__(self, what: str, pixels: Pixels, targets: NDArray[np.int64], *, cached: bool = True) -> None:
        self.what = what
        self.pixels = np.ascontiguousarray(pixels)
        self.targets = targets.astype(np.int64)
        self.key = digest([what.encode(), str(self.pixels.shape).encode(), self.pixels]) if cached else None

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, row: int) -> str:
        """Return for example `17 of mnist train`."""
        return f"{row} of {self.what}"

    def read(self, row: int) -> Pixels:
        """Return the pixels of one image, [H, W] or [H, W, 3]."""
        pixels: Pixels = self.pixels[row]
        return pixels


class FileReader:
    """Images that are files."""

    def __init__(self, paths: Sequence[Path], targets: NDArray[np.int64]) -> None:
        self.paths = list(paths)
        self.targets = targets.astype(np.int64)
        self.key = stat_key(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        """Return the path."""
        return f"'{self.paths[row]}'"

    def read(self, row: int) -> bytes:
        """Return the file's bytes."""
        try:
            return self.paths[row].read_bytes()
        except OSError as error:
            raise BadImageError(self.name(row), error.strerror or type(error).__name__) from error


def digest(parts: Iterable[bytes | NDArray[np.generic]]) -> str:
    """Return 32 hexadecimal digits of BLAKE2b over the parts, arrays by their C-contiguous bytes."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).view(np.uint8).data)
    return state.hexdigest()


def stat_key(paths: Iterable[Path]) -> str:
    """Return a key over absolute name, size and modification time of each file: cheap, and any edit changes it."""
    parts = []
    for path in paths:
        stat = os.stat(path)
        parts.append(f"{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest(parts)


def check_labels(reader: Reader, num_classes: int) -> None:
    """Refuse a label outside 0..K-1, naming the first image that has one."""
    wrong = np.flatnonzero((reader.targets < 0) | (reader.targets >= num_classes))
    if len(wrong):
        row = int(wrong[0])
        raise AttarError(
            f"Image {reader.name(row)} has label {reader.targets[row]}, but labels must lie in 0..{num_classes - 1}: "
            "correct the label column or the list of class names."
        )
