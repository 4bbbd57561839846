"""What `attar check` and the lists of methods say of methods that train in phases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attar
from attar.inspection import check, method_cost
from attar.method import Batch, Method, Outputs, Phase, Probe
from attar.methods import SRM, InDistill
from attar.tasks import Classification
from networks import IMAGES, LABELS, Net


class Idle(Method):
    """One phase trains a head, the other a term without effect; a layer is trained by neither."""

    def build(self, probe: Probe) -> None:
        self.tap = probe.anatomy.stages[0].tap
        self.used, self.unused = nn.Linear(6, 1), nn.Linear(2, 2)

    @property
    def phases(self) -> tuple[Phase, ...]:
        return Phase("alone", 0.1, ()), Phase("still", 0.2, (self.tap,))

    def phase_losses(self, phase: Phase, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        if phase.name == "alone":
            return {"own": self.used.weight.square().sum() + self.used.bias.square().sum()}
        pooled = outputs[self.tap].detach().mean(dim=(2, 3))
        return {"still": self.used(pooled).square().mean(), "wild": pooled.mean() / 0.0}

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        return {}


def built(*methods: Method) -> attar.Distiller:
    torch.manual_seed(0)
    return attar.Distiller(Net(batch_norm=True).double(), methods, attar.Classification(3))


def test_every_phase_is_checked_and_what_only_phases_train_is_no_problem() -> None:
    teacher = Net(batch_norm=True).double()
    found = check(built(InDistill(teacher), SRM(teacher)), Batch.of((IMAGES, LABELS)))
    assert [str(term) for term in found.terms] == [
        "InDistill.mse (layer 1)",
        "InDistill.mse (layer 2)",
        "SRM.reconstruction (dictionary)",
        "SRM.pixel (initialisation)",
        "SRM.image (initialisation)",
        "task",
        "SRM.kl",
    ]
    gradients = {str(term): term.gradient for term in found.terms}
    assert gradients.pop("SRM.reconstruction (dictionary)") == 0
    assert min(gradients.values()) > 0
    assert found.without_gradient == ()
    assert found.problems == ()
    assert found.remarks == ()
    assert found.phases[0] == ("InDistill", "layer 1", 3 / 70)
    assert [phase for _, phase, _ in found.phases] == ["layer 1", "layer 2", "dictionary", "initialisation"]


def test_what_is_wrong_in_a_phase_is_said() -> None:
    found = check(built(Idle()), Batch.of((IMAGES, LABELS)))
    assert [name.removeprefix("methods.Idle.") for name in found.without_gradient] == ["unused.weight", "unused.bias"]
    assert any(sentence.startswith("Term Idle.wild (still) is ") for sentence in found.problems)
    # The student does not run in the first phase, so nothing could move it there.
    assert found.remarks == (
        "Term Idle.still (still) does not move the student.",
        "Term Idle.wild (still) does not move the student.",
    )


def test_the_list_of_methods_has_the_terms_of_phases_and_the_cost_of_the_main_training() -> None:
    images = torch.randn(2, 3, 16, 16)
    listed = method_cost(SRM, lambda: Net(batch_norm=True), Classification(3), images)
    assert listed.terms == ("reconstruction", "pixel", "image", "kl")
    alone = method_cost(InDistill, lambda: Net(batch_norm=True), Classification(3), images)
    assert alone.terms == ("mse",)
    assert alone.cost.multiply_adds * 2 == listed.cost.multiply_adds  # SRM asks the teacher in every step
