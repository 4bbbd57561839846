"""Data sets with masks that torchvision reads: Pascal VOC 2012 and Cityscapes (fine)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attar.data.cache import is_storage_error
from attar.data.masks import VOID, MaskCoding, MaskedOrigin
from attar.data.pairs import PairReader
from attar.errors import AttarError

__all__ = ["TORCHVISION_MASK_NAMES", "open_torchvision_masks"]

TORCHVISION_MASK_NAMES = ("cityscapes", "voc")
# torchvision gives no names with the images; these are in the order of the palette.
_VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def open_torchvision_masks(name: str, root: Path) -> MaskedOrigin:
    """Return `voc` (2012: 1,464 training and 1,449 validation images) or `cityscapes` (2,975 and 500).

    VOC is downloaded where its files are not under `root`. Cityscapes has no public download: its `leftImg8bit` and
    `gtFine` (or the two zip files) must lie in `root` or in `root/cityscapes`; its 19 training classes are evaluated,
    all else is void.

    Raises:
        AttarError: files are missing and cannot be downloaded.
    """
    return _voc(root) if name == "voc" else _cityscapes(root)


def _voc(root: Path) -> MaskedOrigin:
    def reader(part: str) -> PairReader:
        data = _load_voc(root, part)
        return _reader("voc", data.images, data.masks)

    coding = MaskCoding(len(_VOC_CLASSES))
    return MaskedOrigin("voc", _VOC_CLASSES, coding, reader("train"), reader("val"), None)


def _load_voc(root: Path, part: str) -> Any:
    from torchvision.datasets import VOCSegmentation

    try:
        try:
            return VOCSegmentation(root, year="2012", image_set=part)
        except RuntimeError:  # the files are not there
            root.mkdir(parents=True, exist_ok=True)
            return VOCSegmentation(root, year="2012", image_set=part, download=True)
    except (OSError, RuntimeError, EOFError) as error:
        if is_storage_error(error):
            raise AttarError(
                f"Cannot store voc under '{root}' ({error}): free some space or choose another data root."
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise AttarError(
            f"Cannot download voc ({reason}): connect this machine once, or put its folder VOCdevkit/VOC2012 under "
            f"'{root}'."
        ) from error


def _cityscapes(root: Path) -> MaskedOrigin:
    from torchvision.datasets import Cityscapes

    home = root if (root / "leftImg8bit").is_dir() else root / "cityscapes"

    def reader(part: str) -> PairReader:
        try:
            data = Cityscapes(home, split=part, mode="fine", target_type="semantic")
        except (OSError, RuntimeError) as error:
            raise AttarError(
                f"Cityscapes is not under '{home}' and cannot be downloaded: get leftImg8bit_trainvaltest.zip and "
                "gtFine_trainvaltest.zip from cityscapes-dataset.com and put them there, unpacked or not."
            ) from error
        # torchvision lists folders in whatever order the disk has them.
        pairs = sorted(zip(data.images, (targets[0] for targets in data.targets), strict=True))
        return _reader("cityscapes", *map(list, zip(*pairs, strict=True)))

    trained = sorted((each for each in Cityscapes.classes if 0 <= each.train_id < VOID), key=lambda each: each.train_id)
    other = {(each.id,) for each in Cityscapes.classes if each.id >= 0} - {(each.id,) for each in trained}
    coding = MaskCoding(len(trained), VOID, tuple((each.id,) for each in trained), tuple(sorted(other)))
    names = tuple(each.name for each in trained)
    return MaskedOrigin("cityscapes", names, coding, reader("train"), reader("val"), None)


def _reader(name: str, images: list[str], masks: list[str]) -> PairReader:
    for path in map(Path, (*images, *masks)):
        if not path.is_file():
            raise AttarError(f"The files of {name} are incomplete, '{path}' is missing: unpack or download them again.")
    return PairReader([Path(path) for path in images], [Path(path) for path in masks])
