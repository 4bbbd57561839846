"""Image classification: what labels, the supervised loss and the checks on both mean."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from attar.errors import AttarError
from attar.functional import full_precision
from attar.tasks.task import Task

__all__ = ["Classification"]


class Classification(Task):
    """Single-label image classification over K classes.

    Definition: `loss(z, y) = -(1/N) sum_n sum_k q_nk log softmax(z_n)_k`, where q is one-hot for class indices and
    the given row for soft targets, smoothed to `(1 - e) q + e / K` when `label_smoothing` is e.

    Shapes: logits [N, K]; targets [N] (int64 class indices) or [N, K] (rows that sum to one). Unit: nats.

    Args:
        num_classes: K, at least 2.

    Raises:
        AttarError: fewer than two classes, logits that are not [N, K], labels outside 0..K-1.
    """

    name: ClassVar[str] = "classification"
    dense: ClassVar[bool] = False

    def __init__(self, num_classes: int) -> None:
        if num_classes < 2:
            raise AttarError(f"Classification needs at least two classes, not {num_classes}.")
        self.num_classes = num_classes

    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the batch mean of the cross-entropy, computed in at least float32."""
        logits = full_precision(logits)
        if targets.is_floating_point():
            targets = targets.to(logits.dtype)
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)

    def logits(self, output: object, network: str = "student") -> Tensor:
        """Return the tensor itself: a classifier returns nothing else."""
        if not isinstance(output, Tensor):
            raise AttarError(
                f"The {network} returns a {type(output).__name__} instead of one logits tensor "
                f"[N, {self.num_classes}]: switch its auxiliary outputs off or wrap it so that it returns the logits "
                "alone."
            )
        return output

    def check_logits(self, output: object, network: str = "student", *, size: tuple[int, int] | None = None) -> None:
        """Refuse a network whose output is not one tensor [N, num_classes]."""
        wanted = f"[N, {self.num_classes}]"
        logits = self.logits(output, network)
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise AttarError(
                f"The {network} returns {list(logits.shape)} instead of {wanted}: "
                f"build it with num_classes={self.num_classes}."
            )

    def check_targets(self, targets: Tensor) -> None:
        """Refuse labels outside 0..K-1 (synchronises with the device: for data set-up, not for the step)."""
        if targets.is_floating_point():
            if targets.ndim != 2 or targets.shape[1] != self.num_classes:
                raise AttarError(f"Soft targets must be [N, {self.num_classes}], not {list(targets.shape)}.")
            return
        if targets.numel():
            low, high = int(targets.min()), int(targets.max())
            if low < 0 or high >= self.num_classes:
                raise AttarError(
                    f"Labels must lie in 0..{self.num_classes - 1}, but the data hold {low if low < 0 else high}: "
                    "check the class count and the label column."
                )

    def __repr__(self) -> str:
        return f"Classification(num_classes={self.num_classes})"
