"""Images with masks by name, in three splits: segmentation's side of `open_source`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attar.data.cache import cached_scan
from attar.data.huggingface_masks import open_masked_hub, open_masked_parquet
from attar.data.masks import VOID, ClassNames, MaskCoding, MaskedOrigin, MaskedReader, sentence
from attar.data.pairs import open_pairs
from attar.data.reader import digest
from attar.data.scan import Progress, Scan
from attar.data.splits import Source, Split, asked_size, native_sizes, part, refuse_columns, statistics
from attar.data.torchvision_masks import TORCHVISION_MASK_NAMES, open_torchvision_masks
from attar.errors import AttarError, did_you_mean

__all__ = ["CACHED_PIXELS", "open_masked_source"]

CACHED_PIXELS = 1 << 16  # height x width: up to here both are kept decoded, above they are decoded in workers
_LARGE_SIZE = 512
_TEST_FRACTION = 0.2


def open_masked_source(
    name: str,
    *,
    image_size: int | tuple[int, int] | None,
    holdout: float,
    split_seed: int,
    skip_bad_images: bool,
    image_column: str | None,
    mask_column: str | None,
    classes: ClassNames,
    ignore_index: int | None,
    data_root: Path,
    root: Path,
    progress: Progress | None,
) -> Source:
    """Open images with masks: `parquet:DIR`, `hf:owner/name`, `voc`, `cityscapes`, or a folder of images and masks.

    Splits: `test` is the test split and `validation` the hold-out, of which then nothing is cut off the training images
    (`holdout` 0 leaves it out). Without `test`, `validation` is the test split; without both, a fifth of the images is.
    What is cut is drawn at random by `split_seed`: images of many classes cannot be stratified by one.

    Size: `image_size`; by default that of the images where all share one, scaled down to at most 512 a side, else 512 x
    512. Images and masks are kept decoded up to `CACHED_PIXELS` pixels.

    Raises:
        AttarError: as `open_source`, or a mask that is missing, unreadable, of another size than its image, or that
            holds a value that is neither a class nor void.
    """
    if not 0 <= holdout < 1:
        raise AttarError(f"The hold-out must be a fraction from 0 to below 1, not {holdout}.")
    origin = _open_origin(name, root, data_root, image_column, mask_column, classes, ignore_index)
    readers = {"train": origin.train, "validation": origin.validation, "test": origin.test}
    if origin.test is None:
        readers |= {"validation": None, "test": origin.validation}
    elif holdout == 0:
        readers["validation"] = None
    for which, reader in readers.items():
        if reader is not None and len(reader) == 0:
            raise AttarError(f"The {which} split of '{origin.name}' is empty: add images to it or remove it.")
    size = _trained_size(image_size, *native_sizes(origin.train)[:2])
    scans = {
        which: cached_scan(
            reader,
            size,
            keep_pixels=size[0] * size[1] <= CACHED_PIXELS,
            skip_bad_images=skip_bad_images,
            cache_dir=root,
            progress=progress,
            coding=origin.coding,
        )
        for which, reader in readers.items()
        if reader is not None
    }
    names, coding, assumed = _classes(origin, list(scans.values()))

    def split(which: str, called: str) -> Split:
        reader = readers[which]
        assert reader is not None
        return _split(called, reader, scans[which], size, coding)

    train = split("train", "train")
    if "test" in scans:
        test = split("test", "test")
    else:
        train, test = _set_aside(train, "test", _TEST_FRACTION, split_seed)
    if "validation" in scans:
        held_out = split("validation", "holdout")
    elif holdout > 0:
        train, held_out = _set_aside(train, "holdout", holdout, split_seed)
    else:
        held_out = part(train, "holdout", np.arange(0))
    found = scans["train"]
    mean, std = statistics(found, train.rows)
    sizes, counts = np.unique(found.sizes, axis=0, return_counts=True)
    native = sizes[counts.argmax()]
    parts = [(found, train), (scans.get("validation", found), held_out), (scans.get("test", found), test)]
    void = tuple(name for which, scan in scans.items() for name in _void(readers[which], scan))
    return Source(
        name=name,
        classes=names,
        train=train,
        holdout=held_out,
        test=test,
        mean=mean,
        std=std,
        image_size=size,
        native_size=(int(native[0]), int(native[1])),
        mixed_sizes=len(counts) > 1,
        skipped=tuple(name for scan in scans.values() for name in scan.skipped),
        fingerprint=_fingerprint(names, parts),
        default_augmentation="scale-crop-flip",
        task="segmentation",
        ignore_index=VOID,
        void=void,
        remarks=(*assumed, *_about_void(void)),
    )


def _open_origin(
    name: str,
    root: Path,
    data_root: Path,
    image_column: str | None,
    mask_column: str | None,
    classes: ClassNames,
    ignore_index: int | None,
) -> MaskedOrigin:
    kind, colon, rest = name.partition(":")
    if colon and kind == "parquet":
        return open_masked_parquet(Path(rest).expanduser(), root, image_column, mask_column, classes, ignore_index)
    if colon and kind == "hf":
        return open_masked_hub(rest, image_column, mask_column, classes, ignore_index)
    refuse_columns(name, image_column=image_column, mask_column=mask_column)
    path = Path(name).expanduser()
    if path.is_dir():
        return open_pairs(path, classes, ignore_index)
    if name in TORCHVISION_MASK_NAMES:
        if classes is not None or ignore_index not in (None, VOID):
            raise AttarError(f"The classes of '{name}' are known: leave classes and ignore_index out.")
        return open_torchvision_masks(name, data_root)
    known = ", ".join(TORCHVISION_MASK_NAMES)
    nearest = did_you_mean(name, TORCHVISION_MASK_NAMES)
    if nearest is not None and "/" not in name:
        raise AttarError(f"There is no data source with masks '{name}': did you mean '{nearest}'?")
    raise AttarError(
        f"There is no data source with masks and no folder '{name}': give a folder with images and masks, parquet:DIR, "
        f"hf:owner/name or one of {known}."
    )


def _trained_size(asked: int | tuple[int, int] | None, native: tuple[int, int], mixed: bool) -> tuple[int, int]:
    if asked is not None:
        return asked_size(asked)
    if mixed:
        return _LARGE_SIZE, _LARGE_SIZE
    scale = min(1.0, _LARGE_SIZE / max(native))
    return max(1, round(native[0] * scale)), max(1, round(native[1] * scale))


def _classes(origin: MaskedOrigin, scans: list[Scan]) -> tuple[tuple[str, ...], MaskCoding, list[str]]:
    """Return the class names, the coding with their number, and what was assumed about them."""
    largest = max(int(scan.largest.max()) for scan in scans if scan.largest is not None)
    if largest < 0:
        raise AttarError(
            f"All masks of '{origin.name}' are void (value {origin.coding.ignore_index}): check them, or say which "
            "value is void with ignore_index."
        )
    if origin.classes:
        return origin.classes, origin.coding, []
    number = largest + 1
    if number == 1:
        raise AttarError(
            f"The masks of '{origin.name}' hold class 0 only, and void ({origin.coding.ignore_index}): segmentation "
            "needs at least two classes; where a value above 0 is the second one, list 'values' in classes.json."
        )
    void = origin.coding.ignore_index
    if void < number:
        raise AttarError(
            f"The void value {void} of '{origin.name}' lies among the values 0..{largest}: say which value each class "
            "has with 'values' in classes.json."
        )
    assumed = (
        f"Nothing names the classes of '{origin.name}': {number} were assumed, '0' to '{largest}', because {largest} "
        f"is the largest value in its masks besides {void} for void."
    )
    return tuple(map(str, range(number))), replace(origin.coding, num_classes=number), [assumed]


def _split(name: str, reader: MaskedReader, found: Scan, size: tuple[int, int], coding: MaskCoding) -> Split:
    return Split(
        name,
        size,
        found.pixels,
        reader,
        np.arange(len(found.rows)),
        reader.targets[found.rows],
        found.rows,
        len(reader),
        found.masks,
        coding,
    )


def _set_aside(split: Split, name: str, fraction: float, seed: int) -> tuple[Split, Split]:
    """Cut a random `fraction` off `split`, the same for the same images and seed; both parts stay in order."""
    from sklearn.model_selection import train_test_split

    if len(split) < 2:
        raise AttarError(f"One image cannot be shared by a training and a {name} part: add images.")
    kept, cut = train_test_split(np.arange(len(split)), test_size=fraction, random_state=seed)
    return part(split, split.name, np.sort(kept)), part(split, name, np.sort(cut))


def _void(reader: MaskedReader | None, found: Scan) -> list[str]:
    assert reader is not None
    assert found.largest is not None
    return [reader.mask_name(int(row)) for row in found.rows[found.largest < 0]]


def _about_void(void: tuple[str, ...]) -> list[str]:
    if not void:
        return []
    several = f" and {len(void) - 1} more have" if len(void) > 1 else " has"
    return [f"{sentence(void[0])}{several} no labelled pixel: nothing can be learnt from it."]


def _fingerprint(classes: tuple[str, ...], parts: list[tuple[Scan, Split]]) -> str:
    pieces: list[bytes | NDArray[np.generic]] = [b"segmentation\0", "\0".join(classes).encode()]
    for found, split in parts:
        assert found.mask_digests is not None
        pieces += [str(len(split)).encode(), found.digests[split.rows], found.mask_digests[split.rows]]
    return digest(pieces)
