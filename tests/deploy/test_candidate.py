"""What a run yields for export: the plain student, its early exits, ensembles; and every folder that is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attar import Distiller
from attar.data import Normalization, open_source
from attar.deploy import candidate_from, load_candidate
from attar.errors import AttarError
from attar.methods import BYOT
from attar.spec import TrainSpec
from attar.tasks import Classification
from attar.train import build_source, evaluate, load_student, load_teacher
from attar.train.models import make_model
from exports import copied_run, evil_checkpoint, evil_pickle, finished_run

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def logits(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(IMAGES)


def refused(folder: Path, *arguments: str, **options: object) -> str:
    before = sorted(path for path in folder.rglob("*")) if folder.exists() else []
    with pytest.raises(AttarError) as caught:
        load_candidate(folder, *arguments, **options)  # type: ignore[arg-type]
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))
    assert (sorted(path for path in folder.rglob("*")) if folder.exists() else []) == before
    return sentence


def test_plain_student() -> None:
    run = finished_run("BYOT")
    candidate, student = load_candidate(run), load_student(run)
    assert type(candidate.network) is type(student.network)
    assert list(candidate.network.state_dict()) == list(student.network.state_dict())
    assert torch.equal(logits(candidate.network), logits(student.network))
    assert candidate.deployable is None
    assert candidate.result == json.loads((run / "result.json").read_text())
    assert candidate.source.classes == student.classes
    assert not candidate.network.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in candidate.network.modules())


def test_images_are_those_of_the_run() -> None:
    run = finished_run("BYOT")
    source, trained = load_candidate(run).source, build_source(TrainSpec.load(run / "spec.json"))
    for own, expected in (
        (source.train, trained.train),
        (source.holdout, trained.holdout),
        (source.test, trained.test),
    ):
        assert np.array_equal(own.index, expected.index)
    assert len(source.train) == 256  # the run's train_limit, of 1,617


@pytest.mark.parametrize(("asked", "name"), [("exit1", "BYOT.exit1"), ("BYOT.exit2", "BYOT.exit2"), ("ensemble", None)])
def test_deployables_are_what_the_run_measured(asked: str, name: str | None) -> None:
    run = finished_run("BYOT")
    candidate = load_candidate(run, asked)
    assert candidate.deployable == (name or f"BYOT.{asked}")
    student, source = candidate.student, candidate.source
    found = evaluate(candidate.network, source.test, Normalization(student.mean, student.std), candidate.task)
    measured = candidate.result["deployables"][candidate.deployable]["test"]
    assert found.top1 == measured["top1"]
    assert found.nll == pytest.approx(measured["nll"], rel=1e-6)
    assert (
        sum(p.numel() for p in candidate.network.parameters())
        == (candidate.result["deployables"][candidate.deployable]["parameters"])
    )


def test_teachers_of_other_methods_are_not_needed(tmp_path: Path) -> None:
    run = copied_run(tmp_path, "BYOT")
    spec = json.loads((run / "spec.json").read_text())
    spec["methods"].append({"name": "KD", "options": {"teachers": ["gone"]}})
    (run / "spec.json").write_text(json.dumps(spec))
    assert load_candidate(run, "exit1").deployable == "BYOT.exit1"


def test_deployables_that_are_not_there() -> None:
    run = finished_run("BYOT")
    sentence = refused(run, "exit9")
    assert "exit9" in sentence
    assert "BYOT.exit1, BYOT.exit2, BYOT.ensemble" in sentence
    assert "branch1" in refused(run, "branch1")
    assert "nothing besides the plain student" in refused(finished_run(), "ensemble")


def test_branches_by_any_name() -> None:
    from attar.deploy.candidate import chosen_deployable

    offered = ["DML.peer1", "DML.peer2", "DML.ensemble"]
    assert chosen_deployable("branch2", offered, "the run") == "DML.peer2"
    assert chosen_deployable("DML.ensemble", offered, "the run") == "DML.ensemble"
    with pytest.raises(AttarError, match=r"may be A\.ensemble or B\.ensemble"):
        chosen_deployable("ensemble", ["A.ensemble", "B.ensemble"], "the run")


def test_folders_that_are_no_finished_run(tmp_path: Path) -> None:
    assert "no folder" in refused(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    assert "holds no run" in refused(tmp_path / "other")
    run = copied_run(tmp_path)
    (run / "result.json").unlink()
    assert "not finished" in refused(run)


def test_damage_is_said(tmp_path: Path) -> None:
    run = copied_run(tmp_path, "BYOT")
    best, weights, config = (
        run / "checkpoints" / "best.pt",
        run / "student" / "model.safetensors",
        run / "student" / "config.json",
    )
    whole = best.read_bytes()
    best.write_bytes(whole[: len(whole) // 2])
    assert "best.pt" in refused(run, "exit1")
    changed = bytearray(whole)
    changed[len(changed) // 2] ^= 0xFF
    best.write_bytes(bytes(changed))
    assert "best.pt" in refused(run, "exit1")
    shutil.copy(finished_run("ONE") / "checkpoints" / "best.pt", best)
    assert "does not fit the run's spec" in refused(run, "exit1")
    kept = weights.read_bytes()
    weights.write_bytes(kept[:100])
    assert "model.safetensors" in refused(run)
    weights.write_bytes(kept)
    told = json.loads(config.read_text())
    for damaged in ({"attar": {}}, {**told, "attar": {**told["attar"], "image_size": "large"}}):
        config.write_text(json.dumps(damaged))
        assert "damaged" in refused(run)


def test_images_of_other_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "photos" / label / f"{number}.png")
    assert "other classes" in refused(finished_run(), data=str(tmp_path / "photos"))


def test_image_sizes(tmp_path: Path) -> None:
    candidate = load_candidate(finished_run(), image_size=(12, 10))
    assert candidate.source.image_size == candidate.student.image_size == (12, 10)
    assert candidate.source.test.image_size == (12, 10)
    assert "at least 1 pixel" in refused(finished_run(), image_size=(0, 8))
    torch.manual_seed(0)
    vit = make_model("vit_tiny_patch16_224", 10, {"img_size": 8, "patch_size": 4, "depth": 1}).eval()
    with pytest.raises(AttarError, match=r"refuses images of 12 x 12 \(.*\): leave out --image-size"):
        candidate_from(vit, open_source("digits", image_size=12))


def test_pickles_are_never_executed(tmp_path: Path) -> None:
    run, mark = copied_run(tmp_path, "BYOT"), tmp_path / "executed"
    best, weights = run / "checkpoints" / "best.pt", run / "student" / "model.safetensors"
    for content in (evil_pickle(mark), evil_checkpoint(mark)):
        best.write_bytes(content)
        assert "best.pt" in refused(run, "exit1")
        kept = weights.read_bytes()
        weights.write_bytes(content)
        assert "model.safetensors" in refused(run)
        weights.write_bytes(kept)
        teacher = tmp_path / "teacher.pt"
        for path in (teacher, teacher.with_suffix(".safetensors")):
            path.write_bytes(content)
            with pytest.raises(AttarError, match="cannot be read as weights"):
                load_teacher(f"cifar_resnet20={path}", 10)
        with pytest.raises(AttarError):
            load_teacher(str(run), 11)
        assert not mark.exists()


def test_from_a_live_distiller() -> None:
    torch.manual_seed(0)
    student = make_model("cifar_resnet20", 10, {"width": 0.25})
    distiller = Distiller(student, [BYOT()], Classification(10), normalization=((0.5,) * 3, (0.25,) * 3))
    distiller.build(IMAGES)
    source = open_source("digits")
    candidate = candidate_from(distiller, source, options={"width": 0.25})
    student.eval()
    assert type(candidate.network) is type(student)
    assert list(candidate.network.state_dict()) == list(student.state_dict())
    assert torch.equal(logits(candidate.network), logits(student))
    assert candidate.network is not student
    assert student.conv1.weight.requires_grad
    assert (candidate.student.model, candidate.student.mean) == ("cifar_resnet20", (0.5,) * 3)
    exit1 = candidate_from(distiller, source, deployable="exit1")
    assert exit1.deployable == "BYOT.exit1"
    assert logits(exit1.network).shape == (4, 10)
    plain = candidate_from(student, source)
    assert torch.equal(logits(plain.network), logits(student))
    assert plain.student.mean == source.mean
    with pytest.raises(AttarError, match="Only a distiller"):
        candidate_from(student, source, deployable="exit1")
    with pytest.raises(AttarError, match=r"BYOT\.exit1"):
        candidate_from(distiller, source, deployable="exit7")
