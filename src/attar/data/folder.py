"""A folder of class folders: `DIR/cat/1.jpg`, or `DIR/train/cat/1.jpg` beside `DIR/test` or `DIR/val`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from attar.data.reader import FileReader, Origin
from attar.errors import AttarError, unknown_name

__all__ = ["list_images", "open_folder"]

_EXTENSIONS = frozenset([".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".pbm", ".bmp", ".gif", ".tif", ".tiff", ".webp"])
_TEST_NAMES = ("test", "val", "validation", "valid")


def open_folder(directory: Path) -> Origin:
    """Return the images of `directory`; classes are the sub-folders' names in sorted order.

    With a `train` folder in it that holds class folders, the test images come from `test`, else from `val`,
    `validation` or `valid`; otherwise all class folders are training data. Class folders are searched to any depth;
    hidden files and folders are passed over.

    Raises:
        AttarError: no images, images outside class folders, an empty class folder, a test class unknown to training,
            a folder that may not be read.
    """
    try:
        return _open(directory)
    except OSError as error:
        raise AttarError(f"Cannot read '{error.filename}' ({error.strerror}): make it readable.") from error


def _open(directory: Path) -> Origin:
    train = directory / "train"
    split = train.is_dir() and bool(_folders(train))
    root = train if split else directory
    class_folders = _folders(root)
    images = {folder.name: list_images(folder) for folder in class_folders}
    if not any(images.values()):
        loose = next((path for path in sorted(root.iterdir()) if path.suffix.lower() in _EXTENSIONS), None)
        if loose is not None:
            raise AttarError(
                f"'{root}' holds images but no class folders: move each image into a folder named after its class."
            )
        raise AttarError(f"'{root}' holds no images: give a folder with one sub-folder of images per class.")
    empty = next((name for name, paths in images.items() if not paths), None)
    if empty is not None:
        raise AttarError(f"Class folder '{root / empty}' holds no images: add some or remove the folder.")
    classes = tuple(images)
    return Origin(str(directory), classes, _reader(images, classes), _test(directory, classes) if split else None)


def _test(directory: Path, classes: tuple[str, ...]) -> FileReader | None:
    root = next((directory / name for name in _TEST_NAMES if (directory / name).is_dir()), None)
    if root is None:
        return None
    images = {folder.name: list_images(folder) for folder in _folders(root)}
    if not any(images.values()):
        raise AttarError(f"'{root}' holds no images in class folders: add some or remove the folder.")
    stranger = next((name for name in images if name not in classes), None)
    if stranger is not None:
        raise unknown_name(f"class (of '{root}', among the training classes)", stranger, classes)
    return _reader(images, classes)


def _reader(images: dict[str, list[Path]], classes: tuple[str, ...]) -> FileReader:
    paths = [path for name in images for path in images[name]]
    targets = np.repeat([classes.index(name) for name in images], [len(images[name]) for name in images])
    return FileReader(paths, targets)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def list_images(folder: Path) -> list[Path]:
    """Return the image files under `folder`, at any depth, sorted; hidden ones are passed over.

    Raises:
        OSError: a folder that may not be read.
    """
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [Path(parent, name) for name in files if Path(name).suffix.lower() in _EXTENSIONS and name[0] != "."]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error  # os.walk would otherwise pass over a folder it may not read
