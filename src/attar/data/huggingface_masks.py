"""Hugging Face `datasets` with masks: parquet files and hub ids with an image column and a mask column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attar.data.huggingface import HuggingFaceReader, Tables, encoded, find_image_column, load_hub, load_parquet
from attar.data.masks import ClassNames, MaskedOrigin, mask_coding
from attar.errors import AttarError, unknown_name

__all__ = ["open_masked_hub", "open_masked_parquet"]

_MASK_COLUMNS = ("mask", "annotation", "label", "segmentation")
_VALIDATION_SPLITS = ("validation", "val", "valid")


class _Reader(HuggingFaceReader):
    """One split of images and masks."""

    def __init__(self, dataset: Any, split: str, column: str, mask_column: str, key: str) -> None:
        from datasets import Image

        dataset = dataset.cast_column(mask_column, Image(decode=False))
        super().__init__(dataset, split, column, np.zeros(len(dataset), np.int64), key)
        self.mask_column = mask_column
        self._masks: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_masks": None}

    def mask_name(self, row: int) -> str:
        """Return for example `mask of row 17 of train` with the file name that the table gives, if any."""
        path = self._mask_cell(row)["path"]
        return f"mask of row {row} of {self.split}" + (f" ('{path}')" if path else "")

    def read_mask(self, row: int) -> bytes:
        """Return the encoded mask."""
        return encoded(self._mask_cell(row))

    def _mask_cell(self, row: int) -> Mapping[str, Any]:
        if self._masks is None:
            self._masks = self.dataset.with_format("arrow")[:][self.mask_column]
        return self._masks[row].as_py() or {"bytes": None, "path": None}


def open_masked_parquet(
    directory: Path,
    cache: Path,
    image_column: str | None,
    mask_column: str | None,
    classes: ClassNames,
    ignore_index: int | None,
) -> MaskedOrigin:
    """Return the parquet files of `directory`; classes are named by a `classes.json` beside them.

    Raises:
        AttarError: as `load_parquet` and `mask_coding`, or columns that cannot be told.
    """
    tables, beside = load_parquet(directory, cache), directory / "classes.json"
    return _origin(f"parquet:{directory}", tables, beside, image_column, mask_column, classes, ignore_index)


def open_masked_hub(
    name: str, image_column: str | None, mask_column: str | None, classes: ClassNames, ignore_index: int | None
) -> MaskedOrigin:
    """Return a hub data set; classes are named by `classes`, or by a column that lists an image's classes.

    Raises:
        AttarError: as `load_hub` and `mask_coding`, or columns that cannot be told.
    """
    return _origin(f"hf:{name}", load_hub(name), None, image_column, mask_column, classes, ignore_index)


def _origin(
    name: str,
    tables: Tables,
    beside: Path | None,
    image_column: str | None,
    mask_column: str | None,
    classes: ClassNames,
    ignore_index: int | None,
) -> MaskedOrigin:
    splits, key = tables
    train_name = "train" if "train" in splits else next(iter(splits))
    if train_name in ("test", *_VALIDATION_SPLITS):
        raise AttarError(f"'{name}' has no train split, only {', '.join(splits)}: training needs one.")
    features = splits[train_name].features
    mask = _mask_column(name, features, mask_column, image_column)
    image = find_image_column({column: kind for column, kind in features.items() if column != mask}, image_column)
    if classes is None and not (beside is not None and beside.is_file()):
        classes = _listed(features)
    names, coding = mask_coding(classes, beside, ignore_index)

    def reader(*candidates: str) -> _Reader | None:
        split = next((split for split in candidates if split in splits and _has_masks(splits[split], mask)), None)
        return None if split is None else _Reader(splits[split], split, image, mask, f"{key(splits[split])}/{split}")

    train = reader(train_name)
    if train is None:
        raise AttarError(f"The {train_name} split of '{name}' has no masks in column '{mask}': fill it.")
    return MaskedOrigin(name, names, coding, train, reader(*_VALIDATION_SPLITS), reader("test"))


def _mask_column(name: str, features: Mapping[str, Any], asked: str | None, image_column: str | None) -> str:
    from datasets import Image

    if asked is not None and asked not in features:
        raise unknown_name("column", asked, features)
    images = [column for column, kind in features.items() if isinstance(kind, Image) and column != image_column]
    candidates = _MASK_COLUMNS if asked is None else (asked,)
    found = next((column for column in candidates if column in images), None)
    if found is None:
        what = "has no column of masks" if asked is None else f"has no images in column '{asked}'"
        raise AttarError(
            f"'{name}' {what} (its columns are {', '.join(features)}): segmentation needs one mask image for each "
            "image, in the column that mask_column names."
        )
    return found


def _has_masks(split: Any, column: str) -> bool:
    """Say whether any image has a mask; an empty split is left for the caller to refuse."""
    # Hub data sets often publish their test images without masks: those cannot measure anything.
    cells = split.with_format("arrow")[:][column]
    return len(split) == 0 or bool(cells.null_count < len(split))


def _listed(features: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the class names of the one column that lists classes; a single label says nothing about pixels."""
    from datasets import ClassLabel

    kinds = [getattr(feature, "feature", None) for feature in features.values()]
    lists = [kind for kind in kinds if isinstance(kind, ClassLabel)]
    return tuple(lists[0].names) if len(lists) == 1 else None
