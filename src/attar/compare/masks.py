"""What students answer for a few test images, pixel by pixel: kept beside the run, for the report to show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from attar.data import EvalLoader, Normalization, Split
from attar.data.images import Pixels
from attar.train.evaluate import make_task
from attar.train.predictions import Archive
from attar.train.student import Student

__all__ = ["MASKS", "Masks", "answer_masks", "spread_positions"]

MASKS = "masks.npz"


@dataclass(frozen=True)
class Masks(Archive):
    """A student's answers for n test images, with the images and the truth.

    Attributes:
        positions: [n] int64, of the images in the test split.
        images: [n, H, W, 3] uint8, as the student sees them.
        truth: [n, H, W] uint8 classes, `VOID` where there is none.
        found: [n, H, W] uint8, the classes of the highest logits.
    """

    is_kept_as: ClassVar[str] = "as masks: delete it and compare again."

    positions: NDArray[np.int64]
    images: Pixels
    truth: Pixels
    found: Pixels


def spread_positions(images: int, count: int) -> NDArray[np.int64]:
    """Return the positions of `count` images spread evenly over a split: their number decides, and nothing else."""
    wanted = min(count, images)
    return np.floor((np.arange(wanted) + 0.5) * images / wanted).astype(np.int64)


def answer_masks(student: Student, shown: Split, positions: NDArray[np.int64]) -> Masks:
    """Let a student answer for images, in evaluation mode, in float32.

    Args:
        student: of segmentation.
        shown: the n images and their masks, decoded.
        positions: [n], of the images in the test split.
    """
    assert shown.pixels is not None
    assert shown.masks is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = student.network.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    task, normalization = make_task(student.task, len(student.classes)), Normalization(student.mean, student.std)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        found = [
            task.logits(network(images)).float().argmax(dim=1).to(torch.uint8).cpu().numpy()
            for images, _, _ in EvalLoader(shown, 1, normalization, device)
        ]
    return Masks(
        positions, np.array(shown.pixels[shown.rows]), np.array(shown.masks[shown.rows]), np.concatenate(found)
    )
