"""From encoded masks to class indices: what each value or colour means, and that it means something."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from attar.data.images import BadImageError, Pixels, decode, fit, native_size, reason
from attar.data.reader import Reader
from attar.errors import AttarError

__all__ = [
    "VOID",
    "BadMaskError",
    "ClassNames",
    "MaskCoding",
    "MaskedOrigin",
    "MaskedReader",
    "decode_mask",
    "fit_mask",
    "mask_coding",
    "read_pair",
    "sentence",
]

VOID = 255
_MOST_CLASSES = 255  # 0..254: one byte a pixel, and one value left for void
_LARGEST_VALUE = 65535  # of 16 bits
_SINGLE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")

ClassNames = Sequence[str] | str | Path | None  # the names, or the path of a file that holds them
Values = tuple[tuple[int, ...], ...]


class MaskedReader(Reader, Protocol):
    """Random access to images with masks; `targets` are zeros."""

    def mask_name(self, row: int) -> str:
        """Say which mask belongs to image `row`, in the user's terms: "mask ...", a path or a row of a table."""

    def read_mask(self, row: int) -> bytes:
        """Return the encoded mask."""


@dataclass(frozen=True)
class MaskedOrigin:
    """Images with masks as they come: class names (empty: unknown), what mask values mean, and the splits there are."""

    name: str
    classes: tuple[str, ...]
    coding: MaskCoding
    train: MaskedReader
    validation: MaskedReader | None
    test: MaskedReader | None


class BadMaskError(BadImageError):
    """A mask that cannot be read; `name`, which begins with "mask", says which one and `reason` why."""

    what = ""


@dataclass(frozen=True)
class MaskCoding:
    """What the values of a data set's masks mean.

    Attributes:
        num_classes: K; None until the masks are read, where nothing tells it before.
        ignore_index: the value that means void.
        values: what means class k: one value `(v,)`, or one colour `(r, g, b)`; None: value k.
        ignored: further values (or colours) that mean void.
    """

    num_classes: int | None
    ignore_index: int = VOID
    values: Values | None = None
    ignored: Values = ()

    @property
    def colored(self) -> bool:
        """Whether masks are RGB."""
        return self.values is not None and len(self.values[0]) == 3

    def classes(self, raw: NDArray[Any], name: str) -> Pixels:
        """Turn the values [h, w] or colours [h, w, 3] of mask `name` into classes, void being `VOID`.

        Raises:
            AttarError: a value that is neither a class nor void, named.
        """
        codes = _codes(raw) if self.colored else raw
        if codes.dtype == np.uint8:
            found = np.flatnonzero(np.bincount(codes.ravel(), minlength=256))
        else:
            found = np.unique(codes)
        meaning = [self._meaning(int(code), name) for code in found]
        if not self.colored:
            table = np.zeros(int(found[-1]) + 1, np.uint8)
            table[found] = meaning
            return table[codes]
        # Colours have no table of a reasonable size.
        result: Pixels = np.array(meaning, np.uint8)[np.searchsorted(found, codes)]
        return result

    def _meaning(self, code: int, name: str) -> int:
        value = (code >> 16, code >> 8 & 255, code & 255) if self.colored else (code,)
        if self.values is not None and value in self.values:
            return self.values.index(value)
        if value == (self.ignore_index,) or value in self.ignored:
            return VOID
        if self.values is None and 0 <= code < (self.num_classes or _MOST_CLASSES):
            return code
        raise AttarError(f"{sentence(name)} holds the {self._unknown(value)}")

    def _unknown(self, value: tuple[int, ...]) -> str:
        if self.colored:
            return (
                f"colour {value}, which is that of none of the {self.num_classes} classes: correct the mask, or list "
                "the colour in classes.json, under 'colors' or 'ignored'."
            )
        shown = f"value {value[0]}, "
        if self.values is not None:
            return (
                f"{shown}which is that of none of the {self.num_classes} classes nor void: correct the mask, or list "
                "the value in classes.json, under 'values' or 'ignored'."
            )
        if self.num_classes is None:
            return (
                f"{shown}but there can be at most {_MOST_CLASSES} classes: say which value is void with ignore_index."
            )
        return (
            f"{shown}but the {self.num_classes} classes are 0..{self.num_classes - 1} and void is "
            f"{self.ignore_index}: correct the mask, name all classes, or say which value is void with ignore_index."
        )


def _codes(colors: NDArray[Any]) -> NDArray[np.int32]:
    r, g, b = (colors[..., channel].astype(np.int32) for channel in range(3))
    codes: NDArray[np.int32] = r << 16 | g << 8 | b
    return codes


def mask_coding(given: ClassNames, beside: Path | None, ignore_index: int | None) -> tuple[tuple[str, ...], MaskCoding]:
    """Return class names (empty where nothing tells them) and what mask values mean.

    The file is JSON: `{"names": [...], "ignore_index": 255}`, and where value k does not mean class k also `values`
    (a number for each class) or, for RGB masks, `colors` ([r, g, b] for each), and `ignored` (more that mean void).

    Args:
        given: the names themselves, or the path of such a file.
        beside: the file `classes.json` that counts where nothing is given and it exists.
        ignore_index: what counts before the file's.

    Raises:
        AttarError: no such file, or one that does not say what it should.
    """
    path = Path(given).expanduser() if isinstance(given, str | Path) else beside
    if given is not None and not isinstance(given, str | Path):
        names, told = tuple(given), {}
    elif path is not None and (given is not None or path.is_file()):
        told = _read(path)
        names = tuple(told["names"])
    else:
        names, told = (), {}
    if len(set(names)) != len(names):
        raise AttarError("Two classes have the same name: name every class differently.")
    _check_number(names)
    void = ignore_index if ignore_index is not None else told.get("ignore_index", VOID)
    if type(void) is not int or not 0 <= void <= _LARGEST_VALUE:
        raise AttarError(f"The ignore_index must be a mask's value, from 0 to {_LARGEST_VALUE}, not {void!r}.")
    coding = MaskCoding(len(names) or None, void, told.get("values"), told.get("ignored", ()))
    if coding.values is None and void < len(names):
        raise AttarError(
            f"The void value {void} is also that of class '{names[void]}': choose another ignore_index, or say which "
            "value each class has with 'values' in classes.json."
        )
    return names, coding


def _check_number(names: Sequence[str]) -> None:
    if len(names) == 1:
        raise AttarError(f"There is one class only, '{names[0]}': segmentation needs at least two.")
    if len(names) > _MOST_CLASSES:
        raise AttarError(f"There are {len(names)} classes, but segmentation takes at most {_MOST_CLASSES}.")


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise AttarError(f"Cannot read the classes in '{path}' ({cause}): repair the file.") from error
    names = told.get("names") if isinstance(told, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise AttarError(f'\'{path}\' does not name the classes: let it hold {{"names": [...], "ignore_index": 255}}.')
    known = {"names", "ignore_index", "values", "colors", "ignored"}
    strange = sorted(told.keys() - known)
    if strange:
        raise AttarError(f"'{path}' holds '{strange[0]}', which means nothing here: use {', '.join(sorted(known))}.")
    if "values" in told and "colors" in told:
        raise AttarError(f"'{path}' holds both 'values' and 'colors': masks have one or the other.")
    result: dict[str, Any] = {"names": names}
    if "ignore_index" in told:
        result["ignore_index"] = told["ignore_index"]
    kind = "colors" if "colors" in told else "values"
    if kind in told:
        result["values"] = _values(told, kind, kind == "colors", path)
        if len(set(result["values"])) != len(names) or len(told[kind]) != len(names):
            raise AttarError(f"'{path}' names {len(names)} classes: let '{kind}' hold a different one for each.")
    if "ignored" in told:
        result["ignored"] = _values(told, "ignored", kind == "colors", path)
    return result


def _values(told: dict[str, Any], key: str, colored: bool, path: Path) -> Values:
    wanted = "colours [r, g, b] of 0..255" if colored else "numbers, 0 or more"
    listed = told[key] if isinstance(told[key], list) else [None]
    values = tuple(tuple(value) if isinstance(value, list) else (value,) for value in listed)
    for value in values:
        whole = all(type(part) is int and 0 <= part <= (255 if colored else _LARGEST_VALUE) for part in value)
        if not whole or len(value) != (3 if colored else 1):
            raise AttarError(f"'{key}' in '{path}' must list {wanted}.")
    return values


def decode_mask(data: bytes, name: str, coding: MaskCoding) -> Pixels:
    """Decode one mask to its classes, uint8 [h, w], void being `VOID`; palette masks are read by index.

    Raises:
        BadMaskError: empty, truncated or unrecognised data.
        AttarError: a mask of another kind than the coding says, or a value that means nothing.
    """
    if not data:
        raise BadMaskError(name, "it is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd palettes and metadata help nobody here
            image = Image.open(io.BytesIO(data))
            kind, mode = image.format, image.mode
            raw = np.asarray(image.convert("RGB") if mode == "RGBA" else image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise almost anything on a damaged file
        raise BadMaskError(name, reason(error)) from error
    if kind == "JPEG":
        raise AttarError(f"{sentence(name)} is a JPEG, which does not keep values exactly: save masks as PNG.")
    if coding.colored != (mode in ("RGB", "RGBA")) or (not coding.colored and mode not in _SINGLE_CHANNEL):
        wanted = (
            "but classes.json lists colours: save it as RGB, or list 'values' instead"
            if coding.colored
            else "not a single channel whose value is the class: save class indices (a grey or palette PNG), or list "
            "the colour of each class under 'colors' in classes.json"
        )
        raise AttarError(f"{sentence(name)} is {mode}, {wanted}.")
    if raw.dtype == bool:
        raw = raw.astype(np.uint8)
    return coding.classes(raw, name)


def sentence(name: str) -> str:
    """Return what `mask_name` says as the beginning of a sentence."""
    return name[:1].upper() + name[1:]


def fit_mask(mask: Pixels, size: tuple[int, int]) -> Pixels:
    """Do with a mask [h, w] what `fit` does with its image, each pixel taking the class nearest to it."""
    return np.asarray(fit(Image.fromarray(mask), size, Image.Resampling.NEAREST))


def read_pair(
    reader: MaskedReader, row: int, coding: MaskCoding, draft: int | None = None
) -> tuple[Image.Image, Pixels, tuple[int, int]]:
    """Return an image, the classes of its mask [h, w], and the size (h, w) that both have.

    `draft` lets a JPEG image, not its mask, be decoded at a reduced size.

    Raises:
        BadImageError: an unreadable image or mask.
        AttarError: a mask of another size than its image, or one that `decode_mask` refuses.
    """
    data = reader.read(row)
    image = decode(data, reader.name(row), draft)
    size = native_size(data) or (image.height, image.width)  # a reduced decode hides the true size
    mask = decode_mask(reader.read_mask(row), reader.mask_name(row), coding)
    if mask.shape != size:
        height, width = mask.shape
        raise AttarError(
            f"{sentence(reader.mask_name(row))} is {width} x {height} pixels, but its image {reader.name(row)} is "
            f"{size[1]} x {size[0]}: make them the same size."
        )
    return image, mask, size
