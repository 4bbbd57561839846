from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attar.data import EvalLoader, Loader, Normalization, Shuffled, Source, augmentation, open_source
from attar.data.sources import CACHED_UP_TO
from attar.errors import AttarError


def refused(*arguments: Any, **options: Any) -> str:
    """Return the message of the refusal, after checking that it is one sentence."""
    with pytest.raises(AttarError) as caught:
        open_source(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.rstrip()[-1] in ".?"
    return message


def check(source: Source) -> None:
    """What must hold for every source."""
    splits = source.splits
    for name, split in splits.items():
        assert split.name == name
        assert len(split) == len(split.targets) == len(split.index) == len(split.rows) > 0
        assert (np.diff(split.index) > 0).all()
        assert split.index.max() < split.index_bound
        assert split.targets.min() >= 0
        assert split.targets.max() < source.num_classes
    assert not set(splits["train"].index) & set(splits["holdout"].index)
    if source.test.reader is source.train.reader:
        assert not (set(splits["train"].index) | set(splits["holdout"].index)) & set(splits["test"].index)


# Splits


def test_digits() -> None:
    source = open_source("digits")
    check(source)
    assert [len(split) for split in source.splits.values()] == [1293, 144, 360]
    assert source.classes == tuple("0123456789")
    assert source.image_size == source.native_size == (8, 8)
    assert not source.mixed_sizes
    assert source.default_augmentation == "crop"
    assert source.skipped == ()
    pixels = source.train.pixels[source.train.rows] / 255  # type: ignore[index]
    assert pixels.shape == (1293, 8, 8, 3)
    assert pixels.min() == 0
    assert pixels.max() == 1
    np.testing.assert_allclose(source.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(source.std, pixels.std((0, 1, 2)), rtol=1e-5)


def test_digits_are_written_nowhere(cache: Path) -> None:
    open_source("digits", image_size=16)
    assert not cache.exists()


def test_holdout_is_fixed_stratified_and_apart_from_the_rest() -> None:
    one, again, other = open_source("digits"), open_source("digits"), open_source("digits", split_seed=1)
    np.testing.assert_array_equal(one.holdout.index, again.holdout.index)
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert one.holdout.index.tolist() != other.holdout.index.tolist()
    shares = [np.bincount(split.targets) / len(split) for split in one.splits.values()]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.01)
    np.testing.assert_allclose(shares[0], shares[2], atol=0.01)
    # Another hold-out leaves the test images alone.
    assert open_source("digits", holdout=0.3).test.index.tolist() == one.test.index.tolist()
    assert len(open_source("digits", holdout=0.3).holdout) == 432


def test_class_too_small_to_split(make_folder: Any) -> None:
    message = refused(make_folder(counts={"cat": 20, "dog": 20, "newt": 1}))
    assert "'newt' has too few images" in message


def test_fraction_too_small_for_the_classes(make_folder: Any) -> None:
    folder = make_folder("photos/train", counts={f"c{k}": 3 for k in range(8)}).parent
    make_folder("photos/test", counts={"c0": 2}, seed=1)
    assert "cannot hold each of the 8 classes" in refused(folder, holdout=0.1)
    check(open_source(folder, holdout=0.4))
    assert "fraction" in refused(folder, holdout=1.5)


# Folders


def test_folder_of_class_folders(make_folder: Any) -> None:
    folder = make_folder()
    (folder / ".hidden").mkdir()
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / "cat" / "deeper").mkdir()
    shutil.move(folder / "cat" / "003.png", folder / "cat" / "deeper" / "003.PNG")
    source = open_source(str(folder))
    check(source)
    assert source.classes == ("cat", "dog")
    assert source.image_size == (20, 16)
    assert [len(split) for split in source.splits.values()] == [28, 4, 8]
    assert source.default_augmentation == "crop-flip"


@pytest.mark.parametrize("test_name", ["test", "val", "valid", "validation"])
def test_folder_with_splits(make_folder: Any, test_name: str) -> None:
    folder = make_folder("photos/train").parent
    make_folder(f"photos/{test_name}", counts={"dog": 5, "cat": 4}, seed=1)
    source = open_source(folder)
    check(source)
    assert [len(split) for split in source.splits.values()] == [36, 4, 9]
    assert np.bincount(source.test.targets).tolist() == [4, 5]


def test_test_wins_over_val_and_train_alone_is_split(make_folder: Any) -> None:
    folder = make_folder("photos/train").parent
    assert len(open_source(folder).test) == 8
    make_folder("photos/val", counts={"cat": 3, "dog": 3})
    make_folder("photos/test", counts={"cat": 2, "dog": 3})
    assert len(open_source(folder).test) == 5


def test_a_class_may_be_called_train(make_folder: Any) -> None:
    assert open_source(make_folder(counts={"train": 10, "car": 10})).classes == ("car", "train")


def test_bad_folders(make_folder: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(tmp_path / "empty")
    loose = make_folder("loose", counts={"": 3})
    assert "no class folders" in refused(loose)
    assert "one class only, 'cat'" in refused(make_folder("single", counts={"cat": 9}))
    hollow = make_folder("hollow")
    (hollow / "bird").mkdir()
    assert "bird' holds no images" in refused(hollow)
    strange = make_folder("strange/train").parent
    make_folder("strange/test", counts={"cats": 2})
    assert "'cats': did you mean 'cat'?" in refused(strange)
    (strange / "test" / "cats").rename(strange / "test" / "cat")
    assert len(open_source(strange).test) == 2
    shutil.rmtree(strange / "test" / "cat")
    assert "test' holds no images" in refused(strange)


def test_folder_that_may_not_be_read(make_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scandir = make_folder(), os.scandir

    def forbid(path: Any) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    assert refused(folder) == f"Cannot read '{folder / 'dog'}' (Permission denied): make it readable."


@pytest.mark.parametrize("damage", ["zero bytes", "truncated", "text"])
@pytest.mark.parametrize("image_size", [None, CACHED_UP_TO + 8])
def test_unreadable_images_are_named_or_skipped(make_folder: Any, cache: Path, damage: str, image_size: int) -> None:
    folder = make_folder()
    whole = open_source(folder, image_size=image_size)
    path = folder / "dog" / "004.png"
    data = path.read_bytes()
    path.write_bytes({"zero bytes": b"", "truncated": data[: len(data) // 2], "text": b"hello"}[damage])
    message = refused(folder, image_size=image_size)
    assert str(path) in message
    assert "--skip-bad-images" in message
    source = open_source(folder, image_size=image_size, skip_bad_images=True)
    check(source)
    assert source.skipped == (f"'{path}'",)
    kept = np.sort(np.concatenate([split.index for split in source.splits.values()]))
    assert kept.tolist() == [number for number in range(40) if number != 24]
    # The cached scan remembers; asking for all images again is refused again.
    assert open_source(folder, image_size=image_size, skip_bad_images=True).skipped == source.skipped
    assert str(path) in refused(folder, image_size=image_size)
    path.write_bytes(data)
    assert open_source(folder, image_size=image_size).fingerprint == whole.fingerprint


def test_nothing_readable(make_folder: Any, cache: Path) -> None:
    folder = make_folder(counts={"cat": 2, "dog": 2})
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    assert "None of the 4 images can be read" in refused(folder, skip_bad_images=True)
    assert [path for path in (cache / "images").iterdir() if path.suffix != ".lock"] == []


def test_mixed_sizes_and_modes_are_handled(make_folder: Any) -> None:
    folder = make_folder(counts={"cat": 20, "dog": 20}, size=(24, 30))
    for number, mode in enumerate(["L", "LA", "P", "RGBA", "1"]):
        Image.new("RGB", (40 + number, 50), (200, 10, 10)).convert(mode).save(folder / "cat" / f"odd{number}.png")
    Image.new("CMYK", (9, 9)).save(folder / "cat" / "cmyk.jpg")
    Image.fromarray(np.full((33, 17), 40_000, np.uint16)).save(folder / "cat" / "deep.png")
    source = open_source(folder)
    check(source)
    assert source.mixed_sizes
    assert source.native_size == (24, 30)
    assert source.image_size == (24, 24)
    assert source.train.pixels is not None
    assert source.train.pixels.shape == (47, 24, 24, 3)
    assert open_source(folder, image_size=(10, 12)).train.pixels.shape == (47, 10, 12, 3)  # type: ignore[union-attr]


def test_size_rule(make_folder: Any) -> None:
    small, large = make_folder("small", size=(CACHED_UP_TO, 90)), make_folder("large", size=(CACHED_UP_TO + 1, 90))
    assert open_source(small).image_size == (CACHED_UP_TO, 90)
    source = open_source(large)
    assert source.image_size == (224, 224)
    assert source.train.pixels is None
    assert source.native_size == (129, 90)
    check(source)
    assert open_source(large, image_size=64).train.pixels is not None
    assert "at least 1 pixel" in refused(small, image_size=0)


def test_large_photos_keep_their_native_size(make_folder: Any) -> None:
    folder = make_folder(size=(450, 900), counts={"cat": 8, "dog": 8})
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as image:
            image.save(path.with_suffix(".jpg"))
        path.unlink()
    source = open_source(folder, holdout=0.2)
    assert source.native_size == (450, 900)
    assert not source.mixed_sizes
    assert source.image_size == (224, 224)


def test_large_images_have_the_statistics_of_their_pixels(make_folder: Any) -> None:
    source = open_source(make_folder(size=(140, 140)), image_size=140)
    paths = source.train.reader.paths  # type: ignore[attr-defined]
    pixels = np.stack([np.asarray(Image.open(paths[index])) for index in source.train.index]) / 255
    np.testing.assert_allclose(source.mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(source.std, pixels.std((0, 1, 2)), rtol=1e-4)


# Names


def test_unknown_names(tmp_path: Path) -> None:
    assert "did you mean 'cifar10'" in refused("cifar-10")
    assert "did you mean 'digits'" in refused("digit")
    assert "no folder './photoz'" in refused("./photoz")
    (tmp_path / "a.png").write_bytes(b"x")
    assert "is a file" in refused(tmp_path / "a.png")


# torchvision, with files in its own formats


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(header + values.tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_files_are_read(tmp_path: Path, name: str, folder: str) -> None:
    raw, rng = tmp_path / folder / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    pixels = {}
    for split, count in (("train", 60), ("t10k", 20)):
        pixels[split] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(raw / f"{split}-images-idx3-ubyte", pixels[split])
        write_idx(raw / f"{split}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    source = open_source(name, data_root=tmp_path, holdout=0.2)
    check(source)
    assert [len(split) for split in source.splits.values()] == [48, 12, 20]
    assert source.num_classes == 10
    np.testing.assert_array_equal(source.test.pixels[..., 1], pixels["t10k"])  # type: ignore[index]
    assert source.default_augmentation == ("crop" if name == "mnist" else "crop-flip")


def test_cifar_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder, rng = tmp_path / CIFAR10.base_folder, np.random.default_rng(0)
    folder.mkdir()
    for name, count in (("data_batch_1", 40), ("test_batch", 20)):
        batch = {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": [k % 10 for k in range(count)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = {"label_names": ["plane", "car", *(f"c{k}" for k in range(8))]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    # Only the checksums of the true files are taken out: everything else is torchvision's own reading.
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": None})
    source = open_source("cifar10", data_root=tmp_path, holdout=0.25)
    check(source)
    assert source.classes[:2] == ("plane", "car")
    assert source.image_size == (32, 32)
    expected = pickle.loads((folder / "test_batch").read_bytes())["data"].reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(source.test.pixels, expected.transpose(0, 2, 3, 1))


def test_impossible_download_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    for name in ("mnist", "cifar10", "svhn"):
        message = refused(name, data_root=tmp_path / name)
        assert message.startswith(f"Cannot download {name} (")
        assert str(tmp_path / name) in message


# Hugging Face


def png(seed: int, size: tuple[int, int] = (12, 12)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    path: Path,
    labels: list[Any],
    *,
    image: str = "image",
    label: str = "label",
    names: list[str] | None = None,
    **more: Any,
) -> None:
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    kind = ClassLabel(names=names) if names else Value("string" if isinstance(labels[0], str) else "int64")
    features = {image: ImageFeature(), label: kind} | {name: Value("int64") for name in more}
    rows = {image: [{"bytes": png(k), "path": None} for k in range(len(labels))], label: labels} | more
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows, features=Features(features)).to_parquet(path)


def test_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    write_parquet(folder / "train.parquet", [0, 1] * 20, image="img", names=["cat", "dog"])
    write_parquet(folder / "validation.parquet", [1, 0, 1], image="img", names=["cat", "dog"])
    source = open_source(f"parquet:{folder}")
    check(source)
    assert source.classes == ("cat", "dog")
    assert [len(split) for split in source.splits.values()] == [36, 4, 3]
    with Image.open(io.BytesIO(png(2))) as image:
        np.testing.assert_array_equal(source.test.pixels[2], np.asarray(image))  # type: ignore[index]
    assert open_source(f"parquet:{folder}").fingerprint == source.fingerprint
    write_parquet(folder / "test.parquet", [1, 0, 1, 0], image="img", names=["cat", "dog"])
    assert len(open_source(f"parquet:{folder}").test) == 4
    write_parquet(folder / "test.parquet", [-1] * 4, image="img", names=["cat", "dog"])
    assert len(open_source(f"parquet:{folder}").test) == 3, "unlabelled test images cannot measure anything"


def test_parquet_through_workers(tmp_path: Path) -> None:
    write_parquet(tmp_path / "table" / "train.parquet", [0, 1] * 20, names=["cat", "dog"])
    source = open_source(f"parquet:{tmp_path / 'table'}", image_size=CACHED_UP_TO + 1)
    loader = Loader(
        source.train,
        Shuffled(len(source.train), 8, 0),
        augmentation("crop-flip"),
        Normalization(source.mean, source.std),
        workers=1,
    )
    assert next(loader.epoch(0)).images.shape == (8, 3, 129, 129)


@pytest.mark.parametrize(
    ("labels", "classes"), [(["b", "a"] * 10, ("a", "b")), ([0, 2] * 10, ("0", "1", "2"))], ids=["strings", "integers"]
)
def test_labels_without_class_names(tmp_path: Path, labels: list[Any], classes: tuple[str, ...]) -> None:
    write_parquet(tmp_path / "table" / "train.parquet", labels)
    source = open_source(f"parquet:{tmp_path / 'table'}")
    check(source)
    assert source.classes == classes


def test_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a" / "train.parquet", [0, 1] * 10, label="fine_label", coarse_label=[1, 1, 0, 0] * 5)
    name = f"parquet:{tmp_path / 'a'}"
    fine, coarse = open_source(name), open_source(name, label_column="coarse_label")
    assert fine.train.targets.tolist() != coarse.train.targets.tolist()
    assert "did you mean 'coarse_label'" in refused(name, label_column="coarse_labels")
    assert "did you mean 'image'" in refused(name, image_column="imag")
    write_parquet(tmp_path / "b" / "train.parquet", [0, 1] * 10, label="sort_of_thing")
    assert "label_column" in refused(f"parquet:{tmp_path / 'b'}")


def test_bad_parquet(tmp_path: Path) -> None:
    assert "There is no folder" in refused(f"parquet:{tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    assert "no .parquet files" in refused(f"parquet:{tmp_path / 'empty'}")
    write_parquet(tmp_path / "range" / "train.parquet", [0, 1, 2, -1] * 5, names=["a", "b", "c"])
    assert "row 3 of train has label -1" in refused(f"parquet:{tmp_path / 'range'}").replace("Image ", "")
    write_parquet(tmp_path / "single" / "train.parquet", [1] * 20, names=["a", "b"])
    assert "one class only, 'b'" in refused(f"parquet:{tmp_path / 'single'}")
    write_parquet(tmp_path / "cut" / "train.parquet", [0, 1] * 20)
    path = tmp_path / "cut" / "train.parquet"
    path.write_bytes(path.read_bytes()[:3000])
    assert refused(f"parquet:{tmp_path / 'cut'}").startswith("Cannot open '")
    write_parquet(tmp_path / "half" / "train.parquet", [0, 1] * 20)
    write_parquet(tmp_path / "half" / "test.parquet", ["x", "y"])
    assert refused(f"parquet:{tmp_path / 'half'}")


def test_bad_image_in_parquet_is_named_by_row(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    cells = [{"bytes": png(k), "path": f"{k}.png"} for k in range(20)]
    cells[7]["bytes"] = cells[7]["bytes"][:100]  # type: ignore[index]
    (tmp_path / "table").mkdir()
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    Dataset.from_dict({"image": cells, "label": [0, 1] * 10}, features=features).to_parquet(
        tmp_path / "table" / "train.parquet"
    )
    name = f"parquet:{tmp_path / 'table'}"
    assert "Cannot read image row 7 of train ('7.png')" in refused(name)
    assert open_source(name, skip_bad_images=True).skipped == ("row 7 of train ('7.png')",)


def test_full_disk_while_storing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "table" / "train.parquet", [0, 1] * 20)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datasets.load_dataset", full)
    message = refused(f"parquet:{tmp_path / 'table'}")
    assert "No space left" in message
    assert "ATTAR_CACHE" in message
    monkeypatch.setattr("torchvision.datasets.MNIST.download", full)
    assert refused("mnist", data_root=tmp_path / "tv").startswith(f"Cannot store mnist under '{tmp_path / 'tv'}'")


def test_readers_travel_to_other_processes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "table" / "train.parquet", [0, 1] * 20)
    reader = open_source(f"parquet:{tmp_path / 'table'}").train.reader
    assert pickle.loads(pickle.dumps(reader)).read(3) == reader.read(3) == png(3)


def test_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `datasets` reads a local folder of the same name through the same code as a repository on the hub.
    write_parquet(tmp_path / "owner" / "pets" / "data" / "train-00000-of-00001.parquet", [0, 1] * 20, names=["a", "b"])
    write_parquet(tmp_path / "owner" / "pets" / "data" / "test-00000-of-00001.parquet", [0, 1], names=["a", "b"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    source = open_source("hf:owner/pets")
    check(source)
    assert source.classes == ("a", "b")
    assert len(source.test) == 2
    message = refused("hf:owner/absent")
    assert message.startswith("Cannot open the Hugging Face data set 'owner/absent' (")
    assert "connection" in message


@pytest.mark.slow
def test_real_cifar10(real_data: Path) -> None:
    source = open_source(f"parquet:{real_data / 'cifar10'}")
    check(source)
    assert [len(split) for split in source.splits.values()] == [45_000, 5_000, 10_000]
    assert source.classes[3] == "cat"
    assert source.image_size == (32, 32)
    assert not source.mixed_sizes
    assert np.bincount(source.holdout.targets).tolist() == [500] * 10
    np.testing.assert_allclose(source.mean, (0.4914, 0.4822, 0.4465), atol=2e-3)  # the values everybody quotes
    loader = EvalLoader(source.test, 1000, Normalization(source.mean, source.std))
    assert sum(int((sample.targets == 3).sum()) for sample in loader) == 1000
    assert torch.isfinite(next(iter(loader)).images).all()


def test_real_tiny_imagenet(real_data: Path) -> None:
    source = open_source(f"parquet:{real_data / 'tiny-imagenet-25'}")
    check(source)
    assert source.num_classes == 25
    assert source.image_size == (64, 64)
    assert [len(split) for split in source.splits.values()] == [11_250, 1_250, 1_250]
