"""Measuring a network on one split: accuracy, likelihood, calibration; and a run's student, also by retrieval."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.data import EvalLoader, Normalization, Source, Split, open_source
from attar.errors import AttarError, unknown_name
from attar.spec import TrainSpec
from attar.tasks import Classification, Segmentation, Task
from attar.train.distributed import Ranks, join
from attar.train.predictions import Predictions
from attar.train.retrieval import Retrieval, measure_retrieval
from attar.train.segmentation import PixelPredictions, SegmentationMetrics, measure_pixels
from attar.train.student import Student, load_student

__all__ = [
    "EVAL_BATCH",
    "Metrics",
    "evaluate",
    "evaluate_run",
    "make_task",
    "measure",
    "measure_classes",
    "retrieve_run",
]

# One size for every evaluation, whatever the training's: the same batches give the same numbers to the last bit.
EVAL_BATCH = 250
_BINS = 15


@dataclass(frozen=True)
class Metrics:
    """What a network does on N images.

    Attributes:
        images: N.
        top1: share of images whose highest logit is the label's.
        top5: share whose label is among the five highest; None for five classes or fewer.
        nll: mean of -log p(label), in nats.
        calibration_error: expected difference of confidence and accuracy over 15 equal bins of confidence (Guo et al.,
            ICML 2017), in 0..1.
    """

    primary: ClassVar[str] = "top1"

    images: int
    top1: float
    top5: float | None
    nll: float
    calibration_error: float

    @property
    def score(self) -> float:
        """What a hold-out chooses by."""
        return self.top1

    def as_dict(self) -> dict[str, Any]:
        """Return the metrics by name."""
        return dataclasses.asdict(self)


def evaluate(
    network: nn.Module,
    split: Split,
    normalization: Normalization,
    task: Task,
    *,
    ranks: Ranks | None = None,
) -> Metrics | SegmentationMetrics:
    """Measure a network in evaluation mode, in float32, every image of the split exactly once.

    With several processes all take part and all get the same numbers: counts are summed, nothing is padded. The
    batches do not depend on how many processes share them.

    Args:
        network: images [N, C, H, W] -> what the task asks for; its modes are restored.
        split: images and labels, or masks.
        normalization: of the network's images.
        task: what the answers mean.
        ranks: the processes that share the work; default: this one alone, on the network's device.
    """
    return measure(network, split, normalization, task, ranks=ranks)[0]


def measure(
    network: nn.Module,
    split: Split,
    normalization: Normalization,
    task: Task,
    *,
    ranks: Ranks | None = None,
) -> tuple[Metrics, Predictions] | tuple[SegmentationMetrics, PixelPredictions]:
    """As `evaluate`, with the answer for every single image beside the metrics."""
    ranks = ranks or Ranks(0, 1, next(network.parameters()).device)
    if task.dense:
        return measure_pixels(network, split, normalization, task, ranks)
    return measure_classes(network, split, normalization, task.num_classes, ranks)


def measure_classes(
    network: nn.Module, split: Split, normalization: Normalization, num_classes: int, ranks: Ranks
) -> tuple[Metrics, Predictions]:
    """Measure a classifier, as `measure` does."""
    from torchmetrics import MeanMetric, MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

    settings: dict[str, Any] = {"num_classes": num_classes, "validate_args": False}
    shares: dict[str, Any] = {"top1": MulticlassAccuracy(average="micro", **settings)}
    if num_classes > 5:
        shares["top5"] = MulticlassAccuracy(average="micro", top_k=5, **settings)
    shares["calibration_error"] = MulticlassCalibrationError(n_bins=_BINS, **settings)
    metrics = MetricCollection(shares, compute_groups=False).to(ranks.device)
    nll = MeanMetric(nan_strategy="disable").set_dtype(torch.float64).to(ranks.device)

    predicted = torch.zeros(len(split), dtype=torch.int64, device=ranks.device)
    confidence, losses = (torch.zeros(len(split), device=ranks.device) for _ in range(2))
    loader = EvalLoader(split, EVAL_BATCH, normalization, ranks.device)
    loader.batches = loader.batches[ranks.rank :: ranks.world]
    modes = {module: module.training for module in network.modules()}
    network.eval()
    # Autotuned kernels may differ from run to run.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for (images, targets, _), positions in zip(loader, loader.batches, strict=True):
            logits = network(images).float()
            probabilities = torch.softmax(logits, dim=1)
            metrics.update(probabilities, targets)
            loss = F.cross_entropy(logits, targets, reduction="none")
            nll.update(loss)
            part = slice(int(positions[0]), int(positions[-1]) + 1)
            confidence[part], predicted[part] = probabilities.max(dim=1)
            losses[part] = loss
    for module, mode in modes.items():
        module.training = mode
    with warnings.catch_warnings():
        # With fewer batches than processes some have seen nothing, which is no mistake here.
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        values: dict[str, Tensor] = {**metrics.compute(), "nll": nll.compute()}
    answers = Predictions(
        split.targets,
        # Every image is one process's, and zero in all others.
        *(ranks.sum(values).cpu().numpy() for values in (predicted, confidence, losses)),
    )
    found = Metrics(
        images=len(split),
        top1=_share(values["top1"], len(split)),
        top5=_share(values["top5"], len(split)) if "top5" in values else None,
        nll=float(values["nll"]),
        calibration_error=float(values["calibration_error"]),
    )
    return found, answers


def _share(value: Tensor, images: int) -> float:
    """Return the exact share: the metric is a count over `images`, rounded to float32."""
    return round(float(value) * images) / images


def evaluate_run(folder: str | Path, *, data: str | None = None, split: str = "test") -> Metrics | SegmentationMetrics:
    """Measure the student of a run folder: exactly the numbers of its `result.json` for the run's own data.

    Args:
        folder: a finished run, or a `student/` folder (which needs `data`).
        data: other images with the same classes; default: the run's.
        split: `test`, `holdout` or `train`.

    Raises:
        AttarError: no student there, no such split, or images of other classes.
    """
    with _opened(folder, data, split) as (student, source, ranks):
        return evaluate(
            student.network,
            source.splits[split],
            Normalization(student.mean, student.std),
            make_task(student.task, source.num_classes),
            ranks=ranks,
        )


def retrieve_run(
    folder: str | Path,
    *,
    data: str | None = None,
    split: str = "test",
    progress: Callable[[float], None] | None = None,
) -> dict[str, Retrieval]:
    """Measure by retrieval the student of a run folder: a split's images search the training images.

    Args:
        folder: as of `evaluate_run`.
        data: other images with the same classes, both to ask and to search; default: the run's.
        split: where the queries come from, `test` or `holdout`.
        progress: told the share of the work that is done, in 0..1.

    Returns:
        What `measure_retrieval` says, by distance.

    Raises:
        AttarError: as `evaluate_run` and `measure_retrieval`.
    """
    with _opened(folder, data, split) as (student, source, ranks):
        if student.task != "classification":
            raise AttarError(
                f"'{folder}' holds a network for {student.task}, whose images have no single class to be found by: "
                "leave retrieval out."
            )
        return measure_retrieval(
            student.network,
            source,
            Normalization(student.mean, student.std),
            split=split,
            ranks=ranks,
            progress=progress,
        )


def make_task(name: str, num_classes: int, **options: Any) -> Task:
    """Return the task of that name (`TrainSpec.task`); `options` are its further arguments."""
    kinds: dict[str, type[Task]] = {kind.name: kind for kind in (Classification, Segmentation)}
    return kinds[name](num_classes, **options)  # type: ignore[call-arg]


@contextmanager
def _opened(folder: str | Path, data: str | None, split: str) -> Iterator[tuple[Student, Source, Ranks]]:
    """Load a student on the device and open the images it is to be measured on."""
    folder = Path(folder)
    student = load_student(folder)
    home = folder if (folder / "spec.json").is_file() else folder.parent
    spec = TrainSpec.load(home / "spec.json") if (home / "spec.json").is_file() else None
    if data is None and spec is None:
        raise AttarError(f"'{folder}' does not tell its data: give the run's folder, or name the data.")
    settings = {} if spec is None else spec.on(data).opening()
    with join() as ranks:
        source = ranks.first_then_others(
            lambda: open_source(
                data or spec.data,  # type: ignore[union-attr]
                image_size=student.image_size,
                task=student.task,
                **settings,
            )
        )
        if split not in source.splits:
            raise unknown_name("split", split, source.splits)
        if source.classes != student.classes:
            raise AttarError(
                f"'{source.name}' has other classes, or in another order, than those the student was trained on "
                f"({len(source.classes)} against {len(student.classes)}): give images of the same classes."
            )
        student.network.to(device=ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        yield student, source, ranks
