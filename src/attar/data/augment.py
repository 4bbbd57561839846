"""Batched augmentation of small images: every draw is a function of (seed, epoch, image, view) and of nothing else.

So an image looks the same whatever batch, rank or resumed run it appears in. Images are [N, H, W, C] uint8 and stay so
through crop and flip (one gather); colour and erasing work on floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attar.data.hashing import uniform
from attar.data.images import Pixels

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Draws",
    "Normalization",
    "crop_flip",
    "crop_flip_torch",
    "finish",
    "inside",
    "jitter",
    "jitter_factors",
]

_AUGMENTATION = 2  # separates these draws from those of the order under the same seed
# One stream per quantity: a new quantity takes a new number, so that it changes none of the old draws.
_TOP, _LEFT, _FLIP, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _ERASE, _AREA, _ASPECT, _ERASE_TOP, _ERASE_LEFT = range(
    12
)


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image.

    Attributes:
        name: how the command line calls it.
        crop: small images: zero-padded by an eighth of each side (at least 1 pixel), then cropped back to size at a
            random place; large images: a random area of 8 to 100 %, resized.
        flip: mirrored left to right with probability 1/2.
        color: strength s of colour jitter: brightness, contrast and saturation factors uniform in [1 - s, 1 + s], hue
            turned by up to s/8 of the colour circle; 0 for none.
        erase: probability that one rectangle of 2 to 20 % of the area, aspect 0.3 to 3.3, is set to the mean.
    """

    name: str
    crop: bool = False
    flip: bool = False
    color: float = 0.0
    erase: float = 0.0

    @property
    def random(self) -> bool:
        """Whether an image ever looks otherwise than in the epoch before."""
        return self.crop or self.flip or self.color > 0 or self.erase > 0

    def pad(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the padding (vertical, horizontal) for small images of `size` = (height, width)."""
        return (max(1, size[0] // 8), max(1, size[1] // 8)) if self.crop else (0, 0)

    def draw(
        self, size: tuple[int, int], seed: int, epoch: int, index: NDArray[np.int64], view: NDArray[np.int64] | int
    ) -> Draws:
        """Return what to do to images `index` [N] of `size` = (height, width) in one epoch; `view` is [N] or one."""
        wanted = [_TOP, _LEFT, _FLIP]
        wanted += [_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE] if self.color > 0 else []
        wanted += [_ERASE, _AREA, _ASPECT, _ERASE_TOP, _ERASE_LEFT] if self.erase > 0 else []
        drawn = uniform(seed, _AUGMENTATION, epoch, view, index, np.array(wanted)[:, None])
        unit = dict(zip(wanted, drawn, strict=True))
        pad_y, pad_x = self.pad(size)
        top = (unit[_TOP] * (2 * pad_y + 1)).astype(np.int64)
        left = (unit[_LEFT] * (2 * pad_x + 1)).astype(np.int64)
        flip = unit[_FLIP] < 0.5 if self.flip else np.zeros(len(index), dtype=bool)
        factors = None
        if self.color > 0:
            colors = np.stack([unit[quantity] for quantity in (_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE)])
            factors = jitter_factors(colors, self.color)
        boxes = None
        if self.erase > 0:
            area = (0.02 + 0.18 * unit[_AREA]) * (size[0] * size[1])
            aspect = np.exp(np.log(0.3) + np.log(3.3 / 0.3) * unit[_ASPECT])
            height = np.minimum(np.round(np.sqrt(area * aspect)), size[0]).astype(np.int64)
            width = np.minimum(np.round(np.sqrt(area / aspect)), size[1]).astype(np.int64)
            height *= unit[_ERASE] < self.erase
            y = (unit[_ERASE_TOP] * (size[0] - height + 1)).astype(np.int64)
            x = (unit[_ERASE_LEFT] * (size[1] - width + 1)).astype(np.int64)
            boxes = np.stack([y, y + height, x, x + width])
        return Draws((pad_y, pad_x), top, left, flip, factors, boxes)


@dataclass(frozen=True)
class Draws:
    """What to do to N images.

    Attributes:
        pad: padding (vertical, horizontal) before the crop.
        top: [N] first row of the crop in the padded image, 0..2 pad.
        left: [N] first column of it.
        flip: [N] whether the crop is mirrored.
        factors: [4, N] brightness, contrast, saturation (factors) and hue (radians), or None.
        boxes: [4, N] first row, end row, first column, end column to erase (empty for none), or None.
    """

    pad: tuple[int, int]
    top: NDArray[np.int64]
    left: NDArray[np.int64]
    flip: NDArray[np.bool_]
    factors: NDArray[np.float64] | None
    boxes: NDArray[np.int64] | None


AUGMENTATIONS: dict[str, Augmentation] = {
    preset.name: preset
    for preset in (
        Augmentation("none"),
        Augmentation("flip", flip=True),
        Augmentation("crop", crop=True),
        Augmentation("crop-flip", crop=True, flip=True),
        Augmentation("strong", crop=True, flip=True, color=0.4, erase=0.25),
    )
}


def jitter_factors(unit: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    """Turn draws [4, N] in [0, 1) into brightness, contrast, saturation (factors) and hue (radians)."""
    factors = (2 * unit - 1) * strength
    factors[:3] += 1
    factors[3] *= np.pi / 4
    return factors


def crop_flip(images: Pixels, draws: Draws) -> Pixels:
    """Pad with zeros, crop back to size and mirror, [N, H, W, C] to the same, in one gather.

    NumPy on the CPU: one thread, so that preparing data never competes with the training step for torch's threads.
    """
    n, height, width, channels = images.shape
    (pad_y, pad_x), columns = draws.pad, np.arange(width)
    if pad_y or pad_x:
        padded = np.zeros((n, height + 2 * pad_y, width + 2 * pad_x, channels), np.uint8)
        padded[:, pad_y : pad_y + height, pad_x : pad_x + width] = images
    elif draws.flip.any():
        padded = images
    else:
        return images
    y = draws.top[:, None] + np.arange(height)
    x = draws.left[:, None] + np.where(draws.flip[:, None], width - 1 - columns, columns)
    line = np.arange(n)[:, None] * padded.shape[1] + y
    pixel = line[:, :, None] * padded.shape[2] + x[:, None, :]
    cropped: Pixels = np.take(padded.reshape(-1, channels), pixel.reshape(-1), axis=0)
    return cropped.reshape(images.shape)


def crop_flip_torch(images: Tensor, draws: Draws) -> Tensor:
    """Do exactly what `crop_flip` does, on the device of `images`; only the draws travel there."""
    n, height, width, channels = images.shape
    device, (pad_y, pad_x) = images.device, draws.pad
    padded = torch.nn.functional.pad(images, (0, 0, pad_x, pad_x, pad_y, pad_y))
    top, left, flip = (_to(draw, device)[:, None] for draw in (draws.top, draws.left, draws.flip))
    columns = torch.arange(width, device=device)
    y = top + torch.arange(height, device=device)
    x = left + torch.where(flip, width - 1 - columns, columns)
    line = torch.arange(n, device=device)[:, None] * padded.shape[1] + y
    pixel = line[:, :, None] * padded.shape[2] + x[:, None, :]
    return padded.reshape(-1, channels).index_select(0, pixel.reshape(-1)).reshape(images.shape)


class Normalization:
    """From uint8 pixels to the student's input: `(x / 255 - mean) / std` per channel, as one multiply and one add.

    Args:
        mean: per-channel mean in 0..1.
        std: per-channel standard deviation in 0..1.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean = mean
        self.std = std
        self.scale = (1 / (255 * np.asarray(std))).astype(np.float32)
        self.bias = (-np.asarray(mean) / np.asarray(std)).astype(np.float32)

    def __call__(self, images: Pixels | Tensor) -> Tensor:
        """Turn [N, H, W, C] uint8 into [N, C, H, W] float32 in channels-last memory format."""
        n, height, width, channels = images.shape
        if isinstance(images, Tensor):
            scale, bias = (_to(values, images.device) for values in (self.scale, self.bias))
            return torch.addcmul(bias, images.float(), scale).permute(0, 3, 1, 2)
        # Whole lines at a time: NumPy's inner loop would otherwise be three channels long.
        lines = images.reshape(n, height, width * channels)
        values = np.multiply(lines, np.tile(self.scale, width), dtype=np.float32)
        values += np.tile(self.bias, width)
        return torch.from_numpy(values).view(n, height, width, channels).permute(0, 3, 1, 2)


def finish(images: Pixels | Tensor, draws: Draws | None, normalization: Normalization) -> Tensor:
    """Apply colour, normalisation and erasing to cropped images: uint8 [N, H, W, C] to float32 [N, C, H, W]."""
    if draws is None or draws.factors is None:
        result = normalization(images)
    else:
        result = jitter(images, draws.factors, normalization)
    if draws is not None and draws.boxes is not None:
        result.masked_fill_(inside(draws.boxes, result), 0.0)  # 0 is the mean once normalised
    return result


def jitter(images: Pixels | Tensor, factors: NDArray[np.float64], normalization: Normalization) -> Tensor:
    """Change the colours of uint8 [N, H, W, 3] by `factors` [4, N] and normalise: float32 [N, 3, H, W]."""
    from kornia import enhance

    pixels = images if isinstance(images, Tensor) else torch.from_numpy(images)
    brightness, contrast, saturation, hue = _to(factors.astype(np.float32), pixels.device)
    result = pixels.permute(0, 3, 1, 2).float() / 255
    result = enhance.adjust_brightness_accumulative(result, brightness)
    result = enhance.adjust_contrast_with_mean_subtraction(result, contrast)
    result = enhance.adjust_saturation_with_gray_subtraction(result, saturation)
    result = enhance.adjust_hue(result, hue)
    mean, std = (
        torch.tensor(values, device=pixels.device, dtype=torch.float32).view(1, -1, 1, 1)
        for values in (normalization.mean, normalization.std)
    )
    normalized: Tensor = ((result - mean) / std).contiguous(memory_format=torch.channels_last)
    return normalized


def inside(boxes: NDArray[np.int64], images: Tensor) -> Tensor:
    """Return [N, 1, H, W]: which pixels lie in each image's box."""
    y0, y1, x0, x1 = _to(boxes, images.device)[:, :, None, None, None]
    y = torch.arange(images.shape[2], device=images.device)[:, None]
    x = torch.arange(images.shape[3], device=images.device)
    inside: Tensor = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
    return inside


def _to(values: NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
