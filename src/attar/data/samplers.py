"""Which images make up each step: stateless functions of (seed, epoch), so that a run resumes at any step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from attar.data.hashing import hash_counters
from attar.errors import AttarError
from attar.sampling import Balanced, ClassPairs, Overlapping, Sampling

__all__ = ["BalancedBatches", "OverlappingBatches", "Paired", "Sampler", "Shuffled", "make_sampler", "rank_slice"]

_ORDER, _PARTNER = 1, 6  # separate these draws from each other and from the augmentation's under the same seed


class Sampler(Protocol):
    """Chooses the images of every step; one object serves every rank and every epoch.

    An epoch is a sequence of global batches: arrays of positions 0..N-1 in the split. Each rank takes its own
    `rank_slice` of a batch, so a batch's length must be divisible by the number of ranks.

    Attributes:
        batch: images a step over all ranks, as the user counts them.
        groups: how many equally long parts a batch has that belong together image by image.
    """

    batch: int
    groups: int

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""

    def epoch(self, epoch: int) -> Sequence[NDArray[np.int64]]:
        """Return the batches of `epoch`, a function of the sampler's arguments and `epoch` alone."""


class Shuffled:
    """Every image once an epoch, in an order that is a function of (seed, epoch).

    Definition: positions sorted by `hash(seed, epoch, position)`, cut into consecutive batches.

    Args:
        num_samples: N, images in the split.
        batch: images a step over all ranks; when it exceeds N the step is the whole split.
        seed: seed of the order.
        drop_last: leave the last, smaller batch out; otherwise it is cut to a multiple of `world`.
        world: number of ranks that share a batch.

    Raises:
        AttarError: a batch that the ranks cannot share evenly, or fewer images than ranks.
    """

    groups = 1

    def __init__(self, num_samples: int, batch: int, seed: int, drop_last: bool = True, world: int = 1) -> None:
        if batch < 1 or batch % world:
            raise AttarError(
                f"A batch of {batch} cannot be shared evenly by {world} ranks: choose a multiple of {world}."
            )
        if num_samples < world:
            raise AttarError(f"{num_samples} training images cannot be shared by {world} ranks: use fewer ranks.")
        self.num_samples = num_samples
        self.batch = min(batch, num_samples - num_samples % world)
        self.seed = seed
        self.drop_last = drop_last
        self.world = world

    @property
    def _used(self) -> int:
        unit = self.batch if self.drop_last else self.world
        return self.num_samples - self.num_samples % unit

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return -(-self._used // self.batch)

    def epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the batches of `epoch`, each [batch] int64 (the last one maybe shorter)."""
        keys = hash_counters(self.seed, _ORDER, epoch, np.arange(self.num_samples))
        order = np.argsort(keys, kind="stable").astype(np.int64)[: self._used]
        return [order[start : start + self.batch] for start in range(0, len(order), self.batch)]


class Paired(Shuffled):
    """Batches of `Shuffled`, each followed by as many partners: for every image one of its class.

    Definition: the partner of the image at position i is the `hash(seed, epoch, i) mod n_c`-th of the n_c images of its
    class, itself included.

    Args:
        targets: [N] class of every image.
        batch: B, images a step over all ranks, partners not counted.
        seed: seed of order and partners.
        drop_last: as in `Shuffled`.
        world: as in `Shuffled`.

    Raises:
        AttarError: as `Shuffled`.
    """

    groups = 2

    def __init__(
        self, targets: NDArray[np.int64], batch: int, seed: int, drop_last: bool = True, world: int = 1
    ) -> None:
        super().__init__(len(targets), batch, seed, drop_last, world)
        self._targets = targets
        self._members = np.argsort(targets, kind="stable")
        self._counts = np.bincount(targets)
        self._starts = np.cumsum(self._counts) - self._counts

    def epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the batches of `epoch`, each [2 B] int64: B images, then their partners."""
        words = hash_counters(self.seed, _PARTNER, epoch, np.arange(self.num_samples))
        drawn = (words % self._counts[self._targets].astype(np.uint64)).astype(np.int64)
        partners = self._members[self._starts[self._targets] + drawn]
        return [np.concatenate([batch, partners[batch]]) for batch in super().epoch(epoch)]


class BalancedBatches:
    """P classes with K images each, in an order that depends on (seed, epoch) alone.

    Definition: the images of every class are shuffled and cut into groups of K, what is left over sits the epoch out.
    Every batch takes a group of each of the P classes that have most groups left, ties in random order, so that the
    classes run out together.

    Args:
        targets: [N] class of every image.
        batch: images a step over all ranks, at most: P K with P = batch / K, or with all classes where there are fewer.
        instances: K, at least.
        seed: seed of the order.
        world: number of ranks that share a batch.

    Raises:
        AttarError: a batch that the ranks cannot share evenly or that holds fewer than two classes, or a class with
            fewer than K images, which would never be seen.
    """

    groups = 1

    def __init__(self, targets: NDArray[np.int64], batch: int, instances: int, seed: int, world: int = 1) -> None:
        present, counts = np.unique(targets, return_counts=True)
        classes = min(batch // instances, len(present))
        if classes < 2:
            raise AttarError(
                f"A batch of {batch} does not hold 2 classes of {instances} images each: choose a larger batch."
            )
        if counts.min() < instances:
            raise AttarError(
                f"A class has {counts.min()} training images, fewer than the {instances} that a balanced batch holds "
                "of each: choose fewer instances."
            )
        # Few classes fill the batch with more images each, as far as the smallest class goes.
        self.instances = max(instances, min(batch // classes, int(counts.min())))
        self.batch = classes * self.instances
        if self.batch % world:
            raise AttarError(
                f"A batch of {classes} classes with {self.instances} images cannot be shared evenly by {world} ranks: "
                "choose another batch."
            )
        self.classes, self.seed, self.world = classes, seed, world
        self._targets, self._labels = targets, present
        self._left = counts // self.instances
        # How many there are does not depend on how ties are broken.
        self.steps_per_epoch = len(self._plan(np.zeros(len(present), dtype=np.uint64)))

    def _plan(self, ties: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
        """Return the classes of every batch."""
        left = self._left.copy()
        plan: list[NDArray[np.int64]] = []
        while True:
            chosen = np.lexsort((ties, -left))[: self.classes]
            if left[chosen[-1]] == 0:
                return plan
            left[chosen] -= 1
            plan.append(chosen)
            ties = np.roll(ties, 1)

    def epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the batches of `epoch`, each [P K] int64, class after class."""
        keys = hash_counters(self.seed, _ORDER, epoch, np.arange(len(self._targets)))
        shuffled = np.argsort(keys, kind="stable")
        members = [shuffled[self._targets[shuffled] == label] for label in self._labels]
        ties = hash_counters(self.seed, _PARTNER, epoch, np.arange(len(members)))
        used = np.zeros(len(members), dtype=np.int64)
        batches = []
        for chosen in self._plan(ties):
            parts = []
            for number in chosen:
                start = used[number] * self.instances
                parts.append(members[number][start : start + self.instances])
                used[number] += 1
            batches.append(np.concatenate(parts))
        # Classes that have many images come first in the plan: the order of the batches must not tell.
        order = np.argsort(hash_counters(self.seed, _PARTNER, epoch, len(members) + np.arange(len(batches))))
        return [batches[number] for number in order]


class OverlappingBatches:
    """Every image twice an epoch: new in one batch, repeated in the next.

    Definition: the order of `Shuffled` is cut into halves h_0, h_1, ... of B/2 images; batch t is h_t, then h_(t-1).
    Before h_0 stands the last half of the epoch before; in the first epoch, its own last half.

    Args:
        num_samples: N.
        batch: B, images a step over all ranks, the repeated ones counted; even.
        seed: seed of the order.
        world: number of ranks that share a batch.

    Raises:
        AttarError: a batch whose halves the ranks cannot share evenly.
    """

    groups = 2

    def __init__(self, num_samples: int, batch: int, seed: int, world: int = 1) -> None:
        if batch % (2 * world):
            raise AttarError(
                f"A batch of {batch} has no two halves that {world} ranks can share: choose a multiple of {2 * world}."
            )
        self._halves = Shuffled(num_samples, batch // 2, seed, drop_last=True, world=world)
        self.batch = 2 * self._halves.batch
        self.steps_per_epoch = self._halves.steps_per_epoch

    def epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the batches of `epoch`, each [B] int64: new images, then those of the batch before."""
        halves = self._halves.epoch(epoch)
        before = self._halves.epoch(max(epoch - 1, 0))[-1]
        return [np.concatenate(pair) for pair in zip(halves, [before, *halves], strict=False)]


def make_sampler(
    sampling: Sampling | None, targets: NDArray[np.int64], batch: int, seed: int, drop_last: bool = True, world: int = 1
) -> Sampler:
    """Return the sampler that draws batches as a method asks.

    Args:
        sampling: what the method asks for.
        targets: [N] class of every training image.
        batch: images a step over all ranks, partners not counted.
        seed: seed of the order.
        drop_last: leave the last, smaller batch out, where there is one.
        world: number of ranks that share a batch.

    Raises:
        AttarError: images, batch and ranks do not fit together.
    """
    match sampling:
        case None:
            return Shuffled(len(targets), batch, seed, drop_last, world)
        case ClassPairs():
            return Paired(targets, batch, seed, drop_last, world)
        case Balanced(instances):
            return BalancedBatches(targets, batch, instances, seed, world)
        case Overlapping():
            return OverlappingBatches(len(targets), batch, seed, world)


def rank_slice(batch: NDArray[np.int64], rank: int, world: int, groups: int = 1) -> NDArray[np.int64]:
    """Return the part of a global batch that `rank` works on: the rank-th of `world` equal, contiguous pieces.

    Concatenating the pieces in rank order gives the batch of one process, which is what makes losses that gather over
    ranks comparable with those of one process. A batch of several groups of equal length (images and partners) is
    shared group by group, so that what belongs together stays together.

    Raises:
        AttarError: a group is not divisible by the number of ranks.
    """
    if len(batch) % (groups * world):
        raise AttarError(f"A batch of {len(batch)} cannot be shared evenly by {world} ranks: choose a multiple.")
    return batch.reshape(groups, world, -1)[:, rank].reshape(-1)
