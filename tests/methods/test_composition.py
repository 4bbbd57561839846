"""Methods side by side: one student pass where possible, every term as if its method were alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import attar
from attar.method import Batch, Method
from attar.methods import BYOT, CSKD, FRSKD, ONE, OSKD, SAD, SCD, SLA
from networks import IMAGES, LABELS, Net

# Methods, and how often the student runs in one step.
PAIRS: dict[str, tuple[Callable[[], list[Method]], int]] = {
    "ONE+SCD": (lambda: [ONE(branches=2, gate_norm=False), SCD()], 1),
    "ONE+OSKD": (lambda: [ONE(branches=2, gate_norm=False), OSKD()], 1),
    "FRSKD+SLA": (lambda: [FRSKD(), SLA()], 2),  # the rotated images
    "FRSKD+SCD": (lambda: [FRSKD(), SCD()], 1),
    "BYOT+SAD": (lambda: [BYOT(head_norm=False), SAD()], 1),
    "CSKD+SCD": (lambda: [CSKD(), SCD()], 2),  # the partners
}


def built(methods: list[Method]) -> attar.Distiller:
    torch.manual_seed(0)
    return attar.Distiller(Net().double(), methods, attar.Classification(3)).build(IMAGES).train()


def batch() -> Batch:
    return Batch(IMAGES, LABELS, labels=LABELS, partners=Batch(IMAGES.flip(-1), LABELS, labels=LABELS))


def student_gradients(distiller: attar.Distiller, progress: float) -> tuple[attar.Terms, dict[str, torch.Tensor]]:
    distiller.zero_grad()
    torch.manual_seed(1)
    terms = distiller(batch(), progress)
    terms.total().backward()
    return terms, {name: parameter.grad.clone() for name, parameter in distiller.student.named_parameters()}


@pytest.mark.parametrize("pair", PAIRS)
def test_terms_and_gradients_are_those_of_each_method_alone(pair: str) -> None:
    make, passes = PAIRS[pair]
    progress = 1.0  # every ramp is done
    both = built(make())
    calls: list[int] = []
    handle = both.student.low.register_forward_hook(lambda *_: calls.append(1))
    terms, gradients = student_gradients(both, progress)
    handle.remove()
    assert len(calls) == passes
    _, plain = student_gradients(built([]), progress)
    alone = {name: torch.zeros_like(gradient) for name, gradient in plain.items()}
    names = {"task"}
    for position in range(2):
        method = make()[position]
        single = built([method])
        # The same auxiliaries as beside the other method.
        single.load_state_dict(
            {key: value for key, value in both.state_dict().items() if key in single.state_dict()}, strict=True
        )
        found, its = student_gradients(single, progress)
        assert float(found.weights["task"]) == 1.0
        for name, loss in found.losses.items():
            torch.testing.assert_close(terms.losses[name], loss, rtol=1e-9, atol=1e-12)
            assert float(terms.weights[name]) == float(found.weights[name])
        names |= found.losses.keys()
        moved = False
        for name, gradient in its.items():
            alone[name] += gradient - plain[name]
            moved = moved or not torch.allclose(gradient, plain[name], rtol=1e-6, atol=1e-12)
        assert moved, f"{method.name} leaves the student alone"
    assert terms.losses.keys() == names
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[name] + alone[name], rtol=1e-7, atol=1e-10)
