"""From encoded bytes or raw pixels to an RGB image of the size asked, whatever mode or size the file has."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from attar.errors import AttarError

__all__ = ["BadImageError", "Pixels", "covering", "decode", "fit", "native_size", "reason"]

Pixels = NDArray[np.uint8]
_ORIENTATION = 0x0112


class BadImageError(AttarError):
    """An image that cannot be read; `name` says which one and `reason` why."""

    what = "image "

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"Cannot read {self.what}{name} ({reason}): repair or remove it, or skip unreadable images "
            "with --skip-bad-images (skip_bad_images=True in Python)."
        )
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImageError], tuple[str, str]]:
        return type(self), (self.name, self.reason)


def decode(data: bytes | Pixels, name: str, draft: int | None = None) -> Image.Image:
    """Decode one image to RGB, 8 bits a channel, turned upright as its EXIF orientation says.

    Grey, palette, CMYK and transparent images are converted (transparency is dropped, as torchvision does); 16-bit
    grey is scaled to 8 bits. `draft` lets a JPEG be decoded at a reduced size, its sides at least that many pixels.

    Raises:
        BadImageError: empty, truncated, unrecognised or 32-bit data.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data).convert("RGB")
    if not data:
        raise BadImageError(name, "it is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd palettes and metadata help nobody here
            image: Image.Image = Image.open(io.BytesIO(data))
            if draft is not None:
                image.draft("RGB", (draft, draft))
            if image.getexif().get(_ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(image)
            return _to_rgb(image)
    except (MemoryError, BadImageError):
        raise
    except Exception as error:  # decoders raise almost anything on a damaged file: OSError, SyntaxError, struct.error
        raise BadImageError(name, reason(error)) from error


def reason(error: Exception) -> str:
    """Return what a decoder complains about, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image"
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = np.asarray(image)
        # Pillow opens 16-bit PGM as 32-bit "I"; anything wider has no agreed range, so guessing would corrupt it.
        if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError("it has 32-bit pixels, not 8 or 16")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def covering(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) at which an image of that shape just covers `size`."""
    scale = max(size[0] / image[0], size[1] / image[1])
    return max(size[0], round(image[0] * scale)), max(size[1], round(image[1] * scale))


def fit(
    image: Image.Image, size: tuple[int, int], resampling: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """Resize (antialiased) so that `image` just covers size = (height, width), then crop its centre."""
    height, width = size
    if (image.height, image.width) == size:
        return image
    cover = covering((image.height, image.width), size)
    image = image.resize(cover[::-1], resampling)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def native_size(data: bytes | Pixels) -> tuple[int, int] | None:
    """Return (height, width) from the header alone, upright; None when the header cannot be read."""
    if isinstance(data, np.ndarray):
        return data.shape[0], data.shape[1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:
        return None
