"""What a network answered for every single image of a split: the raw material of every comparison."""

from __future__ import annotations

import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from attar.errors import AttarError
from attar.train.files import write_atomically

__all__ = ["Archive", "Predictions"]


class Archive:
    """A frozen dataclass of arrays that is kept as one NumPy archive."""

    # What the file is, and what to do about a damaged one: the ends of a sentence.
    is_kept_as: ClassVar[str] = "as predictions: is this a finished run's folder?"

    def save(self, path: Path) -> None:
        """Write a NumPy archive atomically."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{field.name: getattr(self, field.name) for field in fields(self)})  # type: ignore[arg-type]
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            AttarError: the file is missing or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                return cls(**{field.name: stored[field.name] for field in fields(cls)})  # type: ignore[arg-type]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise AttarError(f"'{path}' cannot be read {cls.is_kept_as}") from error


@dataclass(frozen=True)
class Predictions(Archive):
    """The answers for the N images of a split, in the split's order.

    Attributes:
        targets: [N] int64, the labels.
        predicted: [N] int64, the classes of the highest logits.
        confidence: [N] float32, probabilities of `predicted`.
        nll: [N] float32, -log p(label) in nats.
    """

    targets: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]
    nll: NDArray[np.float32]
