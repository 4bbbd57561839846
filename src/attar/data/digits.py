"""The embedded data: scikit-learn's 1,797 handwritten digits, 8x8, no download."""

from __future__ import annotations

import numpy as np

from attar.data.reader import ArrayReader, Origin

__all__ = ["open_digits"]


def open_digits() -> Origin:
    """Return the digits: grey levels 0..16 scaled to 0..255, ten classes; test images are set aside by the caller.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (test part).
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    reader = ArrayReader("digits", pixels, data.target, cached=False)
    return Origin("digits", tuple("0123456789"), reader, None, default_augmentation="crop")
