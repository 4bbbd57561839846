"""Segmentation compared: a small comparison of real runs, every figure recomputed from their files, and its report."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from attar.cli import main
from attar.compare import pictures
from attar.compare.analysis import analyse
from attar.compare.columns import DENSE_COLUMNS
from attar.compare.groups import tuning
from attar.compare.masks import Masks, answer_masks, spread_positions
from attar.compare.measure import decoded_split, measure_corruptions
from attar.compare.primary import resolution
from attar.compare.records import Record, read_records
from attar.compare.report import html_text
from attar.compare.tables import csv_text, json_text, markdown_text
from attar.data import open_source
from attar.data.corruptions import KINDS, corrupt
from attar.data.splits import part
from attar.errors import AttarError
from attar.spec import MethodSpec
from attar.train import evaluate_run, load_student
from compare.samples import dense_sample, sample

HEIGHT, WIDTH, CLASSES = 24, 32, ("sky", "ground", "ball")
BROKEN = 'SCD(stages=["nowhere","there"])'
SETTINGS = "--task segmentation --model lraspp_mobilenet_v3_large --epochs 1 --batch 6 --lr 0.05 --precision fp32"


def write_pairs(folder: Path) -> Path:
    """Write 12 training, 3 validation and 5 test images of a ball before sky and ground, their left edge void."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for split, count in (("train", 12), ("val", 3), ("test", 5)):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for i in range(count):
            mask = (rows > 15).astype(np.uint8)
            mask[(rows - rng.integers(6, 18)) ** 2 + (columns - rng.integers(8, 24)) ** 2 < 30] = 2
            image = np.array([[90, 140, 220], [110, 100, 60], [200, 60, 60]])[mask] + rng.normal(
                0, 20, (*mask.shape, 3)
            )
            mask[:, :2] = 255
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{i}.png")
    (folder / "classes.json").write_text(json.dumps({"names": CLASSES, "ignore_index": 255}))
    return folder


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, cached: None) -> Path:
    return write_pairs(tmp_path_factory.mktemp("balls") / "balls")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Plain, label smoothing and SCD on two seeds, and an entry whose runs cannot be built."""
    home = tmp_path_factory.mktemp("compared") / "home"
    words = ["compare", "SCD", BROKEN, *SETTINGS.split(), "--data", str(data), "--seeds", "2", "--smoothing", "0.1"]
    assert main([*words, "--jobs", "2", "--out", str(home)]) == 1
    return home


@pytest.fixture(scope="module")
def records(home: Path) -> dict[tuple[str, int], Record]:
    labels = {"": "plain", "Supervised": "smoothing", "SCD": "SCD"}
    found = [record for record in read_records([home]) if record.result is not None]
    return {(labels["+".join(m.name for m in one.spec.methods)], one.spec.seed): one for one in found}


@pytest.fixture(scope="module")
def told(home: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((home / "report.json").read_text())
    return found


def entry(told: dict[str, Any], role: str) -> dict[str, Any]:
    kinds = {"plain": "plain", "smoothing": "smoothing", "SCD": "method"}
    return next(one for one in told["entries"] if one["role"] == kinds[role] and one["seeds"])


def hand_miou(record: Record) -> tuple[float, list[float | None]]:
    """Mean and class IoU from the counts of every image, with sums and divisions alone."""
    counts = np.load(record.folder / "predictions.npz")
    common, labelled, found = (counts[name].sum(axis=0) for name in ("common", "labelled", "found"))
    shares = [
        None if t + f - c == 0 else float(c) / float(t + f - c) for c, t, f in zip(common, labelled, found, strict=True)
    ]
    known = [share for share in shares if share is not None]
    return sum(known) / len(known), shares


def test_figures_of_every_entry_from_the_raw_files(records: dict[tuple[str, int], Record], told: Any) -> None:
    assert len(records) == 6
    assert told["primary"] == {"task": "segmentation", "key": "miou", "title": "mIoU", "name": "mIoU", "dense": True}
    assert told["classes"] == list(CLASSES)
    assert told["images"] == {"train": 12, "holdout": 3, "test": 5}
    for role in ("plain", "smoothing", "SCD"):
        row, runs = entry(told, role), [records[role, seed] for seed in (0, 1)]
        counts = [np.load(run.folder / "predictions.npz") for run in runs]
        pixels = [each["labelled"].sum() for each in counts]
        assert pixels == [5 * HEIGHT * (WIDTH - 2)] * 2  # void pixels count nowhere
        expected = {
            "miou": [hand_miou(run)[0] for run in runs],
            "pixel_accuracy": [each["common"].sum() / pixels[0] for each in counts],
            "nll": [each["nll"].sum() / pixels[0] for each in counts],
        }
        for key, values in expected.items():
            figure = row["figures"][key]
            np.testing.assert_allclose(figure["values"], values, rtol=1e-9)
            half = stats.t.ppf(0.975, 1) * np.std(values, ddof=1) / math.sqrt(2)
            interval = [np.mean(values), np.mean(values) - half, np.mean(values) + half]
            np.testing.assert_allclose([figure[name] for name in ("mean", "low", "high")], interval, atol=1e-12)
        shares = np.array([[np.nan if one is None else one for one in hand_miou(run)[1]] for run in runs])
        np.testing.assert_allclose(np.array(row["class_iou"], dtype=float), shares, rtol=1e-12)
        np.testing.assert_allclose(np.array(row["per_class"], dtype=float), np.nanmean(shares, axis=0), rtol=1e-12)
        np.testing.assert_allclose(row["figures"]["class_spread"]["values"], np.nanstd(shares, axis=1), rtol=1e-9)
        lines = [(run.folder / "metrics.jsonl").read_text().splitlines() for run in runs]
        epochs = [[json.loads(line) for line in text if '"kind": "epoch"' in line] for text in lines]
        assert row["curve"] == [[line["holdout"]["miou"] for line in run] for run in epochs]
        assert {"training_seconds", "step", "latency", "deployed_flops"} <= row["figures"].keys()
        assert row["confusion"] == []
    unmeasured = ("corruption_miou", "outliers", "onnx_", "int8_")
    assert [column["key"] for column in told["columns"]] == [
        column.key for column in DENSE_COLUMNS if not column.key.startswith(unmeasured)
    ]


def test_evaluate_repeats_a_figure_of_the_report(records: dict[tuple[str, int], Record], told: Any) -> None:
    found = evaluate_run(records["SCD", 1].folder).as_dict()
    for key in ("miou", "pixel_accuracy", "nll", "calibration_error"):
        assert entry(told, "SCD")["figures"][key]["values"][1] == found[key]


def test_differences_are_paired_and_have_the_floor_of_pixels(records: dict[tuple[str, int], Record], told: Any) -> None:
    scores = {key: hand_miou(record)[0] for key, record in records.items()}
    labelled = np.load(records["plain", 0].folder / "predictions.npz")["labelled"].sum(axis=0)
    floor = math.sqrt(sum(1 / float(count) ** 2 for count in labelled)) / 3 / math.sqrt(6)
    ps = {}
    for role in ("smoothing", "SCD"):
        differences = np.array([scores[role, seed] - scores["plain", seed] for seed in (0, 1)])
        contrast = entry(told, role)["against_plain"]
        np.testing.assert_allclose(contrast["differences"], differences, atol=2e-12)
        error = max(np.std(differences, ddof=1), floor) / math.sqrt(2)
        half = stats.t.ppf(0.975, 1) * error
        np.testing.assert_allclose(
            [contrast[name] for name in ("mean", "low", "high")],
            [differences.mean(), differences.mean() - half, differences.mean() + half],
            atol=1e-9,
        )
        ps[role] = 2 * stats.t.sf(abs(differences.mean()) / error, 1)
        assert contrast["p"] == pytest.approx(ps[role], rel=1e-6)
    # Holm over the two that have finished runs.
    smaller, larger = sorted(ps, key=ps.__getitem__)
    first = min(1.0, 2 * ps[smaller])
    assert entry(told, smaller)["against_plain"]["p_corrected"] == pytest.approx(first, rel=1e-6)
    assert entry(told, larger)["against_plain"]["p_corrected"] == pytest.approx(max(first, ps[larger]), rel=1e-6)
    assert "points of test mIoU over plain training" in entry(told, "SCD")["verdict"]


def test_the_resolution_is_one_image_or_the_pixels_of_the_classes(records: dict[tuple[str, int], Record]) -> None:
    stored = records["plain", 0].predictions
    assert stored is not None
    alone = np.zeros((5, 3), np.int64)
    alone[:, 1] = 20  # one class of 100 pixels: a share of 100
    answers = dataclasses.replace(stored, labelled=alone)  # type: ignore[type-var]
    assert resolution(answers) == pytest.approx(1 / 100)
    alone[0, 2] = 10
    both = math.sqrt(1 / 100**2 + 1 / 10**2) / 2
    assert resolution(answers) == pytest.approx(both)


def test_label_smoothing_is_chosen_by_the_miou_of_the_holdout(records: dict[tuple[str, int], Record]) -> None:
    def smoothed(share: float, **holdout: float) -> Record:
        run = records["smoothing", 0]
        assert run.result is not None
        method = MethodSpec(name="Supervised", options={"label_smoothing": share})
        result = {**run.result, "holdout": {**run.result["holdout"], **holdout}}
        return dataclasses.replace(run, spec=run.spec.model_copy(update={"methods": (method,)}), result=result)

    better = smoothed(0.2, miou=0.9, pixel_accuracy=0.1, nll=3.0)
    worse = smoothed(0.1, miou=0.2, pixel_accuracy=0.9, nll=0.1)
    assert tuning({0.2: [better], 0.1: [worse]}) == {0.2: (0.9, 3.0), 0.1: (0.2, 0.1)}
    found = analyse([records["plain", 0], better, worse])
    assert [one.label for one in found.entries] == ["plain", "label smoothing 0.2"]
    assert found.smoothing == {"0.1": 0.2, "0.2": 0.9}
    assert "Hold-out mIoU by candidate" in html_text(found)


def test_an_entry_whose_runs_fail_is_explained_and_the_rest_complete(home: Path, told: Any) -> None:
    (broken,) = (one for one in told["entries"] if not one["seeds"])
    assert [failure["seed"] for failure in broken["failures"]] == [0, 1]
    assert "nowhere" in broken["failures"][0]["reason"]
    for name in ("report.html", "report.md"):
        text = (home / name).read_text()
        assert "nowhere" in text
        assert "mIoU" in text
        assert "top-1" not in text.lower()
    assert "No run has finished" not in (home / "report.html").read_text()


def test_csv_has_the_primary_differences_and_every_class(home: Path, records: dict[tuple[str, int], Record]) -> None:
    with (home / "report.csv").open() as file:
        rows = {(row["role"], row["label"], row["key"]): row for row in csv.DictReader(file)}
    for i, name in enumerate(CLASSES):
        row = rows["method", "SCD", f"iou:{name}"]
        for seed in (0, 1):
            share = hand_miou(records["SCD", seed])[1][i]
            assert row[f"seed_{seed}"] == ("" if share is None else repr(share))
    difference = hand_miou(records["SCD", 1])[0] - hand_miou(records["plain", 1])[0]
    assert float(rows["method", "SCD", "miou_minus_plain"]["seed_1"]) == pytest.approx(difference, abs=1e-11)
    assert ("method", "SCD", "miou_minus_smoothing") in rows
    assert not [key for key in rows if "top1" in key[2]]
    table = [line for line in (home / "report.md").read_text().splitlines() if line.startswith("| ball |")]
    assert len(table) == 1
    assert table[0].count("%") == 3


def read_test_split(data: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    paths = [data / "test" / kind for kind in ("images", "masks")]
    images, masks = (np.stack([np.asarray(Image.open(path / f"{i}.png")) for i in range(5)]) for path in paths)
    return images, masks


def test_masks_of_the_first_seed_are_what_its_student_answers(
    home: Path, data: Path, records: dict[tuple[str, int], Record]
) -> None:
    images, truth = read_test_split(data)
    assert sorted(path.parent.name.split("-seed")[1][0] for path in home.glob("*/masks.npz")) == ["0", "0", "0"]
    for role in ("plain", "smoothing", "SCD"):
        run, masks = records[role, 0], records[role, 0].masks
        assert masks is not None
        assert masks.positions.tolist() == [0, 1, 3, 4]
        assert np.array_equal(masks.images, images[masks.positions])
        assert np.array_equal(masks.truth, truth[masks.positions])
        student = load_student(run.folder)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (student.mean, student.std))
        with torch.no_grad():
            normal = (torch.from_numpy(masks.images).permute(0, 3, 1, 2) / 255 - mean) / std
            answers = student.network(normal)["out"].argmax(1).numpy()
        assert (answers == masks.found).mean() > 0.999  # a pixel may lie on the boundary
        # The counts of these images are those that the result was computed from.
        assert run.predictions is not None
        for i, position in enumerate(masks.positions):
            counted = np.bincount(masks.found[i][masks.truth[i] != 255], minlength=3)
            assert np.abs(counted - run.predictions.found[position]).max() <= 1  # type: ignore[union-attr]


def test_positions_are_spread_and_depend_on_nothing_else() -> None:
    assert spread_positions(60, 4).tolist() == [7, 22, 37, 52]
    assert spread_positions(3, 4).tolist() == [0, 1, 2]


def decoded(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))


def test_the_page_shows_images_truth_and_answers(home: Path, records: dict[tuple[str, int], Record]) -> None:
    text = (home / "report.html").read_text()
    sources = re.findall(r'src="(data:image/png;base64,[^"]+)"', text)
    assert len(sources) == text.count("<img ") == 4 * (2 + 3)
    assert "img-src data:;" in text
    assert text.count('alt="') == len(sources)
    masks = [records[role, 0].masks for role in ("plain", "smoothing", "SCD")]
    first = masks[0]
    assert first is not None
    palette = np.array([list(bytes.fromhex(pictures.color(label))) for label in range(3)], np.uint8)
    for i in range(4):
        photo, truth, *answers = (decoded(source) for source in sources[5 * i : 5 * i + 5])
        assert np.array_equal(np.asarray(photo), first.images[i])
        colours = np.asarray(truth.convert("RGBA"))
        void = first.truth[i] == 255
        assert void.any()
        assert (colours[void][:, 3] == 0).all()  # the hatched ground of the page is seen there
        assert (colours[~void][:, 3] == 255).all()
        assert np.array_equal(colours[~void][:, :3], palette[first.truth[i][~void]])
        for answer, one in zip(answers, masks, strict=True):
            assert one is not None
            assert np.array_equal(np.asarray(answer.convert("RGB")), palette[one.found[i]])
            right = (one.found[i] == one.truth[i])[~void].mean()
            assert f"<small>{100 * right:.1f}\u00a0% right</small>" in text
    for name in CLASSES:
        assert f"{name}</li>" in text
    assert "void: no class, counts nowhere" in text


def test_report_from_the_run_folders_alone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "empty"))
    assert main(["report", str(home), "--out", str(tmp_path / "again")]) == 1
    for name in ("report.json", "report.csv", "report.md", "report.html"):
        assert (tmp_path / "again" / name).read_bytes() == (home / name).read_bytes()
    assert not (tmp_path / "empty").exists()
    assert "mIoU" in capsys.readouterr().out


def test_corrupted_images_keep_their_masks(records: dict[tuple[str, int], Record], data: Path) -> None:
    run = records["SCD", 0]
    student = load_student(run.folder)
    (found,) = measure_corruptions([student], open_source(data, task="segmentation").test)
    assert set(KINDS) - set(found["kinds"]) == {"zoom_blur", "elastic"}
    assert found["clean"] == run.score
    assert found["miou"] == pytest.approx(np.mean(list(found["kinds"].values())))
    images, truth = read_test_split(data)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (student.mean, student.std))
    for kind in ("brightness", "gaussian_noise"):
        pixels = torch.from_numpy(corrupt(images, kind, 3)).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            answers = student.network((pixels - mean) / std)["out"].argmax(1).numpy()[truth != 255]
        labels, shares = truth[truth != 255], []
        for k in range(3):
            union = ((answers == k) | (labels == k)).sum()
            shares += [((answers == k) & (labels == k)).sum() / union] if union else []
        assert found["kinds"][kind][2] == pytest.approx(np.mean(shares), abs=2e-3)  # a pixel may lie on the boundary


def test_large_images_are_measured_and_shown_as_the_student_sees_them(
    records: dict[tuple[str, int], Record], data: Path
) -> None:
    """Decoded in workers they must be what is kept decoded of small ones."""
    kept = open_source(data, task="segmentation").test
    large = dataclasses.replace(kept, pixels=None, masks=None)
    one, other = decoded_split(large), decoded_split(kept)
    assert one.pixels is not None
    assert one.masks is not None
    assert np.array_equal(one.pixels, other.pixels)
    assert np.array_equal(one.masks, other.masks)
    student, third = load_student(records["plain", 0].folder), np.array([3])
    masks, known = answer_masks(student, part(one, "test", third), third), records["plain", 0].masks
    assert known is not None
    for name in ("images", "truth", "found"):
        assert np.array_equal(getattr(masks, name)[0], getattr(known, name)[2])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["BAKE"], "BAKE cannot train segmentation, since it draws batches by the images' classes"),
        (["SCD", "CSKD"], "CSKD cannot train segmentation, since it pairs images of one class"),
        (["Supervised(mixup=0.2)"], "Supervised cannot train segmentation, since Mixup and CutMix"),
        (["SCD", "--model", "resnet18"], r"returns \[2, 3\] instead of \[N, 3, 24, 32\]"),
        (["SCD", "--class-weights", "1", "2"], "Give 3 positive class weights"),
        (["SCD", "--data", "digits"], "There is no data source with masks"),
    ],
)
def test_mistakes_are_one_sentence_before_any_training(
    words: list[str], sentence: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = SETTINGS.split()
    if "--model" in words:
        given[given.index("--model") + 1] = words[words.index("--model") + 1]
        words = words[:-2]
    more = [] if "--data" in words else ["--data", str(data)]
    assert main(["compare", *words, *given, *more, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said), said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_runs_of_two_tasks_are_no_comparison(records: dict[tuple[str, int], Record]) -> None:
    one, other = records["plain", 0], records["SCD", 0]
    classifier = dataclasses.replace(other, spec=other.spec.model_copy(update={"task": "classification"}))
    with pytest.raises(AttarError, match=r"they differ in task \(segmentation, classification\)"):
        analyse([one, classifier])


# Drawn without training ----------------------------------------------------------------------------------------------


def test_a_class_that_occurs_nowhere_is_a_dash() -> None:
    analysis = dense_sample()
    told = json.loads(json_text(analysis))
    assert [one["per_class"][-1] for one in told["entries"]] == [None] * len(analysis.entries)
    assert "iou:pole" not in csv_text(analysis)
    assert next(line for line in markdown_text(analysis).splitlines() if line.startswith("| pole")).count("–") == 5
    section = html_text(analysis).split('id="iou"')[1].split("</table>")[0]
    assert section.split(">pole<")[1].count("–") == len(analysis.entries)


def test_pixels_stay_out_of_the_json() -> None:
    told = json.loads(json_text(dense_sample()))
    assert "masks" not in told["entries"][0]
    assert "class_iou" in told["entries"][0]
    assert "primary" not in json.loads(json_text(sample()))


def test_an_entry_whose_first_seed_failed_says_which_seed_is_seen() -> None:
    shown = pictures.examples(dense_sample())
    assert shown is not None
    assert shown.seeds == (0, 1)
    texts = {picture.title: picture.text for picture in shown.images[0].pictures}
    assert texts["SCD"].endswith(", seed 1")
    assert texts["plain"].endswith(", seed 0")


def test_answers_for_other_images_are_left_out() -> None:
    analysis = dense_sample()
    other = analysis.entries[-1]
    assert isinstance(other.masks, Masks)
    moved = dataclasses.replace(other.masks, positions=other.masks.positions + 1)
    changed = dataclasses.replace(other, masks=moved)
    shown = pictures.examples(dataclasses.replace(analysis, entries=(*analysis.entries[:-1], changed)))
    assert shown is not None
    assert other.label not in [picture.title for picture in shown.images[0].pictures]
    bare = [dataclasses.replace(one, masks=None) for one in analysis.entries]
    without = dataclasses.replace(analysis, entries=tuple(bare))
    assert pictures.examples(without) is None
    assert "<img" not in html_text(without)
    assert "img-src" not in html_text(without)


def test_colours_are_fixed_and_differ() -> None:
    colours = [pictures.color(label) for label in range(255)]
    assert len(set(colours)) == 255
    assert all(re.fullmatch("[0-9a-f]{6}", each) for each in colours)
    assert colours[:2] == ["4363d8", "e6194b"]


def test_large_pictures_are_made_smaller_without_mixing_classes() -> None:
    shown = pictures.examples(dense_sample(size=(480, 720), images=1, methods=1))
    assert shown is not None
    (only,) = shown.images
    assert {(picture.width, picture.height) for picture in only.pictures} == {(320, 213)}
    known = {bytes.fromhex(pictures.color(label)) for label in range(4)}
    found = np.asarray(decoded(only.pictures[2].source).convert("RGB")).reshape(-1, 3)
    assert {bytes(colour) for colour in np.unique(found, axis=0)} <= known
