"""What is measured on finished students: how fast they answer, what corrupted images do to them, how masks look."""

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

from attar.compare.masks import MASKS, answer_masks, spread_positions
from attar.compare.primary import primary
from attar.compare.protocol import label_of
from attar.compare.records import measured, remember
from attar.data import EvalLoader, Normalization, Split
from attar.data.corruptions import KINDS, SEVERITIES, corrupt
from attar.data.images import Pixels
from attar.data.splits import part
from attar.errors import AttarError
from attar.spec import TrainSpec
from attar.train import build_source
from attar.train.distributed import Ranks
from attar.train.evaluate import make_task, measure
from attar.train.student import Student, load_student
from attar.train.timing_loop import processor, time_answers

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["decoded_split", "first_images", "measure_corruptions", "measure_latency", "measure_runs"]

_TOGETHER = 8  # students in memory at a time, for which each corrupted image is made once
# What decides which test images there are, and how large.
_SAME_IMAGES = ("task", "data", "image_size", "holdout", "split_seed", "skip_bad_images", "train_limit")
# After these a pixel no longer shows what its mask says.
_MOVING = ("zoom_blur", "elastic")
_SHOWN = 4  # test images whose masks the report shows


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
    """Measure the primary metric of students on corrupted images, the same for all of them.

    Masks stay as they are: in dense tasks the kinds of corruption that move pixels are left out.

    Args:
        students: of the same task, classes and image size.
        split: the images that are corrupted.
        seed: of the corruptions' random draws.
        progress: where it is shown.

    Returns:
        For each student `top1` or `miou` (mean over all kinds and severities), `clean` (the same images as they are),
        `images` (how many), and `kinds`: by kind the metric at severities 1 to 5.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks = [student.network.to(device=device, memory_format=torch.channels_last) for student in students]  # type: ignore[call-overload]
    whole, ranks = decoded_split(split), Ranks(0, 1, device)
    assert whole.pixels is not None

    def shares(images: Pixels) -> list[float]:
        shown = dataclasses.replace(whole, pixels=images)
        return [
            measure(
                network,
                shown,
                Normalization(one.mean, one.std),
                make_task(one.task, len(one.classes)),
                ranks=ranks,
            )[0].score
            for network, one in zip(networks, students, strict=True)
        ]

    clean, kinds = shares(whole.pixels), _kinds(students[0].task)
    found: list[dict[str, list[float]]] = [{kind: [] for kind in kinds} for _ in students]
    task = None if progress is None else progress.add_task("corruptions", total=len(kinds) * len(SEVERITIES))
    for kind in kinds:
        for severity in SEVERITIES:
            corrupted = shares(corrupt(whole.pixels, kind, severity, index=split.index, seed=seed))
            for by_kind, share in zip(found, corrupted, strict=True):
                by_kind[kind].append(share)
            if progress is not None and task is not None:
                progress.advance(task)
    if progress is not None and task is not None:
        progress.remove_task(task)
    return [
        {
            primary(student.task).key: fmean(share for each in by_kind.values() for share in each),
            "clean": uncorrupted,
            "images": len(split),
            "kinds": by_kind,
        }
        for student, by_kind, uncorrupted in zip(students, found, clean, strict=True)
    ]


def _kinds(task: str) -> tuple[str, ...]:
    return tuple(kind for kind in KINDS if not primary(task).dense or kind not in _MOVING)


def decoded_split(split: Split) -> Split:
    """Return the split with its images as students see them, uint8 [N, H, W, 3], in its order, and its masks."""
    rows = np.arange(len(split))
    if split.pixels is not None:
        masks = None if split.masks is None else np.array(split.masks[split.rows])
        return dataclasses.replace(split, pixels=np.array(split.pixels[split.rows]), masks=masks, rows=rows)
    # Decoded in workers they come as floats in 0..1, from which the bytes are read back exactly.
    plain = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    images, targets = [], []
    for sample in EvalLoader(split, 64, plain):
        images.append((sample.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
        targets.append(sample.targets)
    masks = None if split.coding is None else torch.cat(targets).to(torch.uint8).numpy()
    return dataclasses.replace(split, pixels=torch.cat(images).contiguous().numpy(), masks=masks, rows=rows)


def measure_runs(folders: Sequence[Path], images: int = 0, console: Console | None = None) -> None:
    """Measure the students of finished runs and keep what is found in `measured.json`; what is there stays.

    Of segmentation the answers of the first seed of every entry for a few test images are kept in `masks.npz` too.

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
    _keep_masks(folders)
    if images:
        _measure_corrupted(folders, images, console)


def _keep_masks(folders: Sequence[Path]) -> None:
    firsts: dict[str, tuple[int, Path]] = {}
    for folder in folders:
        spec = TrainSpec.load(folder / "spec.json")
        if primary(spec.task).dense:
            label = label_of(spec.methods)
            firsts[label] = min(firsts.get(label, (spec.seed, folder)), (spec.seed, folder))
    missing = [folder for _, folder in firsts.values() if not (folder / MASKS).is_file()]
    for spec, group in _by_images(missing):
        test = build_source(spec).test
        positions = spread_positions(len(test), _SHOWN)
        shown = decoded_split(part(test, "test", positions))
        for folder in group:
            answer_masks(load_student(folder), shown, positions).save(folder / MASKS)


def _by_images(folders: Sequence[Path]) -> list[tuple[TrainSpec, list[Path]]]:
    """Return the runs by the test images that they have, with the spec of one of them."""
    groups: dict[str, tuple[TrainSpec, list[Path]]] = {}
    for folder in folders:
        spec = TrainSpec.load(folder / "spec.json")
        groups.setdefault(str([getattr(spec, name) for name in _SAME_IMAGES]), (spec, []))[1].append(folder)
    return list(groups.values())


def _measure_corrupted(folders: Sequence[Path], images: int, console: Console | None) -> None:
    for spec, group in _by_images(folders):
        split = first_images(build_source(spec).test, images)
        missing = [folder for folder in group if measured(folder).get("corruptions", {}).get("images") != len(split)]
        if missing and console is not None:
            ways = len(_kinds(spec.task)) * len(SEVERITIES)
            console.print(
                f"Measuring {len(missing)} students on {len(split)} test images, corrupted in {ways} ways ..."
            )
        shown = console is not None and console.is_terminal and not console.quiet
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
            for start in range(0, len(missing), _TOGETHER):
                together = missing[start : start + _TOGETHER]
                found = measure_corruptions([load_student(folder) for folder in together], split, progress=progress)
                for folder, values in zip(together, found, strict=True):
                    remember(folder, corruptions=values)
