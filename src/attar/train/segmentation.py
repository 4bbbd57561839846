"""Measuring a network that answers for every pixel: mean IoU, pixel accuracy, likelihood, calibration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from attar.data import EvalLoader, Normalization, Split
from attar.tasks import Task
from attar.train.distributed import Ranks
from attar.train.predictions import Archive

__all__ = ["PixelPredictions", "SegmentationMetrics", "measure_pixels"]

_BINS = 15
# Logits of one evaluation batch, in numbers: the batches, and so the numbers, depend on the images' size alone.
_BATCH_LOGITS = 1 << 24


@dataclass(frozen=True)
class SegmentationMetrics:
    """What a network does on N images with M valid pixels; void pixels count nowhere.

    Attributes:
        images: N.
        pixels: M.
        miou: mean over classes of intersection over union, `|found and true| / |found or true|`, pixels counted over
            all images; classes that neither the network nor the labels name are left out.
        pixel_accuracy: share of valid pixels whose highest logit is the label's.
        class_iou: intersection over union of every class; None where it occurs nowhere.
        nll: mean over valid pixels of -log p(label), in nats.
        calibration_error: expected difference of confidence and accuracy over 15 equal bins of confidence (Guo et al.,
            ICML 2017), over valid pixels, in 0..1.
    """

    primary: ClassVar[str] = "miou"

    images: int
    pixels: int
    miou: float
    pixel_accuracy: float
    class_iou: tuple[float | None, ...]
    nll: float
    calibration_error: float

    @property
    def score(self) -> float:
        """What a hold-out chooses by."""
        return self.miou

    def as_dict(self) -> dict[str, Any]:
        """Return the metrics by name."""
        return {**dataclasses.asdict(self), "class_iou": list(self.class_iou)}


@dataclass(frozen=True)
class PixelPredictions(Archive):
    """The answers for the N images of a split, in the split's order, as counts of valid pixels.

    Attributes:
        common: [N, K] int64, pixels of class k that are found as k.
        labelled: [N, K] int64, pixels of class k.
        found: [N, K] int64, pixels that are found as class k.
        nll: [N] float64, sums of -log p(label) in nats.
    """

    common: NDArray[np.int64]
    labelled: NDArray[np.int64]
    found: NDArray[np.int64]
    nll: NDArray[np.float64]


def measure_pixels(
    network: nn.Module, split: Split, normalization: Normalization, task: Task, ranks: Ranks
) -> tuple[SegmentationMetrics, PixelPredictions]:
    """Measure a network in evaluation mode, in float32, every image of the split exactly once over all processes.

    Everything is a sum of counts over images, so that uneven shares of the processes give the same numbers.
    """
    classes, device = task.num_classes, ranks.device
    counts = torch.zeros(3, len(split), classes, dtype=torch.int64, device=device)
    losses = torch.zeros(len(split), dtype=torch.float64, device=device)
    bins = torch.zeros(3, _BINS, dtype=torch.float64, device=device)
    batch = max(1, _BATCH_LOGITS // (classes * split.image_size[0] * split.image_size[1]))
    loader = EvalLoader(split, batch, normalization, device)
    loader.batches = loader.batches[ranks.rank :: ranks.world]
    modes = {module: module.training for module in network.modules()}
    network.eval()
    # Autotuned kernels may differ from run to run.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for (images, targets, _), positions in zip(loader, loader.batches, strict=True):
            logits = task.logits(network(images)).float()
            valid = task.valid(targets)
            assert valid is not None
            labels = targets.where(valid, 0)
            confidence, found = torch.softmax(logits, dim=1).max(dim=1)
            part = slice(int(positions[0]), int(positions[-1]) + 1)
            counts[:, part] = _counts(labels, found, valid, classes)
            loss = F.cross_entropy(logits, labels, reduction="none") * valid
            losses[part] = loss.sum(dim=(1, 2), dtype=torch.float64)
            bins += _binned(confidence[valid], (found == labels)[valid])
    for module, mode in modes.items():
        module.training = mode
    # Every image is one process's, and zero in all others.
    counts, losses, bins = ranks.sum(counts), ranks.sum(losses), ranks.sum(bins)
    common, labelled, found = counts
    answers = PixelPredictions(*(values.cpu().numpy() for values in (common, labelled, found, losses)))
    return _metrics(counts.sum(dim=1).cpu(), losses.sum().item(), bins.cpu(), len(split)), answers


def _counts(labels: Tensor, found: Tensor, valid: Tensor, classes: int) -> Tensor:
    """Return [3, n, K]: the pixels that are common, labelled and found, of every image and class."""
    image = torch.arange(len(labels), device=labels.device).view(-1, 1, 1) * classes
    both = valid & (labels == found)
    which = ((labels, both), (labels, valid), (found, valid))
    size = len(labels) * classes
    return torch.stack(
        [torch.bincount((image + index)[mask], minlength=size).view(-1, classes) for index, mask in which]
    )


def _binned(confidence: Tensor, right: Tensor) -> Tensor:
    """Return [3, bins]: how many answers are in each bin of confidence, their confidence and how many are right."""
    index = (confidence * _BINS).long().clamp(max=_BINS - 1)
    parts = (torch.ones_like(confidence), confidence, right)
    return torch.stack([torch.bincount(index, part.double(), minlength=_BINS) for part in parts])


def _metrics(counts: Tensor, nll: float, bins: Tensor, images: int) -> SegmentationMetrics:
    common, labelled, found = counts
    union = labelled + found - common
    iou = [int(c) / int(u) if u else None for c, u in zip(common, union, strict=True)]
    present = [share for share in iou if share is not None]
    pixels = int(labelled.sum())
    answers, confident, right = bins
    return SegmentationMetrics(
        images=images,
        pixels=pixels,
        miou=sum(present) / max(len(present), 1),
        pixel_accuracy=int(common.sum()) / max(pixels, 1),
        class_iou=tuple(iou),
        nll=nll / max(pixels, 1),
        calibration_error=float((confident - right).abs().sum() / answers.sum().clamp(min=1)),
    )
