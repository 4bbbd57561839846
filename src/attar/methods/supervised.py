"""Supervised: plain training with the regularisers that every comparison needs beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.anatomy import Anatomy, Tap
from attar.errors import AttarError
from attar.method import Batch, Method, Outputs, Probe
from attar.tasks import Task

__all__ = ["Supervised"]


class Supervised(Method):
    """Supervised training with label smoothing, Mixup and CutMix: the baselines a distillation method must beat.

    Definition: the targets of every cross-entropy of the run become `(1 - e) q + e / K`, with q one-hot or, under
    mixing, `lambda q_a + (1 - lambda) q_b` for the mixed image `lambda x_a + (1 - lambda) x_b` (Mixup) or x_a with a
    box of share 1 - lambda from x_b (CutMix), lambda ~ Beta(a, a) once per batch. It adds no term of its own.

    Dense tasks have label smoothing alone, of the student's own cross-entropy (its auxiliary answers' among it, not
    those of branches or peers) over valid pixels: `(1 - e) CE(z, y) + e U`, U the cross-entropy from the uniform
    distribution over classes, which is the term `uniform`.

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
        AttarError: a value out of range, or mixing in a dense task.

    Sources: Szegedy et al., CVPR 2016; Zhang et al., "mixup", ICLR 2018; Yun et al., "CutMix", ICCV 2019. Mixing is
    torchvision's; it draws from torch's global generator and breaks the graph of a compiled step.
    """

    not_dense = ""

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
            self.not_dense = "Mixup and CutMix mix the labels of whole images, and the pixels of a mask have their own"
            self.breaks = frozenset({"labels"})
        self._num_classes = 0
        self._dense_task: Task | None = None

    def build(self, probe: Probe) -> None:
        """Remember the number of classes, and a dense task."""
        self._num_classes = probe.task.num_classes
        self._dense_task = probe.task if probe.task.dense else None

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """None."""
        return ()

    def prepare(self, batch: Batch) -> Batch:
        """Mix the images and soften the targets."""
        if not self.training or self._smooths_pixels or not (self.label_smoothing or self.mixup or self.cutmix):
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
        """Return `uniform` in dense tasks, else nothing: the student's own loss already uses the prepared targets."""
        task = self._dense_task
        if task is None or not self._smooths_pixels:
            return {}
        uniform = task.loss(outputs.logits, batch.targets, label_smoothing=1.0)
        for logits in outputs.auxiliary.values():
            uniform = uniform + task.auxiliary_weight * task.loss(logits, batch.targets, label_smoothing=1.0)
        return {"uniform": uniform}

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        return {"uniform": self.label_smoothing} if self._smooths_pixels else {}

    def task_weight(self, progress: Tensor) -> float | Tensor:
        """1, in dense tasks 1 - e."""
        return 1.0 - self.label_smoothing if self._smooths_pixels else 1.0

    @property
    def _smooths_pixels(self) -> bool:
        return self.training and self._dense_task is not None and self.label_smoothing > 0


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
