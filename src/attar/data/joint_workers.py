"""Large images and their masks: decoded, scaled and cropped one by one in worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from attar.data.images import fit
from attar.data.joint import JointAugmentation, Placed, place_one
from attar.data.masks import MaskCoding, MaskedReader, fit_mask, read_pair
from attar.data.workers import Item
from attar.errors import AttarError

__all__ = ["decoded_pairs"]


def decoded_pairs(
    reader: MaskedReader,
    coding: MaskCoding,
    batches: Sequence[Sequence[Item]],
    size: tuple[int, int],
    augmentation: JointAugmentation,
    seed: int,
    mean: tuple[float, ...],
    *,
    workers: int,
    pin_memory: bool,
) -> Iterator[Placed]:
    """Yield each batch of items, images and masks as they are seen at `size` = (height, width).

    Raises:
        AttarError: an image or mask that has become unreadable, or another, since it was scanned.
    """
    loader = DataLoader(
        _Decoded(reader, coding, size, augmentation, seed, mean),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # otherwise it draws from, and so disturbs, the training's random state
    )
    for batch in loader:
        if isinstance(batch, AttarError):
            raise batch
        images, masks, boxes = batch
        yield Placed(images, masks, boxes.numpy())


class _Decoded(Dataset[Placed | AttarError]):
    def __init__(
        self,
        reader: MaskedReader,
        coding: MaskCoding,
        size: tuple[int, int],
        augmentation: JointAugmentation,
        seed: int,
        mean: tuple[float, ...],
    ) -> None:
        self.reader = reader
        self.coding = coding
        self.size = size
        self.augmentation = augmentation
        self.seed = seed
        self.mean = mean

    def __getitem__(self, item: Item) -> Placed | AttarError:
        index, epoch, view = item
        try:
            image, mask, _ = read_pair(self.reader, index, self.coding)
        except AttarError as error:  # returned: raised, its message would be the worker's traceback
            return error
        draws = self.augmentation.draw(self.seed, epoch, np.array([index]), view)
        if draws.scale is None:
            image, mask = fit(image, self.size), fit_mask(mask, self.size)
        pixels = torch.from_numpy(np.array(image))
        return place_one(pixels, torch.from_numpy(np.array(mask)), draws, 0, self.size, self.mean)


def _collate(pairs: list[Placed | AttarError]) -> tuple[Tensor, Tensor, Tensor] | AttarError:
    whole = []
    for pair in pairs:
        if isinstance(pair, AttarError):
            return pair
        whole.append(pair)
    boxes = torch.from_numpy(np.stack([pair.boxes for pair in whole], axis=1))
    return torch.stack([pair.images for pair in whole]), torch.stack([pair.masks for pair in whole]), boxes
