"""Measurements on finished students: latency, and accuracy on corrupted images recomputed by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from attar.compare.measure import first_images, measure_corruptions, measure_latency, measure_runs
from attar.compare.records import read_record
from attar.data import EvalLoader, Normalization, open_source
from attar.data.corruptions import KINDS, corrupt
from attar.errors import AttarError
from attar.tasks import Classification
from attar.train import evaluate, fit, load_student
from runs import quiet, tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two students that are better than chance."""
    home = tmp_path_factory.mktemp("measured")
    for seed in (0, 1):
        fit(tiny(seed=seed, epochs=6, train_limit=512), home / str(seed), console=quiet())
    return home


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "measured.json").read_text())


class Counting(nn.Module):
    """Says how often and how it was asked."""

    asked: list[tuple[int, bool, torch.Size]] = []  # noqa: RUF012 - shared with the copy that answers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.asked.append((torch.get_num_threads(), self.training, images.shape))
        return images.flatten(1)


def test_latency_is_of_one_image_on_one_thread() -> None:
    network = Counting().train()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = measure_latency(network, (8, 9))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(Counting.asked) == {(1, False, torch.Size([1, 3, 8, 9]))}
    assert len(Counting.asked) > found["repeats"] >= 30
    assert 0 < found["median_seconds"] <= found["p95_seconds"]
    assert (found["threads"], found["batch"]) == (1, 1)
    assert network.training


def test_threads_are_restored_when_a_network_fails() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError):
            measure_latency(nn.Conv2d(5, 1, 1), (8, 8))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_first_images_keep_the_shares_of_the_classes() -> None:
    test = open_source("digits").test
    for limit in (10, 47, 200):
        part = first_images(test, limit)
        assert len(part) == limit
        expected = np.bincount(test.targets, minlength=10) * limit / len(test)
        assert np.abs(np.bincount(part.targets, minlength=10) - expected).max() <= 1
        position = {index: i for i, index in enumerate(test.index)}
        assert [test.targets[position[index]] for index in part.index] == part.targets.tolist()
    assert np.array_equal(first_images(test, 10_000).index, test.index)


def test_measured_runs_hold_what_a_second_way_finds(home: Path) -> None:
    folders = [home / "0", home / "1"]
    (folders[0] / "measured.json").write_text(json.dumps({"mine": 1}))
    measure_runs(folders, 120, quiet())
    part = first_images(open_source("digits").test, 120)
    assert part.pixels is not None
    pixels = part.pixels[part.rows]
    for folder in folders:
        found = stored(folder)["corruptions"]
        student = load_student(folder)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (student.mean, student.std))

        def right(images: Any, student: Any = student, mean: Any = mean, std: Any = std) -> float:
            normal = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
            with torch.no_grad():
                return float(np.mean(student.network(normal).argmax(1).numpy() == part.targets))

        assert found["images"] == 120
        assert found["clean"] == pytest.approx(right(pixels), abs=1e-9)
        assert list(found["kinds"]) == list(KINDS)
        for kind, shares in found["kinds"].items():
            again = [right(corrupt(pixels, kind, severity, index=part.index)) for severity in (1, 2, 3, 4, 5)]
            assert shares == pytest.approx(again, abs=1.01 / 120)  # an image may lie on the boundary
        assert found["top1"] == pytest.approx(np.mean(list(found["kinds"].values())))
        assert found["clean"] > 0.5
        assert found["top1"] < found["clean"] - 0.1
        by_severity = np.mean(list(found["kinds"].values()), axis=0)
        assert all(np.diff(by_severity) < 0.02)
        assert by_severity[4] < by_severity[0] - 0.1
        assert stored(folder)["latency"]["repeats"] >= 30
    assert stored(folders[0])["mine"] == 1
    assert read_record(folders[0]).measured == stored(folders[0])


def test_what_is_measured_is_not_measured_again(home: Path) -> None:
    folder = home / "1"
    measure_runs([folder], 40)
    assert stored(folder)["corruptions"]["images"] == 40
    found = stored(folder)
    found["latency"]["median_seconds"] = 7.0
    found["corruptions"]["top1"] = 7.0
    (folder / "measured.json").write_text(json.dumps(found))
    measure_runs([folder], 40)
    measure_runs([folder])
    assert stored(folder) == found


def test_uncorrupted_images_give_the_result(home: Path) -> None:
    test = open_source("digits").test
    (found,) = measure_corruptions([load_student(home / "0")], dataclasses.replace(test))
    result = json.loads((home / "0" / "result.json").read_text())
    assert found["clean"] == result["test"]["top1"]
    assert found["images"] == 360


def test_images_that_are_decoded_in_workers_are_corrupted_as_the_student_sees_them(home: Path) -> None:
    """Large images are resized a little larger and cropped; here the digits are treated so."""
    decoded = dataclasses.replace(first_images(open_source("digits").test, 90), pixels=None)
    student = load_student(home / "0")
    normalization = Normalization(student.mean, student.std)
    seen = torch.cat([sample.images for sample in EvalLoader(decoded, 90, normalization, workers=0)])
    pixels = ((seen * torch.tensor(student.std).view(3, 1, 1) + torch.tensor(student.mean).view(3, 1, 1)) * 255).round()
    kept = dataclasses.replace(
        decoded, pixels=pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy(), rows=np.arange(90)
    )
    (one,), (other,) = (measure_corruptions([student], split) for split in (decoded, kept))
    assert one == other
    assert one["clean"] == evaluate(student.network, decoded, normalization, Classification(10)).score


def test_refusals(home: Path, tmp_path: Path) -> None:
    with pytest.raises(AttarError, match="not on -1"):
        measure_runs([home / "0"], -1)
    tiny().save(tmp_path / "spec.json")
    with pytest.raises(AttarError, match="holds no student: its run has not finished"):
        measure_runs([tmp_path])
    assert not (tmp_path / "measured.json").exists()
