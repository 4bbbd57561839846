"""What opening a name gives: three splits of images, and what training must know about them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attar.data.images import BadImageError, Pixels, native_size
from attar.data.masks import MaskCoding
from attar.data.reader import Reader
from attar.data.scan import Scan
from attar.errors import AttarError

__all__ = ["Source", "Split", "asked_size", "native_sizes", "part", "refuse_columns", "statistics"]

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
        masks: in segmentation [M, H, W] uint8 class of each pixel, `VOID` where there is none, which `rows` point into
            as into `pixels`; None in classification and when images are decoded in workers. In segmentation `targets`
            are zeros, so that whatever draws by class draws at random.
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


def part(split: Split, name: str, positions: NDArray[np.int64]) -> Split:
    """Return the images at `positions` of a split as a split called `name`."""
    rows, targets, index = split.rows[positions], split.targets[positions], split.index[positions]
    return dataclasses.replace(split, name=name, rows=rows, targets=targets, index=index)


def statistics(found: Scan, rows: NDArray[np.int64]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return the per-channel mean and standard deviation, in 0..1, over the images at `rows`."""
    mean, square = found.moments[rows].mean(axis=0) / np.array([[255.0], [255.0**2]])
    # A constant channel has no deviation to divide by; one grey level is the smallest that 8 bits can show.
    std = np.sqrt(np.maximum(square - mean**2, (1 / 255) ** 2))
    return (float(mean[0]), float(mean[1]), float(mean[2])), (float(std[0]), float(std[1]), float(std[2]))


def asked_size(asked: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of what was asked for: one number means both.

    Raises:
        AttarError: a side below one pixel.
    """
    size = (asked, asked) if isinstance(asked, int) else (asked[0], asked[1])
    if min(size) < 1:
        raise AttarError(f"The image size must be at least 1 pixel a side, not {asked}.")
    return size


def refuse_columns(name: str, **columns: str | None) -> None:
    """Refuse columns of images that are no table.

    Raises:
        AttarError: naming the first that was given.
    """
    given = [option for option, column in columns.items() if column is not None]
    if given:
        raise AttarError(f"'{name}' is no table, only parquet:DIR and hf:owner/name are: leave {given[0]} out.")


def native_sizes(reader: Reader) -> tuple[tuple[int, int], bool, int]:
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
