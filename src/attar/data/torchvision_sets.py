"""Data sets that torchvision downloads and holds as one array: CIFAR, SVHN, MNIST and its relatives, STL-10, USPS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attar.data.cache import is_storage_error
from attar.data.images import Pixels
from attar.data.reader import ArrayReader, Origin
from attar.errors import AttarError

__all__ = ["TORCHVISION_NAMES", "open_torchvision"]


@dataclass(frozen=True)
class _Set:
    class_name: str
    splits: bool = False  # takes split="train" rather than train=True
    mirrored: bool = True  # a mirrored image is as natural as the image (not so for digits and letters)


_SETS = {
    "cifar10": _Set("CIFAR10"),
    "cifar100": _Set("CIFAR100"),
    "fashion_mnist": _Set("FashionMNIST"),
    "kmnist": _Set("KMNIST", mirrored=False),
    "mnist": _Set("MNIST", mirrored=False),
    "stl10": _Set("STL10", splits=True),
    "svhn": _Set("SVHN", splits=True, mirrored=False),
    "usps": _Set("USPS", mirrored=False),
}
TORCHVISION_NAMES = tuple(_SETS)


def open_torchvision(name: str, root: Path) -> Origin:
    """Return the data set from its files under `root`, downloaded first when they are not there.

    Raises:
        AttarError: the files are neither there nor can they be downloaded.
    """
    known = _SETS[name]
    train = _load(name, known, root, train=True)
    test = _load(name, known, root, train=False)
    targets = _targets(train)
    classes = tuple(getattr(train, "classes", None) or [str(number) for number in range(int(targets.max()) + 1)])
    return Origin(
        name,
        classes,
        ArrayReader(f"{name} train", _pixels(train), targets),
        ArrayReader(f"{name} test", _pixels(test), _targets(test)),
        default_augmentation="crop-flip" if known.mirrored else "crop",
    )


def _load(name: str, known: _Set, root: Path, *, train: bool) -> Any:
    import torchvision.datasets

    which: dict[str, Any] = {"split": "train" if train else "test"} if known.splits else {"train": train}
    dataset = getattr(torchvision.datasets, known.class_name)
    try:
        try:
            return dataset(root, download=False, **which)
        except RuntimeError:  # the files are not there
            root.mkdir(parents=True, exist_ok=True)
            return dataset(root, download=True, **which)
    except (OSError, RuntimeError, EOFError) as error:
        if is_storage_error(error):
            raise AttarError(
                f"Cannot store {name} under '{root}' ({error}): free some space or choose another data root."
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise AttarError(
            f"Cannot download {name} ({reason}): connect this machine once, or put torchvision's files under '{root}'."
        ) from error


def _pixels(dataset: Any) -> Pixels:
    """Return [N, H, W] or [N, H, W, 3]; SVHN and STL-10 hold [N, 3, H, W]."""
    pixels = np.asarray(dataset.data)
    return pixels.transpose(0, 2, 3, 1) if pixels.ndim == 4 and pixels.shape[1] == 3 else pixels


def _targets(dataset: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    values = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return np.asarray(values, dtype=np.int64)
