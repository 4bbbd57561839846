"""Common corruptions of images: eleven kinds at five severities, the same for the same image wherever it is seen.

The kinds are those of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019 (arXiv 1903.12261), but for glass blur, snow, frost and fog; Gaussian blur stands for defocus.
Lengths are made to the size of the image, from 8 to 224 pixels a side and beyond. The code and the strengths are not
theirs: accuracies under these corruptions compare students with each other, not with published numbers on CIFAR-10-C or
ImageNet-C.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from attar.data.hashing import hash_counters
from attar.data.images import Pixels
from attar.errors import AttarError, unknown_name

__all__ = ["KINDS", "SEVERITIES", "corrupt"]

SEVERITIES = (1, 2, 3, 4, 5)
_CORRUPTION = 5  # separates these draws from those of order, augmentation and training steps under the same seed
_BLOCK = 128  # images at a time: floats of large images take much memory
_STEPS = 16  # at most, positions whose mean is a motion

Corruption = Callable[[Tensor, float, list[torch.Generator]], Tensor]


def corrupt(
    pixels: Pixels, kind: str, severity: int, *, index: NDArray[np.int64] | None = None, seed: int = 0
) -> Pixels:
    """Return corrupted copies of images; each is a function of (image, kind, severity, seed, its index) alone.

    Args:
        pixels: [N, H, W, 3] uint8.
        kind: one of `KINDS`.
        severity: 1 to 5.
        index: [N] numbers of the images, which their random draws come from; default: 0..N-1.
        seed: of the draws.

    Raises:
        AttarError: an unknown kind (with the nearest name), another severity, or anything but uint8 colour images.
    """
    if kind not in KINDS:
        raise unknown_name("corruption", kind, KINDS)
    if severity not in SEVERITIES:
        raise AttarError(f"A corruption's severity is 1, 2, 3, 4 or 5, not {severity}.")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise AttarError(f"Corruptions need uint8 images [N, H, W, 3], not {pixels.dtype} {list(pixels.shape)}.")
    index = np.arange(len(pixels)) if index is None else index
    words = hash_counters(seed, _CORRUPTION, list(KINDS).index(kind), severity, index) >> np.uint64(1)
    strengths, apply = _CORRUPTIONS[kind]
    done = np.empty_like(pixels)
    for start in range(0, len(pixels), _BLOCK):
        part = slice(start, start + _BLOCK)
        draws = [torch.Generator().manual_seed(int(word)) for word in words[part]]
        images = torch.from_numpy(np.array(pixels[part])).permute(0, 3, 1, 2).float() / 255
        corrupted = apply(images, strengths[severity - 1], draws).clamp(0, 1)
        done[part] = (corrupted * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return done


# Each takes images [N, 3, H, W] in 0..1, its strength, and one source of random numbers per image.


def _gaussian_noise(images: Tensor, deviation: float, draws: list[torch.Generator]) -> Tensor:
    return images + deviation * torch.stack([torch.randn(images.shape[1:], generator=draw) for draw in draws])


def _shot_noise(images: Tensor, scarcity: float, draws: list[torch.Generator]) -> Tensor:
    """Count photons: white is a mean of 1 / scarcity."""
    counts = [torch.poisson(image / scarcity, generator=draw) for image, draw in zip(images, draws, strict=True)]
    return torch.stack(counts) * scarcity


def _impulse_noise(images: Tensor, share: float, draws: list[torch.Generator]) -> Tensor:
    """Replace a share of all values by black or white."""
    chance = torch.stack([torch.rand(images.shape[1:], generator=draw) for draw in draws])
    return images.masked_fill(chance < share, 1.0).masked_fill(chance < share / 2, 0.0)


def _gaussian_blur(images: Tensor, deviation: float, draws: list[torch.Generator]) -> Tensor:
    from kornia.filters import gaussian_blur2d

    deviation *= _scale(images)
    side = 2 * math.ceil(3 * deviation) + 1
    blurred: Tensor = gaussian_blur2d(images, (side, side), (deviation, deviation), border_type="replicate")
    return blurred


def _motion_blur(images: Tensor, length: float, draws: list[torch.Generator]) -> Tensor:
    """Move the image along a line of random direction."""
    angles = 2 * math.pi * torch.stack([torch.rand(1, generator=draw) for draw in draws])
    length *= _scale(images)
    line = length * torch.cat([angles.cos(), angles.sin()], dim=1)[:, None, None]
    moves = torch.linspace(-0.5, 0.5, min(_STEPS, math.ceil(length) + 1))
    return torch.stack([_moved(images, move * line) for move in moves]).mean(dim=0)


def _zoom_blur(images: Tensor, zoom: float, draws: list[torch.Generator]) -> Tensor:
    """Zoom into the middle by up to 1 + zoom."""
    height, width = images.shape[-2:]
    y, x = torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    centred = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
    factors = torch.linspace(1.0, 1.0 + zoom, _STEPS)
    return torch.stack([_moved(images, centred * (1 / factor - 1)) for factor in factors]).mean(dim=0)


def _brightness(images: Tensor, added: float, draws: list[torch.Generator]) -> Tensor:
    return images + added


def _contrast(images: Tensor, lost: float, draws: list[torch.Generator]) -> Tensor:
    mean = images.mean(dim=(2, 3), keepdim=True)
    return mean + (1 - lost) * (images - mean)


def _elastic(images: Tensor, share: float, draws: list[torch.Generator]) -> Tensor:
    """Move every pixel by a smooth field whose deviation is a share of the side."""
    height, width = images.shape[-2:]
    coarse = torch.stack([torch.randn(2, 6, 6, generator=draw) for draw in draws])
    field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    return _moved(images, field.permute(0, 2, 3, 1) * share * min(height, width))


def _pixelate(images: Tensor, lost: float, draws: list[torch.Generator]) -> Tensor:
    """Show the image on fewer, larger pixels and look at it with the old ones."""
    down, across = (_coarse(side, max(1, round(side * (1 - lost)))) for side in images.shape[-2:])
    return down @ images @ across.T


def _coarse(side: int, fewer: int) -> Tensor:
    """Return the matrix [side, side] that averages over `fewer` cells of equal length, by shares of overlap."""
    edges, cells = torch.arange(side + 1.0), torch.arange(fewer + 1) * (side / fewer)
    overlap = torch.minimum(edges[1:], cells[1:, None]) - torch.maximum(edges[:-1], cells[:-1, None])
    overlap = overlap.clamp(min=0)
    return overlap.T @ overlap / (side / fewer)


def _jpeg(images: Tensor, loss: float, draws: list[torch.Generator]) -> Tensor:
    compressed: Tensor = tv.jpeg((images * 255).round().to(torch.uint8), quality=round(100 - loss))
    return compressed.float() / 255


def _scale(images: Tensor) -> float:
    """Return the unit of lengths that are perceived rather than seen: between a pixel and a share of the side."""
    return math.sqrt(min(images.shape[-2:]))


def _moved(images: Tensor, offsets: Tensor) -> Tensor:
    """Sample the images bilinearly at every pixel's place plus an offset (x, y) in pixels, [N|1, H|1, W|1, 2]."""
    count, _, height, width = images.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([columns, rows], dim=-1) + offsets
    # -1 and 1 are the outer edges of the outermost pixels.
    grid = (2 * places + 1) / torch.tensor([width, height]) - 1
    grid = grid.expand(count, height, width, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


_CORRUPTIONS: dict[str, tuple[tuple[float, float, float, float, float], Corruption]] = {
    "gaussian_noise": ((0.05, 0.09, 0.14, 0.20, 0.28), _gaussian_noise),
    "shot_noise": ((0.008, 0.016, 0.033, 0.066, 0.13), _shot_noise),
    "impulse_noise": ((0.02, 0.04, 0.07, 0.12, 0.20), _impulse_noise),
    # In roots of the side: 1.5 to 5 pixels of 224, 0.6 to 1.9 of 32.
    "gaussian_blur": ((0.10, 0.15, 0.20, 0.26, 0.33), _gaussian_blur),
    "motion_blur": ((0.5, 0.8, 1.1, 1.5, 2.0), _motion_blur),
    "zoom_blur": ((0.08, 0.14, 0.20, 0.27, 0.35), _zoom_blur),
    "brightness": ((0.1, 0.2, 0.3, 0.4, 0.5), _brightness),
    "contrast": ((0.4, 0.55, 0.7, 0.8, 0.9), _contrast),
    "elastic": ((0.01, 0.018, 0.028, 0.038, 0.05), _elastic),
    "pixelate": ((0.15, 0.35, 0.5, 0.65, 0.78), _pixelate),
    "jpeg": ((50.0, 70.0, 82.0, 90.0, 94.0), _jpeg),
}
KINDS = tuple(_CORRUPTIONS)
