"""Batches on the device, prepared ahead: training batches from any step on, evaluation batches in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attar.data.augment import Augmentation, Draws, Normalization, crop_flip, crop_flip_torch, finish
from attar.data.images import Pixels
from attar.data.joint import JOINT_AUGMENTATIONS, JointAugmentation, JointDraws, Placed, finish_joint, place
from attar.data.joint_workers import decoded_pairs
from attar.data.masks import MaskedReader
from attar.data.prefetch import prefetch
from attar.data.samplers import Sampler, rank_slice
from attar.data.sources import Split
from attar.data.workers import Item, decoded_batches, default_workers
from attar.errors import AttarError

__all__ = ["EvalLoader", "Loader", "Sample"]

_RESIDENT_BYTES = 2 << 30  # a uint8 data set up to here is copied to the GPU whole

Indices = NDArray[np.int64]
MeanStd = tuple[tuple[float, ...], tuple[float, ...]]


class Sample(NamedTuple):
    """One rank's part of one step.

    Attributes:
        images: [V*N, C, H, W] float32, channels-last, normalised; the N images of view 0, then those of view 1, ...
        targets: [V*N] int64 class indices, in the same order; in segmentation [V*N, H, W] int64 masks, void being
            `VOID`.
        index: [V*N] int64 numbers of the images in the original data (`Split.index`).
    """

    images: Tensor
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody wants here


class Loader:
    """Training batches of one rank, augmented, on the device, a function of (seed, epoch, step) alone.

    Small images are gathered and augmented by one background thread (on a GPU: by the GPU, and a data set of up to
    2 GiB lies there whole); large ones are decoded by worker processes. Nothing draws from torch's random state.
    Masks go the same ways as their images.

    Args:
        split: the images.
        sampler: chooses the global batch of every step; this rank takes its `rank_slice`.
        augmentation: what to do to each image; for images with masks, a `JointAugmentation`.
        normalization: the student's input normalisation, or its (mean, std), usually those of the source.
        device: where batches are wanted.
        rank: this process among those that share each batch.
        world: how many those are.
        views: V, independently augmented versions of each image.
        seed: seed of the augmentation.
        cycle: after so many epochs the augmentations come again, in another order of the images; None: never.
        workers: processes that decode large images; default: one per processor, at most 8. 0 decodes in this process.
        depth: batches prepared ahead.

    Raises:
        AttarError: an empty split, or an augmentation that is not for its kind of images.
    """

    def __init__(
        self,
        split: Split,
        sampler: Sampler,
        augmentation: Augmentation | JointAugmentation,
        normalization: Normalization | MeanStd,
        device: torch.device | str = "cpu",
        *,
        rank: int = 0,
        world: int = 1,
        views: int = 1,
        seed: int = 0,
        cycle: int | None = None,
        workers: int | None = None,
        depth: int = 2,
    ) -> None:
        if isinstance(augmentation, JointAugmentation) != (split.coding is not None):
            kinds = ("images without masks", "images with masks")
            this, other = kinds if isinstance(augmentation, Augmentation) else kinds[::-1]
            raise AttarError(
                f"The augmentation '{augmentation.name}' is for {this}, but the {split.name} split has {other}: take "
                "it from augmentation(name, task) of the data's task."
            )
        self.split = split
        self.sampler = sampler
        self.augmentation = augmentation
        self.normalization = _normalization(normalization)
        self.rank = rank
        self.world = world
        self.views = views
        self.seed = seed
        self.cycle = cycle
        self.depth = depth
        self.workers = default_workers(world) if workers is None else workers
        self._images = _Images(split, torch.device(device))

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return self.sampler.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Sample]:
        """Iterate over the batches of `epoch` from `start_step` on: exactly those an uninterrupted epoch has left.

        Raises:
            AttarError: a batch that the ranks cannot share evenly, or a large image that can no longer be read.
        """
        parts = self._parts(epoch, start_step)
        drawn = epoch if self.cycle is None else epoch % self.cycle
        if self.split.pixels is None:
            return self._from_workers(parts, drawn)
        return prefetch((self._sample(part, drawn) for part in parts), self.depth)

    def numbers(self, epoch: int, start_step: int = 0) -> list[Indices]:
        """Return the numbers [N] (`Split.index`) of the images of every step that `epoch` would yield, of one view."""
        return [self.split.index[part] for part in self._parts(epoch, start_step)]

    def _parts(self, epoch: int, start_step: int) -> list[Indices]:
        groups = self.sampler.groups
        return [rank_slice(batch, self.rank, self.world, groups) for batch in self.sampler.epoch(epoch)[start_step:]]

    def _sample(self, positions: Indices, epoch: int) -> Sample:
        positions, draws = self._views(positions, epoch)
        pixels = self._images.gather(self.split.rows[positions])
        if isinstance(draws, JointDraws):
            masks = self._images.gather_masks(self.split.rows[positions])
            placed = place(torch.as_tensor(pixels), masks, draws, self.normalization.mean)
            return self._images.sample(positions, finish_joint(placed, draws, self.normalization), placed.masks)
        cropped = crop_flip_torch(pixels, draws) if isinstance(pixels, Tensor) else crop_flip(pixels, draws)
        return self._images.sample(positions, finish(cropped, draws, self.normalization))

    def _views(self, positions: Indices, epoch: int) -> tuple[Indices, Draws | JointDraws]:
        """Return the positions repeated view after view, and what to do to each."""
        view = np.repeat(np.arange(self.views), len(positions))
        positions = np.tile(positions, self.views)
        index = self.split.index[positions]
        if isinstance(self.augmentation, JointAugmentation):
            return positions, self.augmentation.draw(self.seed, epoch, index, view)
        return positions, self.augmentation.draw(self.split.image_size, self.seed, epoch, index, view)

    def _from_workers(self, parts: Sequence[Indices], epoch: int) -> Iterator[Sample]:
        plan: list[list[Item]] = [
            [(int(index), epoch, view) for view in range(self.views) for index in self.split.index[positions]]
            for positions in parts
        ]
        if isinstance(self.augmentation, JointAugmentation):
            pairs = self._images.pairs(plan, self.augmentation, self.seed, self.normalization.mean, self.workers)
            for part, placed in zip(parts, pairs, strict=True):
                positions, draws = self._views(part, epoch)
                assert isinstance(draws, JointDraws)
                yield self._images.sample(positions, finish_joint(placed, draws, self.normalization), placed.masks)
            return
        decoded = decoded_batches(
            self.split.reader,
            plan,
            self.split.image_size,
            self.augmentation,
            self.seed,
            workers=self.workers,
            pin_memory=self._images.device.type == "cuda",
        )
        for part, batch in zip(parts, decoded, strict=True):
            positions, draws = self._views(part, epoch)  # the crop and flip in it were for small images
            assert isinstance(draws, Draws)
            yield self._images.sample(positions, finish(self._images.received(batch), draws, self.normalization))


class EvalLoader:
    """Every image of a split exactly once over all ranks, in order, not augmented, normalised as in training.

    Rank r iterates over the r-th of `world` contiguous parts whose sizes differ by at most one: no image is padded in
    or seen twice, so sums over ranks are exact. Ranks may have unequal numbers of batches (none, for fewer images than
    ranks). Large images with masks are resized just to cover the student's size, as small images always are.

    Args:
        split: the images.
        batch: images a batch on this rank.
        normalization: the student's input normalisation, or its (mean, std).
        device: where batches are wanted.
        rank: this process among those that share the split.
        world: how many those are.
        workers: processes that decode large images; default: one per processor, at most 8. 0 decodes in this process.
        depth: batches prepared ahead.

    Raises:
        AttarError: an empty split.
    """

    def __init__(
        self,
        split: Split,
        batch: int,
        normalization: Normalization | MeanStd,
        device: torch.device | str = "cpu",
        *,
        rank: int = 0,
        world: int = 1,
        workers: int | None = None,
        depth: int = 2,
    ) -> None:
        self.split = split
        self.normalization = _normalization(normalization)
        self.depth = depth
        self.workers = default_workers(world) if workers is None else workers
        mine = np.array_split(np.arange(len(split)), world)[rank]
        self.batches = [mine[start : start + batch] for start in range(0, len(mine), batch)]
        self._images = _Images(split, torch.device(device))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Sample]:
        if self.split.pixels is None:
            return self._from_workers()
        return prefetch((self._sample(positions) for positions in self.batches), self.depth)

    def _sample(self, positions: Indices) -> Sample:
        pixels = self._images.gather(self.split.rows[positions])
        masks = None if self.split.coding is None else self._images.gather_masks(self.split.rows[positions])
        return self._images.sample(positions, finish(pixels, None, self.normalization), masks)

    def _from_workers(self) -> Iterator[Sample]:
        plan: list[list[Item]] = [
            [(int(index), 0, 0) for index in self.split.index[positions]] for positions in self.batches
        ]
        if self.split.coding is not None:
            unchanged, mean = JOINT_AUGMENTATIONS["none"], self.normalization.mean
            pairs = self._images.pairs(plan, unchanged, 0, mean, self.workers)
            for positions, placed in zip(self.batches, pairs, strict=True):
                images = placed.images if placed.images.is_cuda else placed.images.numpy()
                yield self._images.sample(positions, finish(images, None, self.normalization), placed.masks)
            return
        decoded = decoded_batches(
            self.split.reader,
            plan,
            self.split.image_size,
            None,
            0,
            workers=self.workers,
            pin_memory=self._images.device.type == "cuda",
        )
        for positions, batch in zip(self.batches, decoded, strict=True):
            yield self._images.sample(positions, finish(self._images.received(batch), None, self.normalization))


def _normalization(given: Normalization | MeanStd) -> Normalization:
    return given if isinstance(given, Normalization) else Normalization(*given)


class _Images:
    """The pixels of one split as near to the device as they fit, and the way from there to a `Sample`."""

    def __init__(self, split: Split, device: torch.device) -> None:
        if len(split) == 0:
            raise AttarError(f"The {split.name} split is empty: choose another one, or set images aside for it.")
        self.split = split
        self.device = device
        self.resident: Tensor | None = None
        self.resident_masks: Tensor | None = None
        if device.type != "cpu" and split.pixels is not None and split.pixels.nbytes <= _RESIDENT_BYTES:
            self.resident = torch.from_numpy(np.array(split.pixels)).to(device)
            if split.masks is not None:
                self.resident_masks = torch.from_numpy(np.array(split.masks)).to(device)

    def gather(self, rows: Indices) -> Pixels | Tensor:
        """Return uint8 [N, H, W, C]: an array when training is on the CPU, else a tensor on the device."""
        if self.resident is not None:
            return self.resident.index_select(0, self._move(torch.from_numpy(rows)))
        assert self.split.pixels is not None
        return self.received(torch.from_numpy(self.split.pixels[rows]))

    def gather_masks(self, rows: Indices) -> Tensor:
        """Return uint8 [N, H, W] on the device."""
        if self.resident_masks is not None:
            return self.resident_masks.index_select(0, self._move(torch.from_numpy(rows)))
        assert self.split.masks is not None
        return self._move(torch.from_numpy(self.split.masks[rows]))

    def pairs(
        self,
        plan: Sequence[Sequence[Item]],
        augmentation: JointAugmentation,
        seed: int,
        mean: tuple[float, ...],
        workers: int,
    ) -> Iterator[Placed]:
        """Yield large images and their masks, decoded by workers, on the device."""
        assert self.split.coding is not None
        for images, masks, boxes in decoded_pairs(
            cast(MaskedReader, self.split.reader),
            self.split.coding,
            plan,
            self.split.image_size,
            augmentation,
            seed,
            mean,
            workers=workers,
            pin_memory=self.device.type == "cuda",
        ):
            yield Placed(self._move(images), self._move(masks), boxes)

    def received(self, pixels: Tensor) -> Pixels | Tensor:
        """Take images from the CPU's memory towards the device."""
        return pixels.numpy() if self.device.type == "cpu" else self._move(pixels)

    def sample(self, positions: Indices, images: Tensor, masks: Tensor | None = None) -> Sample:
        """Add labels, or uint8 masks [N, H, W], and numbers to the images at `positions`."""
        targets, index = (torch.from_numpy(values[positions]) for values in (self.split.targets, self.split.index))
        if masks is not None:
            return Sample(images, masks.long(), self._move(index))
        return Sample(images, self._move(targets), self._move(index))

    def _move(self, values: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return values.to(self.device)
        # Asynchronous only from pinned memory; torch keeps the pinned block until the copy is done.
        return (values if values.is_pinned() else values.pin_memory()).to(self.device, non_blocking=True)
