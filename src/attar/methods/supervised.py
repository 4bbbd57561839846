"""Supervised: plain training with the regularisers that every comparison needs beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.anatomy import Anatomy, Tap
from attar.errors import AttarError
from attar.method import Batch, Method, Outputs, Probe

__all__ = ["Supervised"]


class Supervised(Method):
    """Supervised training with label smoothing, Mixup and CutMix: the baselines a distillation method must beat.

    Definition: the targets of every cross-entropy of the run become `(1 - e) q + e / K`, with q one-hot or, under
    mixing, `lambda q_a + (1 - lambda) q_b` for the mixed image `lambda x_a + (1 - lambda) x_b` (Mixup) or x_a with a
    box of share 1 - lambda from x_b (CutMix), lambda ~ Beta(a, a) once per batch. It adds no term of its own.

    Shapes: images [N, C, H, W], targets [N] -> [N, K]. Data: one view, any sampler. With both mixings each batch takes
    one of them, at even odds.

    Cost: none. Deployed: nothing.

    When it helps: label smoothing nearly always a little; Mixup and CutMix in long trainings of networks with
    capacity to spare, rarely in short ones or for very small networks.

    Args:
        label_smoothing: e in [0, 1).
        mixup: Mixup's a; 0 is off, 0.2 usual.
        cutmix: CutMix's a; 0 is off, 1.0 usual.

    Raises:
        AttarError: a value out of range.

    Sources: Szegedy et al., CVPR 2016; Zhang et al., "mixup", ICLR 2018; Yun et al., "CutMix", ICCV 2019. Mixing is
    torchvision's; it draws from torch's global generator and breaks the graph of a compiled step.
    """

    def __init__(self, *, label_smoothing: float = 0.0, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise AttarError(f"Label smoothing must lie in [0, 1), not {label_smoothing}.")
        if mixup < 0 or cutmix < 0:
            raise AttarError(f"Mixup and CutMix must not be negative, but are {mixup} and {cutmix}.")
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.cutmix = cutmix
        if label_smoothing or mixup or cutmix:
            self.claims = {"targets": "Supervised smooths or mixes them"}
        if mixup or cutmix:
            self.breaks = frozenset({"labels"})
        self._num_classes = 0

    def build(self, probe: Probe) -> None:
        """Remember the number of classes."""
        self._num_classes = probe.task.num_classes

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """None."""
        return ()

    def prepare(self, batch: Batch) -> Batch:
        """Mix the images and soften the targets."""
        if not self.training or not (self.label_smoothing or self.mixup or self.cutmix):
            return batch
        labels = batch.labels
        if labels is None:
            raise AttarError("Supervised needs class indices as targets to smooth or mix them.")
        if self.mixup or self.cutmix:
            images, targets = _mix(batch.images, labels, self._num_classes, self.mixup, self.cutmix)
            batch = dataclasses.replace(batch, images=images, targets=targets, labels=None)
        else:
            one_hot = F.one_hot(labels, self._num_classes).to(batch.images.dtype)
            batch = dataclasses.replace(batch, targets=one_hot)
        smoothed = batch.targets * (1.0 - self.label_smoothing) + self.label_smoothing / self._num_classes
        return dataclasses.replace(batch, targets=smoothed)

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """No term: the student's own supervised loss already uses the prepared targets."""
        return {}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _mix(images: Tensor, labels: Tensor, num_classes: int, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    from torchvision.transforms import v2

    choices = []
    if mixup:
        choices.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix:
        choices.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    mixed, targets = v2.RandomChoice(choices)(images, labels)
    return mixed, targets
