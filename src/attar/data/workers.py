"""Large images: decoded and cropped one by one in worker processes, by draws fixed by (seed, epoch, image, view)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from attar.data.augment import Augmentation
from attar.data.hashing import hash_counters
from attar.data.images import BadImageError, decode, fit
from attar.data.reader import Reader

__all__ = ["Item", "decoded_batches", "default_workers"]

Item = tuple[int, int, int]  # (index of the image in the reader, epoch, view)

_LARGE = 3  # separates these draws from those of the order and of small images under the same seed
_EVALUATED_PART = 0.875  # evaluation sees the central 224 of 256, as is customary


def default_workers(world: int = 1) -> int:
    """Return how many worker processes a rank starts when `world` ranks share this machine: at most 8."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, processors // world))


def decoded_batches(
    reader: Reader,
    batches: Sequence[Sequence[Item]],
    size: tuple[int, int],
    augmentation: Augmentation | None,
    seed: int,
    *,
    workers: int,
    pin_memory: bool,
) -> Iterator[Tensor]:
    """Yield each batch of items as uint8 [N, H, W, 3]; `augmentation` None means the evaluation crop.

    Raises:
        BadImageError: an image that has become unreadable since it was scanned.
    """
    loader = DataLoader(
        _Decoded(reader, size, augmentation, seed),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # otherwise it draws from, and so disturbs, the training's random state
    )
    for batch in loader:
        if isinstance(batch, BadImageError):
            raise batch
        yield batch


class _Decoded(Dataset[Tensor | BadImageError]):
    def __init__(self, reader: Reader, size: tuple[int, int], augmentation: Augmentation | None, seed: int) -> None:
        self.reader = reader
        self.size = size
        self.augmentation = augmentation
        self.seed = seed

    def __getitem__(self, item: Item) -> Tensor | BadImageError:
        index = item[0]
        try:
            image = decode(self.reader.read(index), self.reader.name(index))
        except (
            BadImageError
        ) as error:  # returned, for a DataLoader would raise it with the worker's traceback as message
            return error
        image = self._evaluated(image) if self.augmentation is None else self._trained(image, self.augmentation, item)
        return torch.from_numpy(np.array(image))

    def _trained(self, image: Image.Image, augmentation: Augmentation, item: Item) -> Image.Image:
        from torchvision.transforms import v2

        index, epoch, view = item
        words = hash_counters(self.seed, _LARGE, epoch, view, index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(words[0] >> np.uint64(1)))
            image = (
                v2.RandomResizedCrop(self.size, antialias=True)(image) if augmentation.crop else fit(image, self.size)
            )
            return v2.RandomHorizontalFlip()(image) if augmentation.flip else image

    def _evaluated(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        image = fit(image, (round(height / _EVALUATED_PART), round(width / _EVALUATED_PART)))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


def _collate(images: list[Tensor | BadImageError]) -> Tensor | BadImageError:
    whole = []
    for image in images:
        if isinstance(image, BadImageError):
            return image
        whole.append(image)
    return torch.stack(whole)
