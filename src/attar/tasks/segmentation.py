"""Semantic segmentation: a class for every pixel, some of which are void."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.errors import AttarError
from attar.functional import full_precision
from attar.tasks.task import Task

__all__ = ["Segmentation"]

# What networks call their answer where they return several: torchvision, Hugging Face.
_MAIN = ("out", "logits")


class Segmentation(Task):
    """Semantic segmentation: one of K classes for every pixel, some pixels void.

    Definition, over the valid pixels p (those whose label is not `ignore_index`), with weights v of the classes:
        L = - sum_p v_{y_p} log softmax(z_p)_{y_p} / sum_p v_{y_p} + dice_weight D
        D = 1 - (1/K') sum_k (2 sum_p softmax(z_p)_k [y_p = k] + 1) / (sum_p softmax(z_p)_k + sum_p [y_p = k] + 1)
    with the mean over the K' classes that the batch's labels hold, and labels smoothed as in `Classification`. A batch
    without a valid pixel has loss 0. Networks that return several answers (torchvision's dicts, tuples whose first
    entry counts) train all of them; `auxiliary_weight` multiplies the loss of each one after the first.

    Shapes: logits [N, K, H, W], as large as the images; masks [N, H, W] int64. Unit: nats (D has none).

    Args:
        num_classes: K, at least 2; void is none of them.
        ignore_index: the label of void pixels.
        class_weights: v, K positive numbers; default: ones.
        dice_weight: weight of the soft Dice loss D.
        auxiliary_weight: weight of the loss of every auxiliary answer.

    Raises:
        AttarError: fewer than two classes, weights of another number, an ignore_index that is a class, logits that are
            not [N, K, H, W].

    Sources: Milletari, Navab, Ahmadi, "V-Net", 3DV 2016 (Dice); Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017
    (auxiliary answers with weight 0.4).
    """

    name: ClassVar[str] = "segmentation"
    dense: ClassVar[bool] = True

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        *,
        class_weights: Sequence[float] | None = None,
        dice_weight: float = 0.0,
        auxiliary_weight: float = 0.4,
    ) -> None:
        if num_classes < 2:
            raise AttarError(f"Segmentation needs at least two classes, not {num_classes}.")
        if 0 <= ignore_index < num_classes:
            raise AttarError(
                f"The void label {ignore_index} is one of the {num_classes} classes: choose an ignore_index outside."
            )
        if class_weights is not None and (len(class_weights) != num_classes or min(class_weights) <= 0):
            raise AttarError(f"Give {num_classes} positive class weights, one for each class.")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.class_weights = tuple(class_weights) if class_weights is not None else None
        self._weights = torch.tensor(self.class_weights) if self.class_weights is not None else None
        self.dice_weight = dice_weight
        self._auxiliary_weight = auxiliary_weight

    @property
    def auxiliary_weight(self) -> float:
        """What multiplies the supervised loss of every auxiliary answer."""
        return self._auxiliary_weight

    def logits(self, output: object, network: str = "student") -> Tensor:
        """Return the tensor itself, entry "out" or "logits" of a dict, or the first entry of a tuple."""
        found = output
        if isinstance(output, Mapping):
            found = next((output[name] for name in _MAIN if name in output), None)
        elif isinstance(output, tuple | list) and output:
            found = output[0]
        if not isinstance(found, Tensor):
            raise AttarError(
                f"The {network} returns a {type(output).__name__} without logits [N, {self.num_classes}, H, W]: "
                "let it return them alone, as the first of a tuple, or as 'out' of a dict."
            )
        return found

    def auxiliary(self, output: object) -> Mapping[str, Tensor]:
        """Return the other answers [N, K, h, w] of a dict or tuple, brought bilinearly to the size of the logits."""
        if isinstance(output, Mapping):
            others = {str(name): value for name, value in output.items() if name not in _MAIN}
        elif isinstance(output, tuple | list):
            others = {f"aux{number}": value for number, value in enumerate(output[1:], 1)}
        else:
            return {}
        size = self.logits(output).shape[-2:]
        found = {}
        for name, value in others.items():
            if isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] == self.num_classes:
                same = value.shape[-2:] == size
                found[name] = value if same else F.interpolate(value, size, mode="bilinear", align_corners=False)
        return found

    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean over valid pixels of the cross-entropy, and the Dice loss where it has a weight."""
        logits = full_precision(logits)
        if self._weights is not None and self._weights.device != logits.device:
            # Once: a copy from the host in every step would wait for the device.
            self._weights = self._weights.to(logits.device)
        weights = self._weights.to(logits.dtype) if self._weights is not None else None
        total = F.cross_entropy(
            logits,
            targets,
            weights,
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=label_smoothing,
        )
        valid = targets != self.ignore_index
        if weights is None:
            count = valid.sum().clamp(min=1)
        else:
            count = (weights[targets.where(valid, 0)] * valid).sum().clamp(min=min(self.class_weights or (1.0,)))
        loss = total / count
        return loss + self.dice_weight * self._dice(logits, targets, valid) if self.dice_weight else loss

    def _dice(self, logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        truth = F.one_hot(targets.where(valid, 0), self.num_classes).permute(0, 3, 1, 2) * valid[:, None]
        found = torch.softmax(logits, dim=1) * valid[:, None]
        common, predicted, labelled = ((found * truth), found, truth.to(found.dtype))
        common, predicted, labelled = (part.sum(dim=(0, 2, 3)) for part in (common, predicted, labelled))
        present = labelled > 0
        dice = (2 * common + 1) / (predicted + labelled + 1)
        return ((1 - dice) * present).sum() / present.sum().clamp(min=1)

    def check_logits(self, output: object, network: str = "student", *, size: tuple[int, int] | None = None) -> None:
        """Refuse a network whose logits are not [N, num_classes, H, W], as large as its images."""
        logits = self.logits(output, network)
        height, width = size if size is not None else ("H", "W")
        if logits.ndim != 4 or logits.shape[1] != self.num_classes:
            raise AttarError(
                f"The {network} returns {list(logits.shape)} instead of [N, {self.num_classes}, {height}, {width}]: "
                f"give a segmentation network with num_classes={self.num_classes}."
            )
        if size is not None and tuple(logits.shape[-2:]) != tuple(size):
            raise AttarError(
                f"The {network} returns logits of {logits.shape[-2]}x{logits.shape[-1]} for images of "
                f"{height}x{width}: let it bring them to the images' size (bilinear), as it is to be deployed."
            )

    def check_targets(self, targets: Tensor) -> None:
        """Refuse masks that hold anything but classes and void (synchronises with the device: not for the step)."""
        if targets.ndim != 3 or targets.is_floating_point():
            raise AttarError(f"Masks must be [N, H, W] integers, not {list(targets.shape)} of {targets.dtype}.")
        wrong = (targets != self.ignore_index) & ((targets < 0) | (targets >= self.num_classes))
        if bool(wrong.any()):
            raise AttarError(
                f"Masks must hold 0..{self.num_classes - 1} or {self.ignore_index} for void, but hold "
                f"{int(targets[wrong][0])}: check the class count and the ignore_index."
            )

    def valid(self, targets: Tensor) -> Tensor:
        """Return which pixels are not void, [N, H, W]."""
        return targets != self.ignore_index

    def __repr__(self) -> str:
        return f"Segmentation(num_classes={self.num_classes}, ignore_index={self.ignore_index})"
