"""`attar export` on the command line: what it prints, and every refusal in one sentence with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attar.cli import main
from exports import copied_run, finished_run


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = main(["export", *words])
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("attar: ")
    assert err.count("\n") == 1
    assert err.endswith((".\n", "?\n"))
    return err


def test_help_waits_for_nothing() -> None:
    program = "import sys, attar.cli\ntry: attar.cli.main(['export', '--help'])\nexcept SystemExit: pass\n"
    program += "assert not {'torch', 'numpy', 'onnx'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for option in (
        "--format",
        "--int8",
        "--exit",
        "--branch",
        "--ensemble",
        "--dynamic-batch",
        "--opset",
        "--packaged",
    ):
        assert option in done.stdout


def test_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = str(finished_run("BYOT"))
    before = sorted(Path(run).rglob("*"))
    assert "no folder" in refused(capsys, str(tmp_path / "nowhere"))
    assert "holds no run" in refused(capsys, str(tmp_path))
    assert "did you mean 'onnx'" in refused(capsys, run, "--format", "onxx")
    assert "did you mean '--format'" in refused(capsys, run, "--fromat", "onnx")
    assert "'--image-size' takes" in refused(capsys, run, "--image-size", "1", "2", "3")
    assert "give one of them" in refused(capsys, run, "--exit", "1", "--ensemble")
    assert "choose one of BYOT.exit1, BYOT.exit2, BYOT.ensemble" in refused(capsys, run, "--exit", "8")
    assert "branch1" in refused(capsys, run, "--branch", "1")
    assert "There is no" in refused(capsys, run, "--deployable", "BYOT.exit")
    assert "at least 1 pixel" in refused(capsys, run, "--image-size", "0")
    assert "float32 weights" in refused(capsys, run, "--format", "torch", "--int8")
    assert "--packaged" in refused(capsys, run, "--format", "torch", "--packaged")
    assert "too few" in refused(capsys, run, "--int8", "--calibration", "2")
    assert sorted(Path(run).rglob("*")) == before


def test_unfinished_and_damaged_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = copied_run(tmp_path, "BYOT")
    result = (run / "result.json").read_bytes()
    (run / "result.json").unlink()
    assert "not finished" in refused(capsys, str(run))
    (run / "result.json").write_bytes(result)
    (run / "checkpoints" / "best.pt").write_bytes(b"\x80\x04damaged")
    assert "best.pt" in refused(capsys, str(run), "--exit", "1")
    (run / "student" / "model.safetensors").write_bytes(b"\x80\x04damaged")
    assert "model.safetensors" in refused(capsys, str(run))
    assert not (run / "export").exists()


def test_a_missing_extra(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    run = copied_run(tmp_path, "BYOT")
    assert 'pip install "attar[export]"' in refused(capsys, str(run))
    assert not (run / "export").exists()


def test_export(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = copied_run(tmp_path, "BYOT")
    assert main(["export", str(run), "--format", "torch", "--out", str(tmp_path / "shipped")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "PyTorch" in out
    assert "100.00%" in out
    loading = out[out.index("import timm") :]
    program = f"{loading}\nassert student.num_classes == 10"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert not (run / "export").exists()
    assert "--overwrite" in refused(capsys, str(run), "--format", "torch", "--out", str(tmp_path / "shipped"))
    words = ["--format", "torch", "--out", str(tmp_path / "shipped"), "--overwrite", "--json"]
    assert main(["export", str(run), *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(tmp_path / "shipped")
    assert told["accuracy"]["agreement"] == 1.0


def test_int8_after_training_for_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason='pip install "attar[export]"')
    pytest.importorskip("torchao", reason='pip install "attar[executorch]"')
    run = copied_run(tmp_path)
    # A network of a quarter's width after 2 epochs of 256 images: the bound is wide.
    words = [str(run), "--int8", "--qat", "1", "--calibration", "64", "--most-drop", "0.2"]
    assert main(["export", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(run / "export" / "onnx-int8")
    assert told["int8"]["trained"] is True
    assert told["parity"]["relative_error"] <= told["parity"]["tolerance"]
    assert told["accuracy"]["fp32"] == json.loads((run / "result.json").read_text())["test"]["top1"]
    card = (run / "export" / "onnx-int8" / "model_card.md").read_text()
    assert "learnt by quantisation-aware distillation" in card
    assert "--qat takes the epochs" in refused(capsys, str(run), "--qat", "1")
    assert "--qat takes the epochs" in refused(capsys, str(run), "--int8", "--qat", "0")
