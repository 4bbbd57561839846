"""Augmentation of images together with their masks: every draw is a function of (seed, epoch, image, view) alone.

Scaling and cropping are one resize of the stretch of the image that is seen; the mask takes the same stretch, each
pixel the class nearest to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attar.data.augment import AUGMENTATIONS, Augmentation, Normalization, inside, jitter, jitter_factors
from attar.data.hashing import uniform
from attar.data.images import covering
from attar.data.masks import VOID
from attar.errors import unknown_name

__all__ = [
    "JOINT_AUGMENTATIONS",
    "JointAugmentation",
    "JointDraws",
    "Placed",
    "augmentation",
    "finish_joint",
    "place",
    "place_one",
]

_JOINT = 8  # separates these draws from others of the same seed
# One stream per quantity, as for images alone.
_SCALE, _TOP, _LEFT, _FLIP, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(8)


@dataclass(frozen=True)
class JointAugmentation:
    """What is done to a training image and its mask.

    Attributes:
        name: how the command line calls it.
        scale: (s_0, s_1): both are resized by a factor uniform in [s_0, s_1], relative to the size at which the image
            just covers what the student sees, then cropped to that at a random place; what the image does not fill is
            the mean in the image and void in the mask. None: resized to cover, and the centre cropped.
        flip: both are mirrored left to right with probability 1/2.
        color: strength of the colour jitter of the image, as in `Augmentation`.
    """

    name: str
    scale: tuple[float, float] | None = None
    flip: bool = False
    color: float = 0.0

    @property
    def random(self) -> bool:
        """Whether an image ever looks otherwise than in the epoch before."""
        return self.scale is not None or self.flip or self.color > 0

    def draw(self, seed: int, epoch: int, index: NDArray[np.int64], view: NDArray[np.int64] | int) -> JointDraws:
        """Return what to do to images `index` [N] in one epoch; `view` is [N] or one."""
        unit = uniform(seed, _JOINT, epoch, view, index, np.arange(_HUE + 1)[:, None])
        scale = None
        if self.scale is not None:
            low, high = self.scale
            scale = low + (high - low) * unit[_SCALE]
        flip = unit[_FLIP] < 0.5 if self.flip else np.zeros(len(index), dtype=bool)
        factors = jitter_factors(unit[_BRIGHTNESS:], self.color) if self.color > 0 else None
        return JointDraws(scale, unit[_TOP], unit[_LEFT], flip, factors)


@dataclass(frozen=True)
class JointDraws:
    """What to do to N images and their masks.

    Attributes:
        scale: [N] factor, or None for no scaling and cropping.
        top: [N] where the crop lies in the image, or the image in the crop, in [0, 1): 0 is the highest place.
        left: [N] likewise from left to right.
        flip: [N] whether both are mirrored.
        factors: [4, N] brightness, contrast, saturation (factors) and hue (radians), or None.
    """

    scale: NDArray[np.float64] | None
    top: NDArray[np.float64]
    left: NDArray[np.float64]
    flip: NDArray[np.bool_]
    factors: NDArray[np.float64] | None


class Placed(NamedTuple):
    """Images and masks as they lie in the student's view.

    Attributes:
        images: [N, H, W, 3] uint8.
        masks: [N, H, W] uint8.
        boxes: [4, N] first row, end row, first column, end column that the image fills.
    """

    images: Tensor
    masks: Tensor
    boxes: NDArray[np.int64]


JOINT_AUGMENTATIONS: dict[str, JointAugmentation] = {
    preset.name: preset
    for preset in (
        JointAugmentation("none"),
        JointAugmentation("flip", flip=True),
        JointAugmentation("scale-crop-flip", scale=(0.5, 2.0), flip=True),
        JointAugmentation("strong", scale=(0.5, 2.0), flip=True, color=0.4),
    )
}


@overload
def augmentation(name: str, task: Literal["classification"] = "classification") -> Augmentation: ...
@overload
def augmentation(name: str, task: Literal["segmentation"]) -> JointAugmentation: ...
@overload
def augmentation(name: str, task: str) -> Augmentation | JointAugmentation: ...
def augmentation(name: str, task: str = "classification") -> Augmentation | JointAugmentation:
    """Return the augmentation called `name` of a task: of images with masks for `segmentation`.

    Raises:
        AttarError: no such name; the nearest one is suggested.
    """
    if task == "segmentation":
        if name not in JOINT_AUGMENTATIONS:
            raise unknown_name("augmentation for segmentation", name, JOINT_AUGMENTATIONS)
        return JOINT_AUGMENTATIONS[name]
    if name not in AUGMENTATIONS:
        raise unknown_name("augmentation", name, AUGMENTATIONS)
    return AUGMENTATIONS[name]


def place(images: Tensor, masks: Tensor, draws: JointDraws, mean: tuple[float, ...]) -> Placed:
    """Scale, crop and mirror N images of one size, on their device.

    Args:
        images: [N, H, W, 3] uint8.
        masks: [N, H, W] uint8.
        draws: what to do to each.
        mean: per-channel mean in 0..1, which fills what an image leaves empty.
    """
    if draws.scale is None and not draws.flip.any():
        height, width = masks.shape[1:]
        return Placed(images, masks, np.tile([[0], [height], [0], [width]], len(masks)))
    size = (masks.shape[1], masks.shape[2])
    placed = [place_one(images[n], masks[n], draws, n, size, mean) for n in range(len(masks))]
    return Placed(
        torch.stack([one.images for one in placed]),
        torch.stack([one.masks for one in placed]),
        np.stack([one.boxes for one in placed], axis=1),
    )


def place_one(
    image: Tensor, mask: Tensor, draws: JointDraws, n: int, size: tuple[int, int], mean: tuple[float, ...]
) -> Placed:
    """Scale, crop and mirror one image [h, w, 3] and its mask [h, w] by the n-th draws, to `size` = (height, width)."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    if draws.scale is None:
        top, left, box = (0, mask.shape[0]), (0, mask.shape[1]), np.array([0, size[0], 0, size[1]])
    else:
        cover = covering((mask.shape[0], mask.shape[1]), size)
        scale = draws.scale[n]
        top, (y, height) = _stretch(mask.shape[0], cover[0] * scale, size[0], draws.top[n])
        left, (x, width) = _stretch(mask.shape[1], cover[1] * scale, size[1], draws.left[n])
        box = np.array([y, y + height, x, x + width])
    region, seen = (top[0], left[0], top[1], left[1]), [int(box[1] - box[0]), int(box[3] - box[2])]
    # As plain tensors: for tv_tensors.Mask torchvision's nearest neighbour lies up to half a pixel off the bilinear
    # resize of the image, "exact" does not.
    planes = functional.resized_crop(image.permute(2, 0, 1), *region, seen, InterpolationMode.BILINEAR, antialias=True)
    labels = functional.resized_crop(mask[None], *region, seen, InterpolationMode.NEAREST_EXACT)
    if draws.flip[n]:
        planes, labels = functional.horizontal_flip(planes), functional.horizontal_flip(labels)
    if tuple(seen) == size:
        return Placed(planes.permute(1, 2, 0), labels[0], box)
    fill = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8, device=image.device)
    canvas, void = fill.repeat(*size, 1), torch.full(size, VOID, dtype=torch.uint8, device=mask.device)
    rows, columns = slice(int(box[0]), int(box[1])), slice(int(box[2]), int(box[3]))
    canvas[rows, columns], void[rows, columns] = planes.permute(1, 2, 0), labels[0]
    return Placed(canvas, void, box)


def _stretch(length: int, scaled: float, seen: int, unit: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return along one axis (start, length) of what is taken from the image, and of where it goes.

    Definition: an axis of `length` pixels is resized to `scaled`; where that is at least `seen`, a stretch that
    becomes `seen` pixels is taken, else the whole axis is placed among them.
    """
    goal = max(1, round(scaled))
    if goal < seen:
        return (0, length), (int(unit * (seen - goal + 1)), goal)
    taken = max(1, round(length * seen / goal))
    return (int(unit * (length - taken + 1)), taken), (0, seen)


def finish_joint(placed: Placed, draws: JointDraws, normalization: Normalization) -> Tensor:
    """Apply colour and normalisation; what an image leaves empty is the mean exactly: float32 [N, 3, H, W]."""
    images = placed.images.contiguous()
    if draws.factors is not None:
        result = jitter(images, draws.factors, normalization)
    else:
        result = normalization(images.numpy() if images.device.type == "cpu" else images)
    full = np.array([0, result.shape[2], 0, result.shape[3]])[:, None]
    if (placed.boxes != full).any():
        result.masked_fill_(~inside(placed.boxes, result), 0.0)
    return result
