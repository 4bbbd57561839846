"""Codistillation's ImageNet pair (Anil et al., ICLR 2018, arXiv 1804.03235), all of it from memory.

Left out: the language model and the click prediction, which are no images, and the runs of the third-party code, whose
accuracies are not known.
"""

from __future__ import annotations

from attar.compare.protocol import label_of
from attar.recipes.recipe import FROM_MEMORY, IMAGENET, Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = ["codistillation_resnet50_imagenet"]

_STEPS, _BURN_IN = 7250, 3000


def codistillation_resnet50_imagenet() -> Recipe:
    """Two ResNet-50 with batches of 16384."""

    def run(*methods: MethodSpec) -> TrainSpec:
        return step_run(
            *methods,
            model="resnet50",
            data=IMAGENET,
            image_size=224,
            holdout=0.01,
            epochs=93,
            batch=16384,
            lr=6.4,
            weight_decay=1e-4,
            milestones=(1 / 3, 2 / 3, 8 / 9),
            warmup=5 / 93,
        )

    method = MethodSpec(name="Codistillation", options={"burn_in": round(_BURN_IN / _STEPS, 3)})
    return Recipe(
        "codistillation_resnet50_imagenet",
        "Two ResNet-50 on ImageNet: plain and Codistillation",
        "Codistillation (Anil, Pereyra, Passos, Ormandi, Dahl, Hinton, ICLR 2018, arXiv 1804.03235)",
        "ImageNet figure",
        run(method),
        (
            Published("plain", 75.0, FROM_MEMORY, metric="top-1 accuracy"),
            Published(label_of([method]), 75.6, FROM_MEMORY, metric="top-1 accuracy"),
        ),
        beside=(run(),),
        notes=(
            f"Both after {_STEPS} steps; codistillation is said to reach 75.0 % after 5250. Rate, decay and schedule "
            "are unknown: here those usual for such batches.",
            "The paper's replicas are trained by groups of machines on different images; here both see the same batch. "
            "For one replica in each of two processes set replicas to 'ranks' and double the batch.",
            "1 % of the training images choose the epoch, by the student's accuracy, and the test set is read once.",
        ),
    )
