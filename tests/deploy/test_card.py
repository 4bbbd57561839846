"""Model cards: what they tell, for every format, and the code in them, which runs."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason='needs pip install "attar[export]"')
pytest.importorskip("onnxscript", reason='needs pip install "attar[export]"')

from attar import methods
from attar.deploy import inference_onnx
from attar.deploy.artefact import Settings
from attar.deploy.card import card_text, write_card, write_inference
from attar.deploy.onnx import ONNX
from attar.deploy.report import Report, metadata
from attar.train.models import make_model
from attar.train.student import Student, save_student

CLASSES = ["cat", "dog | `wolf`", "line\nbreak"]
FILES = {"onnx": "model.onnx", "executorch": "model.pte", "openvino": "model.xml", "torch": "model.safetensors"}


def report(format: str = "onnx", **changed: Any) -> Report:
    timing = {"median_seconds": 0.00123, "p95_seconds": 0.00151, "repeats": 300, "threads": 1}
    made = {
        "attar": "0.6.0",
        "format": format,
        "file": FILES[format],
        "size_bytes": 1_234_567,
        "sha256": "0123456789abcdef" * 4,
        "task": "classification",
        "model": "cifar_resnet20",
        "parameters": 272_474,
        "deployable": None,
        "methods": [{"name": "BYOT", "options": {"alpha": 0.25, "exits": ["layer1"]}}],
        "data": "parquet:photos",
        "classes": CLASSES,
        "image_size": [24, 40],
        "mean": [0.5, 0.45, 0.4],
        "std": [0.25, 0.24, 0.23],
        "crop": 1.0,
        "preprocessing_inside": False,
        "batch": 1,
        "opset": 18 if format == "onnx" else None,
        "parity": {
            "max_error": 3.2e-6,
            "relative_error": 1.1e-7,
            "agreement": 1.0,
            "images": 256,
            "batch_sizes": [1, 5, 64],
        },
        "accuracy": {
            "metric": "top1",
            "fp32": 0.9134,
            "artefact": 0.9071,
            "agreement": 0.9823,
            "images": 10_000,
            "calibration_error": 0.0312,
        },
        "int8": None,
        "latency": {"one_thread": timing, "all_threads": {**timing, "threads": 8, "median_seconds": 0.0004}},
        "memory": 23_456_789,
        "versions": {"torch": "2.15.0"},
    }
    made["latency"]["device"] = "A fast CPU"
    return {**made, **changed}  # type: ignore[return-value,typeddict-item]


INT8 = {
    "left_in_float32": ["node_conv_1", "a|b"],
    "calibration_images": 512,
    "drop": 0.0063,
    "trained": False,
    "bound_held": True,
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_number_is_told() -> None:
    text = card_text(report(int8=INT8))
    for said in (
        "# cifar_resnet20, int8, ONNX",
        *("`model.onnx`, 1.18 MiB, opset 18", "0123456789abcdef" * 4, "float32 [1, 3, 24, 40]: RGB, normalised"),
        *("logits [1, 3], float32", "272,474", "90.71 % of 10,000 test images; in PyTorch, float32: 91.34 %"),
        *("98.23 % of the test images", "3.12 % (expected", "1 thread | median 1.23 ms, 95th percentile 1.51 ms"),
        *("8 threads | median 0.4 ms", "22.37 MiB to load it", "A fast CPU", "Trained on `parquet:photos`"),
        *("256 real images", "1, 5, 64", "3.2e-06 at most (1.1e-07 of the largest one)", "100.00 %"),
        *("512 training images", "costs 0.63 points", "`node_conv_1`, `a\\|b`", "attar 0.6.0"),
        *("covers 40 x 24 pixels (width x height)", "mean [0.5, 0.45, 0.4] and std [0.25, 0.24, 0.23]"),
        *("## Licence", "0 `cat`", "1 `` dog \\| `wolf` ``", "2 `line break`"),
    ):
        assert said in text, said
    assert "None" not in text.replace("session.run(None, ", "")
    assert "\n\n\n" not in text


def test_methods_are_told_by_their_docstrings() -> None:
    text = card_text(report())
    said = " ".join((inspect.getdoc(methods.BYOT) or "").replace("/\n", "/").split())
    assert "ArchipLab-LinfengZhang/pytorch-self-distillation-final" in text
    assert "Be Your Own Teacher: Improve the Performance" in text
    for line in (line for line in text.splitlines() if line.startswith("Source: ")):
        assert line in said
    table = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.MULTILINE))
    usual = {name: each.default for name, each in inspect.signature(methods.BYOT).parameters.items()}
    assert table.keys() == usual.keys()
    assert (table["alpha"], table["exits"], table["temperature"]) == (
        "`0.25`",
        '`["layer1"]`',
        f"`{usual['temperature']}`",
    )
    assert table["hint_weight"] == "none"
    own = card_text(report(methods=[{"name": "Mine", "options": {"a": 1}}]))
    assert "trained with Mine on" in own
    assert "| `a` | `1` |" in own
    assert "no distillation method" in card_text(report(methods=[]))


@pytest.mark.parametrize("name", methods.available())
def test_every_method_has_its_source_in_the_card(name: str) -> None:
    text = card_text(report(methods=[{"name": name, "options": {}}]))
    assert re.search(r"^Source: .*(19|20)\d\d", text, re.MULTILINE)


def test_variants_say_what_differs() -> None:
    inside = card_text(report(preprocessing_inside=True, batch=4, crop=0.875))
    for said in (
        "uint8 [4, 24, 40, 3]: RGB pixels, 4 images at a time",
        "probabilities [4, 3]",
        "covers 46 x 27 pixels",
    ):
        assert said in inside
    assert "softmax are\n   inside the graph" in inside
    assert "std::vector<uint8_t> images(4 * 24 * 40 * 3)" in inside
    free = card_text(report(batch=None, latency=None, memory=None, deployable="BYOT.exit1"))
    assert "[N, 3, 24, 40]: RGB, normalised, any number of images at a time" in free
    assert "Latency" not in free
    assert "Memory |" not in free
    assert "(BYOT.exit1)" in free
    gained = card_text(report(int8={**INT8, "drop": -0.001, "left_in_float32": [], "trained": True}))
    assert "gains 0.10 points" in gained
    assert "Nothing was left in float32" in gained
    assert "quantisation-aware distillation" in gained
    assert "was allowed" not in gained
    assert "more than was allowed" in card_text(report(int8={**INT8, "bound_held": False}))
    assert "none was looked for" in card_text(
        report("executorch", int8={**INT8, "left_in_float32": [], "bound_held": None})
    )
    many = card_text(report(classes=[str(k) for k in range(1000)]))
    assert "and 900 more in `export.json`" in many


def test_languages_of_every_format() -> None:
    spoken = {
        "onnx": ("python", "cpp", "kotlin", "swift"),
        "executorch": ("python", "cpp", "kotlin", "swift"),
        "openvino": ("python", "cpp"),
        "torch": ("python",),
    }
    for name, languages in spoken.items():
        text = card_text(report(name))
        assert set(re.findall(r"^```(\w+)$", text, re.MULTILINE)) == set(languages)
        for language in languages:
            for block in blocks(text, language):
                assert 0 < len([line for line in block.splitlines() if line.strip()]) <= 16
                assert "{{" not in block
        for block in blocks(text, "python"):
            compile(block, name, "exec")


def test_the_python_of_an_onnx_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_model("cifar_resnet20", len(CLASSES), {"width": 0.25}).eval()
    told = report(image_size=[24, 24])
    settings = Settings(image_size=(24, 24))
    ONNX().write(network, settings, tmp_path / "model.onnx", None)
    (tmp_path / "export.json").write_text(json.dumps(told))
    write_card(tmp_path, told)
    write_inference(tmp_path)
    assert (tmp_path / "inference.py").read_bytes() == Path(str(inference_onnx.__file__)).read_bytes()
    assert json.loads(metadata({**told})["classes"]) == CLASSES
    from PIL import Image

    Image.fromarray(np.full((30, 20, 3), 90, np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with_script, alone = blocks((tmp_path / "model_card.md").read_text(), "python")
    first: dict[str, Any] = {}
    exec(with_script, first)
    assert {name for name, _ in first["classifier"]("photo.jpg")} == set(CLASSES)
    found: dict[str, Any] = {}
    exec(alone, found)
    expected = network(torch.zeros(1, 3, 24, 24)).detach().numpy()
    np.testing.assert_allclose(found["logits"], expected, atol=1e-5)


def test_the_python_of_a_torch_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_model("cifar_resnet20", 3, {"width": 0.25}).eval()
    told = report("torch", image_size=[24, 24])
    student = Student(
        network, "cifar_resnet20", {"width": 0.25}, tuple(CLASSES), (0.5, 0.45, 0.4), (0.25, 0.24, 0.23), (24, 24)
    )
    save_student(tmp_path / "export", student)
    write_card(tmp_path / "export", told)
    monkeypatch.chdir(tmp_path / "export")
    by_attar, by_timm = blocks(Path("model_card.md").read_text(), "python")
    found: dict[str, Any] = {}
    exec(by_attar, found)
    exec(by_timm, found)
    expected = network(found["images"])
    assert torch.equal(found["logits"], expected)
    assert torch.equal(found["network"](found["images"]), expected)
    # One that has lost channels is not what timm makes.
    config = json.loads(Path("config.json").read_text())
    config["attar"]["kept"] = {"conv1": [[0]]}
    Path("config.json").write_text(json.dumps(config))
    write_card(Path(), told)
    assert len(blocks(Path("model_card.md").read_text(), "python")) == 1
