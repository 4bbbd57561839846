"""Images and masks as pictures inside the page: one colour for a class wherever it is seen, none for void."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from attar.compare.analysis import Analysis
from attar.compare.masks import Masks
from attar.data import VOID
from attar.data.images import Pixels

__all__ = ["Example", "Examples", "Picture", "color", "examples"]

_SIDE = 320  # pixels that the longer side of a picture has at most: a page holds many
_SMALL = 160  # up to here single pixels are to be seen as such
_COLORS = (
    *("4363d8", "e6194b", "3cb44b", "ffe119", "f58231", "911eb4", "42d4f4", "f032e6", "bfef45", "9a6324"),
    *("469990", "fabed4", "800000", "dcbeff", "808000", "aaffc3", "000075", "ffd8b1", "b15928", "1f78b4"),
)
_GOLDEN = 0.6180339887498949  # turns of this share never fall on a hue again


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        title: what it is, or whose answer.
        text: below that.
        alt: what is to be seen, for those who do not see it.
        source: data URI of a PNG file; void pixels are transparent.
        width: in pixels.
        height: in pixels.
        kind: `photo` or `mask`.
        small: whether single pixels are to be seen as such.
    """

    title: str
    text: str
    alt: str
    source: str
    width: int
    height: int
    kind: str
    small: bool


@dataclass(frozen=True)
class Example:
    """One test image: itself, the truth, and what every entry answers."""

    title: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Examples:
    """Some test images.

    Attributes:
        images: a row of pictures for each.
        legend: colour and name of the classes that are to be seen.
        void: whether there are pixels without a class.
        seeds: whose students answer.
    """

    images: tuple[Example, ...]
    legend: tuple[tuple[str, str], ...]
    void: bool
    seeds: tuple[int, ...]


def color(label: int) -> str:
    """Return the colour of a class as six hexadecimal digits: the same in every report, distinct for the first 20."""
    if label < len(_COLORS):
        return _COLORS[label]
    # Hues spread evenly however many there are, in four strengths.
    strength = ((0.85, 0.95), (0.55, 0.9), (0.9, 0.6), (0.45, 0.65))[label % 4]
    return "".join(f"{round(255 * part):02x}" for part in colorsys.hsv_to_rgb(label * _GOLDEN % 1.0, *strength))


def examples(analysis: Analysis) -> Examples | None:
    """Return the answers of all entries for the test images that the first of them kept; None where none did."""
    kept = [(entry, entry.masks) for entry in analysis.entries if entry.masks is not None]
    if not kept:
        return None
    first = kept[0][1]
    same = [(entry, masks) for entry, masks in kept if _same(masks, first)]
    labels = np.unique(np.concatenate([first.truth.ravel(), *(masks.found.ravel() for _, masks in same)]))
    known = [int(label) for label in labels if label < len(analysis.classes)]
    seeds = tuple(sorted({entry.masks_seed for entry, _ in same if entry.masks_seed is not None}))
    # Whose first seed failed is seen by another one, which is then said.
    answers = [
        (entry.label, f", seed {entry.masks_seed}" if len(seeds) > 1 else "", masks.found) for entry, masks in same
    ]
    number = analysis.images.get("test", 0)
    return Examples(
        tuple(_example(i, first, answers, analysis.classes, number) for i in range(len(first.positions))),
        tuple((f"#{color(label)}", analysis.classes[label]) for label in known),
        bool((first.truth == VOID).any()),
        seeds,
    )


def _same(masks: Masks, other: Masks) -> bool:
    return np.array_equal(masks.positions, other.positions) and np.array_equal(masks.truth, other.truth)


def _example(
    i: int, first: Masks, answers: Sequence[tuple[str, str, Pixels]], classes: Sequence[str], number: int
) -> Example:
    place = f"test image {int(first.positions[i]) + 1}" + (f" of {number:,}" if number else "")
    truth = first.truth[i]
    valid = truth != VOID
    void = 1.0 - float(valid.mean())
    pictures = [
        _picture("image", "", f"{place}, as the students see it", _photo(first.images[i]), "photo"),
        _picture(
            "truth",
            f"{100 * void:.1f} % void" if void else "",
            f"True classes of {place}: {_largest(truth[valid], classes)}",
            _mask(truth),
            "mask",
        ),
    ]
    for label, seed, whole in answers:
        found = whole[i]
        right = f"{100 * float((found == truth)[valid].mean()):.1f} % right" if valid.any() else "nothing to name"
        told = f"Classes that {label} finds in {place}: {_largest(found.ravel(), classes)}"
        pictures.append(_picture(label, right + seed, told, _mask(found), "mask"))
    return Example(place[0].upper() + place[1:], tuple(pictures))


def _largest(labels: Pixels, classes: Sequence[str]) -> str:
    """Name the three most common classes with their shares."""
    counts = np.bincount(labels, minlength=1)
    common = [int(label) for label in np.argsort(-counts, kind="stable")[:3] if counts[label]]
    named = [f"{classes[label]} {100 * counts[label] / labels.size:.0f} %" for label in common if label < len(classes)]
    return ", ".join(named) or "void alone"


def _photo(pixels: Pixels) -> Image.Image:
    image = Image.fromarray(pixels)
    return image.resize(_size(image), Image.Resampling.LANCZOS) if max(image.size) > _SIDE else image


def _mask(classes: Pixels) -> Image.Image:
    image = Image.fromarray(classes)
    if max(image.size) > _SIDE:
        image = image.resize(_size(image), Image.Resampling.NEAREST)
    image.putpalette([part for label in range(VOID) for part in bytes.fromhex(color(label))] + [0, 0, 0])
    return image


def _size(image: Image.Image) -> tuple[int, int]:
    scale = _SIDE / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _picture(title: str, text: str, alt: str, image: Image.Image, kind: str) -> Picture:
    buffer = io.BytesIO()
    settings = {"transparency": VOID} if kind == "mask" else {}
    image.save(buffer, "PNG", optimize=True, **settings)
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    small = max(image.size) <= _SMALL
    return Picture(title, text, alt, source, image.width, image.height, kind, small)
