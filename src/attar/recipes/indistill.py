"""InDistill by the settings and the stored scores of its released code: retrieval on CIFAR-10."""

from __future__ import annotations

from attar.compare.protocol import label_of
from attar.recipes.recipe import Metric, Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = ["indistill_cnn_cifar10"]

PAPER = "InDistill (Sarridis et al., WACV 2025, arXiv 2205.10003)"
SCORES = "decoded from the score files of gsarridis/InDistill"


def _run(model: str, epochs: int, falls: float, *methods: MethodSpec) -> TrainSpec:
    return step_run(
        *methods,
        model=model,
        data="cifar10",
        epochs=epochs,
        optimizer="adamw",  # Adam, since there is no decay
        lr=1e-3,
        weight_decay=0.0,
        milestones=(falls / epochs,),
        select="last",  # as the authors do; and the hold-out's top-1 says nothing of students that learn no classifier
    )


def indistill_cnn_cifar10() -> Recipe:
    """A CNN of 16, 32 and 64 channels teaches one of 8, 16 and 32: InDistill, then PKT without labels."""
    pkt = MethodSpec(name="PKT", options={"weight": 1.0, "form": "combined", "task_weight": 0.0})
    row = (MethodSpec(name="InDistill"), pkt)
    figures: dict[str, tuple[float, float, str]] = {
        "teacher": (44.87, 38.54, SCORES),
        "plain": (39.05, 35.10, SCORES),
        label_of(row): (54.61, 50.47, f"{SCORES}, by a better teacher"),
    }
    metrics: tuple[Metric, ...] = ("mAP (cosine)", "mAP (euclidean)")
    return Recipe(
        "indistill_cnn_cifar10",
        "A CNN of 16, 32, 64 channels teaches one of 8, 16, 32 on CIFAR-10: plain, PKT and InDistill with PKT",
        PAPER,
        "the released experiment; the paper's tables were not read",
        _run("cifar_cnn_8_16_32", 70, 60, *row),
        tuple(
            Published(run, value, known, metric=metric)
            for run, (*values, known) in figures.items()
            for metric, value in zip(metrics, values, strict=True)
        ),
        beside=(_run("cifar_cnn_8_16_32", 80, 50), _run("cifar_cnn_8_16_32", 70, 60, pkt)),
        teacher=_run("cifar_cnn_16_32_64", 80, 50),
        notes=(
            "The released student's teacher was first distilled from a pre-activation ResNet-18 with PKT (66.78 % mAP "
            "by cosine, 62.12 by Euclidean distance) and teaches more than the plain one here: for the whole chain "
            "train cifar_resnet18, then cifar_cnn_16_32_64 by PKT from it, then the student.",
            "mAP is the released code's: eleven levels of recall, interpolated over batches of 128 queries.",
            "The released code makes a new Adam every epoch; here one goes on.",
            "2 % of the training images are held out and choose nothing: the last epoch counts, as for the authors.",
        ),
    )
