"""How batches are to be drawn: what a method may ask of the data, in words that know no data."""

from __future__ import annotations

from dataclasses import dataclass

from attar.errors import AttarError

__all__ = ["Balanced", "ClassPairs", "Overlapping", "Sampling"]


@dataclass(frozen=True)
class ClassPairs:
    """Every image comes with another of its class, drawn anew each epoch from the whole training set.

    The partners stand in `Batch.partners`, in the order of the batch; an image may be its own partner, under another
    augmentation. A batch of B holds B images and B partners.
    """


@dataclass(frozen=True)
class Balanced:
    """P classes with K images each: every image has K - 1 others of its class in the batch.

    Attributes:
        instances: K. Where the data have fewer than B / K classes, all of them are in every batch, with more images
            each.
    """

    instances: int = 8

    def __post_init__(self) -> None:
        """Refuse batches without relations."""
        if self.instances < 2:
            raise AttarError(f"A balanced batch holds at least 2 images of a class, not {self.instances}.")


@dataclass(frozen=True)
class Overlapping:
    """The second half of every batch repeats the first half of the batch before, under another augmentation.

    So an epoch shows every image twice.
    """


Sampling = ClassPairs | Balanced | Overlapping
