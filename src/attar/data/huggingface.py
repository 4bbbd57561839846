"""Hugging Face `datasets`: local parquet files and hub ids, columns and class names found by themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attar.data.cache import is_storage_error
from attar.data.reader import Origin, stat_key
from attar.errors import AttarError, unknown_name

__all__ = [
    "HuggingFaceReader",
    "Tables",
    "encoded",
    "find_image_column",
    "load_hub",
    "load_parquet",
    "open_hub",
    "open_parquet",
]

Cell = Mapping[str, Any]
Tables = tuple[Mapping[str, Any], Callable[[Any], str]]  # splits by name, and the key of a split's images

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label", "labels", "target", "class")
_TEST_SPLITS = ("test", "validation", "val", "valid")


class HuggingFaceReader:
    """One split of a Hugging Face data set, read as encoded bytes straight from its memory-mapped table."""

    def __init__(self, dataset: Any, split: str, column: str, targets: NDArray[np.int64], key: str) -> None:
        from datasets import Image

        self.dataset = dataset.cast_column(column, Image(decode=False))
        self.split = split
        self.column = column
        self.targets = targets
        self.key = key
        self._cells: Any = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cells": None}  # the mapped table travels to a worker as its file, not as its bytes

    def name(self, row: int) -> str:
        """Return for example `row 17 of train` with the file name that the table gives, if any."""
        path = self._cell(row)["path"]
        return f"row {row} of {self.split}" + (f" ('{path}')" if path else "")

    def read(self, row: int) -> bytes:
        """Return the encoded image; images that the table only points to are read from their path."""
        return encoded(self._cell(row))

    def _cell(self, row: int) -> Cell:
        if self._cells is None:
            self._cells = self.dataset.with_format("arrow")[:][self.column]
        return self._cells[row].as_py() or {"bytes": None, "path": None}


def encoded(cell: Cell) -> bytes:
    """Return the encoded image of a table's cell; one that it only points to is read from its path."""
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    if cell["path"] and Path(cell["path"]).is_file():
        return Path(cell["path"]).read_bytes()
    return b""


def open_parquet(
    directory: Path, cache: Path, image_column: str | None = None, label_column: str | None = None
) -> Origin:
    """Return the parquet files of `directory`; splits are told by file or folder names as `datasets` does.

    Raises:
        AttarError: no such folder, no parquet files in it, damaged files, columns that cannot be told.
    """
    return _origin(f"parquet:{directory}", *load_parquet(directory, cache), image_column, label_column)


def load_parquet(directory: Path, cache: Path) -> Tables:
    """Return the tables of the parquet files under `directory`.

    Raises:
        AttarError: no such folder, no parquet files in it, damaged files.
    """
    if not directory.is_dir():
        raise AttarError(f"There is no folder '{directory}': give the folder that holds the parquet files.")
    files = sorted(directory.rglob("*.parquet"))
    if not files:
        raise AttarError(f"'{directory}' holds no .parquet files: give the folder that holds them.")
    # Our own cache, so that ATTAR_CACHE governs all the space that local files take.
    splits = _load(f"'{directory}'", "parquet", data_dir=str(directory.absolute()), cache_dir=str(cache / "parquet"))
    return splits, lambda _: stat_key(files)


def open_hub(name: str, image_column: str | None = None, label_column: str | None = None) -> Origin:
    """Return a hub data set by id, `owner/name` or `owner/name:configuration`.

    Raises:
        AttarError: unknown id, no connection, a configuration that must be chosen, columns that cannot be told.
    """
    return _origin(f"hf:{name}", *load_hub(name), image_column, label_column)


def load_hub(name: str) -> Tables:
    """Return the tables of a hub data set by id, `owner/name` or `owner/name:configuration`.

    Raises:
        AttarError: unknown id, no connection, a configuration that must be chosen.
    """
    path, _, configuration = name.partition(":")
    splits = _load(f"the Hugging Face data set '{path}'", path, configuration or None)

    def key(split: Any) -> str:
        return stat_key(Path(file["filename"]) for file in split.cache_files)

    return splits, key


def _load(what: str, *arguments: Any, **options: Any) -> Mapping[str, Any]:
    import datasets

    try:
        loaded: Mapping[str, Any] = datasets.load_dataset(*arguments, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        if is_storage_error(root):
            raise AttarError(
                f"Cannot store {what} ({root}): free some space, or point ATTAR_CACHE (parquet) or HF_HOME (hub) "
                "elsewhere."
            ) from error
        reason = (str(root).splitlines() or [type(root).__name__])[0].rstrip(".")
        raise AttarError(f"Cannot open {what} ({reason}): check the name, the files and the connection.") from error
    return loaded


def _origin(
    name: str,
    splits: Mapping[str, Any],
    key: Callable[[Any], str],
    image_column: str | None,
    label_column: str | None,
) -> Origin:
    train_name = "train" if "train" in splits else next(iter(splits))
    if train_name in _TEST_SPLITS:
        raise AttarError(f"'{name}' has no train split, only {', '.join(splits)}: training needs one.")
    train = splits[train_name]
    image = find_image_column(train.features, image_column)
    label = _label_column(train.features, label_column, image)
    classes, numbers = _classes(train, label)

    def reader(split: str) -> HuggingFaceReader:
        data = splits[split]
        return HuggingFaceReader(data, split, image, _targets(data, label, numbers, split), f"{key(data)}/{split}")

    tests = (reader(split) for split in _TEST_SPLITS if split in splits)
    # Hub data sets often publish their test images without labels, marked -1: those cannot measure anything.
    test = next((test for test in tests if len(test) == 0 or (test.targets >= 0).any()), None)
    return Origin(name, classes, reader(train_name), test)


def find_image_column(features: Mapping[str, Any], asked: str | None) -> str:
    """Return the column of the images, as asked or as it can be told."""
    from datasets import Image

    if asked is not None:
        if asked not in features:
            raise unknown_name("column", asked, features)
        return asked
    named = [column for column in _IMAGE_COLUMNS if column in features]
    images = named or [column for column, feature in features.items() if isinstance(feature, Image)]
    if len(images) != 1:
        raise AttarError(
            f"Cannot tell which of the columns {', '.join(features)} holds the images: name it with image_column."
        )
    return images[0]


def _label_column(features: Mapping[str, Any], asked: str | None, image: str) -> str:
    from datasets import ClassLabel

    if asked is not None:
        if asked not in features:
            raise unknown_name("column", asked, features)
        return asked
    labels = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    named = [column for column in _LABEL_COLUMNS if column in features and column != image]
    if len(labels) == 1:
        return labels[0]
    if not named:
        raise AttarError(
            f"Cannot tell which of the columns {', '.join(features)} holds the labels: name it with label_column."
        )
    return named[0]


def _classes(train: Any, label: str) -> tuple[tuple[str, ...], dict[str, int] | None]:
    """Return the class names, and for labels that are strings the number of each."""
    from datasets import ClassLabel

    feature = train.features[label]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names), None
    values = train.unique(label)
    if all(isinstance(value, str) for value in values):
        names = tuple(sorted(values))
        return names, {name: number for number, name in enumerate(names)}
    if all(isinstance(value, int) for value in values):
        return tuple(str(number) for number in range(max(values, default=-1) + 1)), None
    raise AttarError(
        f"Column '{label}' holds neither integers nor strings in every row: labels must be one or the other."
    )


def _targets(data: Any, label: str, numbers: dict[str, int] | None, split: str) -> NDArray[np.int64]:
    values = data.with_format("arrow")[:][label].to_pylist()  # of this column only: no image is decoded
    if numbers is not None:
        for row, value in enumerate(values):
            if value not in numbers:
                raise unknown_name(f"class (row {row} of {split})", str(value), numbers)
        values = [numbers[value] for value in values]
    if None in values:
        raise AttarError(f"Row {values.index(None)} of {split} has no label: fill column '{label}' or remove the row.")
    return np.array(values, dtype=np.int64)
