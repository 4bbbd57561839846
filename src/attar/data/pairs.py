"""A folder of images beside a folder of masks: `DIR/images` and `DIR/masks`, whole or under train/, val/, test/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from attar.data.folder import list_images
from attar.data.masks import BadMaskError, ClassNames, MaskedOrigin, mask_coding
from attar.data.reader import FileReader, digest, stat_key
from attar.errors import AttarError

__all__ = ["PairReader", "open_pairs"]

_VALIDATION_NAMES = ("val", "validation", "valid")


class PairReader(FileReader):
    """Images and masks that are files."""

    def __init__(self, paths: Sequence[Path], masks: Sequence[Path]) -> None:
        super().__init__(paths, np.zeros(len(paths), np.int64))
        self.masks = list(masks)
        self.key = digest([self.key.encode(), stat_key(self.masks).encode()])

    def mask_name(self, row: int) -> str:
        """Return the path of the mask."""
        return f"mask '{self.masks[row]}'"

    def read_mask(self, row: int) -> bytes:
        """Return the bytes of the mask's file."""
        try:
            return self.masks[row].read_bytes()
        except OSError as error:
            raise BadMaskError(self.mask_name(row), error.strerror or type(error).__name__) from error


def open_pairs(directory: Path, classes: ClassNames, ignore_index: int | None) -> MaskedOrigin:
    """Return the images of `directory` with their masks, paired by file names without their endings.

    The images lie in `images` and the masks in `masks`; where there are splits, both lie in `train`, `test` and `val`
    (or `validation`, `valid`), or these lie in both. Classes are named by a `classes.json` in `directory`.

    Raises:
        AttarError: no images, an image without a mask or a mask without an image, two files of one name, a folder that
            may not be read, or what `mask_coding` refuses.
    """
    try:
        train = _reader(directory, ("train",))
        whole = train or _pair(directory / "images", directory / "masks")
        if whole is None:
            raise AttarError(
                f"'{directory}' holds no folders 'images' and 'masks' (nor 'train' with both): segmentation needs a "
                "mask of the same name for each image."
            )
        validation = _reader(directory, _VALIDATION_NAMES) if train else None
        test = _reader(directory, ("test",)) if train else None
    except OSError as error:
        raise AttarError(f"Cannot read '{error.filename}' ({error.strerror}): make it readable.") from error
    names, coding = mask_coding(classes, directory / "classes.json", ignore_index)
    return MaskedOrigin(str(directory), names, coding, whole, validation, test)


def _reader(directory: Path, names: tuple[str, ...]) -> PairReader | None:
    for name in names:
        found = _pair(directory / name / "images", directory / name / "masks") or _pair(
            directory / "images" / name, directory / "masks" / name
        )
        if found is not None:
            return found
    return None


def _pair(images: Path, masks: Path) -> PairReader | None:
    """Return the pairs of two folders, None where neither of both is there."""
    if not images.is_dir() and not masks.is_dir():
        return None
    for folder in (images, masks):
        if not folder.is_dir():
            raise AttarError(f"There is no folder '{folder}': segmentation needs images and a mask for each of them.")
    of_images, of_masks = _by_stem(images), _by_stem(masks)
    if not of_images:
        raise AttarError(f"'{images}' holds no images: add some or remove the folder.")
    _refuse_missing("Image", of_images, "mask", of_masks, masks)
    _refuse_missing("Mask", of_masks, "image", of_images, images)
    return PairReader(list(of_images.values()), [of_masks[stem] for stem in of_images])


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in list_images(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise AttarError(f"'{found[stem]}' and '{path}' have the same name: which is meant? Remove one.")
        found[stem] = path
    return found


def _refuse_missing(kind: str, these: dict[str, Path], other: str, those: dict[str, Path], folder: Path) -> None:
    missing = [stem for stem in these if stem not in those]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise AttarError(
            f"{kind} '{these[missing[0]]}' has no {other}{more}: add a file called '{missing[0]}' to '{folder}', or "
            f"remove the {kind.lower()}."
        )
