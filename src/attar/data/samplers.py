"""Which images make up each step: stateless functions of (seed, epoch), so that a run resumes at any step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from attar.data.hashing import hash_counters
from attar.errors import AttarError

__all__ = ["Sampler", "Shuffled", "rank_slice"]

_ORDER = 1  # separates the draws of the order from those of the augmentation under the same seed


class Sampler(Protocol):
    """Chooses the images of every step; one object serves every rank and every epoch.

    An epoch is a sequence of global batches: arrays of positions 0..N-1 in the split. Each rank takes its own
    `rank_slice` of a batch, so a batch's length must be divisible by the number of ranks.
    """

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


def rank_slice(batch: NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """Return the part of a global batch that `rank` works on: the rank-th of `world` equal, contiguous pieces.

    Concatenating the pieces in rank order gives the batch of one process, which is what makes losses that gather over
    ranks comparable with those of one process.

    Raises:
        AttarError: the batch is not divisible by the number of ranks.
    """
    if len(batch) % world:
        raise AttarError(f"A batch of {len(batch)} cannot be shared evenly by {world} ranks: choose a multiple.")
    share = len(batch) // world
    return batch[rank * share : (rank + 1) * share]
