"""Analyses to render: as large, as small and as awkward as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from attar.compare.analysis import Analysis, Attached, Column, EntryAnalysis, Failure
from attar.compare.columns import DENSE_COLUMNS
from attar.compare.masks import Masks
from attar.compare.primary import SEGMENTATION
from attar.compare.statistics import Contrast, Summary, contrasts, summary, verdict

__all__ = ["COLUMNS", "TEN", "dense_sample", "sample", "several", "two_entries"]

TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
COLUMNS = (
    Column("top1", "Top-1", "share", "high", "Share of test images answered rightly.", "quality"),
    Column("nll", "NLL", "number", "low", "Negative log-likelihood of the true class, in nats per image.", "quality"),
    Column("ece", "Calibration error", "share", "low", "Mean gap between confidence and accuracy.", "quality"),
    Column("class_spread", "Per-class spread", "share", "low", "Standard deviation of per-class accuracy.", "quality"),
    Column("agreement", "Agreement", "share", "high", "Share of images on which two seeds agree.", "quality"),
    Column("corruptions", "Corrupted top-1", "share", "high", "Mean top-1 over the standard corruptions.", "quality"),
    Column("training_seconds", "Training time", "seconds", "low", "Seconds in training steps.", "training"),
    Column("images_per_second", "Images/s", "rate", "high", "Training images per second.", "training"),
    Column("peak_memory_bytes", "Peak memory", "bytes", "low", "Most memory in use while training.", "training"),
    Column("training_flops", "Training FLOPs", "flops", "low", "Operations of the whole training.", "training"),
    Column("extra_parameters", "Extra parameters", "count", "low", "Parameters that die after training.", "training"),
    Column("parameters", "Parameters", "count", "low", "Parameters of the deployed network.", "deployment"),
    Column("flops", "FLOPs", "flops", "low", "Operations for one image.", "deployment"),
    Column("latency", "Latency", "milliseconds", "low", "Median time for one image.", "deployment"),
)


def _entry(
    label: str,
    role: str,
    gain: float,
    cost: float,
    seeds: Sequence[int],
    failures: tuple[Failure, ...],
    classes: int,
    rng: np.random.Generator,
    luck: dict[int, float],
    epochs: int,
) -> EntryAnalysis:
    n, images = len(seeds), 100
    recall = np.clip(0.90 + gain + rng.normal(0, 0.03, classes), 0.5, 0.995)
    off = rng.random((classes, classes)) ** 4 * (1 - np.eye(classes))
    confusion = np.diag(recall * images) + off / off.sum(1, keepdims=True) * ((1 - recall) * images)[:, None]
    top1 = {seed: float(np.clip(0.91 + gain + luck[seed] + rng.normal(0, 0.0012), 0, 1)) for seed in seeds}
    steps = np.linspace(0, 1, epochs)
    curve = np.array([0.1 + (top1[s] - 0.1) * (1 - np.exp(-6 * steps)) + rng.normal(0, 0.008, epochs) for s in seeds])
    figures: dict[str, Summary] = {}
    if n:
        figures = {
            "top1": summary(list(top1.values())),
            "nll": summary([0.31 - gain + rng.normal(0, 0.01) for _ in seeds]),
            "ece": summary([0.031 - gain / 2 + rng.normal(0, 0.002) for _ in seeds]),
            "class_spread": summary([0.042 + rng.normal(0, 0.004) for _ in seeds]),
            "corruptions": summary([0.68 + 2 * gain + rng.normal(0, 0.01) for _ in seeds]),
            "training_seconds": summary([154 * cost + rng.normal(0, 3) for _ in seeds]),
            "images_per_second": summary([6500 / cost + rng.normal(0, 60) for _ in seeds]),
            "peak_memory_bytes": summary([1.1e9 * (0.6 + 0.4 * cost)] * n),
            "training_flops": summary([3.7e15 * cost] * n),
            "extra_parameters": summary([272_474 * (cost - 1)] * n),
            "parameters": summary([272_474] * n),
            "flops": summary([8.17e7] * n),
            "latency": summary([0.00184 + abs(rng.normal(0, 4e-5)) for _ in seeds]),
        }
        if n > 1:
            figures["agreement"] = summary([0.93 + gain + rng.normal(0, 0.004) for _ in range(n * (n - 1) // 2)])
    methods = [part.partition("(")[0] for part in label.split("+")] if role == "method" else []
    attached = tuple(
        Attached(
            method,
            {"branches": 204_000, "gate": 1_234} if method == "ONE" else {},
            ("layer2", "layer3") if method == "ONE" else (),
            ("resnet110 <best>",) if method == "KD" else (),
            2 if method == "SCD" else 1,
            {"cross_entropy": (0.21, 1.0), "distillation": (0.034, 0.8)},
        )
        for method in methods
    )
    return EntryAnalysis(
        label,
        role,  # type: ignore[arg-type]
        tuple(seeds),
        failures,
        figures,
        None,
        None,
        f"{label} scored {figures['top1'].mean:.2%} of test top-1." if n else "No run has finished.",
        curve if n else np.zeros((0, epochs)),
        154 * cost * np.linspace(1 / epochs, 1, epochs),
        confusion if n else np.zeros((classes, classes)),
        recall if n else np.zeros(classes),
        attached,
        {method: {"branches": 2, "temperature": 3.0, "ramp": 0.27} for method in methods},
        310.0 if "KD" in methods else 0.0,
        epochs,
        tuple(f"runs/compare/{methods[0] if methods else role}-seed{seed}-0a1b2c3d4e5f" for seed in seeds),
    )


def sample(
    methods: Sequence[tuple[str, float, float]] = (
        ("ONE(branches=2)", 0.006, 1.55),
        ("ONE(branches=2)+SCD", 0.0112, 2.35),
        ("KD(teacher=resnet110,temperature=4)", 0.004, 1.42),
        ("SCD", 0.0005, 1.8),
        ("Mixup", -0.009, 1.02),
        ("FRSKD+SLA", 0.0, 3.1),
    ),
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    classes: Sequence[str] = TEN,
    broken: str | None = "FRSKD+SLA",
    failed: tuple[str, int] | None = ("SCD", 2),
    smoothing: bool = True,
    epochs: int = 40,
) -> Analysis:
    """Return a comparison of `(label, gain, cost as a multiple of plain)`.

    Args:
        methods: beside plain and label smoothing.
        seeds: of every entry.
        classes: their names.
        broken: the entry whose runs all failed.
        failed: the entry and the seed of the one run that failed otherwise.
        smoothing: whether label smoothing is there.
        epochs: of every run.
    """
    rng = np.random.default_rng(7)
    luck = {seed: float(rng.normal(0, 0.003)) for seed in seeds}
    asked = [("plain", "plain", 0.0, 1.0)]
    asked += [("Supervised(label_smoothing=0.1)", "smoothing", 0.0035, 1.0)] * smoothing
    asked += [(label, "method", gain, cost) for label, gain, cost in methods]
    entries = []
    for label, role, gain, cost in asked:
        missing = set(seeds) if label == broken else {failed[1]} if failed and failed[0] == label else set()
        failures = tuple(
            Failure(seed, "the loss became NaN at step 812 of 3,120 (learning rate 0.1 & <no warm-up>).")
            for seed in seeds
            if seed in missing
        )
        done = [seed for seed in seeds if seed not in missing]
        entries.append(_entry(label, role, gain, cost, done, failures, len(classes), rng, luck, epochs))
    return Analysis(
        "cifar_resnet20",
        "cifar10",
        tuple(classes),
        {"train": 45_000, "holdout": 5_000, "test": 100 * len(classes)},
        tuple(seeds),
        COLUMNS,
        _contrasted(entries, 100 * len(classes)),
        {"0.05": 0.9121, "0.1": 0.9134, "0.2": 0.9117} if smoothing else {},
        {
            "model": "cifar_resnet20",
            "data": "cifar10",
            "epochs": epochs,
            "batch": 128,
            "lr": 0.1,
            "momentum": 0.9,
            "augment": ["crop", "flip"],
            "model_options": {},
            "train_limit": None,
        },
        {
            "device": ("NVIDIA H200",),
            "torch": ("2.15.0",),
            "python": ("3.11.2",),
            "cpu": ("Xeon 8480 <a>", "Xeon 8490"),
        },
        "attar compare 'ONE(branches=2)' 'ONE(branches=2)+SCD' 'KD(teacher=resnet110,temperature=4)' SCD Mixup"
        " FRSKD+SLA --model cifar_resnet20 --data cifar10 --seeds 5 --epochs 40 --out runs/compare",
        ("All entries trained for the same number of epochs.", "Two runs shared the machine at any time."),
    )


def _contrasted(entries: Sequence[EntryAnalysis], images: int) -> tuple[EntryAnalysis, ...]:
    found: dict[str, dict[str, Contrast]] = {}
    for role in ("plain", "smoothing"):
        base = next((_top1(entry) for entry in entries if entry.role == role), {})
        others = {entry.label: _top1(entry) for entry in entries if entry.role not in (role, "plain")}
        found[role] = contrasts(others, base, 1 / images) if base else {}
    done = []
    for entry in entries:
        plain, smoothing = (found[role].get(entry.label) for role in ("plain", "smoothing"))
        said = entry.verdict if entry.role != "method" else verdict(entry.label, plain, smoothing)
        done.append(replace(entry, against_plain=plain, against_smoothing=smoothing, verdict=said))
    return tuple(done)


def _top1(entry: EntryAnalysis) -> dict[int, float]:
    return dict(zip(entry.seeds, entry.figures["top1"].values, strict=True)) if entry.seeds else {}


def two_entries() -> Analysis:
    """Return plain training and one method, two seeds, two classes, nothing else."""
    chosen = sample(
        [("ONE", 0.01, 1.6)], seeds=(0, 1), classes=("no", "yes"), broken=None, failed=None, smoothing=False, epochs=3
    )
    return chosen


def several(count: int) -> Analysis:
    """Return a comparison of many methods with names of every length."""
    methods = [
        (f"ONE(branches={i},temperature={i / 2})" + "+SCD" * (i % 3 == 0), 0.015 * np.sin(i), 1 + i / 8)
        for i in range(2, count + 2)
    ]
    return sample(methods, seeds=(0, 1, 2), broken=methods[-1][0], failed=(methods[3][0], 1))


def dense_sample(
    classes: Sequence[str] = ("sky", "road", "tree", "car", "pole"),
    *,
    methods: int = 3,
    size: tuple[int, int] = (180, 240),
    images: int = 4,
) -> Analysis:
    """Return a comparison of segmentation: bands of classes with a void disc; the last class occurs nowhere."""
    rng = np.random.default_rng(5)
    labels = [("ONE", 0.02, 1.5), ("SCD", 0.0, 1.2), ("FRSKD(stack=3)+SCD", 0.03, 2.5), ("AT", 0.01, 1.1)]
    labels += [(f"KD(temperature={i})", 0.001 * i, 1.4) for i in range(4, methods + 1)]
    base = sample(labels[:methods], seeds=(0, 1, 2), classes=classes, broken=None, failed=("SCD", 0), epochs=12)
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    truth = np.empty((images, height, width), np.uint8)
    for i in range(images):
        wave = rows + 0.1 * height * np.sin(columns / width * 6 + i)
        truth[i] = np.clip(wave / height * (len(classes) - 1), 0, len(classes) - 2)
        truth[i][(rows - height / 3) ** 2 + (columns - width / 2) ** 2 < (height / 8) ** 2] = 255
    photos = np.repeat((truth[..., None] * 37 % 200 + 30), 3, axis=-1) * np.array([1.0, 0.8, 0.6])
    photos = np.clip(photos + rng.normal(0, 12, photos.shape), 0, 255).astype(np.uint8)
    positions = np.arange(images) * 7
    entries = []
    for entry in base.entries:
        share = entry.per_class * np.linspace(1.0, 0.4, len(classes))
        shares = np.clip(share + rng.normal(0, 0.01, (len(entry.seeds), len(classes))), 0, 1)
        shares[:, -1] = np.nan
        found = np.where(truth == 255, 0, truth).astype(np.uint8)
        wrong = np.repeat(np.repeat(rng.random((images, height // 12, width // 12)) < 0.1, 12, axis=1), 12, axis=2)
        part = found[:, : wrong.shape[1], : wrong.shape[2]]
        part[wrong] = rng.integers(0, len(classes) - 1, int(wrong.sum()))
        figures = {"miou" if key == "top1" else key: one for key, one in entry.figures.items()}
        figures["pixel_accuracy"] = entry.figures["top1"]
        entries.append(
            replace(
                entry,
                figures=figures,
                confusion=np.zeros((0, 0)),
                per_class=shares.mean(axis=0),
                class_iou=shares,
                masks=Masks(positions, photos, truth, found),
                masks_seed=entry.seeds[0],
                verdict=entry.verdict.replace("top-1", "mIoU"),
            )
        )
    shown = {key for entry in entries for key in entry.figures}
    return replace(
        base,
        model="lraspp_mobilenet_v3_large",
        data="camvid",
        columns=tuple(column for column in DENSE_COLUMNS if column.key in shown),
        entries=tuple(entries),
        primary=SEGMENTATION,
    )
