"""Where images come from: one name in, three splits out (train, hold-out, test), whatever lies behind the name."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attar.data.cache import cache_root, cached_scan
from attar.data.digits import open_digits
from attar.data.folder import open_folder
from attar.data.huggingface import open_hub, open_parquet
from attar.data.images import BadImageError, Pixels, native_size
from attar.data.reader import Origin, Reader, check_labels, digest
from attar.data.scan import Progress, Scan
from attar.data.torchvision_sets import TORCHVISION_NAMES, open_torchvision
from attar.errors import AttarError, did_you_mean

__all__ = ["CACHED_UP_TO", "Source", "Split", "open_source"]

CACHED_UP_TO = 128  # pixels a side: up to here images are decoded once and kept, above they are decoded in workers
_LARGE_SIZE = 224
_TEST_FRACTION = 0.2
_PROBED = 256


@dataclass(frozen=True)
class Split:
    """One split of a source: N images, their labels and their numbers in the original data.

    Attributes:
        name: `train`, `holdout` or `test`.
        image_size: (height, width) of the images as the student sees them.
        pixels: [M, H, W, 3] uint8 that `rows` point into (memory-mapped), or None when images are decoded in workers.
        reader: where images that are not kept are read from, by `index`.
        rows: [N] rows of `pixels`.
        targets: [N] int64 class of each image.
        index: [N] int64 number of each image in the original data; skipping unreadable images or another hold-out
            does not change it, so tables and caches per image may be kept under it.
        index_bound: one more than the largest `index` the original data can hold.
        masks: in segmentation [M, H, W] uint8 class of each pixel, `VOID` where there is none, that `rows` point into as
            into `pixels`; None in classification and when images are decoded in workers. `targets` are then zeros,
            so that whatever draws by class draws at random.
        coding: in segmentation, what the values of the masks on disk mean; None in classification.
    """

    name: str
    image_size: tuple[int, int]
    pixels: Pixels | None
    reader: Reader
    rows: NDArray[np.int64]
    targets: NDArray[np.int64]
    index: NDArray[np.int64]
    index_bound: int
    masks: Pixels | None = None
    coding: MaskCoding | None = None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Source:
    """Labelled images in three splits, with what training must know about them.

    Attributes:
        name: the name it was opened by.
        classes: K class names; label k means `classes[k]`.
        train: training images without the hold-out.
        holdout: fixed, stratified part of the training data for model selection (length 0 when none is asked).
        test: images that no decision may depend on; a stratified part of the data when they come without a test split.
        mean: per-channel mean of `train` in 0..1, at `image_size`, before augmentation.
        std: per-channel standard deviation over all pixels of `train`, likewise.
        image_size: (height, width) of the images as the student sees them.
        native_size: most common (height, width) of the training images as they come.
        mixed_sizes: whether they come in more than one size.
        skipped: names of the unreadable images left out.
        fingerprint: 32 hexadecimal digits over the decoded images, labels, split and class names: equal on two machines
            exactly when they would train and test on the same numbers.
        default_augmentation: name of the augmentation that suits the images.
        task: `classification` or `segmentation`.
        ignore_index: in segmentation, the value of void pixels in masks as they are given out: always `VOID`, 255.
        void: names of the masks without a single labelled pixel.
        remarks: sentences on what was assumed about the data.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    holdout: Split
    test: Split
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: tuple[int, int]
    native_size: tuple[int, int]
    mixed_sizes: bool
    skipped: tuple[str, ...]
    fingerprint: str
    default_augmentation: str
    task: str = "classification"
    ignore_index: int | None = None
    void: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.classes)

    @property
    def splits(self) -> dict[str, Split]:
        """The three splits by name."""
        return {"train": self.train, "holdout": self.holdout, "test": self.test}


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
    if not 0 <= holdout < 1:
        raise AttarError(f"The hold-out must be a fraction from 0 to below 1, not {holdout}.")
    if task == "segmentation":
        return _open_masked()
    origin = _open_origin(str(name), root, Path(data_root or root / "torchvision"), image_column, label_column)
    _check(origin)
    if not 0 <= holdout < 1:
        raise AttarError(f"The hold-out must be a fraction from 0 to below 1, not {holdout}.")
    size = _trained_size(image_size, *_native_size(origin.train))
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
        held_out = _part(train, "holdout", np.arange(0))
    mean, std = _statistics(found, train.rows)
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


def _native_size(reader: Reader) -> tuple[tuple[int, int], bool, int]:
    """Return the most common size among evenly spaced images, whether they differ, and the median shorter side."""
    probed = np.unique(np.linspace(0, len(reader) - 1, _PROBED).astype(int))
    sizes = [size for row in probed if (size := _probe(reader, int(row))) is not None]
    if not sizes:
        return (1, 1), False, 1  # all damaged: the scan says so and names one
    counts = Counter(sizes)
    return counts.most_common(1)[0][0], len(counts) > 1, int(np.median([min(size) for size in sizes]))


def _probe(reader: Reader, row: int) -> tuple[int, int] | None:
    try:
        return native_size(reader.read(row))
    except BadImageError:
        return None


def _trained_size(
    asked: int | tuple[int, int] | None, native: tuple[int, int], mixed: bool, median_side: int
) -> tuple[int, int]:
    if asked is not None:
        size = (asked, asked) if isinstance(asked, int) else (asked[0], asked[1])
        if min(size) < 1:
            raise AttarError(f"The image size must be at least 1 pixel a side, not {asked}.")
        return size
    if not mixed:
        return native if max(native) <= CACHED_UP_TO else (_LARGE_SIZE, _LARGE_SIZE)
    side = min(median_side, _LARGE_SIZE)
    return side, side


def _split(name: str, reader: Reader, found: Scan, size: tuple[int, int]) -> Split:
    rows = np.arange(len(found.rows))
    return Split(name, size, found.pixels, reader, rows, reader.targets[found.rows], found.rows, len(reader))


def _part(split: Split, name: str, positions: NDArray[np.int64]) -> Split:
    rows, targets, index = split.rows[positions], split.targets[positions], split.index[positions]
    return Split(name, split.image_size, split.pixels, split.reader, rows, targets, index, split.index_bound)


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
    return _part(split, split.name, np.sort(kept)), _part(split, name, np.sort(cut))


def _statistics(found: Scan, rows: NDArray[np.int64]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    mean, square = found.moments[rows].mean(axis=0) / np.array([[255.0], [255.0**2]])
    # A constant channel has no deviation to divide by; one grey level is the smallest that 8 bits can show.
    std = np.sqrt(np.maximum(square - mean**2, (1 / 255) ** 2))
    return (float(mean[0]), float(mean[1]), float(mean[2])), (float(std[0]), float(std[1]), float(std[2]))


def _fingerprint(classes: tuple[str, ...], parts: list[tuple[Scan, Split]]) -> str:
    pieces: list[bytes | NDArray[np.generic]] = ["\0".join(classes).encode()]
    for found, split in parts:
        pieces += [str(len(split)).encode(), found.digests[split.rows], split.targets]
    return digest(pieces)
