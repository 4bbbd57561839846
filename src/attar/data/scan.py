"""One pass over the images: which ones can be read, their moments and digests, and the pixels of small ones."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from attar.data.images import BadImageError, Pixels, decode, fit, native_size
from attar.data.masks import VOID, MaskCoding, MaskedReader, fit_mask, read_pair
from attar.data.reader import Reader
from attar.errors import AttarError

__all__ = ["Progress", "Scan", "join", "scan_chunks"]

Progress = Callable[[int, int], None]  # called with (images done, images in all)

_CHUNK_BYTES = 1 << 20
_BAR_AFTER_SECONDS = 2.0
_THREADS_FROM_BYTES = 4096  # below this Python's own share of a decode, which threads cannot share out, dominates


@dataclass(frozen=True)
class Scan:
    """What one pass over a reader found, row by row over the M readable images.

    Attributes:
        pixels: [M, H, W, 3] uint8, or None when the images are too large to keep.
        rows: [M] row of each image in the reader.
        moments: [M, 2, 3] per-image channel means of x and of x^2, x in 0..255.
        digests: [M] 64-bit digest of each decoded image.
        sizes: [M, 2] height and width before resizing.
        skipped: names of the images left out because they cannot be read.
        masks: [M, H, W] uint8 classes, or None when images have no masks or are too large to keep.
        mask_digests: [M] 64-bit digest of each mask at that size, or None when images have no masks.
        largest: [M] largest class of each mask as it comes, -1 where all is void, or None when images have no masks.
    """

    pixels: Pixels | None
    rows: NDArray[np.int64]
    moments: NDArray[np.float64]
    digests: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    skipped: tuple[str, ...]
    masks: Pixels | None = None
    mask_digests: NDArray[np.uint64] | None = None
    largest: NDArray[np.int64] | None = None


def scan_chunks(
    reader: Reader,
    size: tuple[int, int],
    *,
    keep_pixels: bool,
    skip_bad_images: bool,
    progress: Progress | None,
    coding: MaskCoding | None = None,
) -> Iterator[Scan]:
    """Decode all images in order, a chunk at a time, at `size` = (height, width); consume to the end or close.

    With a `coding` the reader is a `MaskedReader`, and every mask is read and checked too.

    Raises:
        BadImageError: an unreadable image or mask, unless they are skipped.
        AttarError: no readable image at all, or a mask that does not fit its image or the coding.
    """
    total = len(reader)
    step = max(1, min(256, _CHUNK_BYTES // (size[0] * size[1] * 3)))
    starts = range(0, total, step)

    def decode_chunk(start: int) -> Scan:
        rows = range(start, min(start + step, total))
        return _decode(reader, rows, size, keep_pixels, skip_bad_images, coding)

    report = _Bar(total) if progress is None else progress
    threads = _threads(reader)
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    decoded = pool.map(decode_chunk, starts) if pool else map(decode_chunk, starts)
    good = 0
    try:
        for start, chunk in zip(starts, decoded, strict=True):
            good += len(chunk.rows)
            yield chunk
            report(min(start + step, total), total)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
        if isinstance(report, _Bar):
            report.close()
    if good == 0:
        raise AttarError(f"None of the {total} images can be read (the first is {reader.name(0)}): check the data.")


def join(chunks: list[Scan], pixels: Pixels | None) -> Scan:
    """Concatenate the chunks of one pass; `pixels` are given separately because on disk they are already one file.

    Masks, which lie beside them, are left out.
    """
    return Scan(
        pixels,
        np.concatenate([chunk.rows for chunk in chunks]),
        np.concatenate([chunk.moments for chunk in chunks]),
        np.concatenate([chunk.digests for chunk in chunks]),
        np.concatenate([chunk.sizes for chunk in chunks]),
        tuple(name for chunk in chunks for name in chunk.skipped),
        mask_digests=_concatenated([chunk.mask_digests for chunk in chunks]),
        largest=_concatenated([chunk.largest for chunk in chunks]),
    )


def _concatenated(parts: list[NDArray[Any] | None]) -> NDArray[Any] | None:
    there = [part for part in parts if part is not None]
    return np.concatenate(there) if there else None


def _decode(
    reader: Reader,
    rows: range,
    size: tuple[int, int],
    keep_pixels: bool,
    skip_bad_images: bool,
    coding: MaskCoding | None,
) -> Scan:
    pixels = np.empty((len(rows), *size, 3), np.uint8)
    masks = np.empty((len(rows), *size), np.uint8) if coding is not None else None
    kept: list[int] = []
    sizes: list[tuple[int, int]] = []
    digests: list[int] = []
    skipped: list[str] = []
    mask_digests: list[int] = []
    largest: list[int] = []
    # Kept pixels are what the student sees, so they are decoded in full; a reduced decode is for moments only.
    draft = None if keep_pixels else max(size)
    for row in rows:
        try:
            if coding is None:
                data = reader.read(row)
                image = decode(data, reader.name(row), draft)
                native = native_size(data) or (image.height, image.width)  # a reduced decode hides the true size
            else:
                image, mask, native = read_pair(cast(MaskedReader, reader), row, coding, draft)
        except BadImageError as error:
            if not skip_bad_images:
                raise
            skipped.append(error.name)
            continue
        slot = pixels[len(kept)]
        slot[:] = np.asarray(fit(image, size))
        digests.append(_digest(slot))
        if masks is not None:
            masks[len(kept)] = fit_mask(mask, size)
            mask_digests.append(_digest(masks[len(kept)]))
            valid = mask[mask != VOID]
            largest.append(int(valid.max(initial=0)) if len(valid) else -1)
        sizes.append(native)
        kept.append(row)
    pixels = pixels[: len(kept)]
    values = pixels.reshape(len(kept), size[0] * size[1], 3).astype(np.float32)
    moments = np.stack([values.mean(1, dtype=np.float64), np.square(values).mean(1, dtype=np.float64)], axis=1)
    return Scan(
        pixels if keep_pixels else None,
        np.array(kept, dtype=np.int64),
        moments,
        np.array(digests, dtype=np.uint64),
        np.array(sizes, dtype=np.int64).reshape(-1, 2),
        tuple(skipped),
        masks[: len(kept)] if masks is not None and keep_pixels else None,
        np.array(mask_digests, dtype=np.uint64) if masks is not None else None,
        np.array(largest, dtype=np.int64) if masks is not None else None,
    )


def _digest(values: Pixels) -> int:
    return int.from_bytes(hashlib.blake2b(values.data, digest_size=8).digest(), "little")


def _threads(reader: Reader) -> int:
    first = [reader.read(row) for row in range(0, len(reader), max(1, len(reader) // 16))]
    encoded = [len(data) for data in first if isinstance(data, bytes)]
    if not encoded or sum(encoded) < _THREADS_FROM_BYTES * len(encoded):
        return 1
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class _Bar:
    """A rich progress bar on standard error that appears only once the work has taken two seconds."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.started = time.monotonic()
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None and time.monotonic() - self.started > _BAR_AFTER_SECONDS:
            from rich.console import Console
            from rich.progress import Progress as RichProgress

            console = Console(stderr=True)
            self.bar = RichProgress(console=console, transient=True, disable=not console.is_terminal)
            self.task = self.bar.add_task("Reading images", total=total)
            self.bar.start()
        if self.bar is not None:
            self.bar.update(self.task, completed=done)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
