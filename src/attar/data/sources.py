"""Where images come from: one name in, three splits out (train, hold-out, test), whatever lies behind the name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attar.data.cache import cache_root, cached_scan
from attar.data.digits import open_digits
from attar.data.folder import open_folder
from attar.data.huggingface import open_hub, open_parquet
from attar.data.masked_sources import open_masked_source
from attar.data.masks import ClassNames
from attar.data.reader import Origin, Reader, check_labels, digest
from attar.data.scan import Progress, Scan
from attar.data.splits import Source, Split, asked_size, native_sizes, part, refuse_columns, statistics
from attar.data.torchvision_sets import TORCHVISION_NAMES, open_torchvision
from attar.errors import AttarError, did_you_mean, unknown_name

__all__ = ["CACHED_UP_TO", "Source", "Split", "open_source"]

CACHED_UP_TO = 128  # pixels a side: up to here images are decoded once and kept, above they are decoded in workers
_LARGE_SIZE = 224
_TEST_FRACTION = 0.2


def open_source(
    name: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    holdout: float = 0.1,
    split_seed: int = 0,
    skip_bad_images: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    data_root: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    task: str = "classification",
    mask_column: str | None = None,
    classes: ClassNames = None,
    ignore_index: int | None = None,
) -> Source:
    """Open images by name: `digits`, a torchvision name, a folder, `parquet:DIR` or `hf:owner/name[:configuration]`.

    Every image is read once, on the first opening, which is when unreadable ones are found; what was learnt is cached.
    Images are kept decoded when the size they are trained at is at most `CACHED_UP_TO` a side. That size is
    `image_size`; by default the native one if all images share it and it is that small, else 224 (for images of mixed
    sizes: the median shorter side, at most 224). Images of another size are resized to cover it, then centre-cropped.

    Args:
        name: what to open; a path that exists wins over the names.
        image_size: (height, width) or one number for both.
        holdout: fraction of the training images set aside for model selection; 0 for none.
        split_seed: seed of the hold-out (and of the test images where none come apart), apart from the training seed.
        skip_bad_images: leave unreadable images out and list them in `Source.skipped`, instead of refusing the data.
        image_column: column of the images in Hugging Face data, when it cannot be told.
        label_column: column of the labels, likewise (for example `coarse_label`).
        data_root: where torchvision's files are or go; default `<cache>/torchvision`.
        cache_dir: default: environment variable `ATTAR_CACHE`, else `~/.cache/attar`.
        progress: called with (images done, images in all); default a progress bar on a terminal after two seconds.
        task: `classification`, or `segmentation` for images with masks, as `open_masked_source` says.
        mask_column: segmentation: column of the masks in Hugging Face data, when it cannot be told.
        classes: segmentation: the class names, or the path of a JSON file with them.
        ignore_index: segmentation: the value of void pixels on disk; default: what that file says, else 255.

    Raises:
        AttarError: unknown name, no images, one class, labels out of range, an unreadable image, an empty split,
            a class too small to split, no space; in segmentation also any malformed mask.
    """
    root = cache_root(cache_dir)
    if task == "segmentation":
        if label_column is not None:
            raise AttarError("Segmentation has masks instead of labels: name their column with mask_column.")
        return open_masked_source(
            str(name),
            image_size=image_size,
            holdout=holdout,
            split_seed=split_seed,
            skip_bad_images=skip_bad_images,
            image_column=image_column,
            mask_column=mask_column,
            classes=classes,
            ignore_index=ignore_index,
            data_root=Path(data_root or root / "torchvision"),
            root=root,
            progress=progress,
        )
    if task != "classification":
        raise unknown_name("task", task, ("classification", "segmentation"))
    if (mask_column, classes, ignore_index) != (None, None, None):
        raise AttarError("mask_column, classes and ignore_index are about masks: open the images for segmentation.")
    origin = _open_origin(str(name), root, Path(data_root or root / "torchvision"), image_column, label_column)
    _check(origin)
    if not 0 <= holdout < 1:
        raise AttarError(f"The hold-out must be a fraction from 0 to below 1, not {holdout}.")
    size = _trained_size(image_size, *native_sizes(origin.train))
    keep_pixels = max(size) <= CACHED_UP_TO

    def scan(reader: Reader) -> Scan:
        return cached_scan(
            reader,
            size,
            keep_pixels=keep_pixels,
            skip_bad_images=skip_bad_images,
            cache_dir=root,
            progress=progress,
        )

    found = scan(origin.train)
    train = _split("train", origin.train, found, size)
    if origin.test is None:
        train, test = _set_aside(train, "test", _TEST_FRACTION, split_seed, origin.classes)
        found_test = None
    else:
        found_test = scan(origin.test)
        test = _split("test", origin.test, found_test, size)
    if holdout > 0:
        train, held_out = _set_aside(train, "holdout", holdout, split_seed, origin.classes)
    else:
        held_out = part(train, "holdout", np.arange(0))
    mean, std = statistics(found, train.rows)
    sizes, counts = np.unique(found.sizes, axis=0, return_counts=True)
    native = sizes[counts.argmax()]
    return Source(
        name=str(name),
        classes=origin.classes,
        train=train,
        holdout=held_out,
        test=test,
        mean=mean,
        std=std,
        image_size=size,
        native_size=(int(native[0]), int(native[1])),
        mixed_sizes=len(counts) > 1,
        skipped=found.skipped + (found_test.skipped if found_test is not None else ()),
        fingerprint=_fingerprint(origin.classes, [(found, train), (found, held_out), (found_test or found, test)]),
        default_augmentation=origin.default_augmentation,
    )


def _open_origin(name: str, root: Path, data_root: Path, image_column: str | None, label_column: str | None) -> Origin:
    kind, colon, rest = name.partition(":")
    if colon and kind == "parquet":
        return open_parquet(Path(rest).expanduser(), root, image_column, label_column)
    if colon and kind == "hf":
        return open_hub(rest, image_column, label_column)
    refuse_columns(name, image_column=image_column, label_column=label_column)
    path = Path(name).expanduser()
    if path.is_dir():
        return open_folder(path)
    if name == "digits":
        return open_digits()
    if name in TORCHVISION_NAMES:
        return open_torchvision(name, data_root)
    nearest = did_you_mean(name, ["digits", *TORCHVISION_NAMES])
    if path.exists():
        raise AttarError(f"'{name}' is a file: give a folder of class folders, or parquet:DIR for parquet files.")
    if nearest is not None and "/" not in name:
        raise AttarError(f"There is no data source '{name}': did you mean '{nearest}'?")
    raise AttarError(
        f"There is no data source and no folder '{name}': give a folder of class folders, parquet:DIR, hf:owner/name, "
        f"digits or one of {', '.join(TORCHVISION_NAMES)}."
    )


def _check(origin: Origin) -> None:
    for split, reader in (("train", origin.train), ("test", origin.test)):
        if reader is not None:
            if len(reader) == 0:
                raise AttarError(f"The {split} split of '{origin.name}' is empty: add images to it or remove it.")
            check_labels(reader, len(origin.classes))
    present = np.unique(origin.train.targets)
    if len(present) < 2:
        only = origin.classes[int(present[0])]
        raise AttarError(f"'{origin.name}' has images of one class only, '{only}': classification needs at least two.")


def _trained_size(
    asked: int | tuple[int, int] | None, native: tuple[int, int], mixed: bool, median_side: int
) -> tuple[int, int]:
    if asked is not None:
        return asked_size(asked)
    if not mixed:
        return native if max(native) <= CACHED_UP_TO else (_LARGE_SIZE, _LARGE_SIZE)
    side = min(median_side, _LARGE_SIZE)
    return side, side


def _split(name: str, reader: Reader, found: Scan, size: tuple[int, int]) -> Split:
    rows = np.arange(len(found.rows))
    return Split(name, size, found.pixels, reader, rows, reader.targets[found.rows], found.rows, len(reader))


def _set_aside(split: Split, name: str, fraction: float, seed: int, classes: tuple[str, ...]) -> tuple[Split, Split]:
    """Cut a stratified `fraction` off `split`, the same for the same images and seed; both parts stay in order."""
    from sklearn.model_selection import train_test_split

    present, counts = np.unique(split.targets, return_counts=True)
    if counts.min() < 2:
        raise AttarError(
            f"Class '{classes[present[counts.argmin()]]}' has too few images to set a {name} part aside "
            "(each class needs at least 2): add images of it or leave the class out."
        )
    aside = int(np.ceil(fraction * len(split)))
    if min(aside, len(split) - aside) < len(present):
        raise AttarError(
            f"A {name} part of {fraction:g} of {len(split)} images cannot hold each of the {len(present)} classes "
            f"on both sides: add images or change the fraction."
        )
    kept, cut = train_test_split(np.arange(len(split)), test_size=fraction, stratify=split.targets, random_state=seed)
    return part(split, split.name, np.sort(kept)), part(split, name, np.sort(cut))


def _fingerprint(classes: tuple[str, ...], parts: list[tuple[Scan, Split]]) -> str:
    pieces: list[bytes | NDArray[np.generic]] = ["\0".join(classes).encode()]
    for found, split in parts:
        pieces += [str(len(split)).encode(), found.digests[split.rows], split.targets]
    return digest(pieces)
