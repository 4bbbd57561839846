from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
from attar.errors import AttarError
from attar.methods import DLB
from attar.sampling import Overlapping
from networks import IMAGES, LABELS, Answers, Net


def distilled(classes: int, **options: float) -> attar.Distiller:
    distiller = attar.Distiller(Answers(), [DLB(**options)], attar.Classification(classes), stages=["stage"])
    return distiller.build(torch.zeros(2, 1, 1, classes, dtype=torch.float64)).train()


def step(distiller: attar.Distiller, z: Tensor, index: list[int]) -> attar.Terms:
    labels = torch.zeros(len(z), dtype=torch.long)
    return distiller(attar.Batch(z[:, None, None, :], labels, torch.tensor(index)), 0.5)


def test_worked_example() -> None:
    distiller = distilled(3)
    old, now = torch.tensor([[[2.0, 0, 0]], [[1.0, 1, 0]]], dtype=torch.float64)
    assert step(distiller, old, [7]).losses["DLB.kl"] == 0, "there is nothing to recall in the first step"
    assert step(distiller, now, [7]).losses["DLB.kl"].item() == pytest.approx(0.356138, abs=1e-6)


ANSWERS = st.integers(0, 10_000).map(
    lambda seed: 2 * torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
)


@given(ANSWERS, st.floats(0.5, 8.0))
def test_only_repeated_samples_learn_and_the_memory_is_a_constant(answers: Tensor, temperature: float) -> None:
    distiller = distilled(4, temperature=temperature)
    before, now = (values.clone().requires_grad_() for values in answers)
    step(distiller, before, [0, 1, 2, 3, 4, 5])
    step(distiller, now, [6, 7, 8, 2, 0, 1]).losses["DLB.kl"].backward()
    p, t = (now.detach() / temperature).softmax(1)[3:], (before.detach() / temperature).softmax(1)[[2, 0, 1]]
    expected = torch.cat([torch.zeros(3, 4, dtype=torch.float64), temperature / 3 * (p - t)])
    torch.testing.assert_close(now.grad, expected)
    assert before.grad is None


def test_the_same_answer_again_costs_nothing_and_alpha_zero_is_plain_training() -> None:
    torch.manual_seed(0)
    distiller = attar.Distiller(Net().double(), [DLB()], attar.Classification(3)).build(IMAGES).train()
    batch = attar.Batch(IMAGES, LABELS, torch.arange(6))
    distiller(batch, 0.5)
    assert distiller(batch, 0.5).losses["DLB.kl"].abs() < 1e-12
    assert distiller(attar.Batch(IMAGES.flip(-1), LABELS, torch.arange(6)), 0.5).losses["DLB.kl"] > 1e-6
    z = torch.randn(2, 3, dtype=torch.float64)
    plain = nn.functional.cross_entropy(z, torch.zeros(2, dtype=torch.long))
    off = distilled(3, alpha=0.0)
    step(off, z.flip(1), [0, 1])
    torch.testing.assert_close(step(off, z, [0, 1]).total(), plain)


def test_memory_is_that_of_the_last_step_and_survives_a_checkpoint() -> None:
    distiller = distilled(3)
    z = torch.eye(3, dtype=torch.float64)
    step(distiller, z, [0, 1, 2])
    step(distiller, z, [3, 4, 5])
    assert step(distiller.eval(), z.flip(1), [0, 1, 2]).losses["DLB.kl"] == 0, "two steps ago is forgotten"
    state = copy.deepcopy(distiller.state_dict())
    expected = step(distiller, z.flip(1), [3, 4, 5]).losses["DLB.kl"]
    assert expected > 0, "evaluation does not touch the memory"
    other = distilled(3)
    other.load_state_dict(state)
    assert step(other, z.flip(1), [3, 4, 5]).losses["DLB.kl"] == expected


def test_what_it_asks_for() -> None:
    distiller = attar.Distiller(Net().double(), [DLB()], attar.Classification(3)).build(IMAGES)
    assert distiller.sampling == Overlapping()
    with pytest.raises(AttarError, match=r"give batches with their sample numbers"):
        distiller((IMAGES, LABELS), 0.5)
    with pytest.raises(AttarError, match="both set the sampler"):
        attar.Distiller(Net(), [DLB(), attar.methods.CSKD()], attar.Classification(3))
    with pytest.raises(AttarError, match="must be positive"):
        DLB(temperature=0.0)
