"""How wide activations are where methods read them: what decides how much an 8-bit grid can tell apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from attar.anatomy import Anatomy, Recorder, overwritten, survey
from attar.data import Normalization
from attar.deploy.running import load_images, some_of
from attar.errors import AttarError
from attar.spec import TrainSpec
from attar.tasks import Task
from attar.train import build_source, load_student
from attar.train.evaluate import make_task

__all__ = ["Range", "activation_ranges", "ranges_of_run", "ranges_text"]

_TAIL = 1e-3  # share of the magnitudes that counts as outliers
_BATCH = 64 * 224**2  # pixels
_IMAGES, _DENSE_IMAGES = 256, 32


@dataclass(frozen=True)
class Range:
    """The activations x of one tap over some images.

    Definition: with m_c the largest |x| of channel c and q the magnitude that 0.1 % of all |x| reach:
        outliers = max |x| / q
        channel_spread = max_c m_c / median_c m_c
        step = (max(x, 0) - min(x, 0)) / 255 / std(x)

    Attributes:
        tap: name of the stage, `embedding` or `logits`.
        low: least x.
        high: largest x.
        std: standard deviation of all x.
        outliers: how far the largest magnitude stands out, at least 1; an int8 grid must reach it.
        channel_spread: how unlike the channels are, at least 1 (infinite where more than half of them are silent);
            activations share one grid.
        step: between two levels of the 8-bit grid that holds all x, in standard deviations: what quantisation loses.
    """

    tap: str
    low: float
    high: float
    std: float
    outliers: float
    channel_spread: float
    step: float

    def as_dict(self) -> dict[str, Any]:
        """Return the values by name; None for what is infinite, which JSON does not have."""
        values = dataclasses.asdict(self)
        return {key: None if value == math.inf else value for key, value in values.items()}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Range:
        """Read what `as_dict` wrote."""
        read: dict[str, Any] = {key: math.inf if value is None else value for key, value in values.items()}
        return cls(**read)


def activation_ranges(
    network: nn.Module, images: Tensor, anatomy: Anatomy | None = None, task: Task | None = None
) -> list[Range]:
    """Measure the activations of a network at every stage, at its embedding and at its logits, in evaluation mode.

    Args:
        network: images [N, C, H, W] -> whatever `task` finds logits in; its modes are restored.
        images: training images, normalised; where the network is.
        anatomy: of the network; default: as `attar.anatomy.survey` finds it.
        task: what the network is for; default: classification, for which it returns logits [N, K].

    Returns:
        One range per tap, shallow to deep.

    Raises:
        AttarError: no image, or no stage could be found.
    """
    if len(images) == 0:
        raise AttarError("Activation ranges are measured on at least 1 image: give some.")
    modes = {module: module.training for module in network.modules()}
    network.eval()
    anatomy = anatomy or survey(network, images[:1], dense=task is not None and task.dense)[0]
    taps = {stage.name: stage.tap for stage in anatomy.stages}
    if anatomy.embedding is not None:
        taps["embedding"] = anatomy.embedding
    touched, _ = overwritten(network, taps.values(), images[:1])
    recorder = Recorder(network, taps.values(), touched)
    seen = {name: _Seen(len(images)) for name in (*taps, "logits")}
    try:
        with torch.no_grad():
            for part in torch.split(images, max(1, _BATCH // (images.shape[2] * images.shape[3]))):
                output, values = recorder.run(part)
                for name, tap in taps.items():
                    seen[name].add(values[tap])
                seen["logits"].add(output if task is None else task.logits(output))
    finally:
        recorder.remove()
        for module, mode in modes.items():
            module.training = mode
    return [each.range(name) for name, each in seen.items()]


class _Seen:
    """Running statistics of one tap over N images; of the magnitudes only the largest are kept."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.count = 0
        self.sums = torch.zeros(2, dtype=torch.float64)
        self.low, self.high = math.inf, -math.inf
        self.channels = torch.zeros(0)
        self.largest = torch.zeros(0)

    def add(self, values: Tensor) -> None:
        """Take in activations [n, C, ...]."""
        values = values.float()
        self.count += values.numel()
        exact = values.double()
        self.sums += torch.stack([exact.sum(), exact.square().sum()]).cpu()
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        magnitudes = values.abs()
        channels = magnitudes.transpose(0, 1).flatten(1).amax(1).cpu()
        self.channels = torch.maximum(self.channels, channels) if len(self.channels) else channels
        kept = math.ceil(_TAIL * values[0].numel() * self.images)
        joined = torch.cat([self.largest, magnitudes.flatten().cpu()])
        self.largest = joined.topk(min(kept, len(joined))).values

    def range(self, tap: str) -> Range:
        mean, square = (self.sums / self.count).tolist()
        std = math.sqrt(max(square - mean**2, 0.0))
        width = max(self.high, 0.0) - min(self.low, 0.0)
        return Range(
            tap,
            self.low,
            self.high,
            std,
            _ratio(float(self.largest[0]), float(self.largest[-1])),
            _ratio(float(self.channels.max()), float(self.channels.median())),
            _ratio(width / 255, std, same=0.0),
        )


def _ratio(value: float, base: float, same: float = 1.0) -> float:
    """Divide; what is silent altogether is `same`."""
    if base == 0.0:
        return same if value == 0.0 else math.inf
    return value / base


def ranges_of_run(folder: str | Path, images: int | None = None) -> list[Range]:
    """Measure the student of a finished run on evenly spaced images it was trained on.

    Args:
        folder: the run's.
        images: how many; default: 256, or 32 where there is an answer for every pixel.

    Raises:
        AttarError: a folder that holds no finished run, or its data are missing.
    """
    folder = Path(folder)
    student, spec = load_student(folder), TrainSpec.load(folder / "spec.json")
    task = make_task(student.task, len(student.classes))
    if images is None:
        images = _DENSE_IMAGES if task.dense else _IMAGES
    chosen = some_of(build_source(spec).train, images)
    shown = torch.from_numpy(load_images(chosen, Normalization(student.mean, student.std)))
    anatomy = survey(student.network, shown[:1], spec.stages, len(student.classes), dense=task.dense)[0]
    return activation_ranges(student.network, shown, anatomy, task)


def ranges_text(measured: Mapping[str, Sequence[Sequence[Range]]], baseline: str = "plain") -> str:
    """Write how the ranges of entries compare, as a Markdown table: means over runs, and how they relate to plain's.

    Args:
        measured: by entry, the ranges of each of its runs, of one architecture.
        baseline: the entry that the others are divided by.

    Raises:
        AttarError: the baseline is missing, or taps differ.
    """
    if baseline not in measured:
        raise AttarError(f"Ranges are compared with those of '{baseline}', which is not among them: measure it too.")
    taps = [each.tap for each in measured[baseline][0]]
    if any([each.tap for each in run] != taps for runs in measured.values() for run in runs):
        raise AttarError("Only students of one architecture have ranges that can be compared: give runs of one model.")
    lines = ["| tap | entry | std | largest | outliers | channel spread | step |", "|---|---|--:|--:|--:|--:|--:|"]
    for place, tap in enumerate(taps):
        plain = _means(measured[baseline], place)
        for label, runs in measured.items():
            found = _means(runs, place)
            cells = [
                f"{found[key]:.3g}" + ("" if label == baseline else f" (× {_ratio(found[key], plain[key]):.2f})")
                for key in ("std", "largest", "outliers", "channel_spread", "step")
            ]
            lines.append(f"| {' | '.join([tap, label.replace('|', chr(92) + '|'), *cells])} |")
    return "\n".join(lines) + "\n"


def _means(runs: Sequence[Sequence[Range]], place: int) -> dict[str, float]:
    found: list[dict[str, Any]] = []
    for run in runs:
        each = run[place]
        found.append({**dataclasses.asdict(each), "largest": max(abs(each.low), abs(each.high))})
    return {key: fmean(one[key] for one in found) for key in found[0] if key != "tap"}
