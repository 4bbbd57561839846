"""What is measured on finished students: how fast they answer, and what corrupted images do to them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from attar.compare.records import measured, remember
from attar.data import EvalLoader, Normalization, Split
from attar.data.corruptions import KINDS, SEVERITIES, corrupt
from attar.data.images import Pixels
from attar.errors import AttarError
from attar.spec import TrainSpec
from attar.train import build_source
from attar.train.distributed import Ranks
from attar.train.evaluate import measure_classes
from attar.train.student import Student, load_student
from attar.train.timing_loop import processor, time_answers

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["first_images", "measure_corruptions", "measure_latency", "measure_runs"]

_TOGETHER = 8  # students in memory at a time, for which each corrupted image is made once
# What decides which test images there are, and how large.
_SAME_IMAGES = ("data", "image_size", "holdout", "split_seed", "skip_bad_images", "train_limit")


def measure_latency(network: nn.Module, image_size: tuple[int, int]) -> dict[str, Any]:
    """Measure how long a network takes for one image, as eager PyTorch on one CPU thread.

    At least 30 answers after a warm-up, at most 300, for about a second; a copy answers, on the CPU, in float32.

    Args:
        network: images [1, 3, H, W] -> logits.
        image_size: (H, W).

    Returns:
        `median_seconds`, `p95_seconds`, `repeats`, `threads`, `batch` and `device`.
    """
    network = copy.deepcopy(network).cpu().float().eval()
    image = torch.zeros(1, 3, *image_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            timed = time_answers(lambda: network(image))
    finally:
        torch.set_num_threads(threads)
    return {**timed, "threads": 1, "batch": 1, "device": processor()}


def first_images(split: Split, limit: int) -> Split:
    """Return the first `limit` images of a split such that every class keeps its share, to within an image."""
    targets = split.targets
    counts = np.bincount(targets)
    rank = np.empty(len(targets), dtype=np.int64)
    for label in range(len(counts)):
        rank[targets == label] = np.arange(counts[label])
    kept = np.sort(np.argsort((rank + 0.5) / counts[targets], kind="stable")[:limit])
    return dataclasses.replace(split, rows=split.rows[kept], targets=targets[kept], index=split.index[kept])


def measure_corruptions(
    students: Sequence[Student], split: Split, *, seed: int = 0, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Measure the accuracy of students on corrupted images, the same for all of them.

    Args:
        students: of the same classes and image size.
        split: the images that are corrupted.
        seed: of the corruptions' random draws.
        progress: where it is shown.

    Returns:
        For each student `top1` (mean over all kinds and severities), `clean` (the same images as they are), `images`
        (how many), and `kinds`: by kind the accuracy at severities 1 to 5.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks = [student.network.to(device=device, memory_format=torch.channels_last) for student in students]  # type: ignore[call-overload]
    pixels, ranks = _pixels(split), Ranks(0, 1, device)

    def shares(images: Pixels) -> list[float]:
        shown = dataclasses.replace(split, pixels=images, rows=np.arange(len(images)))
        return [
            measure_classes(network, shown, Normalization(one.mean, one.std), len(one.classes), ranks)[0].top1
            for network, one in zip(networks, students, strict=True)
        ]

    clean = shares(pixels)
    found: list[dict[str, list[float]]] = [{kind: [] for kind in KINDS} for _ in students]
    task = None if progress is None else progress.add_task("corruptions", total=len(KINDS) * len(SEVERITIES))
    for kind in KINDS:
        for severity in SEVERITIES:
            corrupted = shares(corrupt(pixels, kind, severity, index=split.index, seed=seed))
            for kinds, share in zip(found, corrupted, strict=True):
                kinds[kind].append(share)
            if progress is not None and task is not None:
                progress.advance(task)
    if progress is not None and task is not None:
        progress.remove_task(task)
    return [
        {
            "top1": fmean(share for each in kinds.values() for share in each),
            "clean": whole,
            "images": len(split),
            "kinds": kinds,
        }
        for kinds, whole in zip(found, clean, strict=True)
    ]


def _pixels(split: Split) -> Pixels:
    """Return the images as students see them, uint8 [N, H, W, 3]."""
    if split.pixels is not None:
        return np.array(split.pixels[split.rows])
    # Decoded in workers they come as floats in 0..1, from which the bytes are read back exactly.
    plain = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    batches = [sample.images for sample in EvalLoader(split, 64, plain)]
    return (torch.cat(batches) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def measure_runs(folders: Sequence[Path], images: int = 0, console: Console | None = None) -> None:
    """Measure the students of finished runs and keep what is found in `measured.json`; what is there stays.

    Args:
        folders: of the runs.
        images: test images to corrupt, those of all classes in their shares; 0 measures no corruptions.
        console: where progress is shown.

    Raises:
        AttarError: a run without a student, or fewer than no images.
    """
    if images < 0:
        raise AttarError(f"Robustness is measured on some test images, not on {images}.")
    for folder in folders:
        if "latency" not in measured(folder):
            student = load_student(folder)
            remember(folder, latency=measure_latency(student.network, student.image_size))
    if images:
        _measure_corrupted(folders, images, console)


def _measure_corrupted(folders: Sequence[Path], images: int, console: Console | None) -> None:
    groups: dict[str, list[Path]] = {}
    specs = {folder: TrainSpec.load(folder / "spec.json") for folder in folders}
    for folder, spec in specs.items():
        groups.setdefault(str([getattr(spec, name) for name in _SAME_IMAGES]), []).append(folder)
    for group in groups.values():
        split = first_images(build_source(specs[group[0]]).test, images)
        missing = [folder for folder in group if measured(folder).get("corruptions", {}).get("images") != len(split)]
        if missing and console is not None:
            console.print(f"Measuring {len(missing)} students on {len(split)} test images, corrupted in 55 ways ...")
        shown = console is not None and console.is_terminal and not console.quiet
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
            for start in range(0, len(missing), _TOGETHER):
                part = missing[start : start + _TOGETHER]
                found = measure_corruptions([load_student(folder) for folder in part], split, progress=progress)
                for folder, values in zip(part, found, strict=True):
                    remember(folder, corruptions=values)
