from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
from architectures import HandWritten
from attar.errors import AttarError
from attar.functional import codistillation_loss, ensemble_log_probs, kl_divergence, prediction_churn
from attar.methods import DML, Codistillation
from attar.testing import MethodContract
from networks import IMAGES, LABELS, Net

CE = attar.Classification(3).loss


def built(method: attar.Method, student: nn.Module | None = None, seed: int = 0) -> attar.Distiller:
    torch.manual_seed(seed)
    student = Net() if student is None else student
    return attar.Distiller(student.double(), [method], attar.Classification(3)).build(IMAGES).train()


def networks(distiller: attar.Distiller) -> list[nn.Module]:
    (method,) = distiller.methods.values()
    return [distiller.student, *method.peers.networks]


def copies(distiller: attar.Distiller) -> list[nn.Module]:
    return list(distiller.methods["Codistillation"].copies.networks)


def train(distiller: attar.Distiller, steps: int, progress: float = 0.5, lr: float = 0.1) -> list[dict[str, Tensor]]:
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        terms = distiller((IMAGES, LABELS), progress)
        terms.total().backward()
        optimizer.step()
        seen.append({name: loss.detach() for name, loss in terms.losses.items()})
    return seen


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def random(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(count)]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), others=st.integers(1, 4))
def test_properties_of_the_divergences(seed: int, others: int) -> None:
    z, *rest = random(1 + others, seed)
    z.requires_grad_()
    target = ensemble_log_probs(rest)
    p, q = z.detach().softmax(1), torch.stack([other.softmax(1) for other in rest]).mean(0)
    torch.testing.assert_close(target.exp(), q)
    forward, soft, backward = (codistillation_loss(z, target, psi) for psi in ("kl", "cross_entropy", "reverse_kl"))
    torch.testing.assert_close(forward, (q * (q / p).log()).sum(1).mean())
    torch.testing.assert_close(soft, -(q * p.log()).sum(1).mean())
    torch.testing.assert_close(backward, (p * (p / q).log()).sum(1).mean())
    one, other, third = (torch.autograd.grad(loss, z)[0] for loss in (forward, soft, backward))
    torch.testing.assert_close(one, (p - q) / 5)
    torch.testing.assert_close(one, other)
    ratio = (p / q).log()
    torch.testing.assert_close(third, p * (ratio - (p * ratio).sum(1, keepdim=True)) / 5)
    for psi in ("kl", "reverse_kl"):
        alike = codistillation_loss(z, z.detach().log_softmax(1), psi)
        assert alike.abs() < 1e-12
        assert torch.autograd.grad(alike, z)[0].abs().max() < 1e-12


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_churn(seed: int) -> None:
    one, other, third = random(3, seed)
    assert prediction_churn(one, one + 3.0) < 1e-12
    assert prediction_churn(one, other) == prediction_churn(other, one)
    assert 0 < prediction_churn(one, other) < 2
    assert prediction_churn(one, third) <= prediction_churn(one, other) + prediction_churn(other, third) + 1e-12
    certain = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    assert prediction_churn(certain, certain.flip(1)) == 2.0
    two = one[:, :2], other[:, :2]
    binary = (two[0].softmax(1)[:, 0] - two[1].softmax(1)[:, 0]).abs().mean()
    torch.testing.assert_close(prediction_churn(*two), 2 * binary)


@pytest.mark.parametrize("mode", ["original", "synchronous"])
def test_before_the_burn_in_is_over_it_is_plain_training_to_the_last_bit(mode: str) -> None:
    for resting in (False, True):
        distiller = built(Codistillation(replicas=3, mode=mode), Net(batch_norm=True))  # type: ignore[arg-type]
        if resting:
            distiller.epoch_start(39, 100)
        alone = [copy.deepcopy(network).train() for network in networks(distiller)]
        apart = [torch.optim.SGD(network.parameters(), 0.1) for network in alone]
        optimizer = torch.optim.SGD(distiller.parameters(), 0.1)
        for _ in range(4):
            optimizer.zero_grad()
            terms = distiller((IMAGES, LABELS), 0.39)
            terms.total().backward()
            assert (terms.losses["Codistillation.kl"] == 0) == resting
            optimizer.step()
            for network, own in zip(alone, apart, strict=True):
                own.zero_grad()
                CE(network(IMAGES), LABELS).backward()
                own.step()
        assert all(same(mine, own) for mine, own in zip(networks(distiller), alone, strict=True))
        # And after it, it is not.
        distiller.epoch_start(40, 100)
        assert distiller((IMAGES, LABELS), 0.4).total() > distiller((IMAGES, LABELS), 0.39).total()


def test_copies_change_at_multiples_of_the_interval_only() -> None:
    distiller = built(Codistillation(interval=3), Net(batch_norm=True))
    train(distiller, 2, progress=0.2)
    before = [network(IMAGES) for network in copies(distiller)]
    for step in range(8):
        train(distiller, 1, progress=0.5)
        now = [network(IMAGES) for network in copies(distiller)]
        assert [torch.equal(one, other) for one, other in zip(now, before, strict=True)] == [step % 3 != 0] * 2
        before = now
    assert not any(module.training for network in copies(distiller) for module in network.modules())


def test_copies_have_the_weights_from_before_the_step_and_its_statistics() -> None:
    distiller = built(Codistillation(replicas=3, interval=2, burn_in=0.0), Net(batch_norm=True))
    before = [copy.deepcopy(network) for network in networks(distiller)]
    live = [network(IMAGES) for network in before]  # moves their statistics as the step does
    first = train(distiller, 1)[0]
    assert all(same(old, was) for old, was in zip(copies(distiller), before, strict=True))
    train(distiller, 1)
    assert all(same(old, was) for old, was in zip(copies(distiller), before, strict=True))
    probabilities = [network.eval()(IMAGES).softmax(1) for network in before]
    wanted = [
        kl_divergence(live[own], target_log_probs=((sum(probabilities) - probabilities[own]) / 2).log())
        for own in range(3)
    ]
    torch.testing.assert_close(first["Codistillation.kl"], wanted[0])
    torch.testing.assert_close(first["Codistillation.kl_peers"], wanted[1] + wanted[2])
    now = [copy.deepcopy(network) for network in networks(distiller)]
    for network in now:
        network(IMAGES)
    train(distiller, 1)
    assert all(same(old, was) for old, was in zip(copies(distiller), now, strict=True))


@pytest.mark.parametrize("mode", ["original", "synchronous"])
def test_two_replicas_that_exchange_in_every_step_learn_mutually(mode: str) -> None:
    """Without batch norm: copies are in evaluation mode, the peers of DML are not."""
    ours = train(built(Codistillation(interval=1, burn_in=0.0, mode=mode)), 5)  # type: ignore[arg-type]
    theirs = train(built(DML()), 5)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["Codistillation.kl"] > 1e-6
        for name in ("kl", "ce_peers", "kl_peers"):
            torch.testing.assert_close(mine[f"Codistillation.{name}"], other[f"DML.{name}"])


@pytest.mark.parametrize("psi", ["kl", "reverse_kl"])
def test_identical_replicas_have_only_labels_to_learn_from(psi: str) -> None:
    distiller = built(Codistillation(replicas=3, psi=psi))  # type: ignore[arg-type]
    for network in networks(distiller)[1:]:
        network.load_state_dict(distiller.student.state_dict())
    losses = distiller((IMAGES, LABELS), 0.5).losses
    for name, network in (("kl", distiller.student), ("kl_peers", networks(distiller)[1])):
        loss = losses[f"Codistillation.{name}"]
        assert loss.abs() < 1e-12
        gradients = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        assert all(gradient.abs().max() < 1e-12 for gradient in gradients)


def test_no_replica_is_moved_by_anothers_loss_and_no_copy_by_any() -> None:
    distiller = built(Codistillation())
    losses = distiller((IMAGES, LABELS), 0.5).losses
    student, peer = ([*network.parameters()] for network in networks(distiller))
    for name, own, other in (("kl", student, peer), ("kl_peers", peer, student)):
        loss = losses[f"Codistillation.{name}"]
        assert any(g.any() for g in torch.autograd.grad(loss, own, retain_graph=True))
        assert not any(torch.autograd.grad(loss, other, allow_unused=True, retain_graph=True))
    assert [list(network.parameters()) for network in copies(distiller)] == [[], []]


def test_copies_and_counts_go_with_the_state() -> None:
    first = built(Codistillation(interval=3), Net(batch_norm=True))
    train(first, 4)
    second = built(Codistillation(interval=3), Net(batch_norm=True), seed=5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for mine, theirs in zip(train(first, 5), train(second, 5), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_one_replica_is_plain_training() -> None:
    distiller = built(Codistillation(replicas=1))
    terms = distiller((IMAGES, LABELS), 0.5)
    assert set(terms.losses) == {"task", "Codistillation.kl"}
    assert terms.losses["Codistillation.kl"] == 0
    assert distiller.deployables() == {}


def test_trained_together_they_churn_less() -> None:
    """Two trainings that differ in their first weights, on images apart from those they are compared on."""
    unseen = torch.randn(40, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    churn = []
    for weight in (0.0, 5.0):
        distiller = built(Codistillation(interval=5, burn_in=0.0, weight=weight))
        train(distiller, 80)
        distiller.eval()
        churn.append(prediction_churn(*(network(unseen) for network in networks(distiller))).item())
    assert churn[1] < 0.65 * churn[0]  # the paper reports a third less


def test_every_replica_can_be_kept() -> None:
    distiller = built(Codistillation(replicas=3), Net(batch_norm=True))
    train(distiller, 2)
    names = [f"Codistillation.{name}" for name in ("peer1", "peer2", "ensemble")]
    assert list(distiller.deployables()) == names
    kept = distiller.strip(names[1], prove_export=False)
    assert torch.equal(kept(IMAGES), networks(distiller)[2].eval()(IMAGES))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"replicas": 0}, "a number from 1 on, or 'ranks', not 0"),
        ({"replicas": "rank"}, "a number from 1 on, or 'ranks', not 'rank'"),
        ({"interval": 0}, "a number of steps from 1 on, not 0"),
        ({"burn_in": 1.0}, "from 0 to below 1, not 1.0"),
        ({"weight": -1.0}, "must not be negative, not -1.0"),
        ({"mode": "overlap"}, "'original' or 'synchronous', not 'overlap'"),
        ({"psi": "mse"}, "'kl', 'cross_entropy' or 'reverse_kl', not 'mse'"),
        ({"replicas": "ranks", "mode": "synchronous"}, "needs replicas that see the same batch"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        Codistillation(**options)  # type: ignore[arg-type]


def test_ranks_need_several_processes() -> None:
    with pytest.raises(AttarError, match="start several with torchrun"):
        built(Codistillation(replicas="ranks"))


class TestSynchronous(MethodContract):
    """The original mode is under contract with all methods."""

    def method(self) -> attar.Method:
        return Codistillation(replicas=3, mode="synchronous", psi="reverse_kl")

    def student(self) -> nn.Module:
        return HandWritten(self.num_classes)


class TestOriginal(MethodContract):
    def method(self) -> attar.Method:
        return Codistillation(burn_in=0.0, interval=2)

    def student(self) -> nn.Module:
        return HandWritten(self.num_classes)
