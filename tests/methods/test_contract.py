"""The contract suite over methods and architectures: the common networks by default, all of them with `-m slow`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import attar
from architectures import ARCHITECTURES, Architecture, HandWritten
from attar.errors import AttarError
from attar.method import Method
from attar.methods import (
    AT,
    BAKE,
    BYOT,
    CSKD,
    DDGSD,
    DLB,
    DML,
    FRSKD,
    KD,
    KDCL,
    MEAL,
    ONE,
    OSAKD,
    OSKD,
    PCL,
    PKT,
    PSKD,
    SAD,
    SCD,
    SLA,
    SPKD,
    SRM,
    Blockwise,
    Codistillation,
    FitNet,
    InDistill,
    InformationFlow,
    Moonshine,
    OKDDip,
    OnlineEnsemble,
    Supervised,
    TfKD,
)
from attar.testing import MethodContract


def small_teacher(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


# One line per method: every method of attar stands here (see the last test).
METHODS: dict[str, Callable[[int], Method]] = {
    "AT": lambda classes: AT(HandWritten(classes)),
    "BAKE": lambda classes: BAKE(),
    "BYOT": lambda classes: BYOT(),
    # Half of the multiply-adds is less than the hand-written network has where batch norms decide.
    "Blockwise": lambda classes: Blockwise(small_teacher(classes), budget=0.8),
    "CSKD": lambda classes: CSKD(),
    "Codistillation": lambda classes: Codistillation(),
    "DDGSD": lambda classes: DDGSD(),
    "DLB": lambda classes: DLB(),
    "DML": lambda classes: DML(),
    "FRSKD": lambda classes: FRSKD(),
    "FitNet": lambda classes: FitNet(small_teacher(classes), regressor="pointwise"),
    "InDistill": lambda classes: InDistill(HandWritten(classes), wider="adapt"),
    "InformationFlow": lambda classes: InformationFlow(HandWritten(classes)),
    "KD": lambda classes: KD(small_teacher(classes)),
    "KDCL": lambda classes: KDCL(),
    "MEAL": lambda classes: MEAL(small_teacher(classes)),
    "Moonshine": lambda classes: Moonshine(small_teacher(classes)),
    "OKDDip": lambda classes: OKDDip(branches=3),
    "ONE": lambda classes: ONE(branches=2),
    "OnlineEnsemble": lambda classes: OnlineEnsemble(students=2),
    "OSAKD": lambda classes: OSAKD(k=2),
    "OSKD": lambda classes: OSKD(),
    "PCL": lambda classes: PCL(branches=2),
    "PKT": lambda classes: PKT(HandWritten(classes)),
    "PSKD": lambda classes: PSKD(),
    "SAD": lambda classes: SAD(),
    "SCD": lambda classes: SCD(),
    "SLA": lambda classes: SLA(),
    "SPKD": lambda classes: SPKD(),
    "SRM": lambda classes: SRM(HandWritten(classes)),
    "Supervised": lambda classes: Supervised(label_smoothing=0.1),
    "TfKD": lambda classes: TfKD(),
}


# Where a method does not apply, and why it says so; everywhere else it must work.
_NO_MAP = "behind a layer norm over channels every position has the same energy"
_NO_NORM, _GROUPED = "has no batch norm", "groups without being depth-wise"
_ATTENTION, _NARROW = "contains attention", "since its channels cannot be followed or it does not run with fewer"
REFUSED: dict[tuple[str, str], str] = {
    ("AT", "pvt_v2_b0"): _NO_MAP,
    ("Blockwise", "seresnext26t_32x4d"): _GROUPED,
    ("Blockwise", "regnety_002"): _GROUPED,
    ("Blockwise", "convnext_atto"): _NO_NORM,
    ("Blockwise", "convnextv2_atto"): _NO_NORM,
    ("Blockwise", "fastvit_t8"): _GROUPED,
    ("Blockwise", "edgenext_xx_small"): _NO_NORM,
    ("Blockwise", "vit_tiny_patch16_224"): _NO_NORM,
    ("Blockwise", "deit_tiny_patch16_224"): _NO_NORM,
    ("Blockwise", "swin_tiny_patch4_window7_224"): _NO_NORM,
    ("Blockwise", "efficientvit_b0"): _GROUPED,
    ("Blockwise", "poolformer_s12"): _NO_NORM,
    ("Blockwise", "coat_lite_tiny"): _NO_NORM,
    ("Blockwise", "pvt_v2_b0"): _NO_NORM,
    ("Blockwise", "mambaout_femto"): _NO_NORM,
    ("Blockwise", "nfnet_l0"): _NO_NORM,
    ("Blockwise", "torchvision:squeezenet1_1"): _NO_NORM,
    ("Blockwise", "torchvision:convnext_tiny"): _NO_NORM,
    ("Blockwise", "torchvision:swin_t"): _NO_NORM,
    ("Blockwise", "torchvision:vit"): _NO_NORM,
    ("Blockwise", "inception_next_atto"): "No channels of MetaNeXt can be taken away",
    ("Blockwise", "tiny_vit_5m_224"): "No channels of TinyVit can be taken away",
    ("Blockwise", "levit_128s"): "No channels of LevitDistilled can be taken away",
    ("Blockwise", "torchvision:shufflenet_v2_x0_5"): "cannot follow the channels of ShuffleNetV2",
    ("Blockwise", "xcit_nano_12_p16_224"): "A budget of 0.80 of the macs cannot be met",
    ("Moonshine", "pvt_v2_b0"): "no attention map in '.*' of the student",
    ("Moonshine", "torchvision:convnext_tiny"): "no attention map in '.*' of the student",
    ("OnlineEnsemble", "ghostnet_050"): _NARROW,
    ("OnlineEnsemble", "fastvit_t8"): "cannot make 'stages.1' of FastVit behind 'stages.0' narrower",
    ("OnlineEnsemble", "edgenext_xx_small"): _ATTENTION,
    ("OnlineEnsemble", "mobilevit_xxs"): _ATTENTION,
    ("OnlineEnsemble", "mobilevitv2_050"): _ATTENTION,
    ("OnlineEnsemble", "vit_tiny_patch16_224"): _ATTENTION,
    ("OnlineEnsemble", "deit_tiny_patch16_224"): _ATTENTION,
    ("OnlineEnsemble", "swin_tiny_patch4_window7_224"): _ATTENTION,
    ("OnlineEnsemble", "levit_128s"): _ATTENTION,
    ("OnlineEnsemble", "efficientformerv2_s0"): _ATTENTION,
    ("OnlineEnsemble", "efficientvit_b0"): _ATTENTION,
    ("OnlineEnsemble", "hrnet_w18_small"): "is not made of tensors alone",
    ("OnlineEnsemble", "poolformer_s12"): _NARROW,
    ("OnlineEnsemble", "xcit_nano_12_p16_224"): "is not made of tensors alone",
    ("OnlineEnsemble", "coat_lite_tiny"): _ATTENTION,
    ("OnlineEnsemble", "pvt_v2_b0"): _ATTENTION,
    ("OnlineEnsemble", "mambaout_femto"): _NARROW,
    ("OnlineEnsemble", "cspresnet50"): _NARROW,
    ("OnlineEnsemble", "nfnet_l0"): _NARROW,
    ("OnlineEnsemble", "inception_next_atto"): _NARROW,
    ("OnlineEnsemble", "res2net50_26w_4s"): _NARROW,
    ("OnlineEnsemble", "tiny_vit_5m_224"): _ATTENTION,
    ("OnlineEnsemble", "torchvision:shufflenet_v2_x0_5"): _NARROW,
    ("OnlineEnsemble", "torchvision:swin_t"): _ATTENTION,
    ("OnlineEnsemble", "torchvision:vit"): _ATTENTION,
    ("SAD", "pvt_v2_b0"): _NO_MAP,
    ("SAD", "torchvision:convnext_tiny"): _NO_MAP,
    ("SCD", "pvt_v2_b0"): _NO_MAP,
    ("SCD", "torchvision:convnext_tiny"): _NO_MAP,
}


def refusal(name: str, make_method: Callable[[int], Method], architecture: Architecture) -> type:
    class Refusal:
        def test_it_says_why(self) -> None:
            torch.manual_seed(0)
            distiller = attar.Distiller(architecture.make(5), [make_method(5)], attar.Classification(5))
            with pytest.raises(AttarError, match=REFUSED[name, architecture.name]):
                distiller.build(torch.randn(2, 3, architecture.size, architecture.size))

    Refusal.__name__ = Refusal.__qualname__ = f"Test{name}On_{architecture.name}"
    return pytest.mark.slow(Refusal)


def contract(
    name: str, make_method: Callable[[int], Method], architecture: Architecture, default: bool, compiled: bool
) -> type[MethodContract]:
    class Contract(MethodContract):
        image_size = architecture.size

        def method(self) -> Method:
            return make_method(self.num_classes)

        def student(self) -> nn.Module:
            return architecture.make(self.num_classes)

    if not architecture.common:
        Contract = type("Contract", (Contract,), {"test_compiled_step_equals_eager": None})
    elif not compiled:

        class Contract(Contract):  # type: ignore[no-redef]
            @pytest.mark.slow
            def test_compiled_step_equals_eager(self) -> None:
                super().test_compiled_step_equals_eager()

    if not default:
        Contract = pytest.mark.slow(Contract)
    Contract.__name__ = Contract.__qualname__ = f"Test{name}On_{architecture.name}"
    return Contract


# The default run has all methods on the hand-written network; those that cut, copy or narrow the student or build on
# its stages also on a ResNet-20, those that read or make maps by the form of the network on a ViT, and ONE, which cuts
# the student, on every common network that is cut in a way of its own. All methods on all networks, compiled on all
# common ones, are slow.
ON_STAGES = {"BYOT", "Blockwise", "FRSKD", "InDistill", "Moonshine", "OKDDip", "OnlineEnsemble", "PCL", "SCD"}
ON_TOKENS = {"AT", "BYOT", "FRSKD", "SAD", "SCD"}
CUT_ALIKE = {"resnet18", "mobilenetv2_050"}  # as cifar_resnet20 and mobilenetv3_small_050 are
# Compiled by default on the hand-written network, but for those that compile in their own test files, and those whose
# graphs are made of what others compile: branches (ONE), peers (DML), memories (DLB), relations in a batch (OSKD).
COMPILED_ELSEWHERE = {"AT", "Codistillation", "FitNet", "InDistill", "MEAL", "Moonshine", "PKT", "SPKD", "SRM"}
COMPILED_ALIKE = {"BAKE", "KDCL", "OKDDip", "OSAKD", "PCL", "PSKD", "TfKD"}

for _name, _make in METHODS.items():
    for _architecture in ARCHITECTURES:
        if (_name, _architecture.name) in REFUSED:
            _class = refusal(_name, _make, _architecture)
        else:
            _names = {"hand-written"}
            _names |= {"cifar_resnet20"} if _name in ON_STAGES else set()
            _names |= {"vit_tiny_patch16_224"} if _name in ON_TOKENS else set()
            _names |= {each.name for each in ARCHITECTURES if _name == "ONE"} - CUT_ALIKE
            _default = _architecture.common and _architecture.name in _names
            _elsewhere = _name in COMPILED_ALIKE | COMPILED_ELSEWHERE
            _compiled = _architecture.name == "hand-written" and not _elsewhere
            _class = contract(_name, _make, _architecture, _default, _compiled)
        globals()[_class.__name__] = _class
del _class


def test_every_method_is_under_contract() -> None:
    assert set(METHODS) == set(attar.methods.available())


class TestABrokenMethodIsCaught:
    """The contract can fail: each of these methods breaks one promise."""

    class _Base(MethodContract):
        image_size = 16

        def student(self) -> nn.Module:
            return ARCHITECTURES[0].make(self.num_classes)

    def test_unused_parameter(self) -> None:
        class Idle(Method):
            def build(self, probe: attar.Probe) -> None:
                self.idle = nn.Linear(2, 2)

            def losses(self, outputs, batch, progress):  # type: ignore[no-untyped-def]
                return {}

        class Contract(self._Base):
            def method(self) -> Method:
                return Idle()

        with pytest.raises(AssertionError, match="no gradient"):
            Contract().test_every_trainable_tensor_gets_a_gradient()

    def test_term_without_effect(self) -> None:
        class Silent(Method):
            def losses(self, outputs, batch, progress):  # type: ignore[no-untyped-def]
                return {"silent": 0.0 * outputs.embedding.mean()}

        class Contract(self._Base):
            def method(self) -> Method:
                return Silent()

        with pytest.raises(AssertionError, match="leaves every gradient"):
            Contract().test_terms_move_the_student()

    def test_infinite_term_and_misspelt_weight(self) -> None:
        class Wild(Method):
            def losses(self, outputs, batch, progress):  # type: ignore[no-untyped-def]
                return {"wild": outputs.logits.mean() / 0.0}

        class Typo(Method):
            def losses(self, outputs, batch, progress):  # type: ignore[no-untyped-def]
                return {"term": outputs.logits.mean()}

            def weights(self, progress):  # type: ignore[no-untyped-def]
                return {"trem": 2.0}

        for broken, message in ((Wild, "is "), (Typo, "does not exist")):
            suite = self._Base()
            suite.method = broken  # type: ignore[method-assign]
            with pytest.raises(AssertionError, match=message):
                suite.test_terms_are_named_finite_scalars_with_weights()
