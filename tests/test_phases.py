"""Phases: parts of a run that one method has for itself, with a student that runs only as far as they need."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.errors import AttarError
from attar.method import Batch, Method, Outputs, Phase, Probe
from attar.methods import ONE
from attar.testing import MethodContract
from attar.train.distributed import Ranks
from attar.train.meter import Meter
from networks import IMAGES, LABELS, Net


class Warm(Method):
    """A dictionary without the student, then the student's shallow half, then the student whole."""

    def build(self, probe: Probe) -> None:
        shallow = probe.anatomy.stages[0]
        self.tap = shallow.tap
        self.dictionary = nn.Linear(3, 3)
        self.head = nn.Conv2d(shallow.channels, 1, 1)

    @property
    def phases(self) -> tuple[Phase, ...]:
        return Phase("dictionary", 0.1, ()), Phase("shallow", 0.2, (self.tap,)), Phase("whole", 0.1)

    def phase_losses(self, phase: Phase, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        pixels = outputs.images.mean(dim=(2, 3))
        if phase.name == "dictionary":
            return {"reconstruction": (self.dictionary(pixels) - pixels).square().mean()}
        if phase.name == "shallow":
            return {"shallow": (self.head(outputs[self.tap]) - 1.0).square().mean()}
        return {"logits": outputs.logits.square().mean()}

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        return {}


def built(*methods: Method) -> attar.Distiller:
    torch.manual_seed(0)
    return attar.Distiller(Net(batch_norm=True).double(), methods, attar.Classification(3)).build(IMAGES).train()


def gradients(distiller: attar.Distiller) -> set[str]:
    distiller.zero_grad(set_to_none=True)
    distiller((IMAGES, LABELS), 0.5).total().backward()
    return {name for name, parameter in distiller.named_parameters() if parameter.grad is not None}


class TestWarmKeepsTheContract(MethodContract):
    num_classes = 3

    def method(self) -> Method:
        return Warm()

    def student(self) -> nn.Module:
        return Net(batch_norm=True)


def test_each_phase_trains_what_it_names_and_nothing_behind_it() -> None:
    distiller = built(Warm(), ONE(branches=2))
    calls: list[int] = []
    distiller.student.high.register_forward_hook(lambda *_: calls.append(1))
    distiller.enter(0)
    assert gradients(distiller) == {"methods.Warm.dictionary.weight", "methods.Warm.dictionary.bias"}
    distiller.enter(1)
    before = {name: value.clone() for name, value in distiller.student.high.state_dict().items()}
    gradients(distiller)  # the first time it is counted how often modules run
    calls.clear()
    trained = gradients(distiller)
    assert not calls, "the deep half was computed"
    assert all(name.startswith(("student.low", "methods.Warm.head")) for name in trained)
    assert any(name.startswith("student.low") for name in trained)
    assert all(torch.equal(value, before[name]) for name, value in distiller.student.high.state_dict().items())
    distiller.enter(2)
    terms = distiller((IMAGES, LABELS), 0.5)
    assert list(terms.losses) == ["Warm.logits"]
    assert terms.logits.shape == (6, 3)
    distiller.enter(None)
    assert {"task", "ONE.kl"} <= distiller((IMAGES, LABELS), 0.5).losses.keys()


def test_what_is_read_of_a_partial_pass_equals_a_whole_one() -> None:
    distiller = built(Warm()).eval()
    read: dict[str, Tensor] = {}
    warm = distiller.methods["Warm"]
    warm.phase_losses = lambda phase, outputs, batch: (
        read.update(part=outputs[warm.tap]) or {"x": outputs[warm.tap].sum()}
    )
    distiller.enter(1)
    terms = distiller((IMAGES, LABELS), 0.5)
    assert terms.logits.shape == (0, 3)
    assert torch.equal(read["part"], distiller._pass(IMAGES)[warm.tap])


def test_phases_follow_the_shares_of_the_run_and_last_an_epoch_at_least() -> None:
    distiller = built(Warm())

    def names(epochs: int) -> list[str | None]:
        found = []
        for epoch in range(epochs):
            distiller.epoch_start(epoch, epochs)
            found.append(distiller.phase.name if distiller.phase else None)
        return found

    assert names(10) == ["dictionary", "shallow", "shallow", "whole", *[None] * 6]
    assert names(20) == [*["dictionary"] * 2, *["shallow"] * 4, *["whole"] * 2, *[None] * 12]
    assert names(4) == ["dictionary", "shallow", "whole", None]
    with pytest.raises(AttarError, match="The 3 phases of Warm take 3 epochs and leave none of 3"):
        names(3)


def test_phases_may_have_the_whole_schedule_to_themselves() -> None:
    class Staged(Warm):
        @property
        def phases(self) -> tuple[Phase, ...]:
            first, second, third = super().phases
            return first, dataclasses.replace(second, own_schedule=True), third

    distiller = built(Staged())
    assert distiller.schedule_starts(20) == [0, 2, 6]
    assert distiller.schedule_starts(4) == [0, 1, 2]
    assert built(Warm()).schedule_starts(20) == [0]


def test_phases_of_several_methods_follow_one_another() -> None:
    class Second(Warm):
        @property
        def phases(self) -> tuple[Phase, ...]:
            return (Phase("second", 0.1, ()),)

        def phase_losses(self, phase: Phase, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
            return super().phase_losses(Phase("dictionary", 0.1), outputs, batch)

    distiller = built(Warm(), Second())
    assert [phase.name for _, phase in distiller.phases] == ["dictionary", "shallow", "whole", "second"]
    distiller.enter(3)
    assert list(distiller((IMAGES, LABELS), 0.5).losses) == ["Second.reconstruction"]


def test_the_meter_begins_anew_where_terms_change() -> None:
    distiller, meter = built(Warm()), Meter(Ranks(0, 1, torch.device("cpu")))
    distiller.enter(0)
    meter.add(distiller((IMAGES, LABELS), 0.0), 0)
    distiller.enter(None)
    terms = distiller((IMAGES, LABELS), 0.5)
    meter.add(terms, 1)
    task = pytest.approx(terms.losses["task"].item())
    assert meter.window() == {"task": task}
    assert meter.epoch() == {"task": task}
