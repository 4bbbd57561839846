from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
from attar.errors import AttarError
from attar.methods import PSKD
from networks import IMAGES, LABELS, Answers, Net


def distilled(classes: int, samples: int, **options: float) -> attar.Distiller:
    distiller = attar.Distiller(Answers(), [PSKD(**options)], attar.Classification(classes), stages=["stage"])
    return distiller.build(torch.zeros(2, 1, 1, classes, dtype=torch.float64), samples).train()


def step(distiller: attar.Distiller, z: Tensor, labels: Tensor, index: Tensor, progress: float) -> attar.Terms:
    return distiller(attar.Batch(z[:, None, None, :], labels, index), progress)


def memory(distiller: attar.Distiller) -> Tensor:
    return distiller.methods["PSKD"].memory


def test_worked_example() -> None:
    distiller = distilled(3, 5)
    memory(distiller)[4] = torch.tensor([0.6, 0.3, 0.1])
    z = torch.tensor([[1.0, 0, 0]], dtype=torch.float64, requires_grad=True)
    terms = step(distiller, z, torch.tensor([0]), torch.tensor([4]), 0.5)
    assert float(terms.weights["PSKD.past"]) == pytest.approx(0.4)
    assert float(terms.weights["task"]) == pytest.approx(0.6)
    terms.total().backward()
    assert terms.total().item() == pytest.approx(0.711445, abs=1e-6)
    assert z.grad[0].tolist() == pytest.approx([-0.263883, 0.091942, 0.171942], abs=1e-6)
    torch.testing.assert_close(memory(distiller)[4], z.detach().softmax(1)[0])


def test_share_at_the_end_of_an_epoch_is_the_codes() -> None:
    method = PSKD(alpha=0.8)
    shares = [float(method.weights(torch.tensor(epoch / 300))["past"]) for epoch in (1, 75, 150, 225, 300)]
    assert shares == pytest.approx([0.002667, 0.2, 0.4, 0.6, 0.8], abs=1e-6)
    assert float(method.task_weight(torch.tensor(0.5))) == pytest.approx(0.6)


BATCHES = (
    st.integers(0, 10_000)
    .map(lambda seed: torch.Generator().manual_seed(seed))
    .map(
        lambda generator: (
            2 * torch.randn(4, 3, dtype=torch.float64, generator=generator),
            torch.randint(3, (4,), generator=generator),
            torch.randperm(9, generator=generator)[:4],
        )
    )
)


@given(BATCHES, st.floats(0, 1), st.floats(0, 1))
def test_the_first_epoch_and_alpha_zero_are_plain_training(
    batch: tuple[Tensor, Tensor, Tensor], progress: float, alpha: float
) -> None:
    z, labels, index = batch
    plain = nn.functional.cross_entropy(z, labels)
    torch.testing.assert_close(step(distilled(3, 9, alpha=alpha), z, labels, index, progress).total(), plain)
    again = distilled(3, 9, alpha=0.0)
    step(again, z.flip(1), labels, index, progress)
    torch.testing.assert_close(step(again, z, labels, index, progress).total(), plain)


@given(BATCHES, st.floats(0.1, 1))
def test_gradient_is_answer_minus_target(batch: tuple[Tensor, Tensor, Tensor], progress: float) -> None:
    z, labels, index = batch
    distiller = distilled(3, 9)
    first = z.flip(1).requires_grad_()
    step(distiller, first, labels, index, progress)
    z = z.clone().requires_grad_()
    step(distiller, z, labels, index, progress).total().backward()
    share = 0.8 * progress
    target = (1 - share) * nn.functional.one_hot(labels, 3) + share * first.detach().softmax(1)
    torch.testing.assert_close(target.sum(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(z.grad, (z.detach().softmax(1) - target) / 4)
    assert first.grad is None, "the answer of the epoch before is a constant"


def test_only_training_remembers_and_only_what_was_seen() -> None:
    distiller = distilled(3, 9)
    z = torch.eye(3, dtype=torch.float64)
    step(distiller.eval(), z, torch.arange(3), torch.tensor([1, 5, 7]), 0.5)
    assert not memory(distiller).any()
    step(distiller.train(), z, torch.arange(3), torch.tensor([1, 5, 7]), 0.5)
    assert memory(distiller).sum(1).nonzero().flatten().tolist() == [1, 5, 7]


def test_memory_is_part_of_the_state() -> None:
    torch.manual_seed(0)
    distiller = attar.Distiller(Net().double(), [PSKD()], attar.Classification(3)).build(IMAGES, 6).train()
    batch = attar.Batch(IMAGES, LABELS, torch.arange(6))
    distiller(batch, 0.1)
    state = copy.deepcopy(distiller.state_dict())
    expected = distiller(batch, 0.7).total()
    torch.manual_seed(1)
    other = attar.Distiller(Net().double(), [PSKD()], attar.Classification(3)).build(IMAGES, 6).train()
    other.load_state_dict(state)
    torch.testing.assert_close(other(batch, 0.7).total(), expected, rtol=0, atol=0)
    assert not any("memory" in key for key in distiller.strip().state_dict())


def test_mistakes() -> None:
    with pytest.raises(AttarError, match="tell build"):
        attar.Distiller(Net().double(), [PSKD()], attar.Classification(3)).build(IMAGES)
    with pytest.raises(AttarError, match=r"give batches with their sample numbers"):
        attar.Distiller(Net().double(), [PSKD()], attar.Classification(3)).build(IMAGES, 6)((IMAGES, LABELS), 0.5)
    with pytest.raises(AttarError, match="share between 0 and 1"):
        PSKD(alpha=1.5)
    with pytest.raises(AttarError, match="both set the task weight"):
        attar.Distiller(Net(), [PSKD(), attar.methods.KD(Net())], attar.Classification(3))
