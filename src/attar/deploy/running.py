"""A loaded artefact as a network, so that attar's own evaluation measures it; real images for it to answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attar.data import EvalLoader, Normalization, Split
from attar.deploy.artefact import Logits
from attar.tasks import Task
from attar.train.distributed import Ranks
from attar.train.evaluate import Metrics, measure
from attar.train.predictions import Predictions
from attar.train.segmentation import PixelPredictions, SegmentationMetrics

__all__ = ["PIXELS", "Measured", "load_images", "measure_runtime", "some_of"]

# A normalisation that leaves pixels what they are: x * 1 + 0.
PIXELS = Normalization((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
_SMALLEST = 1e-30
_BATCH = 64


class _Running(nn.Module):
    """Answers tensors through a runtime, and tells how many images it has answered."""

    def __init__(
        self, answer: Callable[[NDArray[Any]], Logits], packaged: bool, told: Callable[[int], None] | None
    ) -> None:
        super().__init__()
        self._answer, self._packaged, self._told = answer, packaged, told
        self.found: list[NDArray[np.uint8 | np.int64]] = []

    def forward(self, images: Tensor) -> Tensor:
        shown = images.numpy()
        answer = torch.from_numpy(np.array(self._answer(as_pixels(shown) if self._packaged else shown)))
        if self._told is not None:
            self._told(len(images))
        named = answer.argmax(dim=1)
        # One byte a pixel: all test images' classes are kept.
        self.found.append((named.to(torch.uint8) if named.ndim > 1 else named).numpy())
        # Logarithms of probabilities are logits with the same softmax.
        return answer.clamp_min(_SMALLEST).log() if self._packaged else answer


class Measured(NamedTuple):
    """What a runtime does on the images of a split.

    Attributes:
        metrics: over all of them.
        predictions: for every single one.
        found: the classes it names, [N], in dense tasks [N, H, W] uint8.
    """

    metrics: Metrics | SegmentationMetrics
    predictions: Predictions | PixelPredictions
    found: NDArray[Any]


def measure_runtime(
    answer: Callable[[NDArray[Any]], Logits],
    split: Split,
    normalization: Normalization,
    task: Task,
    *,
    packaged: bool = False,
    told: Callable[[int], None] | None = None,
) -> Measured:
    """Measure an artefact exactly as `attar evaluate` measures a network, on the CPU.

    Args:
        answer: the loaded artefact (or anything else that answers arrays of images).
        split: the images.
        normalization: of the network's images.
        task: what the answers mean.
        packaged: the artefact takes uint8 [N, H, W, 3] and gives probabilities.
        told: is called with how many images have been answered, batch by batch.
    """
    running = _Running(answer, packaged, told)
    ranks = Ranks(0, 1, torch.device("cpu"))
    metrics, predictions = measure(running, split, PIXELS if packaged else normalization, task, ranks=ranks)
    return Measured(metrics, predictions, np.concatenate(running.found))


def as_pixels(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return images [N, 3, H, W] in 0..255 as uint8 [N, H, W, 3]."""
    return np.ascontiguousarray(np.rint(images).astype(np.uint8).transpose(0, 2, 3, 1))


def some_of(split: Split, count: int) -> Split:
    """Return `count` evenly spaced images of a split, or all where it has fewer."""
    if count >= len(split):
        return split
    chosen = np.linspace(0, len(split) - 1, count).round().astype(np.int64)
    rows, targets, index = split.rows[chosen], split.targets[chosen], split.index[chosen]
    return dataclasses.replace(split, rows=rows, targets=targets, index=index)


def load_images(split: Split, normalization: Normalization) -> NDArray[np.float32]:
    """Return all images of a split, prepared as for evaluation: float32 [N, 3, H, W], contiguous."""
    batches = [sample.images.contiguous().numpy() for sample in EvalLoader(split, _BATCH, normalization)]
    return np.concatenate(batches)
