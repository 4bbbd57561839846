"""What the entries of a comparison are compared by: top-1 of images, mean IoU of masks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attar.tasks import Classification, Segmentation
from attar.train.evaluate import Metrics
from attar.train.predictions import Predictions
from attar.train.segmentation import PixelPredictions, SegmentationMetrics

__all__ = ["CLASSIFICATION", "SEGMENTATION", "Primary", "primary", "resolution"]


@dataclass(frozen=True)
class Primary:
    """The metric that contrasts, verdicts and the choice on the hold-out are about.

    It is a share in 0..1, of which more is better; its differences are told in points, hundredths of it.

    Attributes:
        task: whose it is (`TrainSpec.task`).
        key: as in `result.json` and in the report's files.
        title: as in tables.
        name: as in sentences.
        dense: whether there is one answer per pixel.
    """

    task: str
    key: str
    title: str
    name: str
    dense: bool


CLASSIFICATION = Primary(Classification.name, Metrics.primary, "Top-1", "top-1", Classification.dense)
SEGMENTATION = Primary(Segmentation.name, SegmentationMetrics.primary, "mIoU", "mIoU", Segmentation.dense)


def primary(task: str) -> Primary:
    """Return what runs of a task are compared by."""
    return next(one for one in (CLASSIFICATION, SEGMENTATION) if one.task == task)


def resolution(answers: Predictions | PixelPredictions) -> float:
    """Return the granularity of the primary metric on the images that were answered, as `contrast` asks for it.

    Definition: a count rounds the share it stands for by an error of deviation `1 / (N sqrt(12))`, N what is counted.
    An accuracy counts N images. The mean IoU of K classes is a mean of K shares, class k counting at least its L_k
    labelled pixels; independent errors of deviation `1 / (L_k sqrt(12))` make one of `resolution / sqrt(12)` with
    `resolution = sqrt(sum_k 1 / L_k^2) / K`, which is 1 / N for one share of N.

    Why not the effect of a whole image: the floor is about what the numbers cannot tell, and one pixel moves a mean
    IoU, whereas nothing smaller than an image moves an accuracy. What other test images would say, no test of seeds
    tells, in either task.
    """
    if isinstance(answers, PixelPredictions):
        pixels = [int(count) for count in answers.labelled.sum(axis=0) if count]
        return math.sqrt(sum(count**-2 for count in pixels)) / len(pixels) if pixels else 0.0
    return 1 / len(answers.targets)
