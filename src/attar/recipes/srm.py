"""SRM on ImageNet by the settings of its released code."""

from __future__ import annotations

from attar.compare.protocol import label_of
from attar.recipes.recipe import IMAGENET, Published, Recipe, step_run
from attar.spec import MethodSpec, TrainSpec

__all__ = ["srm_resnet34_resnet18_imagenet"]

PAPER = "SRM (Tran, Gabbouj, Iosifidis, 2021, arXiv 2103.17012)"
_STAGES = (35, 80, 100)
_EPOCHS = sum(_STAGES)


def _run(model: str, epochs: int, *methods: MethodSpec) -> TrainSpec:
    return step_run(
        *methods,
        model=model,
        data=IMAGENET,
        image_size=224,
        holdout=0.01,
        epochs=epochs,
        batch=1280,
        weight_decay=1e-4,
        milestones=(0.5, 0.8, 0.9),
    )


def srm_resnet34_resnet18_imagenet() -> Recipe:
    """ResNet-34 teaches ResNet-18."""
    dictionary, initialisation, _ = (stage / _EPOCHS for stage in _STAGES)
    options = {"codewords": 4.0, "alpha": 0.3, "dictionary": dictionary, "initialisation": initialisation}
    method = MethodSpec(name="SRM", options=options)
    return Recipe(
        "srm_resnet34_resnet18_imagenet",
        "ResNet-34 teaches ResNet-18 on ImageNet: plain and SRM",
        PAPER,
        "the figure of the released code's README; the paper's tables were not read",
        _run("resnet18", _EPOCHS, method),
        (
            Published("plain", 69.8, "about that, of torchvision's weights", metric="top-1 accuracy"),
            Published(label_of([method]), 71.21, "README of viebboy/SRM", metric="top-1 accuracy"),
        ),
        beside=(_run("resnet18", _STAGES[2]),),
        teacher=_run("resnet34", _STAGES[2]),
        notes=(
            "35 epochs for the dictionaries, 80 for the initialisation, 100 of KD, as released; there each stage has "
            "an optimiser and batch of its own (Adam from 1e-3 for the dictionaries), and the rate of the "
            "initialisation falls after every 20 epochs; here SGD from 0.1 falls after 0.5, 0.8 and 0.9 of each stage.",
            "The released teacher is torchvision's; here it is trained with the last stage's settings, as is the plain "
            "student.",
            "The released augmentation crops at random sizes, with colour jitter and PCA noise; here crop-flip.",
            "The first released dictionary is learned before the first max-pooling and used behind it; here stages are "
            "tapped at their ends in both.",
        ),
    )
