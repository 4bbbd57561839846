"""A comparison of real runs, every figure of it recomputed from the raw files with numpy and scipy alone."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from attar.compare.analysis import COLUMNS, Analysis, EntryAnalysis, Failure, analyse
from attar.compare.command import command
from attar.compare.protocol import label_of, read_entry
from attar.compare.records import Record, read_record, read_records
from attar.errors import AttarError
from attar.options import Parser, values_of
from attar.spec import TrainSpec, parse
from attar.train import fit
from runs import quiet, tiny

SEEDS = (0, 1, 2)
EPOCHS = 2
SMOOTH, SMOOTHER = ({"name": "Supervised", "options": {"label_smoothing": share}} for share in (0.05, 0.2))


def small(*methods: str | dict[str, Any], **fields: Any) -> TrainSpec:
    return tiny(*methods, **{"epochs": EPOCHS, "train_limit": 160, "batch": 16, **fields})


def exported(name: str, seed: int) -> dict[str, Any]:
    """What a run's export says that the columns read; only the plain student's ONNX files have the right numbers."""
    wrong = 1000 if name not in ("onnx", "onnx-int8") else 0
    int8 = {"left_in_float32": ["stem"] * (seed + wrong), "drop": 0.02 * seed - 0.01 + wrong}
    return {
        "format": "executorch" if name.startswith("executorch") else "onnx",
        "deployable": "BYOT.exit1" if name.endswith("exit1") else None,
        "size_bytes": (4000 if "int8" not in name else 1000) + seed + wrong,
        "accuracy": {"artefact": 0.5 + 0.1 * seed + wrong},
        "int8": int8 if "int8" in name else None,
        "latency": {"one_thread": {"median_seconds": (2e-3 if "int8" not in name else 1e-3) + wrong}},
    }


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain, ONE, KD and two label smoothings; one run failed, one was interrupted."""
    home = tmp_path_factory.mktemp("comparison")
    kd = {"name": "KD", "options": {"teachers": [str(home / "plain-0")]}}
    plan: dict[str, tuple[list[Any], tuple[int, ...]]] = {
        "plain": ([], SEEDS),
        "one": (["ONE"], SEEDS),
        "kd": ([kd], (0, 1)),
        "smooth": ([SMOOTH], (0,)),
        "smoother": ([SMOOTHER], SEEDS),
    }
    for name, (methods, seeds) in plan.items():
        for seed in seeds:
            fit(small(*methods, seed=seed), home / f"{name}-{seed}", console=quiet())
    for seed, share in enumerate((0.51, 0.48, 0.57)):
        measured = {
            "latency": {"median_seconds": 0.001 * (seed + 1)},
            "step": {"relative": 1.5},
            "corruptions": {"top1": share},
            "ranges": [{"tap": "layer1", "outliers": 2.0 + seed}, {"tap": "layer2", "outliers": None}],
        }
        (home / f"one-{seed}" / "measured.json").write_text(json.dumps(measured))
        for name in ("onnx", "onnx-int8", "onnx-BYOT.exit1", "executorch-int8", ".onnx.7.tmp"):
            folder = home / f"one-{seed}" / "export" / name
            folder.mkdir(parents=True)
            (folder / "export.json").write_text(json.dumps(exported(name, seed)))
    for name, number in (("failed", 0), ("begun", 1)):
        folder = home / f"{name}-{number}"
        folder.mkdir()
        branches = {"name": "ONE", "options": {"branches": 2}}
        small(branches, seed=number).save(folder / "spec.json")
    (home / "failed-0" / "failure.json").write_text(json.dumps({"reason": "The loss became NaN at step 3."}))
    (home / "begun-1" / "metrics.jsonl").write_text('{"kind": "epoch", "epoch": 0, "holdout": {"top1": 0.4}}\n{"ki')
    return home


@pytest.fixture(scope="session")
def found(home: Path) -> Analysis:
    return analyse(read_records([home]), order=["ONE", "ONE(branches=2)"], seeds=SEEDS)


def raw(home: Path, name: str, seeds: tuple[int, ...] = SEEDS) -> list[dict[str, Any]]:
    return [json.loads((home / f"{name}-{seed}" / "result.json").read_text()) for seed in seeds]


def entry(found: Analysis, label: str) -> EntryAnalysis:
    return next(entry for entry in found.entries if entry.label == label)


def kd_label(home: Path) -> str:
    return f"KD(teachers={home / 'plain-0'})"


def each(found: Analysis, home: Path) -> list[tuple[EntryAnalysis, str, tuple[int, ...]]]:
    """Every entry with results, the beginning of its folders' names, and its seeds."""
    labels = {"plain": "plain", "label smoothing 0.2": "smoother", "ONE": "one", kd_label(home): "kd"}
    return [(entry(found, label), name, (0, 1) if name == "kd" else SEEDS) for label, name in labels.items()]


def check(summary: Any, values: list[float]) -> None:
    """Compare with the mean and Student's interval, written anew."""
    np.testing.assert_allclose(summary.values, values, rtol=1e-12)
    mean, half = np.mean(values), 0.0
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    np.testing.assert_allclose([summary.mean, summary.low, summary.high], [mean, mean - half, mean + half], rtol=1e-9)


def test_entries_stand_in_order(found: Analysis, home: Path) -> None:
    labels = ["plain", "label smoothing 0.2", "ONE", "ONE(branches=2)", kd_label(home)]
    assert [entry.label for entry in found.entries] == labels
    assert [entry.role for entry in found.entries] == ["plain", "smoothing", "method", "method", "method"]
    assert (found.model, found.data, found.seeds) == ("cifar_resnet20", "digits", SEEDS)
    assert found.classes == tuple("0123456789")
    assert found.images == {"train": 160, "holdout": 144, "test": 360}


def test_every_figure_from_the_raw_files(found: Analysis, home: Path) -> None:
    teacher = raw(home, "plain")[0]["training_seconds"]
    for row, name, seeds in each(found, home):
        results = raw(home, name, seeds)
        assert row.seeds == seeds
        assert row.folders == tuple(str(home / f"{name}-{seed}") for seed in seeds)
        before = teacher if name == "kd" else 0.0
        assert row.teacher_seconds == before
        for key in ("top1", "top5", "nll", "calibration_error"):
            check(row.figures[key], [result["test"][key] for result in results])
        check(row.figures["training_seconds"], [result["training_seconds"] + before for result in results])
        check(row.figures["images_per_second"], [result["images_per_second"] for result in results])
        check(row.figures["peak_memory"], [result["peak_memory_bytes"] for result in results])
        # 2 epochs of 10 steps of 16 images
        check(row.figures["training_flops"], [result["flops"]["training"] * 2 * 10 * 16 for result in results])
        sizes = [result["parameters"] for result in results]
        check(row.figures["extra_parameters"], [size["training"] - size["deployed"] for size in sizes])
        check(row.figures["deployed_parameters"], [size["deployed"] for size in sizes])
        check(row.figures["deployed_flops"], [result["flops"]["deployed"] for result in results])
    one = entry(found, "ONE").figures
    check(one["latency"], [0.001, 0.002, 0.003])
    check(one["corruption_top1"], [0.51, 0.48, 0.57])
    check(one["step"], [1.5, 1.5, 1.5])
    check(one["onnx_latency"], [2e-3, 2e-3, 2e-3])
    check(one["onnx_size"], [4000, 4001, 4002])
    check(one["int8_top1"], [0.5, 0.6, 0.7])
    check(one["int8_drop"], [-0.01, 0.01, 0.03])
    check(one["int8_left"], [0, 1, 2])
    check(one["int8_latency"], [1e-3, 1e-3, 1e-3])
    check(one["int8_size"], [1000, 1001, 1002])
    check(one["outliers"], [2, 3, 4])
    assert not {"onnx_size", "int8_top1", "outliers"} & entry(found, "plain").figures.keys()
    assert "latency" not in entry(found, "plain").figures
    assert one["extra_parameters"].mean > 0 == entry(found, "plain").figures["extra_parameters"].mean
    assert [column.key for column in found.columns] == [column.key for column in COLUMNS]


def test_answers_from_the_raw_predictions(found: Analysis, home: Path) -> None:
    for row, name, seeds in each(found, home):
        stored = [np.load(home / f"{name}-{seed}" / "predictions.npz") for seed in seeds]
        targets, answers = stored[0]["targets"], [archive["predicted"] for archive in stored]
        confusion = np.zeros((10, 10))
        for answer in answers:
            for target, said in zip(targets, answer, strict=True):
                confusion[target, said] += 1 / len(seeds)
        np.testing.assert_allclose(row.confusion, confusion)
        recalls = np.array([[(answer[targets == k] == k).mean() for k in range(10)] for answer in answers])
        np.testing.assert_allclose(row.per_class, recalls.mean(axis=0))
        check(row.figures["class_spread"], recalls.std(axis=1).tolist())
        pairs = [(i, j) for i in range(len(seeds)) for j in range(i)]
        agreement = row.figures["agreement"]
        np.testing.assert_allclose(
            sorted(agreement.values), sorted((answers[i] == answers[j]).mean() for i, j in pairs)
        )
        assert agreement.low == agreement.high == agreement.mean == pytest.approx(np.mean(agreement.values))
        # The answers are those that the result was computed from.
        np.testing.assert_allclose(
            row.figures["top1"].values, [(answer == targets).mean() for answer in answers], rtol=1e-12
        )


def paired(values: list[float], baseline: list[float]) -> tuple[float, float, float]:
    """Mean difference, half of its interval and p, with the floor of the spread: all written anew."""
    difference, image = np.array(values) - np.array(baseline), 1 / 360
    n, spread = len(values), max(np.std(difference, ddof=1), image / np.sqrt(6))
    error = spread / np.sqrt(n)
    p = 2 * stats.t.sf(abs(difference.mean()) / error, n - 1)
    return difference.mean(), stats.t.ppf(0.975, n - 1) * error, p


def corrected(ps: list[float]) -> list[float]:
    """Holm, by its definition with all hypotheses of equal or smaller p."""
    m, ranked = len(ps), sorted(ps)
    return [max(min(1.0, (m - i) * ranked[i]) for i in range(ranked.index(p) + 1)) for p in ps]


def test_every_contrast_from_the_raw_files(found: Analysis, home: Path) -> None:
    top1 = {name: [result["test"]["top1"] for result in raw(home, name)] for name in ("plain", "one", "smoother")}
    top1["kd"] = [result["test"]["top1"] for result in raw(home, "kd", (0, 1))]
    rows = {name: row for row, name, _ in each(found, home)}
    assert rows["plain"].against_plain is None
    assert rows["plain"].against_smoothing is rows["smoother"].against_smoothing is None
    families = {"against_plain": ("plain", ["smoother", "one", "kd"]), "against_smoothing": ("smoother", ["one", "kd"])}
    for field, (baseline, names) in families.items():
        contrasts = [getattr(rows[name], field) for name in names]
        expected = [paired(top1[name], top1[baseline][: len(top1[name])]) for name in names]
        for contrast, (mean, half, p), name in zip(contrasts, expected, names, strict=True):
            np.testing.assert_allclose(
                contrast.differences, np.array(top1[name]) - top1[baseline][: len(top1[name])], atol=1e-11
            )
            np.testing.assert_allclose(
                [contrast.mean, contrast.low, contrast.high], [mean, mean - half, mean + half], atol=1e-9
            )
            assert contrast.p == pytest.approx(p, rel=1e-6)
            # Four times out of five, by the noncentral t: the wrong tail is below 1e-9 here.
            n, alpha = len(top1[name]), 0.05 / len(names)
            delta = contrast.detectable / (half / stats.t.ppf(0.975, n - 1))
            assert stats.nct.sf(stats.t.ppf(1 - alpha / 2, n - 1), n - 1, delta) == pytest.approx(0.8, abs=1e-6)
        adjusted = corrected([p for _, _, p in expected])
        np.testing.assert_allclose([contrast.p_corrected for contrast in contrasts], adjusted, rtol=1e-6)


def test_verdicts_say_what_the_contrasts_say(found: Analysis) -> None:
    for row in found.entries:
        if row.role != "method":
            assert f"{100 * row.figures['top1'].mean:.2f} % of test top-1" in row.verdict
        elif row.against_plain is not None:
            claimed = not row.verdict.startswith("No evidence")
            assert claimed == (row.against_plain.p_corrected < 0.05)
            assert f"{100 * row.against_plain.mean:+.2f} points" in row.verdict
            assert "tuned label smoothing 0.2" in row.verdict


def test_curves_and_what_they_cost(found: Analysis, home: Path) -> None:
    for row, name, seeds in each(found, home):
        lines = [(home / f"{name}-{seed}" / "metrics.jsonl").read_text().splitlines() for seed in seeds]
        epochs = [[json.loads(line) for line in text if '"kind": "epoch"' in line] for text in lines]
        np.testing.assert_array_equal(row.curve, [[line["holdout"]["top1"] for line in run] for run in epochs])
        assert row.curve.shape == (len(seeds), EPOCHS)
        seconds = np.mean([result["training_seconds"] for result in raw(home, name, seeds)])
        before = raw(home, "plain")[0]["training_seconds"] if name == "kd" else 0.0
        np.testing.assert_allclose(row.curve_cost, [before + seconds / 2, before + seconds])
        assert row.epochs == EPOCHS


def test_what_was_attached_and_with_which_options(found: Analysis, home: Path) -> None:
    (one,) = entry(found, "ONE").attached
    results = raw(home, "one")
    assert one.method == "ONE"
    assert one.auxiliaries == results[0]["attached"]["ONE"]["auxiliaries"]
    assert (one.taps, one.teachers, one.views) == (("layer2",), (), 1)
    assert list(one.terms) == ["ce_branches", "ce_ensemble", "kl"]
    for name, (loss, weight) in one.terms.items():
        assert loss == pytest.approx(np.mean([result["terms"][f"ONE.{name}"]["loss"] for result in results]))
        assert weight == pytest.approx(np.mean([result["terms"][f"ONE.{name}"]["weight"] for result in results]))
    assert entry(found, "ONE").options["ONE"]["branches"] == 3
    assert entry(found, "ONE(branches=2)").options["ONE"]["branches"] == 2
    kd = entry(found, kd_label(home))
    assert kd.attached[0].teachers == (f"teacher '{home / 'plain-0'}'",)
    assert kd.options["KD"] == {
        "teachers": [str(home / "plain-0")],
        "temperature": 4.0,
        "weight": 0.9,
        "task_weight": 0.1,
    }
    assert entry(found, "plain").attached == ()
    json.dumps([dict(row.options) for row in found.entries])


def test_label_smoothing_is_tuned_on_the_holdout_of_common_seeds(found: Analysis, home: Path) -> None:
    holdout = {name: raw(home, name, (0,))[0]["holdout"]["top1"] for name in ("smooth", "smoother")}
    assert found.smoothing == {"0.05": holdout["smooth"], "0.2": holdout["smoother"]}
    # With one seed each, the hold-out decides; label and role follow.
    both = analyse([read_record(home / name) for name in ("plain-0", "smooth-0", "smoother-0")])
    scores = {
        label: (held["top1"], -held["nll"])
        for label, name in (("label smoothing 0.05", "smooth"), ("label smoothing 0.2", "smoother"))
        for held in [raw(home, name, (0,))[0]["holdout"]]
    }
    assert both.entries[1].label == max(scores, key=scores.__getitem__)
    one = analyse([read_record(home / name) for name in ("plain-0", "smooth-0")])
    assert (one.entries[1].label, one.smoothing) == ("label smoothing 0.05", {})


def test_a_tie_of_label_smoothings_is_decided_by_likelihood(home: Path) -> None:
    runs = [read_record(home / name) for name in ("plain-0", "smooth-0", "smoother-0")]
    for better in (1, 2):
        tied = [runs[0]]
        for position in (1, 2):
            result = dict(runs[position].result or {})
            result["holdout"] = {**result["holdout"], "top1": 0.5, "nll": 1.0 if position == better else 2.0}
            tied.append(dataclasses.replace(runs[position], result=result))
        assert analyse(tied).entries[1].label == f"label smoothing {(0.05, 0.2)[better - 1]}"


def test_runs_without_a_result_are_told(found: Analysis, home: Path) -> None:
    failed = entry(found, "ONE(branches=2)")
    assert failed.failures == (
        Failure(0, "The loss became NaN at step 3."),
        Failure(1, "not finished yet"),
        Failure(2, "not started"),
    )
    assert (failed.seeds, failed.figures, failed.folders) == ((), {}, ())
    assert failed.curve.shape == (0, EPOCHS)
    assert failed.curve_cost.shape == (EPOCHS,)
    assert failed.confusion.shape == (10, 10)
    assert failed.verdict == "ONE(branches=2) has no finished run (The loss became NaN at step 3)."
    assert entry(found, kd_label(home)).failures == (Failure(2, "not started"),)
    assert entry(found, "plain").failures == ()
    (said,) = (note for note in found.notes if note.startswith("Runs without a result"))
    assert "ONE(branches=2), seed 0 (The loss became NaN at step 3); ONE(branches=2), seed 1 (not finished yet)" in said


def test_notes(found: Analysis, home: Path) -> None:
    said = "\n".join(found.notes)
    assert "Conclusions are about this split and these test images" in said
    assert f"The training time of {kd_label(home)} includes" in said
    assert "tuned over 0.05, 0.2 on the hold-out" in said
    assert "Not all runs" not in said
    records = [record for record in read_records([home]) if record.environment]
    other = {**records[0].environment[0], "threads": 7, "precision": "bf16"}
    records[0] = dataclasses.replace(records[0], environment=(other,))
    more = analyse(records, order=["SCD", "ONE"], notes=["First."])
    assert more.notes[0] == "First."
    assert any("Not all runs saw the same threads (" in note for note in more.notes)
    assert any("Not all runs saw the same precision (" in note for note in more.notes)
    assert "No run has begun of SCD." in more.notes
    assert found.environment["device"] == ("cpu",)
    assert found.environment["precision"] == ("fp32",)
    assert set(more.environment["threads"]) == {"7", *found.environment["threads"]}


def test_settings_are_what_all_runs_share(found: Analysis, home: Path) -> None:
    stored = json.loads((home / "plain-0" / "spec.json").read_text())
    assert found.settings == {name: value for name, value in stored.items() if name not in ("methods", "seed")}


def test_older_runs_lack_columns_and_nothing_else(found: Analysis, home: Path, tmp_path: Path) -> None:
    for name in ("plain-0", "one-0"):
        shutil.copytree(home / name, tmp_path / name)
        path = tmp_path / name / "result.json"
        result = json.loads(path.read_text())
        for key in ("flops", "peak_memory_bytes", "attached", "terms"):
            del result[key]
        path.write_text(json.dumps(result))
        (tmp_path / name / "environment.json").unlink()
        shutil.rmtree(tmp_path / name / "student")
    old = analyse(read_records([tmp_path]))
    gone = {"peak_memory", "training_flops", "deployed_flops", "agreement"}  # agreement: one seed
    assert {column.key for column in found.columns} - {column.key for column in old.columns} == gone
    assert old.entries[1].attached == ()
    assert old.images == {"holdout": 144, "test": 360}
    assert old.classes == tuple("0123456789")
    assert "Nothing can be said about ONE yet" in old.entries[1].verdict


def test_a_class_without_test_images_has_no_accuracy(home: Path) -> None:
    run = read_record(home / "plain-0")
    assert run.predictions is not None
    kept = run.predictions.targets != 3
    fewer = type(run.predictions)(
        *(getattr(run.predictions, f.name)[kept] for f in dataclasses.fields(run.predictions))
    )
    (row,) = analyse([dataclasses.replace(run, predictions=fewer)]).entries
    assert [k for k in range(10) if math.isnan(row.per_class[k])] == [3]
    recalls = [(fewer.predicted[fewer.targets == k] == k).mean() for k in range(10) if k != 3]
    assert row.figures["class_spread"].mean == pytest.approx(np.std(recalls))


def changed(record: Record, **fields: Any) -> Record:
    return dataclasses.replace(record, spec=parse(TrainSpec, {**record.spec.model_dump(), **fields}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda runs: [changed(runs[0], lr=0.3, batch=8), runs[1]],
            r"differ in batch \(8, 16\); lr \(0.3, 0.05\): give",
        ),
        (lambda runs: [changed(runs[0], epochs=5), runs[1]], r"The runs of plain differ in epochs \(2, 5\)"),
        (lambda runs: [runs[0], runs[0]], "are both plain with seed 0: give one"),
        (
            lambda runs: [
                runs[0],
                dataclasses.replace(runs[1], result={**(runs[1].result or {}), "data_fingerprint": "another"}),
            ],
            "differ in data_fingerprint",
        ),
        (lambda runs: [dataclasses.replace(run, result=None, predictions=None) for run in runs], "None of the 2 runs"),
        (lambda runs: [], "None of the 0 runs is finished"),
    ],
)
def test_refusals(home: Path, spoil: Callable[[list[Record]], list[Record]], message: str) -> None:
    runs = [read_record(home / "plain-0"), read_record(home / "plain-1")]
    with pytest.raises(AttarError, match=message):
        analyse(spoil(runs))


def test_what_may_differ(home: Path) -> None:
    runs = [read_record(home / name) for name in ("plain-0", "plain-1", "one-0", "one-1")]
    runs = [changed(run, epochs=1) if run.spec.methods else run for run in runs]
    runs[0] = changed(runs[0], log_every=9)
    found = analyse(runs)
    assert [row.epochs for row in found.entries] == [2, 1]
    assert any(
        "different numbers of epochs, as equal training cost asks (plain 2, ONE 1)" in note for note in found.notes
    )
    assert "epochs" not in found.settings
    assert found.reproduce.endswith("--epochs 2 --batch 16 --lr 0.05 --precision fp32 --equal cost --seeds 2")


def read_back(text: str) -> tuple[list[str], TrainSpec, dict[str, Any]]:
    """Read a command the way the command line reads options."""
    words = shlex.split(text)
    assert words[:2] == ["attar", "compare"]
    start = next(i for i, word in enumerate(words) if word.startswith("--"))
    parser = Parser("attar compare", "")
    parser.add_fields("the run", TrainSpec, only=[name for name in TrainSpec.model_fields if name != "methods"])
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--equal", default="epochs")
    parser.add_argument("--smoothing", nargs="+", type=float, default=None)
    given = parser.read(words[start:])
    return words[2:start], parse(TrainSpec, {"methods": (), **values_of(given, TrainSpec)}), given


def test_the_command_makes_the_same_comparison(found: Analysis, home: Path) -> None:
    entries, spec, given = read_back(found.reproduce)
    assert entries == ["ONE", "ONE(branches=2)", kd_label(home)]
    assert spec.fingerprint() == small().fingerprint()
    assert (given["seeds"], given["equal"], given["smoothing"]) == (3, "epochs", [0.05, 0.2])
    assert analyse(read_records([home]), reproduce="make it").reproduce == "make it"


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "adamw", "lr": 0.1, "weight_decay": 5e-4},
        {"optimizer": "adamw"},
        {"nesterov": False, "keep_last": True, "milestones": (0.3, 0.6, 0.9), "schedule": "step", "ema": 0.999},
        {"model_options": {"width": 0.5, "norm": "a b", "depth": [1, 2]}, "stages": ("layer1", "layer 2"), "lr": 1e-5},
        {"data": "./my photos", "image_size": None, "train_limit": None, "channels_last": False},
    ],
)
def test_the_command_spells_every_field(fields: dict[str, Any]) -> None:
    methods = [
        method.model_dump() for method in read_entry("ONE(cut='layer2',branches=2)+Supervised(mixup=0.2)").methods
    ]
    spec = small(*methods, **fields)
    (entry,), back, _ = read_back(command([spec], [0], [label_of(spec.methods), "plain"]))
    back = back.model_copy(update={"methods": read_entry(entry).methods})
    assert back.fingerprint() == spec.fingerprint()
