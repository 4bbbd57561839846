"""The contract suite for dense tasks: every method that serves them on every dense network, and the refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

import attar
from attar.errors import AttarError
from attar.method import Method
from attar.methods import AT, BYOT, DML, FRSKD, KD, ONE, SAD, SCD, SPKD, InDistill, Supervised, TfKD
from attar.tasks import Task
from attar.testing import MethodContract
from dense_networks import DENSE_NETWORKS, DenseNetwork, Dilated

# One line per method that serves dense tasks (see the last tests).
METHODS: dict[str, Callable[[int], Method]] = {
    "AT": lambda classes: AT(Dilated(classes)),
    "BYOT": lambda classes: BYOT(),
    "DML": lambda classes: DML(),
    "FRSKD": lambda classes: FRSKD(),
    "InDistill": lambda classes: InDistill(Dilated(classes), wider="adapt"),
    "KD": lambda classes: KD(Dilated(classes)),
    "ONE": lambda classes: ONE(branches=2),
    "SAD": lambda classes: SAD(),
    "SCD": lambda classes: SCD(),
    "SPKD": lambda classes: SPKD(),
    "Supervised": lambda classes: Supervised(label_smoothing=0.1),
    "TfKD": lambda classes: TfKD(),
}

# Compiled in the default run.
COMPILED = {("ONE", "dilated")}


def contract(name: str, make_method: Callable[[int], Method], network: DenseNetwork) -> type[MethodContract]:
    class Contract(MethodContract):
        num_classes = 4
        image_size = network.size

        def task(self) -> Task:
            return attar.Segmentation(self.num_classes)

        def method(self) -> Method:
            return make_method(self.num_classes)

        def student(self) -> nn.Module:
            return network.make(self.num_classes)

    if not network.cheap:
        Contract = pytest.mark.slow(type("Contract", (Contract,), {"test_compiled_step_equals_eager": None}))
        Contract = pytest.mark.skipif(bool(network.missing), reason=f"needs {network.missing}")(Contract)
    elif (name, network.name) not in COMPILED:

        class Contract(Contract):  # type: ignore[no-redef]
            @pytest.mark.slow
            def test_compiled_step_equals_eager(self) -> None:
                super().test_compiled_step_equals_eager()

    Contract.__name__ = Contract.__qualname__ = f"Test{name}On_{network.name}"
    return Contract


for _name, _make in METHODS.items():
    for _network in DENSE_NETWORKS:
        _class = contract(_name, _make, _network)
        globals()[_class.__name__] = _class
del _class


def test_every_method_that_serves_dense_tasks_is_under_contract() -> None:
    assert set(METHODS) == {name for name, method in attar.methods.available().items() if not method.not_dense}


def test_the_others_say_why_they_do_not() -> None:
    reasons = {name: method.not_dense for name, method in attar.methods.available().items() if method.not_dense}
    assert Method.not_dense not in reasons.values()
    for name, reason in reasons.items():
        with pytest.raises(AttarError, match=f"{name} cannot train segmentation, since {reason[:20]}"):
            attar.Distiller(Dilated(4), [_any(name)], attar.Segmentation(4))


def _any(name: str) -> Method:
    method = attar.methods.find(name)
    try:
        return method()
    except TypeError:
        return method(Dilated(4))  # type: ignore[call-arg]


class TestABrokenMethodIsCaught:
    """The contract can fail: these methods count void pixels."""

    class _Base(MethodContract):
        num_classes = 4
        image_size = (32, 48)

        def task(self) -> Task:
            return attar.Segmentation(self.num_classes)

        def student(self) -> nn.Module:
            return Dilated(self.num_classes)

    def test_student_at_void_pixels(self) -> None:
        class Everywhere(Method):
            not_dense = ""

            def losses(self, outputs, batch, progress):  # type: ignore[no-untyped-def]
                return {"square": outputs.logits.square().mean()}

        suite = self._Base()
        suite.method = Everywhere  # type: ignore[method-assign]
        with pytest.raises(AssertionError, match="void pixels get a gradient"):
            suite.test_void_pixels_change_nothing()

    def test_teacher_at_void_pixels(self) -> None:
        class Loudest(KD):
            def losses(self, outputs, batch, progress):  # type: ignore[no-untyped-def]
                return {"kl": super().losses(outputs, batch, progress)["kl"] * self.teachers[0](outputs.images).amax()}

        suite = self._Base()
        suite.method = lambda: Loudest(Dilated(4))  # type: ignore[method-assign]
        with pytest.raises(AssertionError, match=r"Loudest\.kl depends on void pixels"):
            suite.test_void_pixels_change_nothing()
