"""Teachers: frozen networks that answer, and never learn, move or get saved with the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.errors import AttarError
from attar.tasks import Task

__all__ = ["Memory", "Normalization", "Teacher"]


class Normalization(NamedTuple):
    """Per-channel mean and standard deviation of images in [0, 1]: a network sees `(x - mean) / std`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Memory(Protocol):
    """What a teacher has answered before."""

    def read(self, index: Tensor, views: int) -> Tensor:
        """Return the logits [V*N, K] for the images `index` [V*N], view after view, as they look in this epoch."""


class Teacher:
    """A frozen network, always in evaluation mode and without gradient, with its own input conventions.

    It is deliberately no `nn.Module`: set as an attribute of a method it stays out of `parameters()`, `state_dict()`,
    distributed buckets and `.train()`.

    Args:
        network: returns logits [N, K]; in dense tasks [N, K, H, W], which come back at the student's size.
        normalization: the mean and std that the network was trained with; images that arrive normalised for the
            student are re-normalised. None: the network takes the student's images as they are.
        image_size: side of the images the network wants; others are resized (bilinear). None: any size.
        name: how errors and reports call it.
    """

    def __init__(
        self,
        network: nn.Module,
        normalization: Normalization | Sequence[Sequence[float]] | None = None,
        image_size: int | None = None,
        name: str = "teacher",
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.normalization = Normalization(*map(tuple, normalization)) if normalization is not None else None
        self.image_size = image_size
        self.name = name
        self.memory: Memory | None = None
        self._scale: Tensor | None = None
        self._shift: Tensor | None = None
        self._task: Task | None = None

    def adapt(self, student: Normalization | None, like: Tensor, task: Task | None = None) -> None:
        """Learn how the student's images are normalised, and move to the device and precision of `like`.

        Args:
            student: how the student's images are normalised.
            like: an image batch on the student's device.
            task: finds the logits among what the network returns; None: it returns nothing else.
        """
        self._task = task
        self.network.to(device=like.device, dtype=like.dtype)
        self._scale = self._shift = None
        if self.normalization is None or student is None or student == self.normalization:
            return
        channels = {len(self.normalization.mean), len(student.mean)}
        if len(channels) > 1:
            raise AttarError(
                f"The {self.name} is normalised over {len(self.normalization.mean)} channels and the student over "
                f"{len(student.mean)}: give both the same number of channels."
            )
        mean_s, std_s, mean_t, std_t = (
            torch.tensor(v, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
            for v in (*student, *self.normalization)
        )
        self._scale, self._shift = std_s / std_t, (mean_s - mean_t) / std_t

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the teacher's logits [N, K] for images normalised for the student."""
        size = images.shape[-2:]
        if self._scale is not None and self._shift is not None:
            images = images * self._scale + self._shift
        if self.image_size is not None and images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, size=(self.image_size, self.image_size), mode="bilinear", antialias=True)
        output = self.network(images)
        logits: Tensor = output if self._task is None else self._task.logits(output, self.name)
        if logits.ndim == 4 and logits.shape[-2:] != size:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits

    def answer(self, images: Tensor, index: Tensor | None = None, views: int = 1) -> Tensor:
        """Return the logits [V*N, K] for the images of a batch: from `memory` where a run has given it one.

        Args:
            images: [V*N, C, H, W], as the data augmentation left them (not mixed, not turned by a method).
            index: [V*N] sample numbers, as in `Batch.index`.
            views: V.
        """
        return self(images) if self.memory is None or index is None else self.memory.read(index, views)

    def apply(self, fn: Callable[..., Any]) -> None:
        """Follow a method to another device or precision."""
        self.network._apply(fn)  # type: ignore[no-untyped-call]
        if self._scale is not None and self._shift is not None:
            self._scale, self._shift = fn(self._scale), fn(self._shift)
