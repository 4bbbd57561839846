"""The script that answers without torch: the pixels, classes and probabilities of attar's own evaluation."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnxruntime", reason='needs pip install "attar[export]"')
pytest.importorskip("onnxscript", reason='needs pip install "attar[export]"')

from attar.data import Normalization, Source, open_source
from attar.data.images import decode, fit
from attar.data.reader import FileReader
from attar.data.workers import decoded_batches
from attar.deploy import inference_onnx
from attar.deploy.artefact import Settings
from attar.deploy.candidate import load_candidate
from attar.deploy.export import export_run
from attar.deploy.inference_onnx import Classifier, InferenceError, pixels_of
from attar.deploy.onnx import ONNX, annotate
from attar.deploy.packaged import package
from attar.deploy.report import METADATA, metadata
from attar.tasks import Classification
from attar.train import evaluate_run
from attar.train import fit as train
from attar.train.evaluate import measure
from attar.train.predictions import Predictions
from networks import Net
from runs import quiet, tiny

# What a machine without torch lacks, and much that would not be asked for by mistake alone.
_ABSENT = ("torch", "torchvision", "attar", "timm", "onnx", "onnxscript", "kornia", "scipy", "sklearn", "pandas")

# A script as it runs where these packages are not installed.
_WITHOUT = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

_COLOURS = {"brick": (150, 70, 60), "grass": (80, 140, 70), "water pool": (60, 90, 150)}


class Shipped(NamedTuple):
    """An export of a run on images that lie on disk, and what attar itself answers to its test images."""

    run: Path
    folder: Path
    photos: Path
    paths: list[Path]
    predictions: Predictions
    source: Source


def photograph(colour: tuple[int, int, int], size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Return a noisy picture of something coloured; size = (height, width)."""
    coarse = rng.normal(colour, 45, (5, 6, 3)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of JPEGs of many sizes, with some that are grey, CMYK or turned by EXIF among the test images."""
    home, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 10)):
        for name, colour in _COLOURS.items():
            folder = home / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = photograph(colour, (int(rng.integers(40, 190)), int(rng.integers(40, 190))), rng)
                exif = Image.Exif()
                if split == "test" and number < 4:
                    image = image.convert("L") if number == 0 else image.convert("CMYK") if number == 1 else image
                    exif[0x0112] = (1, 1, 6, 3)[number]
                image.save(folder / f"{number:02}.jpg", quality=85, exif=exif)
    return home


@pytest.fixture(scope="module", params=[24, 136], ids=["kept-decoded", "decoded-in-workers"])
def shipped(
    request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shipped]:
    """Small images are resized to the size of the network, large ones to somewhat more, of which the centre is seen."""
    home = tmp_path_factory.mktemp("shipped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTAR_CACHE", str(home / "cache"))
        spec = tiny(data=str(photos), image_size=request.param, batch=8, epochs=4, train_limit=None)
        train(spec, home / "run", console=quiet())
        exported = export_run(home / "run")
        student = load_candidate(home / "run").student
        source = open_source(photos, image_size=request.param)
        normalization = Normalization(student.mean, student.std)
        _, predictions = measure(student.network, source.test, normalization, Classification(len(student.classes)))
        assert isinstance(source.test.reader, FileReader)
        paths = [source.test.reader.paths[row] for row in source.test.index]
        yield Shipped(home / "run", exported.folder, photos, paths, predictions, source)


def ask(script: Path, *words: str | Path, absent: tuple[str, ...] = _ABSENT) -> subprocess.CompletedProcess[str]:
    """Run a script isolated from the environment and the user's packages, and without those that are absent."""
    command = [sys.executable, "-I", "-c", _WITHOUT.format(absent=set(absent)), str(script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=script.parent)


def test_the_blocker_blocks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    for name in ("torch", "attar"):
        script.write_text(f"import {name}")
        assert f"No module named '{name}'" in ask(script).stderr


def test_without_torch_it_answers_what_attar_evaluate_does(shipped: Shipped) -> None:
    """Every test image from disk: the same class, the same probability, and so the same accuracy."""
    said = ask(shipped.folder / "inference.py", *shipped.paths, "--json")
    assert (said.returncode, said.stderr) == (0, "")
    answers = json.loads(said.stdout)
    assert [answer["image"] for answer in answers] == [str(path) for path in shipped.paths]
    best = [answer["answers"][0] for answer in answers]
    classes = shipped.source.classes
    assert [one["class"] for one in best] == [classes[k] for k in shipped.predictions.predicted]
    assert len({one["class"] for one in best}) > 1
    np.testing.assert_allclose([one["probability"] for one in best], shipped.predictions.confidence, rtol=0, atol=1e-6)
    right = sum(one["class"] == path.parent.name for one, path in zip(best, shipped.paths, strict=True))
    assert right / len(best) == evaluate_run(shipped.run).top1


def test_pixels_are_those_of_evaluation_to_the_last_bit(shipped: Shipped) -> None:
    split, size = shipped.source.test, shipped.source.image_size
    classifier = Classifier(shipped.folder)
    assert (classifier.size, classifier.crop) == (size, 1.0 if split.pixels is not None else 0.875)
    if split.pixels is not None:
        expected = split.pixels[split.rows]
    else:
        items = [[(int(row), 0, 0)] for row in split.index]
        decoded = decoded_batches(split.reader, items, size, None, 0, workers=0, pin_memory=False)
        expected = np.concatenate([batch.numpy() for batch in decoded])
    for path, pixels in zip(shipped.paths, expected, strict=True):
        np.testing.assert_array_equal(pixels_of(path, size, classifier.crop), pixels)


def test_lines_for_people(shipped: Shipped) -> None:
    image = shipped.paths[0]
    said = ask(shipped.folder / "inference.py", image, "--top", "2")
    name, answer = said.stdout.rstrip("\n").split(": ")
    assert name == str(image)
    first, second = (part.rsplit(" ", 1) for part in answer.split(", "))
    expected = Classifier(shipped.folder)(image)
    assert [first[0], second[0]] == [expected[0][0], expected[1][0]]
    assert float(first[1]) == pytest.approx(expected[0][1], abs=1e-6)
    assert float(first[1]) >= float(second[1])
    assert sum(probability for _, probability in expected) == pytest.approx(1)


def test_what_it_refuses_is_one_sentence(shipped: Shipped, tmp_path: Path) -> None:
    script, good = shipped.folder / "inference.py", shipped.paths[0]
    (tmp_path / "notes.jpg").write_text("no image")
    said = ask(script, tmp_path / "missing.jpg", good, tmp_path / "notes.jpg")
    assert said.returncode == 2
    assert said.stderr.splitlines() == [
        f"There is no file '{tmp_path / 'missing.jpg'}': check the path.",
        f"Cannot read '{tmp_path / 'notes.jpg'}' (it is not an image): give an image file.",
    ]
    assert said.stdout.startswith(f"{good}: ")  # the others are answered
    said = ask(script, good, absent=(*_ABSENT, "onnxruntime"))
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr.splitlines() == [
        "A package cannot be imported (No module named 'onnxruntime'): pip install onnxruntime numpy pillow."
    ]
    said = ask(script, good, "--top", "0")
    assert said.returncode == 2
    assert "--top must be at least 1, not 0" in said.stderr


def test_the_model_and_what_it_must_tell(shipped: Shipped, tmp_path: Path) -> None:
    image, expected = shipped.paths[0], Classifier(shipped.folder)(shipped.paths[0])
    with pytest.raises(InferenceError, match=r"There is no '.*model.onnx': keep the model beside this file\."):
        Classifier(tmp_path)
    model = (shipped.folder / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(model)
    assert Classifier(tmp_path)(image) == expected  # the file itself carries what must be known
    (tmp_path / "model.onnx").write_bytes(_without_metadata(model))
    with pytest.raises(InferenceError, match=r"does not tell its classes: keep export\.json beside it\."):
        Classifier(tmp_path)
    (tmp_path / "export.json").write_bytes((shipped.folder / "export.json").read_bytes())
    assert Classifier(tmp_path)(image) == expected
    (tmp_path / "model.onnx").write_bytes(model[: len(model) // 2])
    with pytest.raises(InferenceError, match=r"cannot be read \(.*\): copy or export it again\."):
        Classifier(tmp_path)


def test_preprocessing_inside_the_graph_changes_no_answer(shipped: Shipped, tmp_path: Path) -> None:
    told = json.loads((shipped.folder / "export.json").read_text())
    path = tmp_path / "model.onnx"
    path.write_bytes((shipped.folder / "model.onnx").read_bytes())
    package(path, Normalization(told["mean"], told["std"]))
    annotate(path, metadata({**told, "preprocessing_inside": True}))
    outside, inside = Classifier(shipped.folder), Classifier(tmp_path)
    assert (outside.inside, inside.inside) == (False, True)
    for image in shipped.paths[:5]:
        one, other = dict(outside(image)), dict(inside(image))
        assert one == pytest.approx(other, abs=1e-6)


def test_a_model_of_several_images_at_a_time_answers_to_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Net().eval()
    told = dict.fromkeys(METADATA)
    told |= {"classes": ["a", "b", "c"], "image_size": [12, 10], "mean": [0.4] * 3, "std": [0.2] * 3, "crop": 1.0}
    (tmp_path / "export.json").write_text(json.dumps({**told, "preprocessing_inside": False}))
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    data = _encoded(Image.fromarray(pixels), "PNG")
    with torch.no_grad():
        expected = network(Normalization((0.4,) * 3, (0.2,) * 3)(pixels[None])).softmax(1)[0]
    for batch in (3, None):
        ONNX().write(network, Settings(image_size=(12, 10), batch=batch), tmp_path / "model.onnx", None)
        found = dict(Classifier(tmp_path)(data))
        assert [found[name] for name in "abc"] == pytest.approx(expected.tolist(), abs=1e-6)


def _without_metadata(model: bytes) -> bytes:
    import onnx

    loaded = onnx.load_from_string(model)
    del loaded.metadata_props[:]
    return bytes(loaded.SerializeToString())


def test_it_is_shipped_as_it_is(shipped: Shipped) -> None:
    script = (shipped.folder / "inference.py").read_bytes()
    assert script == Path(str(inference_onnx.__file__)).read_bytes()


# Pixels of every kind of image, against attar's own reader -----------------------------------------------------------


def _encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def _kinds() -> Iterator[Any]:
    rng = np.random.default_rng(1)
    colour = photograph((120, 90, 60), (61, 83), rng)
    alpha = colour.copy()
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (61, 83), dtype=np.uint8)))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield pytest.param(_encoded(colour, "JPEG", exif=exif), id=f"exif-{orientation}")
    yield pytest.param(_encoded(colour.convert("L"), "JPEG"), id="grey-jpeg")
    yield pytest.param(_encoded(colour.convert("CMYK"), "JPEG"), id="cmyk-jpeg")
    yield pytest.param(_encoded(colour, "JPEG", progressive=True, quality=40), id="progressive")
    yield pytest.param(_encoded(alpha, "PNG"), id="transparent")
    yield pytest.param(_encoded(alpha.convert("LA"), "PNG"), id="grey-transparent")
    yield pytest.param(_encoded(colour.convert("1"), "PNG"), id="black-and-white")
    yield pytest.param(_encoded(colour.quantize(16), "PNG", transparency=3), id="palette-transparent")
    yield pytest.param(_encoded(colour.quantize(16), "GIF"), id="gif")
    yield pytest.param(_encoded(colour, "WEBP", lossless=True), id="webp")
    deep = Image.fromarray(rng.integers(0, 65536, (61, 83), dtype=np.uint16))
    yield pytest.param(_encoded(deep, "PNG"), id="16-bit-png")
    yield pytest.param(_encoded(deep, "TIFF"), id="16-bit-tiff")
    yield pytest.param(b"P5\n83 61\n65535\n" + np.asarray(deep).astype(">u2").tobytes(), id="16-bit-pgm")
    yield pytest.param(_encoded(photograph((9, 9, 9), (1, 300), rng), "PNG"), id="one-line")


@pytest.mark.parametrize("data", _kinds())
def test_every_kind_of_image_is_read_as_attar_reads_it(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(data)
    reader = FileReader([path], np.zeros(1, np.int64))
    for size in ((32, 32), (17, 40), (61, 83), (131, 150)):
        kept = np.asarray(fit(decode(data, "it"), size))
        np.testing.assert_array_equal(pixels_of(path, size, 1.0), kept)
        np.testing.assert_array_equal(pixels_of(data, size, 1.0), kept)
        (cut,) = decoded_batches(reader, [[(0, 0, 0)]], size, None, 0, workers=0, pin_memory=False)
        np.testing.assert_array_equal(pixels_of(path, size, 0.875), cut[0].numpy())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"no image at all", "it is not an image"),
        (_encoded(photograph((9, 9, 9), (64, 64), np.random.default_rng(0)), "JPEG")[:700], "truncated"),
        (_encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "it has 32-bit pixels, not 8 or 16"),
    ],
)
def test_what_cannot_be_read_is_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    with pytest.raises(InferenceError, match=reason) as refused:
        pixels_of(path, (32, 32), 1.0)
    assert str(path) in str(refused.value)
    with pytest.raises(InferenceError, match="is a folder: give image files"):
        pixels_of(tmp_path, (32, 32), 1.0)
