"""The student folder is loaded by plain timm; torchvision's by `load_student`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from attar.errors import AttarError
from attar.spec import TrainSpec
from attar.train import fit, load_student
from attar.train.models import make_model
from attar.train.student import Student, save_student
from runs import quiet, tiny

CLASSES = tuple("abcdefg")
IMAGES = torch.randn(2, 3, 64, 64)


def saved(folder: Path, model: str, **options: Any) -> Student:
    torch.manual_seed(0)
    network = make_model(model, 7, options).eval()
    student = Student(network, model, options, CLASSES, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (64, 64))
    save_student(folder, student)
    return student


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("cifar_resnet20", {"width": 0.5}),
        ("mobilenetv3_small_050", {}),
        ("vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8, "depth": 2}),
        ("test_convnext", {}),
    ],
)
def test_timm_loads_it(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    student = saved(tmp_path / "student", model, **options)
    for network in (
        timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True).eval(),
        load_student(tmp_path).network,
        load_student(tmp_path / "student").network,
    ):
        assert type(network) is type(student.network)
        with torch.no_grad():
            assert torch.equal(network(IMAGES), student.network(IMAGES))
    loaded = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True)
    data = timm.data.resolve_model_data_config(loaded)
    assert [*data["mean"], *data["std"], *data["input_size"]] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 3, 64, 64]
    assert loaded.pretrained_cfg["label_names"] == list(CLASSES)
    # Saved again, the folder is replaced whole.
    saved(tmp_path / "student", model, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_torchvision_student(tmp_path: Path) -> None:
    student = saved(tmp_path / "student", "torchvision:squeezenet1_1")
    again = load_student(tmp_path)
    assert (again.model, again.classes, again.image_size) == ("torchvision:squeezenet1_1", CLASSES, (64, 64))
    with torch.no_grad():
        assert torch.equal(again.network(IMAGES), student.network(IMAGES))
    plain = load_file(tmp_path / "student/model.safetensors")
    assert list(plain) == sorted(student.network.state_dict())


def test_a_trained_student_without_attar(tmp_path: Path) -> None:
    spec = tiny("ONE", model="test_resnet", model_options={}, image_size=32, train_limit=64, epochs=1)
    fit(spec, tmp_path / "run", console=quiet())
    program = f"""
import sys, timm, torch
network = timm.create_model("local-dir:{tmp_path / "run/student"}", pretrained=True).eval()
assert "attar" not in sys.modules
torch.manual_seed(0)
torch.save(network(torch.randn(2, 3, 32, 32)).detach(), "{tmp_path / "logits.pt"}")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    network = load_student(tmp_path / "run").network
    torch.manual_seed(0)
    with torch.no_grad():
        expected = network(torch.randn(2, 3, 32, 32))
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5)


def test_a_student_that_torch_export_refuses_is_saved_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("data-dependent control flow")

    monkeypatch.setattr(torch.export, "export", refuse)
    result = fit(tiny(epochs=1), tmp_path, console=quiet())
    assert result["exportable"] is False
    assert "data-dependent control flow" in result["export_refusal"]
    assert load_student(tmp_path).model == "cifar_resnet20"


def test_spec_of_a_run_is_read_again(one_run: tuple[Path, TrainSpec, dict[str, Any]]) -> None:
    folder, spec, _ = one_run
    student = load_student(folder)
    assert student.options == spec.model_options
    assert not student.network.training


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"])
def test_a_strangers_config_reads_no_other_file(option: str, tmp_path: Path) -> None:
    saved(tmp_path / "student", "cifar_resnet20", width=0.25)
    path = tmp_path / "student/config.json"
    config = json.loads(path.read_text())
    config["attar"]["options"][option] = str(tmp_path / "evil.pt")
    path.write_text(json.dumps(config))
    with pytest.raises(AttarError, match=f"option '{option}' would read a file unchecked"):
        load_student(tmp_path / "student")


def test_weights_that_a_student_began_with_are_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = saved(tmp_path / "student", "mobilenetv3_small_050")
    path = tmp_path / "student/config.json"
    config = json.loads(path.read_text())
    config["attar"]["options"]["pretrained"] = True
    path.write_text(json.dumps(config))
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *given, **named: pytest.fail("fetched"))
    loaded = load_student(tmp_path / "student")
    with torch.no_grad():
        assert torch.equal(loaded.network(IMAGES), student.network(IMAGES))
