"""Recipes carried out: every one at small scale, what is printed, what is refused, what fails."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from scipy import stats

from attar import recipes
from attar.data import sources
from attar.errors import AttarError
from attar.recipes.recipe import Published, Recipe, runs_of
from attar.spec import TrainSpec, parse

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RUNNABLE = [name for name in recipes.available() if not recipes.missing_methods(recipes.find(name))]
JOBS = 2


# Of what a recipe may ask for one each: a student alone and its ensemble, peers, a teacher that is trained first, a
# teacher whose student is of another width, phases. That every recipe can be trained is test_recipes.py's.
DEFAULT = {
    "one_resnet32_cifar10",
    "dml_pair_resnet32_cifar100",
    "kd_wrn_40_2_wrn_16_2_cifar100",
    "moonshine_wrn_40_2_g8b2_cifar10",
    "indistill_cnn_cifar10",
}


def default_or_slow() -> list[Any]:
    assert set(RUNNABLE) >= DEFAULT
    return [pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.slow]) for name in RUNNABLE]


def screen() -> Console:
    return Console(file=io.StringIO(), width=250)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all recipes: what two of them train alike is trained once."""
    return tmp_path_factory.mktemp("reproduced")


def results(answer: recipes.Reproduction, label: str) -> list[dict[str, Any]]:
    return [json.loads((folder / "result.json").read_text()) for folder in answer.folders[label]]


@pytest.mark.parametrize("name", default_or_slow())
def test_every_recipe_runs_at_small_scale(name, shared):
    recipe, console = recipes.find(name), screen()
    answer = recipes.reproduce(recipe, scale="small", out=shared, jobs=JOBS, console=console)
    assert answer.complete, answer.failures
    assert list(answer.folders) == list(runs_of(recipe))
    for label in answer.folders:
        (result,) = results(answer, label)
        assert [method["name"] for method in result["methods"]] == [
            method.name for method in runs_of(recipe)[label].methods
        ]
    shown = [figure.published for figure in answer.figures if figure.published is not None]
    assert sorted(map(repr, shown)) == sorted(map(repr, recipe.published))
    for figure in answer.figures:
        assert figure.measured is not None, figure
        if figure.metric.startswith("top-1"):
            assert 0 <= figure.measured.mean <= 100
    said = console.file.getvalue()
    assert "SMALL SCALE, comparable with nothing" in said
    assert "not comparable" in said
    assert all(figure.known in said for figure in recipe.published)
    searches = any(figure.metric.startswith("mAP") for figure in recipe.published)
    for label in answer.folders:  # a search takes minutes at full scale: every run's is told as it comes
        assert (re.search(rf"{re.escape(label)}, seed 0: mAP [\d.]+% \(cosine\)", said) is not None) is searches


def test_what_a_search_found_is_kept(shared):
    recipe = recipes.find("indistill_cnn_cifar10")
    first = recipes.reproduce(recipe, scale="small", out=shared, jobs=JOBS, console=screen())
    (folder,) = first.folders["plain"]
    student, away = folder / "student", folder / "away"
    student.rename(away)  # so that it cannot be searched with again
    try:
        console = screen()
        again = recipes.reproduce(recipe, scale="small", out=shared, jobs=JOBS, console=console)
    finally:
        away.rename(student)
    assert [f.measured for f in again.figures] == [f.measured for f in first.figures]
    assert "plain, seed 0: mAP" in console.file.getvalue()


def test_a_teacher_is_trained_first_and_taught_with(shared):
    answer = recipes.reproduce(
        recipes.find("kd_wrn_40_2_wrn_16_2_cifar100"), scale="small", out=shared, jobs=JOBS, console=screen()
    )
    (teacher,) = answer.folders["teacher"]
    (result,) = results(answer, "KD")
    assert result["methods"][0]["options"]["teachers"] == [str(teacher)]
    assert result["attached"]["KD"]["teachers"] == [f"teacher '{teacher}'"]


def on_digits(**fields: Any) -> TrainSpec:
    values = {
        "methods": [],
        "model": "cifar_resnet20",
        "model_options": {"width": 0.25},
        "data": "digits",
        "train_limit": 128,
        "epochs": 1,
        "batch": 32,
        "precision": "fp32",
        **fields,
    }
    return parse(TrainSpec, values)


def row(spec: TrainSpec, *published: Published, **fields: Any) -> Recipe:
    return Recipe("a_row", "A row", "A paper", "Table 0", spec, published, **fields)


def test_measured_stands_beside_published_with_interval_and_difference(tmp_path):
    recipe = row(
        on_digits(methods=[{"name": "ONE"}]),
        Published("plain", 80.0, "by heart"),
        Published("plain", 0.2, "by hand", metric="parameters"),
        Published("ONE", 15.0, "by rumour", metric="top-1 accuracy", spread=0.25, table="Table 1"),
        beside=(on_digits(),),
    )
    console = screen()
    answer = recipes.reproduce(recipe, out=tmp_path, seeds=2, jobs=JOBS, console=console)
    errors = [100 * (1 - result["test"]["top1"]) for result in results(answer, "plain")]
    plain = next(f for f in answer.figures if f.run == "plain" and f.metric == "top-1 error")
    half = stats.t.ppf(0.975, 1) * stdev(errors) / 2**0.5
    assert plain.measured.mean == pytest.approx(fmean(errors))
    assert plain.measured.high - plain.measured.mean == pytest.approx(half)
    assert plain.difference == pytest.approx(fmean(errors) - 80)
    (size,) = [f for f in answer.figures if f.metric == "parameters"]
    assert size.measured.mean == results(answer, "plain")[0]["parameters"]["deployed"] / 1e6
    accuracy = next(f for f in answer.figures if f.run == "ONE" and f.network == "student")
    assert accuracy.measured.mean == pytest.approx(100 * fmean(r["test"]["top1"] for r in results(answer, "ONE")))
    ensemble = next(f for f in answer.figures if f.network == "ONE.ensemble")
    tested = [r["deployables"]["ONE.ensemble"]["test"]["top1"] for r in results(answer, "ONE")]
    assert (ensemble.published, ensemble.difference) == (None, None)
    assert ensemble.measured.mean == pytest.approx(100 * (1 - fmean(tested)))
    lines = [line for line in console.file.getvalue().splitlines() if "by " in line]
    assert f"{fmean(errors):.2f}" in lines[0]
    assert f"{fmean(errors) - 80:+.2f}" in lines[0]
    assert "15.00 +- 0.25" in lines[2]
    assert "by rumour (Table 1)" in lines[2]
    # A second call trains nothing and says the same.
    again = screen()
    assert recipes.reproduce(recipe, out=tmp_path, seeds=2, jobs=JOBS, console=again) == answer
    assert "s of training" not in again.file.getvalue()


def test_one_seed_has_no_interval(shared):
    console = screen()
    recipe = recipes.find("one_resnet32_cifar10")
    answer = recipes.reproduce(recipe, scale="small", out=shared, jobs=JOBS, console=console)
    assert all(len(figure.measured.values) == 1 for figure in answer.figures)
    assert " to " not in next(line for line in console.file.getvalue().splitlines() if line.startswith("plain "))
    assert "One seed has no interval" in console.file.getvalue()


def test_a_failed_run_is_explained_and_the_others_go_on(tmp_path):
    recipe = row(
        on_digits(methods=[{"name": "ONE", "options": {"cut": "nonsense"}}]),
        Published("ONE(cut=nonsense)", 15.0, "by rumour"),
        beside=(on_digits(),),
    )
    console = screen()
    answer = recipes.reproduce(recipe, out=tmp_path, jobs=JOBS, console=console)
    assert not answer.complete
    ((label, reason),) = answer.failures
    assert label == "ONE(cut=nonsense), seed 0"
    assert "There is no stage or module 'nonsense'" in reason
    figures = {figure.run: figure for figure in answer.figures}
    assert figures["plain"].measured is not None
    assert (figures["ONE(cut=nonsense)"].measured, figures["ONE(cut=nonsense)"].difference) == (None, None)
    assert "FAILED: ONE(cut=nonsense), seed 0: There is no stage or module 'nonsense'" in console.file.getvalue()


def test_without_its_teacher_a_student_is_not_tried(tmp_path):
    recipe = row(
        on_digits(methods=[{"name": "KD"}]),
        Published("KD", 15.0, "by rumour"),
        teacher=on_digits(model_options={"width": 0.01}),
        beside=(on_digits(),),
    )
    answer = recipes.reproduce(recipe, out=tmp_path, seeds=2, jobs=JOBS, console=screen())
    reasons = dict(answer.failures)
    assert list(reasons) == ["teacher, seed 0", "KD, seed 0", "KD, seed 1"]
    assert "width=0.01 leaves none" in reasons["teacher, seed 0"]
    assert reasons["KD, seed 0"] == "It was not trained, since its teacher failed."
    assert len(results(answer, "plain")) == 2
    assert not any(folder.exists() for folder in answer.folders["KD"])


def test_data_that_cannot_be_opened_are_asked_for(tmp_path, monkeypatch):
    def unreachable(name, root):
        raise AttarError(f"Cannot download {name} (no network): connect this machine once.")

    monkeypatch.setattr(sources, "open_torchvision", unreachable)
    with pytest.raises(AttarError) as refused:
        recipes.reproduce(recipes.find("one_resnet32_cifar10"), out=tmp_path / "out", console=screen())
    assert str(refused.value) == (
        "Cannot download cifar10 (no network): connect this machine once, or give your own copy with --data, "
        "for example --data parquet:DIR."
    )
    assert not (tmp_path / "out").exists()


def test_data_of_ones_own(tmp_path, monkeypatch):
    hundred = dataclasses.replace(recipes.find("one_resnet32_cifar100"))
    with pytest.raises(AttarError, match=r"cifar100, which has 100 classes, but 'digits' has 10: give cifar100\."):
        recipes.reproduce(hundred, out=tmp_path, data="digits", console=screen())
    with pytest.raises(AttarError, match=r"There is no folder 'nowhere'"):
        recipes.reproduce(hundred, out=tmp_path, data="parquet:nowhere", console=screen())
    # Ten classes of one's own in place of CIFAR-10.
    recipe = row(on_digits(data="cifar10"), Published("plain", 10.0, "by heart"))
    answer = recipes.reproduce(recipe, out=tmp_path, data="digits", jobs=JOBS, console=screen())
    assert results(answer, "plain")[0]["data"] == "digits"
    assert answer.complete


def test_a_recipe_on_a_copy_of_cifar10(tmp_path, monkeypatch):
    """The row's settings on some real images, but for a network and an epoch that a processor can do."""
    data = Path(os.environ.get("ATTAR_DATA", Path(__file__).parents[2] / "../shared/data")) / "cifar10"
    if not data.is_dir():
        pytest.skip(f"no CIFAR-10 at {data}: set ATTAR_DATA")
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "copy"
    copy.mkdir()
    for split, images in (("train", 600), ("test", 300)):
        pq.write_table(pq.read_table(data / f"{split}.parquet").slice(0, images), copy / f"{split}.parquet")
    recipe = recipes.find("one_resnet32_cifar10")
    tiny = {"model": "cifar_resnet20", "model_options": {"width": 0.125}, "epochs": 1}
    spec, plain = (each.model_copy(update=tiny) for each in (recipe.spec, *recipe.beside))
    recipe = dataclasses.replace(recipe, spec=spec, beside=(plain,))
    answer = recipes.reproduce(recipe, out=tmp_path / "runs", data=f"parquet:{copy}", jobs=JOBS, console=screen())
    assert answer.complete, answer.failures
    (result,) = results(answer, "ONE")
    assert (result["test"]["images"], result["holdout"]["images"]) == (300, 12)
    figure = next(f for f in answer.figures if f.run == "ONE" and f.network == "student")
    assert figure.difference == pytest.approx(100 * (1 - result["test"]["top1"]) - 5.99)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": "smal"}, r"There is no scale 'smal': did you mean 'small'"),
        ({"scale": "small", "seeds": 0}, r"At least 1 seed is needed, not 0\."),
        ({"scale": "small", "jobs": 0}, r"At least 1 run at a time"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message, tmp_path):
    with pytest.raises(AttarError, match=message):
        recipes.reproduce(recipes.find("one_resnet32_cifar10"), out=tmp_path, console=screen(), **arguments)
