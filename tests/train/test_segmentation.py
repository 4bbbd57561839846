"""Runs of segmentation: metrics by hand, resumed and evaluated exactly, two processes, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from attar import Segmentation
from attar.data import Normalization, open_source
from attar.errors import AttarError
from attar.spec import TrainSpec, parse
from attar.train import Interrupted, evaluate_run, fit, load_student
from attar.train.distributed import Ranks, join
from attar.train.models import make_model
from attar.train.run_folder import RunFolder
from attar.train.segmentation import PixelPredictions, SegmentationMetrics, measure_pixels
from pictures import VOID, write_discs
from runs import assert_same_run, kill_after_lines, quiet, two_ranks

MODEL = "lraspp_mobilenet_v3_large"


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("streets")
    write_discs(home)
    return home


def spec_of(streets: Path, *methods: str, **fields: Any) -> TrainSpec:
    defaults = {"model": MODEL, "data": str(streets), "task": "segmentation", "epochs": 2, "batch": 4, "lr": 0.05}
    chosen = [{"name": name} for name in methods]
    return parse(TrainSpec, {"methods": chosen, **defaults, "holdout": 0.25, "log_every": 1, **fields})


@pytest.fixture(scope="module")
def run(streets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "plain"
    return folder, fit(spec_of(streets), folder, console=quiet())


def by_hand(network: nn.Module, source: Any, split: str) -> dict[str, Any]:
    """Every metric from a confusion matrix that is filled pixel by pixel."""
    confusion = np.zeros((3, 3), np.int64)
    nll, answers = 0.0, []
    home = Path(source.name) / split
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (source.mean, source.std))
    for path in sorted((home / "images").iterdir()):
        image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
        mask = np.array(Image.open(home / "masks" / path.name))
        with torch.no_grad():
            p = torch.softmax(network(((image - mean) / std)[None])["out"][0].double(), 0).numpy()
        for place in np.ndindex(mask.shape):
            label = int(mask[place])
            if label == VOID:
                continue
            answer = p[(slice(None), *place)]
            confusion[label, answer.argmax()] += 1
            nll -= np.log(answer[label])
            answers.append((answer.max(), answer.argmax() == label))
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    iou = [confusion[k, k] / union[k] for k in range(3) if union[k]]
    confidence, right = (np.array(values, float) for values in zip(*answers, strict=True))
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        error += abs(confidence[inside].sum() - right[inside].sum()) / len(right)
    return {
        "pixels": int(confusion.sum()),
        "miou": float(np.mean(iou)),
        "pixel_accuracy": confusion.diagonal().sum() / confusion.sum(),
        "nll": nll / confusion.sum(),
        "calibration_error": error,
    }


def test_metrics_are_those_of_a_confusion_matrix(run: tuple[Path, dict[str, Any]], streets: Path) -> None:
    folder, result = run
    source = open_source(streets, holdout=0.25, task="segmentation")
    expected = by_hand(load_student(folder).network, source, "test")
    found = result["test"]
    assert found["images"] == 7
    assert found["pixels"] == expected["pixels"] == 7 * 32 * 46
    for name in ("miou", "pixel_accuracy"):
        assert found[name] == pytest.approx(expected[name], abs=2e-3)  # a pixel may lie on a boundary in float32
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-4)
    assert found["calibration_error"] == pytest.approx(expected["calibration_error"], abs=2e-3)


def test_evaluate_repeats_the_result_exactly(run: tuple[Path, dict[str, Any]]) -> None:
    folder, result = run
    assert evaluate_run(folder).as_dict() == result["test"]
    assert evaluate_run(folder, split="holdout").as_dict() == result["holdout"]


def test_predictions_hold_every_count(run: tuple[Path, dict[str, Any]]) -> None:
    folder, result = run
    stored = PixelPredictions.load(RunFolder(folder).predictions)
    assert stored.labelled.shape == (7, 3)
    assert stored.labelled.sum() == stored.found.sum() == result["test"]["pixels"]
    union = (stored.labelled + stored.found - stored.common).sum(axis=0)
    iou = stored.common.sum(axis=0)[union > 0] / union[union > 0]
    assert iou.mean() == pytest.approx(result["test"]["miou"], rel=1e-12)
    assert stored.nll.sum() / result["test"]["pixels"] == pytest.approx(result["test"]["nll"], rel=1e-12)


def test_the_student_is_the_plain_network(run: tuple[Path, dict[str, Any]]) -> None:
    student = load_student(run[0])
    assert student.task == "segmentation"
    assert student.classes == ("ground", "disc", "mark")
    assert student.image_size == (32, 48)
    assert list(student.network.state_dict()) == list(make_model(MODEL, 3, task="segmentation").state_dict())


def test_interrupted_anywhere_it_ends_bit_identical(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    spec = TrainSpec.load(run[0] / "spec.json")
    for _ in range(2):
        with pytest.raises(Interrupted):
            fit(spec, tmp_path / "stopped", console=quiet(), stop_after=2)
    fit(spec, tmp_path / "stopped", console=quiet())
    assert_same_run(tmp_path / "stopped", run[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["FRSKD", "ONE", "BYOT"])
def test_killed_it_ends_bit_identical(method: str, streets: Path, tmp_path: Path) -> None:
    fit(spec_of(streets, method), tmp_path / "whole", console=quiet())
    spec = spec_of(streets, method, checkpoint_seconds=0.0)
    assert kill_after_lines(spec, tmp_path / "killed", 3, 0.2)
    fit(spec, tmp_path / "killed", console=quiet())
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


class Brightness(nn.Module):
    """Answers by how bright a pixel is, and a constant for class 2."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(3.0))

    def forward(self, images: Tensor) -> Tensor:
        bright = self.slope * images.mean(dim=1)
        return torch.stack([-bright, bright, torch.full_like(bright, -1.0)], dim=1)


def measured(streets: Path, ranks: Ranks) -> tuple[SegmentationMetrics, PixelPredictions]:
    source = open_source(streets, holdout=0.25, task="segmentation")
    normalization = Normalization(source.mean, source.std)
    return measure_pixels(Brightness(), source.test, normalization, Segmentation(3), ranks)


def measure_as_rank(streets: Path, out: Path) -> None:
    import attar.train.segmentation as segmentation

    segmentation._BATCH_LOGITS = 3 * 32 * 48 * 2  # batches of two: four of them for two processes, the last one alone
    with join() as ranks:
        metrics, predictions = measured(streets, ranks)
        if ranks.first:
            predictions.save(out / "predictions.npz")
            (out / "metrics.json").write_text(json.dumps(metrics.as_dict()))


def test_two_processes_measure_what_one_does(streets: Path, tmp_path: Path) -> None:
    assert two_ranks(measure_as_rank, streets, tmp_path) == [0, 0]
    metrics, predictions = measured(streets, Ranks(0, 1, torch.device("cpu")))
    shared = PixelPredictions.load(tmp_path / "predictions.npz")
    found = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("common", "labelled", "found"):
        ours: NDArray[np.int64] = getattr(predictions, name)
        assert np.array_equal(ours, getattr(shared, name))
    alone = metrics.as_dict()
    for name in ("images", "pixels", "miou", "pixel_accuracy", "class_iou"):
        assert found[name] == alone[name]
    assert found["nll"] == pytest.approx(alone["nll"], rel=1e-12)
    assert found["calibration_error"] == pytest.approx(alone["calibration_error"], rel=1e-12)
    assert 0.3 < alone["pixel_accuracy"] < 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "cifar_resnet20"}, r"instead of \[N, 3, 32, 48\]: give a segmentation network"),
        ({"model": "lraspp_mobilenet_v3_larg"}, "There is no model 'lraspp_mobilenet_v3_larg': did you mean"),
        ({"model": "torchvision:resnet18"}, "There is no model 'torchvision:resnet18'"),
        ({"class_weights": [1.0, 2.0]}, "Give 3 positive class weights"),
        ({"methods": [{"name": "CSKD"}]}, "CSKD cannot train segmentation, since"),
        ({"task": "classification", "data": "digits"}, "is a segmentation network: give --task segmentation"),
        (
            {"task": "classification", "dice_weight": 1.0, "data": "digits", "model": "cifar_resnet20"},
            "'dice_weight' belongs to segmentation",
        ),
        ({"task": "segmentatio"}, "Option 'task' cannot be 'segmentatio'"),
        ({"data": "digits"}, "digits"),
    ],
)
def test_refusals(fields: dict[str, Any], said: str, streets: Path, tmp_path: Path) -> None:
    with pytest.raises(AttarError, match=said) as refused:
        fit(spec_of(streets, **fields), tmp_path / "run", console=quiet())
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_task_is_refused(run: tuple[Path, dict[str, Any]], streets: Path, tmp_path: Path) -> None:
    from attar.train.build import load_teacher

    with pytest.raises(AttarError, match="was trained for segmentation, not classification"):
        load_teacher(str(run[0]), 3)
    taught = spec_of(streets, methods=[{"name": "KD", "options": {"teachers": [str(run[0])]}}], epochs=1)
    result = fit(taught, tmp_path / "taught", console=quiet())
    assert result["terms"]["KD.kl"]["loss"] > 0
