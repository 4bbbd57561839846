"""Small images with masks on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

VOID = 255


def write_discs(home: Path, *, train: int = 16, test: int = 7, void: int = VOID) -> None:
    """Write images of 32 x 48: a bright disc (class 1) on a dark ground (0), two void columns; class 2 is rare."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :48]
    for split, count in (("train", train), ("test", test)):
        for part in ("images", "masks"):
            (home / split / part).mkdir(parents=True)
        for number in range(count):
            cy, cx, radius = rng.uniform(8, 24), rng.uniform(10, 38), rng.uniform(4, 9)
            mask = ((y - cy) ** 2 + (x - cx) ** 2 < radius**2).astype(np.uint8)
            if number == 0:
                mask[3:5, 3:5] = 2
            image = rng.integers(0, 90, (32, 48, 3)) + 120 * (mask[..., None] == 1)
            mask[:, :2] = void
            Image.fromarray(image.astype(np.uint8)).save(home / split / "images" / f"{number:02}.png")
            Image.fromarray(mask).save(home / split / "masks" / f"{number:02}.png")
    (home / "classes.json").write_text(json.dumps({"names": ["ground", "disc", "mark"]}))
