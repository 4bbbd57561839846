"""Whole exports of a finished run: the folder, the numbers in it, and that nothing is left of one that is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import attar.zoo  # noqa: F401 - timm is asked for its networks
from attar.deploy import FORMATS, candidate_from, export_run, find_format, load_candidate, load_export
from attar.errors import AttarError
from attar.train import evaluate_run, load_student
from attar.train.models import make_model
from exports import copied_run, evil_checkpoint, evil_pickle, finished_run

IMAGES = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Memory is measured by a process of its own, whose imports take longer than these exports; see test_latency."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("attar.deploy.export.measure_memory", lambda load, shape: None)
        yield


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def student_logits(run: Path, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return load_student(run).network(torch.from_numpy(images)).numpy()


def refused(run: Path | Any, *arguments: Any, **options: Any) -> str:
    """Export what must be refused in one sentence, with nothing left behind."""
    folder = run if isinstance(run, Path) else run.folder
    before = files(folder)
    with pytest.raises(AttarError) as caught:
        export_run(run, *arguments, **options)
    assert files(folder) == before
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))
    return sentence


def test_formats() -> None:
    assert [kind.name for kind in FORMATS] == ["onnx", "executorch", "openvino", "torch"]
    assert find_format("ONNX").file == "model.onnx"
    with pytest.raises(AttarError, match="did you mean 'onnx'"):
        find_format("onx")


def test_torch_folder(tmp_path: Path) -> None:
    run = copied_run(tmp_path, "BYOT")
    told: list[tuple[str, float | None]] = []
    done = export_run(run, "torch", progress=lambda said, share: told.append((said, share)))
    assert done.folder == run / "export" / "torch"
    assert files(run / "export") == [
        "torch",
        *(f"torch/{name}" for name in ("config.json", "export.json", "model.safetensors", "model_card.md")),
    ]
    expected = student_logits(run, IMAGES)
    assert np.array_equal(done.runtime(IMAGES), expected)
    network = timm.create_model(f"local-dir:{done.folder}", pretrained=True).eval()
    with torch.no_grad():
        assert np.array_equal(network(torch.from_numpy(IMAGES)).numpy(), expected)
    assert network.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    # The numbers are those of attar evaluate.
    report, test = done.report, evaluate_run(run)
    assert report["accuracy"]["fp32"] == test.top1
    assert report["accuracy"]["artefact"] == test.top1
    assert report["accuracy"]["agreement"] == 1.0
    assert report["accuracy"]["images"] == test.images
    assert report["parity"]["max_error"] == 0.0
    assert report["size_bytes"] == sum(
        (done.folder / name).stat().st_size for name in ("config.json", done.report["file"])
    )
    assert report["latency"] is not None
    assert report["latency"]["one_thread"]["median_seconds"] > 0
    assert json.loads((done.folder / "export.json").read_text()) == report
    assert {said for said, _ in told} >= {"reading the run", "writing", "gate", "accuracy of the artefact", "latency"}
    assert [share for said, share in told if said == "accuracy of the artefact"][-1] == 1.0
    # Again: refused, or the same.
    assert "--overwrite" in refused(run, "torch")
    weights, config = ((done.folder / name).read_bytes() for name in ("model.safetensors", "config.json"))
    again = export_run(run, "torch", overwrite=True)
    assert (again.folder / "model.safetensors").read_bytes() == weights
    assert (again.folder / "config.json").read_bytes() == config
    assert untimed(dict(again.report)) == untimed(dict(report))
    assert [path.name for path in (run / "export").iterdir()] == ["torch"]


def untimed(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name not in ("latency", "memory")}


def test_what_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    run = finished_run("BYOT")
    assert "did you mean 'torch'" in refused(run, "torhc")
    assert "--packaged" in refused(run, "torch", packaged=True)
    assert "--opset" in refused(run, "executorch", opset=18)
    assert "float32 weights" in refused(run, "torch", int8=True)
    assert "at least 1 image" in refused(run, "onnx", batch=0)
    assert "calibration images are too few" in refused(run, "onnx", int8=True, calibration=3)
    assert "share from 0 to below 1" in refused(run, "onnx", int8=True, most_drop=1.5)
    assert "needs --int8" in refused(run, "onnx", qat=3)
    (tmp_path / "photo.jpg").write_bytes(b"precious")
    assert "no export" in refused(run, "torch", out=tmp_path, overwrite=True)
    assert (tmp_path / "photo.jpg").exists()


def test_what_is_refused_of_a_run(tmp_path: Path) -> None:
    run = finished_run("BYOT")
    assert "holds the plain student" in refused(run, "torch", deployable="exit1")
    assert "choose one of" in refused(run, "torch", deployable="exit5")
    assert "at least 1 pixel" in refused(run, "torch", image_size=(0, 0))
    unfinished = copied_run(tmp_path)
    (unfinished / "result.json").unlink()
    assert "not finished" in refused(unfinished, "torch")


def test_a_network_that_its_model_does_not_make(tmp_path: Path) -> None:
    candidate = load_candidate(finished_run("BYOT"), "exit1")
    plain = candidate_from(candidate.network, candidate.source, model="cifar_resnet20", folder=tmp_path)
    assert "is not what its model's name makes" in refused(plain, "torch")
    assert files(tmp_path) == []


def test_a_fault_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copied_run(tmp_path, "BYOT")
    kind = next(kind for kind in FORMATS if kind.name == "torch")
    load = kind.load

    def faulty(self: Any, path: Path, threads: int = 1) -> Any:
        runtime = load(self, path, threads)
        return lambda images: runtime(images) * np.float32(1 + 1e-6)

    monkeypatch.setattr(kind, "load", faulty)
    assert "is not the network it was made from" in refused(run, "torch")
    monkeypatch.undo()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("attar.deploy.export.write_json", full)
    assert "No space is left" in refused(run, "torch")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_killed_while_measuring(tmp_path: Path) -> None:
    run = copied_run(tmp_path, "BYOT")
    child = os.fork()
    if child == 0:
        export_run(run, "torch", progress=lambda said, share: os.kill(os.getpid(), signal.SIGKILL) if share else None)
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not (run / "export" / "torch").exists()
    assert [path.name.startswith(".torch.") for path in (run / "export").iterdir()] == [True]
    export_run(run, "torch")
    assert [path.name for path in (run / "export").iterdir()] == ["torch"]


def test_exports_from_others_are_not_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    for name, file in (("onnx", "model.onnx"), ("executorch", "model.pte"), ("torch", "model.safetensors")):
        folder = tmp_path / name
        folder.mkdir()
        with pytest.raises(AttarError, match="holds no export"):
            load_export(folder)
        (folder / "export.json").write_text(json.dumps({"format": name, "file": "/etc/passwd"}))
        config = finished_run() / "student" / "config.json"
        (folder / "config.json").write_bytes(config.read_bytes())
        for content in (evil_pickle(mark), evil_checkpoint(mark)):
            (folder / file).write_bytes(content)
            with pytest.raises(AttarError) as caught:
                load_export(folder)
            assert "\n" not in str(caught.value)
            assert file in str(caught.value)
    (tmp_path / "onnx" / "export.json").write_bytes(evil_pickle(mark))
    with pytest.raises(AttarError, match=r"export\.json"):
        load_export(tmp_path / "onnx")
    (tmp_path / "onnx" / "export.json").write_text("[]")
    with pytest.raises(AttarError, match="not written by attar"):
        load_export(tmp_path / "onnx")
    assert not mark.exists()


@pytest.fixture(scope="module")
def onnx_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copied run with an ONNX export of an exit, packaged."""
    pytest.importorskip("onnxscript", reason='pip install "attar[export]"')
    run = copied_run(tmp_path_factory.mktemp("onnx"), "BYOT")
    export_run(run, "onnx", deployable="exit1", packaged=True)
    return run


def test_onnx_folder(onnx_run: Path) -> None:
    import onnxruntime

    assert [path.name for path in (onnx_run / "export").iterdir()] == ["onnx-packaged-BYOT.exit1"]
    folder = onnx_run / "export" / "onnx-packaged-BYOT.exit1"
    assert files(folder) == ["export.json", "inference.py", "model.onnx", "model_card.md"]
    report = json.loads((folder / "export.json").read_text())
    measured = json.loads((onnx_run / "result.json").read_text())["deployables"]["BYOT.exit1"]["test"]
    assert report["accuracy"]["fp32"] == report["accuracy"]["artefact"] == measured["top1"]
    assert report["preprocessing_inside"]
    assert report["opset"] == 18
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    carried = session.get_modelmeta().custom_metadata_map
    assert json.loads(carried["classes"]) == [str(digit) for digit in range(10)]
    assert json.loads(carried["accuracy"])["artefact"] == measured["top1"]
    assert json.loads(carried["mean"]) == report["mean"]
    answer = session.run(None, {"pixels": np.zeros((1, 8, 8, 3), np.uint8)})[0]
    assert answer.sum() == pytest.approx(1, abs=1e-5)
    assert (folder / "model_card.md").read_text().startswith("#")
    source = load_candidate(onnx_run).source
    # The script answers a file of the test set without torch.
    from PIL import Image

    path = onnx_run.parent / "digit.png"
    assert source.test.pixels is not None
    Image.fromarray(source.test.pixels[source.test.rows[0]]).save(path)
    program = f"import sys; sys.modules['torch'] = None; sys.argv = ['inference.py', {str(path)!r}, '--json']\n"
    program += "import runpy; runpy.run_path('inference.py', run_name='__main__')"
    told = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    best = json.loads(told.stdout)[0]["answers"][0]
    network = load_candidate(onnx_run, "exit1").network
    pixels = torch.from_numpy(source.test.pixels[source.test.rows[:1]]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(report[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = network((pixels - mean) / std).softmax(dim=1)[0]
    assert best["class"] == str(int(expected.argmax()))
    assert best["probability"] == pytest.approx(float(expected.max()), abs=1e-4)


def test_int8(onnx_run: Path) -> None:
    # A network of a quarter's width on 360 images: the bound is wide.
    done = export_run(onnx_run, "onnx", int8=True, calibration=64, most_drop=0.1)
    assert done.folder.name == "onnx-int8"
    report = done.report
    assert report["int8"] is not None
    assert report["int8"]["calibration_images"] == 64
    assert report["int8"]["drop"] == report["accuracy"]["fp32"] - report["accuracy"]["artefact"]
    assert report["int8"]["bound_held"] is True
    assert files(done.folder) == ["export.json", "inference.py", "model.onnx", "model_card.md"]
    assert done.runtime(IMAGES).shape == (5, 10)
    # It is int8, and its float32 twin has passed the gate.
    assert not np.allclose(done.runtime(IMAGES), student_logits(onnx_run, IMAGES), atol=1e-5)
    assert report["parity"]["relative_error"] < 1e-4
    assert b"QuantizeLinear" in (done.folder / "model.onnx").read_bytes()


def test_a_live_network(tmp_path: Path) -> None:
    source = load_candidate(finished_run("BYOT")).source
    torch.manual_seed(0)
    network = make_model("cifar_resnet20", 10, {"width": 0.25}).eval()
    candidate = candidate_from(network, source, options={"width": 0.25}, folder=tmp_path)
    done = export_run(candidate, "torch")
    assert done.folder == tmp_path / "export" / "torch"
    with torch.no_grad():
        assert np.array_equal(done.runtime(IMAGES), network(torch.from_numpy(IMAGES)).numpy())
    assert done.report["methods"] == []
