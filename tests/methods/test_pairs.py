"""Every method with a frozen teacher, under contract over pairs of student and teacher that have little in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import timm
import torch
from torch import nn

import attar
import attar.zoo
from attar.errors import AttarError
from attar.method import Method
from attar.methods import AT, KD, MEAL, PKT, SPKD, SRM, FitNet, InDistill, InformationFlow, Moonshine
from attar.teacher import Normalization, Teacher
from attar.testing import MethodContract


def resnet(classes: int, width: float = 0.25) -> nn.Module:
    return timm.create_model("cifar_resnet20", num_classes=classes, width=width)


def vit(classes: int) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **sizes)


@dataclass(frozen=True)
class Pair:
    student: Callable[[int], nn.Module]
    teacher: Callable[[int], nn.Module | Teacher]


PAIRS = {
    "same_family": Pair(resnet, lambda classes: resnet(classes, 0.5)),
    "cnn_from_vit": Pair(resnet, vit),
    "vit_from_cnn": Pair(vit, lambda classes: resnet(classes, 0.5)),
    "other_input_size": Pair(
        resnet,
        lambda classes: Teacher(resnet(classes, 0.5), Normalization((0.1,) * 3, (0.3,) * 3), image_size=48),
    ),
    "wider_student": Pair(lambda classes: resnet(classes, 0.5), resnet),
}

METHODS: dict[str, Callable[[nn.Module | Teacher], Method]] = {
    "AT": AT,
    "FitNet": lambda teacher: FitNet(teacher, regressor="pointwise"),
    "InDistill": InDistill,
    "InformationFlow": InformationFlow,
    "KD": KD,
    "MEAL": lambda teacher: MEAL(teacher, out_dims=(64, 32, 16, 8)),
    "Moonshine": Moonshine,
    "PKT": PKT,
    "SPKD": SPKD,
    "SRM": SRM,
}

# Where a pair is refused, and the sentence that says why.
REFUSED: dict[tuple[str, str], str] = {
    ("InDistill", "cnn_from_vit"): "finds no convolution inside the teacher's",
    ("InDistill", "vit_from_cnn"): "to select from: let wider be 'adapt'",
    ("InDistill", "wider_student"): "to select from: let wider be 'adapt'",
}


def contract(make: Callable[[nn.Module | Teacher], Method], pair: Pair) -> type[MethodContract]:
    class Contract(MethodContract):
        test_compiled_step_equals_eager = None  # on the common networks, in test_contract.py

        def method(self) -> Method:
            return make(pair.teacher(self.num_classes))

        def student(self) -> nn.Module:
            return pair.student(self.num_classes)

    return Contract


def refusal(make: Callable[[nn.Module | Teacher], Method], pair: Pair, sentence: str) -> type:
    class Refusal:
        def test_it_says_why(self) -> None:
            torch.manual_seed(0)
            normalization = Normalization((0.0,) * 3, (1.0,) * 3)
            methods = [make(pair.teacher(5))]
            distiller = attar.Distiller(pair.student(5), methods, attar.Classification(5), normalization=normalization)
            with pytest.raises(AttarError, match=sentence):
                distiller.build(torch.randn(2, 3, 32, 32))

    return Refusal


for _name, _make in METHODS.items():
    for _kind, _pair in PAIRS.items():
        if (_name, _kind) in REFUSED:
            _class = refusal(_make, _pair, REFUSED[_name, _kind])
        else:
            _class = contract(_make, _pair)
            if _kind != "cnn_from_vit":
                _class = pytest.mark.slow(_class)
        _class.__name__ = _class.__qualname__ = f"Test{_name}_{_kind}"
        globals()[_class.__name__] = _class
del _class


def test_every_method_with_teachers_is_here() -> None:
    from attar.methods import available
    from attar.spec import teacher_options

    # TfKD's teacher is an earlier training of the student itself; Blockwise's is the student before it shrinks.
    others = {"Blockwise", "TfKD"}
    assert {name for name, kind in available().items() if teacher_options(kind)} - others == set(METHODS)
