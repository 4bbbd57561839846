"""Keep what one pass over the images found, so that it is made once: small images become a memory-mapped uint8 array.

The pass (`attar.data.scan`) finds unreadable images before training starts, gathers per-image channel moments (any
subset's mean and deviation is then a sum away), a digest of each decoded image and, for small images, the pixels. It
is stored in `<cache>/images/<key>/`, where the key covers the reader's key (files: absolute names, sizes and
modification times; arrays: their content) and the size asked. It is built in a temporary folder under a lock and
renamed into place, so nobody ever sees half of it.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock

from attar.data.images import BadImageError, Pixels
from attar.data.masks import BadMaskError, MaskCoding
from attar.data.reader import Reader, digest
from attar.data.scan import Progress, Scan, join, scan_chunks
from attar.errors import AttarError

__all__ = ["cache_root", "cached_scan", "is_storage_error"]

_FORMAT = b"attar-images-1"  # raise it when decoding or the files' layout changes
_MASK_FORMAT = b"masks-1"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Return the cache directory: the argument, else the environment variable `ATTAR_CACHE`, else `~/.cache/attar`."""
    return Path(cache_dir or os.environ.get("ATTAR_CACHE") or "~/.cache/attar").expanduser()


def cached_scan(
    reader: Reader,
    size: tuple[int, int],
    *,
    keep_pixels: bool,
    skip_bad_images: bool = False,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    coding: MaskCoding | None = None,
) -> Scan:
    """Return the scan of `reader` at `size` = (height, width), from the cache when a whole one is there.

    Readers without a key are in memory already; they are scanned each time and nothing is written. The default
    `progress` is a bar that appears on a terminal after two seconds. With a `coding` the reader is a `MaskedReader`
    with a key; masks are checked and kept as the images are.

    Raises:
        AttarError: an unreadable image (unless skipped), no readable image, a mask that does not fit its image or the
            coding, no space or no permission for the cache.
    """
    chunks = scan_chunks(
        reader, size, keep_pixels=keep_pixels, skip_bad_images=skip_bad_images, progress=progress, coding=coding
    )  # lazy: nothing is decoded until it is iterated
    if reader.key is None:
        parts = list(chunks)
        return join(parts, np.concatenate([part.pixels for part in parts if part.pixels is not None]))
    root = cache_root(cache_dir) / "images"
    parts_of_key = [_FORMAT, reader.key.encode(), str((*size, keep_pixels)).encode()]
    if coding is not None:
        parts_of_key += [_MASK_FORMAT, repr(coding).encode()]
    folder = root / digest(parts_of_key)
    needed = len(reader) * size[0] * size[1] * (3 if coding is None else 4) if keep_pixels else 0
    with _writing(root, needed):
        found = _open(folder, size, keep_pixels, coding is not None)
        if found is None:
            root.mkdir(parents=True, exist_ok=True)
            # The lock spares a second process the same work; the kernel frees it when its holder is killed.
            with FileLock(root / f"{folder.name}.lock"):
                found = _open(folder, size, keep_pixels, coding is not None)
                if found is None:
                    _build(chunks, folder, needed, coding is not None)
                    found = _open(folder, size, keep_pixels, coding is not None)
    if found is None:
        raise AttarError(f"The image cache under '{root}' was changed while it was made: run again.")
    if found.skipped and not skip_bad_images:
        kind = BadMaskError if found.skipped[0].startswith("mask ") else BadImageError
        raise kind(found.skipped[0], "it could not be read when the images were cached")
    return found


@contextmanager
def _writing(root: Path, needed: int) -> Iterator[None]:
    """Turn a failure to write under `root` into one sentence; `needed` is the space wanted, in bytes."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            wanted = f" for {needed / 2**20:,.0f} MiB of decoded images" if needed else ""
            raise AttarError(
                f"No space left under '{root}'{wanted}: free some, or point ATTAR_CACHE to a larger disk."
            ) from error
        if error.errno in _FORBIDDEN:
            raise AttarError(
                f"Cannot write the image cache under '{root}' ({error.strerror}): point ATTAR_CACHE to your own folder."
            ) from error
        raise


def is_storage_error(error: BaseException) -> bool:
    """Say whether `error` is about the disk, rather than about what is read."""
    return isinstance(error, OSError) and error.errno in (*_FULL, *_FORBIDDEN)


def _open(folder: Path, size: tuple[int, int], keep_pixels: bool, masked: bool) -> Scan | None:
    """Return the cached scan, or None when it is absent, truncated or damaged."""
    try:
        with np.load(folder / "scan.npz") as saved:
            rows, moments, digests, sizes = (saved[name] for name in ("rows", "moments", "digests", "sizes"))
            skipped = tuple(str(name) for name in saved["skipped"])
            of_masks = {name: saved[name] for name in ("mask_digests", "largest")} if masked else {}
        pixels = masks = None
        if keep_pixels:
            pixels = _map(folder / "pixels.u8", (len(rows), *size, 3))
            masks = _map(folder / "masks.u8", (len(rows), *size)) if masked else None
        return Scan(pixels, rows, moments, digests, sizes, skipped, masks, **of_masks)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _map(path: Path, shape: tuple[int, ...]) -> Pixels:
    if path.stat().st_size != np.prod(shape):
        raise ValueError(f"{path} has another size")
    return np.memmap(path, np.uint8, mode="r", shape=shape).view(np.ndarray)


def _build(chunks: Iterator[Scan], folder: Path, needed: int, masked: bool) -> None:
    """Scan into a temporary folder and rename it to `folder`; on any failure leave nothing behind."""
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):  # of a process killed while it held the lock
        shutil.rmtree(leftover, ignore_errors=True)
    if shutil.disk_usage(folder.parent).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        parts = []
        # Plain writes, not a writable memory map: on a full disk a write fails with an error, a map with a signal.
        with ExitStack() as stack:
            names = ("pixels", "masks") if masked else ("pixels",)
            files = {name: stack.enter_context(open(partial / f"{name}.u8", "wb")) for name in names}
            for chunk in chunks:
                for name, file in files.items():
                    if (values := getattr(chunk, name)) is not None:
                        file.write(values.data)
                parts.append(replace(chunk, pixels=None, masks=None))
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        whole = join(parts, None)
        of_masks = {name: getattr(whole, name) for name in ("mask_digests", "largest")} if masked else {}
        with open(partial / "scan.npz", "wb") as file:
            np.savez(
                file,
                rows=whole.rows,
                moments=whole.moments,
                digests=whole.digests,
                sizes=whole.sizes,
                skipped=np.array(whole.skipped, dtype=np.str_),
                **of_masks,
            )
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
