from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import attar.data.cache as cache_module
from attar.data import AUGMENTATIONS, VOID, BadImageError, BadMaskError, Loader, Normalization, Shuffled, Source
from attar.data import open_source as open_any
from attar.data.masks import MaskCoding, decode_mask
from attar.data.reader import digest
from attar.errors import AttarError


def open_source(name: str | Path, **options: Any) -> Source:
    return open_any(name, task="segmentation", **options)


def refused(*arguments: Any, **options: Any) -> str:
    """Return the message of the refusal, after checking that it is one sentence."""
    with pytest.raises(AttarError) as caught:
        open_source(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.rstrip()[-1] in ".?"
    return message


def check(source: Source) -> None:
    """What must hold for every source of images with masks."""
    assert source.task == "segmentation"
    assert source.ignore_index == VOID == 255
    assert source.default_augmentation == "scale-crop-flip"
    for name, split in source.splits.items():
        assert split.name == name
        assert len(split) == len(split.targets) == len(split.index) == len(split.rows) > 0
        assert (np.diff(split.index) > 0).all()
        assert split.index.max() < split.index_bound
        assert (split.targets == 0).all()
        assert split.coding is not None
        assert split.coding.num_classes == source.num_classes
        if split.pixels is None:
            assert split.masks is None
            continue
        assert split.masks is not None
        assert split.masks.dtype == np.uint8
        assert split.masks.shape == split.pixels.shape[:3]
        assert split.masks.shape[1:] == source.image_size == split.image_size
        assert ((split.masks < source.num_classes) | (split.masks == VOID)).all()
    for one, other in (("train", "holdout"), ("train", "test"), ("holdout", "test")):
        if source.splits[one].reader is source.splits[other].reader:
            assert not set(source.splits[one].index) & set(source.splits[other].index)


def write_mask(folder: Path, name: str, mask: Any, mode: str | None = None) -> None:
    Image.fromarray(np.asarray(mask)).convert(mode).save(folder / "masks" / name)


def entries(cache: Path) -> list[str]:
    folder = cache / "images"
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.is_dir() else []


# Folders


def test_folder_of_pairs(make_pairs: Any, cache: Path) -> None:
    folder = make_pairs(count=20)
    source = open_source(folder)
    check(source)
    assert [len(split) for split in source.splits.values()] == [14, 2, 4]
    assert source.image_size == source.native_size == (20, 16)
    assert source.classes == ("0", "1", "2", "3")
    assert "4 were assumed, '0' to '3', because 3 is the largest value" in source.remarks[0]
    for split in source.splits.values():
        for row, index in zip(split.rows, split.index, strict=True):
            for values, kind in ((split.pixels, "images"), (split.masks, "masks")):
                assert values is not None
                np.testing.assert_array_equal(values[row], np.asarray(Image.open(folder / kind / f"{index:03}.png")))
    again = open_source(folder, progress=lambda *_: pytest.fail("read again"))
    assert again.fingerprint == source.fingerprint
    assert again.remarks == source.remarks
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("layout", ["{split}/{kind}", "{kind}/{split}"])
def test_splits_come_as_they_are_named(make_pairs: Any, tmp_path: Path, layout: str) -> None:
    for split, count in (("train", 10), ("val", 4), ("test", 3)):
        part = make_pairs(f"parts/{split}", count=count, seed=count)
        for kind in ("images", "masks"):
            target = tmp_path / "scenes" / layout.format(split=split, kind=kind)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(part / kind, target)
    folder = tmp_path / "scenes"
    source = open_source(folder, holdout=0.5)
    check(source)
    assert [len(split) for split in source.splits.values()] == [10, 4, 3], "a hold-out that comes is not cut"
    assert [len(split) for split in open_source(folder, holdout=0).splits.values()] == [10, 0, 3]
    shutil.rmtree(folder / layout.format(split="test", kind="images"))
    assert "There is no folder" in refused(folder)
    shutil.rmtree(folder / layout.format(split="test", kind="masks"))
    one, other = (open_source(folder, holdout=0.2, split_seed=seed) for seed in (0, 1))
    check(one)
    assert [len(split) for split in one.splits.values()] == [8, 2, 4], "without a test split val is the test"
    assert one.holdout.index.tolist() != other.holdout.index.tolist()
    assert one.fingerprint != other.fingerprint


def test_classes_of_a_file_or_of_an_argument(make_pairs: Any, tmp_path: Path) -> None:
    folder = make_pairs()
    (folder / "classes.json").write_text(json.dumps({"names": ["a", "b", "c", "d", "e"], "ignore_index": 255}))
    source = open_source(folder)
    assert source.classes == ("a", "b", "c", "d", "e")
    assert source.remarks == ()
    assert open_source(folder, classes=["p", "q", "r", "s"]).classes == ("p", "q", "r", "s")
    (folder / "classes.json").rename(tmp_path / "mine.json")
    assert open_source(folder, classes=str(tmp_path / "mine.json")).classes == source.classes
    # The value that means void on disk is given out as 255.
    plain, void = open_source(folder), open_source(folder, ignore_index=3)
    assert void.num_classes == 3
    assert plain.train.masks is not None
    assert void.train.masks is not None
    np.testing.assert_array_equal(np.where(plain.train.masks == 3, 255, plain.train.masks), void.train.masks)
    assert plain.fingerprint != void.fingerprint


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("{", "it is not JSON"),
        ("[]", "does not name the classes"),
        ('{"names": []}', "does not name the classes"),
        ('{"names": ["a"]}', "one class only, 'a'"),
        ('{"names": ["a", "a"]}', "same name"),
        ('{"names": ["a", "b"], "color": []}', "holds 'color', which means nothing"),
        ('{"names": ["a", "b"], "ignore_index": 1}', "also that of class 'b'"),
        ('{"names": ["a", "b"], "ignore_index": -1}', "ignore_index must be"),
        ('{"names": ["a", "b"], "colors": [[0, 0, 0]]}', "names 2 classes: let 'colors' hold a different one"),
        ('{"names": ["a", "b"], "colors": [0, 1]}', "must list colours"),
        ('{"names": ["a", "b"], "values": [0, -1]}', "must list numbers"),
        ('{"names": ["a", "b"], "values": [0, 1], "colors": []}', "both 'values' and 'colors'"),
        (json.dumps({"names": [str(k) for k in range(256)]}), "256 classes, but segmentation takes at most 255"),
    ],
)
def test_bad_class_files(make_pairs: Any, told: str, message: str) -> None:
    folder = make_pairs(count=4)
    (folder / "classes.json").write_text(told)
    assert message in refused(folder)


def test_missing_class_file(make_pairs: Any) -> None:
    assert "No such file" in refused(make_pairs(count=4), classes="nowhere.json")


def test_missing_partners_and_folders_are_named(make_pairs: Any, tmp_path: Path) -> None:
    folder = make_pairs()
    (folder / "masks" / "003.png").rename(folder / "003.png")
    message = refused(folder)
    assert f"Image '{folder / 'images' / '003.png'}' has no mask: add a file called '003' to" in message
    (folder / "masks" / "004.png").unlink()
    assert "(and 1 more)" in refused(folder)
    for name in ("003.png", "004.png", "005.png"):
        (folder / "images" / name).unlink()
    assert f"Mask '{folder / 'masks' / '005.png'}' has no image" in refused(folder)
    shutil.copy(folder / "images" / "000.png", folder / "images" / "000.bmp")
    assert "have the same name" in refused(folder)
    shutil.rmtree(folder / "masks")
    assert f"There is no folder '{folder / 'masks'}'" in refused(folder)
    (tmp_path / "empty").mkdir()
    assert "holds no folders 'images' and 'masks'" in refused(tmp_path / "empty")
    for kind in ("images", "masks"):
        (tmp_path / "empty" / kind).mkdir()
    assert "holds no images" in refused(tmp_path / "empty")


# Masks


@pytest.mark.parametrize("size", [None, 300])
def test_a_wrong_value_is_named(make_pairs: Any, cache: Path, size: int | None) -> None:
    folder = make_pairs(count=6)
    mask = np.zeros((20, 16), np.uint8)
    mask[7, 7] = 9
    write_mask(folder, "004.png", mask)
    message = refused(folder, classes=["a", "b", "c", "d"], image_size=size)
    assert f"Mask '{folder / 'masks' / '004.png'}' holds the value 9, but the 4 classes are 0..3" in message
    assert entries(cache) == []
    assert open_source(folder, image_size=size).num_classes == 10


@pytest.mark.parametrize("size", [None, 300])
def test_a_wrong_size_is_named(make_pairs: Any, cache: Path, size: int | None) -> None:
    folder = make_pairs(count=6)
    write_mask(folder, "002.png", np.zeros((16, 20), np.uint8))
    message = refused(folder, image_size=size)
    assert f"'{folder / 'masks' / '002.png'}' is 20 x 16 pixels" in message
    assert f"'{folder / 'images' / '002.png'}' is 16 x 20" in message
    assert entries(cache) == []


@pytest.mark.parametrize("size", [None, 300])
@pytest.mark.parametrize("damage", ["zero bytes", "truncated", "text"])
def test_an_unreadable_mask_is_named_or_left_out(make_pairs: Any, damage: str, size: int | None) -> None:
    folder = make_pairs()
    path = folder / "masks" / "004.png"
    data = path.read_bytes()
    path.write_bytes({"zero bytes": b"", "truncated": data[: len(data) // 2], "text": b"hello"}[damage])
    assert refused(folder, image_size=size).startswith(f"Cannot read mask '{path}' (")
    source = open_source(folder, image_size=size, skip_bad_images=True)
    assert source.skipped == (f"mask '{path}'",)
    kept = np.sort(np.concatenate([split.index for split in source.splits.values()]))
    assert kept.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert refused(folder, image_size=size).startswith(f"Cannot read mask '{path}' (")
    path.write_bytes(data)
    image = folder / "images" / "007.png"
    image.write_bytes(b"")
    assert refused(folder, image_size=size).startswith(f"Cannot read image '{image}' (")


def test_errors_travel_between_processes() -> None:
    for kind in (BadImageError, BadMaskError):
        error = kind("mask 'x'", "it is empty")
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert str(copy) == str(error)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def palette(values: np.ndarray) -> bytes:
    image = Image.fromarray(values)
    image.putpalette([(37 * k + c) % 256 for k in range(256) for c in (0, 90, 180)])
    assert image.mode == "P"
    return encoded(image)


@pytest.mark.parametrize(
    "encode",
    [
        lambda values: encoded(Image.fromarray(values)),
        palette,
        lambda values: encoded(Image.fromarray(values.astype(np.uint16))),
        lambda values: encoded(Image.fromarray(values), "TIFF"),
        lambda values: encoded(Image.fromarray(values.astype(np.int32)), "TIFF"),
    ],
    ids=["L", "P", "I;16", "tiff", "I"],
)
def test_index_masks_are_read_by_index(encode: Callable[[np.ndarray], bytes]) -> None:
    values = np.array([[0, 1, 2], [3, 254, 255]], np.uint8)
    np.testing.assert_array_equal(decode_mask(encode(values), "mask 'x'", MaskCoding(None)), values)
    with pytest.raises(AttarError, match=r"Mask 'x' holds the value 254, but the 4 classes are 0\.\.3 and void is 255"):
        decode_mask(encode(values), "mask 'x'", MaskCoding(4))


def test_one_bit_masks_have_two_classes() -> None:
    values = np.array([[True, False], [False, True]])
    assert decode_mask(encoded(Image.fromarray(values)), "mask 'x'", MaskCoding(2)).tolist() == [[1, 0], [0, 1]]


def test_sixteen_bits_are_too_many_classes() -> None:
    data = encoded(Image.fromarray(np.array([[0, 300]], np.uint16)))
    with pytest.raises(AttarError, match="holds the value 300, but there can be at most 255 classes"):
        decode_mask(data, "mask 'x'", MaskCoding(None))
    assert decode_mask(data, "mask 'x'", MaskCoding(None, 300)).tolist() == [[0, VOID]]


def test_masks_that_keep_no_values_are_refused() -> None:
    grey = Image.new("L", (8, 8), 1)
    with pytest.raises(AttarError, match="Mask 'x' is a JPEG"):
        decode_mask(encoded(grey, "JPEG"), "mask 'x'", MaskCoding(2))
    for mode in ("RGB", "RGBA", "LA"):
        with pytest.raises(AttarError, match=f"Mask 'x' is {mode}, not a single channel"):
            decode_mask(encoded(grey.convert(mode)), "mask 'x'", MaskCoding(2))


def test_listed_values_and_colours(make_pairs: Any) -> None:
    folder = make_pairs(count=5, classes=2)
    plain = open_source(folder)
    names = {"names": ["ground", "thing"]}
    for path in (folder / "masks").iterdir():
        mask = np.asarray(Image.open(path)) * np.uint8(200)
        mask[0, :2] = 77
        Image.fromarray(mask).save(path)
    (folder / "classes.json").write_text(json.dumps(names | {"values": [0, 200]}))
    assert "holds the value 77, which is that of none of the 2 classes nor void" in refused(folder)
    (folder / "classes.json").write_text(json.dumps(names | {"values": [0, 200], "ignored": [77]}))
    by_value = open_source(folder)
    check(by_value)
    for path in (folder / "masks").iterdir():
        Image.open(path).convert("RGB").save(path)
    (folder / "classes.json").write_text(json.dumps(names | {"colors": [[0, 0, 0], [200, 200, 200]]}))
    assert "holds the colour (77, 77, 77), which is that of none of the 2 classes" in refused(folder)
    colors = {"colors": [[0, 0, 0], [200, 200, 200]], "ignored": [[77, 77, 77]]}
    (folder / "classes.json").write_text(json.dumps(names | colors))
    by_color = open_source(folder)
    for source in (by_value, by_color):
        assert source.train.masks is not None
        assert plain.train.masks is not None
        assert (source.train.masks[:, 0, :2] == VOID).all()
        np.testing.assert_array_equal(source.train.masks[:, 1:], plain.train.masks[:, 1:])
    assert by_value.fingerprint == by_color.fingerprint
    (folder / "classes.json").write_text(json.dumps(names | {"values": [0, 200]}))
    assert "is RGB, not a single channel" in refused(folder)


def test_void_masks_are_named_and_only_void_is_refused(make_pairs: Any) -> None:
    folder = make_pairs()
    for number in (3, 5):
        write_mask(folder, f"{number:03}.png", np.full((20, 16), 255, np.uint8))
    source = open_source(folder)
    assert source.void == tuple(f"mask '{folder / 'masks' / name}'" for name in ("003.png", "005.png"))
    assert source.remarks[1].startswith(f"Mask '{folder / 'masks' / '003.png'}' and 1 more have no labelled pixel")
    for path in (folder / "masks").iterdir():
        write_mask(folder, path.name, np.full((20, 16), 255, np.uint8))
    assert "All masks" in refused(folder)
    for path in (folder / "masks").iterdir():
        write_mask(folder, path.name, np.repeat(np.uint8([0, 255]), 160).reshape(20, 16))
    assert "hold class 0 only" in refused(folder)
    assert open_source(folder, classes=["a", "b"]).num_classes == 2


def test_void_among_the_classes_is_refused(make_pairs: Any) -> None:
    assert "The void value 0" in refused(make_pairs(), ignore_index=0)


# Sizes


def test_size_rule(make_pairs: Any) -> None:
    medium = open_source(make_pairs("medium", count=4, size=(300, 400)))
    check(medium)
    assert medium.image_size == (300, 400)
    assert medium.train.pixels is None, "more than 2^16 pixels are decoded by workers"
    assert open_source(make_pairs("small", count=4, size=(128, 512))).train.masks is not None
    assert open_source(make_pairs("large", count=4, size=(640, 1280))).image_size == (256, 512)
    mixed = make_pairs("mixed", count=4)
    make_pairs("mixed", count=2, size=(24, 16))
    source = open_source(mixed, image_size=(12, 10))
    check(source)
    assert source.mixed_sizes
    assert open_source(mixed).image_size == (512, 512)
    assert "at least 1 pixel" in refused(mixed, image_size=0)


def test_resized_masks_lie_on_their_images(make_pairs: Any) -> None:
    folder = make_pairs(count=4)
    for number in range(4):
        # Both hold the column's number, so they can be compared wherever they end up.
        ramp = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
        Image.fromarray(ramp).convert("RGB").save(folder / "images" / f"{number:03}.png")
        write_mask(folder, f"{number:03}.png", ramp)
    for size in ((100, 100), (37, 50), (230, 250)):
        source = open_source(folder, image_size=size)
        assert source.train.pixels is not None
        assert source.train.masks is not None
        apart = source.train.pixels[..., 0].astype(int) - source.train.masks
        assert abs(apart).max() <= 1 + 100 // size[0]
        assert abs(apart.mean()) < 0.6


# Names


def test_names(tmp_path: Path, make_folder: Any) -> None:
    assert "did you mean 'cityscapes'?" in refused("cityscape")
    assert "There is no data source with masks and no folder 'digits'" in refused("digits")
    assert "holds no folders 'images' and 'masks'" in refused(make_folder())
    assert "classes of 'voc' are known" in refused("voc", classes=["a", "b"])
    assert "fraction" in refused("voc", holdout=1.0)
    with pytest.raises(AttarError, match="did you mean 'segmentation'"):
        open_any("digits", task="segmentatio")
    with pytest.raises(AttarError, match="about masks"):
        open_any("digits", ignore_index=0)
    assert "mask_column" in refused("x", label_column="label")


# Hugging Face


def write_parquet(
    path: Path, pairs: list[tuple[bytes, bytes | None]], columns: tuple[str, str] = ("image", "mask"), **more: Any
) -> None:
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    names = {
        column: [None if pair[k] is None else {"bytes": pair[k]} for pair in pairs] for k, column in enumerate(columns)
    }
    features = {column: ImageFeature() for column in columns} | {name: kind for name, (kind, _) in more.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = names | {name: values for name, (_, values) in more.items()}
    Dataset.from_dict(rows, features=Features(features)).to_parquet(path)


def pairs_of(folder: Path) -> list[tuple[bytes, bytes | None]]:
    names = sorted(path.name for path in (folder / "images").iterdir())
    return [((folder / "images" / name).read_bytes(), (folder / "masks" / name).read_bytes()) for name in names]


def test_parquet(make_pairs: Any, tmp_path: Path) -> None:
    folder, table = make_pairs(count=10), tmp_path / "table"
    pairs = pairs_of(folder)
    write_parquet(table / "train.parquet", pairs)
    name = f"parquet:{table}"
    source = open_source(name)
    check(source)
    assert source.fingerprint == open_source(folder).fingerprint, "the same images, whatever they came in"
    write_parquet(table / "validation.parquet", pairs[:3])
    assert [len(split) for split in open_source(name).splits.values()] == [9, 1, 3]
    write_parquet(table / "test.parquet", pairs[3:5])
    assert [len(split) for split in open_source(name).splits.values()] == [10, 3, 2]
    write_parquet(table / "test.parquet", [(image, None) for image, _ in pairs])
    assert len(open_source(name).test) == 3, "test images without masks cannot measure anything"
    (table / "classes.json").write_text(json.dumps({"names": list("abcde"), "ignore_index": 255}))
    assert open_source(name).classes == tuple("abcde")


@pytest.mark.parametrize("column", ["annotation", "label", "segmentation", "ground_truth"])
def test_mask_columns(make_pairs: Any, tmp_path: Path, column: str) -> None:
    from datasets import ClassLabel, List, Value

    scene = (ClassLabel(names=["town", "sea", "air", "wood", "moor"]), [0] * 6)
    listed = (List(ClassLabel(names=["a", "b", "c", "d"])), [[0]] * 6)
    write_parquet(
        tmp_path / "table" / "train.parquet", pairs_of(make_pairs(count=6)), ("image", column), scene=scene, all=listed
    )
    name = f"parquet:{tmp_path / 'table'}"
    if column == "ground_truth":
        message = refused(name)
        assert "has no column of masks (its columns are image, ground_truth, scene, all)" in message
        source = open_source(name, mask_column=column)
    else:
        source = open_source(name)
    check(source)
    assert source.classes == tuple("abcd")
    assert "did you mean 'scene'" in refused(name, mask_column="scenes")
    assert "no images in column 'scene'" in refused(name, mask_column="scene")
    write_parquet(
        tmp_path / "none" / "train.parquet",
        pairs_of(tmp_path / "scenes"),
        ("image", "b"),
        mask=(Value("int64"), [1] * 6),
    )
    assert "no column of masks" in refused(f"parquet:{tmp_path / 'none'}")


def test_bad_masks_of_a_table_are_named_by_row(make_pairs: Any, tmp_path: Path) -> None:
    pairs, name = pairs_of(make_pairs(count=6)), f"parquet:{tmp_path / 'table'}"
    write_parquet(tmp_path / "table" / "train.parquet", [*pairs[:3], (pairs[3][0], None), *pairs[4:]])
    assert refused(name).startswith("Cannot read mask of row 3 of train (it is empty)")
    assert open_source(name, skip_bad_images=True).skipped == ("mask of row 3 of train",)
    small = encoded(Image.new("L", (3, 4)))
    write_parquet(tmp_path / "table" / "train.parquet", [*pairs[:3], (pairs[3][0], small), *pairs[4:]])
    assert refused(name).startswith("Mask of row 3 of train is 3 x 4 pixels, but its image row 3 of train is 16 x 20")
    assert "the value 3, but the 3 classes" in refused(name, classes=["a", "b", "c"])


def test_readers_travel_to_other_processes(make_pairs: Any, tmp_path: Path) -> None:
    pairs = pairs_of(make_pairs(count=6))
    write_parquet(tmp_path / "table" / "train.parquet", pairs)
    for name in (f"parquet:{tmp_path / 'table'}", tmp_path / "scenes"):
        reader: Any = open_source(name).train.reader
        reader.read_mask(0)
        copy = pickle.loads(pickle.dumps(reader))
        assert (copy.read(3), copy.read_mask(3)) == pairs[3]


def test_hub_data_set(make_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `datasets` reads a local folder of the same name through the same code as a repository on the hub.
    pairs = pairs_of(make_pairs(count=10))
    write_parquet(tmp_path / "owner" / "scenes" / "data" / "train-00000-of-00001.parquet", pairs[:7])
    write_parquet(tmp_path / "owner" / "scenes" / "data" / "validation-00000-of-00001.parquet", pairs[7:])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    source = open_source("hf:owner/scenes", classes=list("abcd"))
    check(source)
    assert [len(split) for split in source.splits.values()] == [6, 1, 3]


# torchvision, with files in its own formats


def write_voc(root: Path) -> Path:
    home = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (home / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        names = [f"2007_{part}_{k}" for k in range(count)]
        (home / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(home / "JPEGImages" / f"{name}.jpg")
            mask = rng.integers(0, 22, (30, 40), dtype=np.uint8)
            mask[mask == 21] = 255
            (home / "SegmentationClass" / f"{name}.png").write_bytes(palette(mask))
    return home


def test_voc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = write_voc(tmp_path)
    source = open_source("voc", data_root=tmp_path, holdout=0.25)
    check(source)
    assert [len(split) for split in source.splits.values()] == [6, 2, 4]
    assert source.num_classes == 21
    assert (source.classes[0], source.classes[15]) == ("background", "person")
    assert source.test.masks is not None
    with Image.open(home / "SegmentationClass" / "2007_val_2.png") as mask:
        np.testing.assert_array_equal(source.test.masks[2], np.asarray(mask))
    (home / "SegmentationClass" / "2007_val_2.png").unlink()
    assert "2007_val_2.png' is missing" in refused("voc", data_root=tmp_path)

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", unreachable)
    message = refused("voc", data_root=tmp_path / "none")
    assert message.startswith("Cannot download voc (no route to host)")
    assert f"VOCdevkit/VOC2012 under '{tmp_path / 'none'}'" in message


@pytest.mark.parametrize("place", [".", "cityscapes"])
def test_cityscapes(tmp_path: Path, place: str) -> None:
    root, rng, masks = tmp_path / place, np.random.default_rng(0), {}
    for part, count in (("train", 6), ("val", 2)):
        for city in ("ulm", "aachen"):
            for k in range(count // 2):
                stem = f"{city}_{k:06}_000019"
                for kind in ("leftImg8bit", "gtFine"):
                    (root / kind / part / city).mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (16, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png")
                masks[stem] = rng.integers(0, 34, (16, 32), dtype=np.uint8)
                path = root / "gtFine" / part / city / f"{stem}_gtFine_labelIds.png"
                Image.fromarray(masks[stem]).save(path)
    source = open_source("cityscapes", data_root=tmp_path, holdout=0.2)
    check(source)
    assert [len(split) for split in source.splits.values()] == [4, 2, 2]
    assert source.num_classes == 19
    assert (source.classes[0], source.classes[13], source.classes[18]) == ("road", "car", "bicycle")
    assert source.test.masks is not None
    raw, given = masks["aachen_000000_000019"], source.test.masks[0]  # aachen comes before ulm
    for label, trained in ((0, 255), (7, 0), (9, 255), (11, 2), (23, 10), (26, 13), (29, 255), (33, 18)):
        assert (given[raw == label] == trained).all()
    path = root / "gtFine" / "val" / "ulm" / "ulm_000000_000019_gtFine_labelIds.png"
    Image.fromarray(np.full((16, 32), 40, np.uint8)).save(path)
    assert "ulm_000000_000019_gtFine_labelIds.png' holds the value 40" in refused("cityscapes", data_root=tmp_path)
    path.unlink()
    assert "is missing" in refused("cityscapes", data_root=tmp_path)
    message = refused("cityscapes", data_root=tmp_path / "none")
    assert f"'{tmp_path / 'none' / 'cityscapes'}' and cannot be downloaded" in message


# The cache


@pytest.mark.parametrize("file", ["masks.u8", "pixels.u8", "scan.npz"])
@pytest.mark.parametrize("keep", [0.5, None])
def test_truncated_or_lost_cache_is_rebuilt(make_pairs: Any, cache: Path, file: str, keep: float | None) -> None:
    folder = make_pairs()
    expected = open_source(folder)
    masks = np.array(expected.train.masks)
    path = cache / "images" / entries(cache)[0] / file
    data = path.read_bytes()
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(data[: int(len(data) * keep)])
    again = open_source(folder)
    assert again.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(again.train.masks, masks)
    assert len(entries(cache)) == 1


def test_full_disk_leaves_nothing(make_pairs: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = make_pairs()
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "fsync", full)
        assert "No space left" in refused(folder)
    assert entries(cache) == []
    assert len(open_source(folder).train) == 7


def test_a_changed_mask_or_coding_makes_a_new_entry(make_pairs: Any, cache: Path) -> None:
    folder = make_pairs()
    prints = [open_source(folder).fingerprint, open_source(folder, ignore_index=3).fingerprint]
    write_mask(folder, "000.png", np.full((20, 16), 1, np.uint8))
    prints.append(open_source(folder).fingerprint)
    assert len(set(prints)) == 3
    assert len(entries(cache)) == 3


def test_fingerprint_is_of_content_not_of_place(make_pairs: Any) -> None:
    here, there = make_pairs("here"), make_pairs("there")
    assert open_source(here).fingerprint == open_source(there).fingerprint
    assert open_source(here).fingerprint != open_source(there, split_seed=1).fingerprint


# Labelled images are what they were


def test_classification_is_what_it_was_before_masks(make_folder: Any, cache: Path) -> None:
    digits = open_any("digits")
    assert digits.fingerprint == "365cf9a960c02cc150b299b8ce74ad92"
    assert (digits.task, digits.ignore_index, digits.void, digits.remarks) == ("classification", None, (), ())
    normalization = Normalization(digits.mean, digits.std)
    loader = Loader(
        digits.train, Shuffled(len(digits.train), 32, 3), AUGMENTATIONS["strong"], normalization, views=2, seed=3
    )
    sample = next(loader.epoch(1))
    assert digest([sample.index.numpy(), sample.targets.numpy()]) == "8e5ec7cb0bacfc58487419470b492798"
    draws = AUGMENTATIONS["strong"].draw((20, 16), 7, 3, np.arange(50) * 3, np.arange(50) % 2)
    assert draws.boxes is not None
    assert digest([draws.top, draws.left, draws.flip, draws.boxes]) == "17c61308a6e421681a58274e324e96e6"
    # The teachers' cache is kept under this text.
    assert repr(AUGMENTATIONS["flip"]) == "Augmentation(name='flip', crop=False, flip=True, color=0.0, erase=0.0)"
    photos = open_any(make_folder())
    assert photos.fingerprint == "2ee78373011e07d189771d0d035e2944"
    reader = photos.train.reader
    assert reader.key is not None
    (name,) = entries(cache)
    assert name == digest([b"attar-images-1", reader.key.encode(), b"(20, 16, True)"])
    assert sorted(path.name for path in (cache / "images" / name).iterdir()) == ["pixels.u8", "scan.npz"]


def test_real_camvid(real_data: Path) -> None:
    if not (real_data / "camvid-180").is_dir():
        pytest.skip(f"no CamVid at {real_data / 'camvid-180'}: set ATTAR_DATA")
    source = open_source(f"parquet:{real_data / 'camvid-180'}")
    check(source)
    assert [len(split) for split in source.splits.values()] == [367, 101, 233]
    assert source.image_size == (180, 240)
    assert source.num_classes == 11
    assert source.classes[8] == "car"
    assert source.remarks == ()
    assert source.train.masks is not None
    shares = np.bincount(source.train.masks.ravel(), minlength=256) / source.train.masks.size
    assert shares[:11].min() > 0.001
    assert 0.02 < shares[255] < 0.06
