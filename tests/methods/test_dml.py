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
from attar.functional import kl_divergence, mutual_divergences
from attar.methods import DML, ONE
from attar.testing import MethodContract
from networks import IMAGES, LABELS, Net

CE = attar.Classification(3).loss


def built(method: DML, student: nn.Module | None = None, seed: int = 0) -> attar.Distiller:
    torch.manual_seed(seed)
    student = Net() if student is None else student
    return attar.Distiller(student.double(), [method], attar.Classification(3)).build(IMAGES)


def networks(distiller: attar.Distiller) -> list[nn.Module]:
    return [distiller.student, *distiller.methods["DML"].peers.networks]


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True))


def moves(loss: Tensor, module: nn.Module) -> bool:
    return any(g is not None and bool(g.any()) for g in gradients(loss, module))


def random(networks: int, seed: int, scale: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(networks)]


def test_worked_example() -> None:
    z_1, z_2 = torch.tensor([[1.0, 0.0]]).double(), torch.zeros(1, 2).double()
    torch.testing.assert_close(z_1.softmax(1), torch.tensor([[0.731059, 0.268941]]).double(), atol=1e-6, rtol=0)
    first, second = mutual_divergences([z_1, z_2])
    assert first.item() == pytest.approx(0.120115, abs=1e-6)  # KL(p_2 || p_1)
    assert second.item() == pytest.approx(0.110944, abs=1e-6)  # KL(p_1 || p_2)


def test_terms_are_those_of_the_networks_alone() -> None:
    distiller = built(DML(peers=2, temperature=2.0, weight=0.5))
    terms = distiller((IMAGES, LABELS), 0.3)
    z = [network(IMAGES) for network in networks(distiller)]
    kl = [sum(kl_divergence(own, other, 2.0) for other in z if other is not own) / 2 for own in z]
    torch.testing.assert_close(terms.losses["task"], CE(z[0], LABELS))
    torch.testing.assert_close(terms.losses["DML.kl"], kl[0])
    torch.testing.assert_close(terms.losses["DML.ce_peers"], CE(z[1], LABELS) + CE(z[2], LABELS))
    torch.testing.assert_close(terms.losses["DML.kl_peers"], kl[1] + kl[2])
    torch.testing.assert_close(terms.total(), sum(CE(own, LABELS) for own in z) + 0.5 * sum(kl))


@pytest.mark.parametrize("target", ["each", "probabilities", "logits"])
def test_no_network_is_moved_by_anothers_loss(target: str) -> None:
    distiller = built(DML(target=target))
    student, peer = networks(distiller)
    losses = distiller((IMAGES, LABELS), 0.3).losses
    first, second = losses["task"] + losses["DML.kl"], losses["DML.ce_peers"] + losses["DML.kl_peers"]
    assert moves(losses["DML.kl"], student)
    assert moves(losses["DML.kl_peers"], peer)
    assert not moves(first, peer)
    assert not moves(second, student)

    attached = built(DML(target=target, constant_targets=False))
    student, peer = networks(attached)
    losses = attached((IMAGES, LABELS), 0.3).losses
    assert moves(losses["DML.kl"], peer)
    assert moves(losses["DML.kl_peers"], student)


def test_gradient_of_the_logits() -> None:
    """dml.md: dL_1/dz_1 = ((p_1 - onehot) + (p_1 - p_2)) / N for two networks."""
    z_1, z_2 = (z.requires_grad_() for z in random(2, 3))
    labels = torch.tensor([0, 1, 2, 3, 0])
    loss = nn.functional.cross_entropy(z_1, labels) + mutual_divergences([z_1, z_2])[0]
    loss.backward()
    p_1, p_2 = z_1.detach().softmax(1), z_2.detach().softmax(1)
    torch.testing.assert_close(z_1.grad, ((p_1 - nn.functional.one_hot(labels, 4)) + (p_1 - p_2)) / 5)
    assert z_2.grad is None


def test_identical_networks_have_only_labels_to_learn_from() -> None:
    distiller = built(DML(peers=2))
    for peer in distiller.methods["DML"].peers.networks:
        peer.load_state_dict(distiller.student.state_dict())
    terms = distiller((IMAGES, LABELS), 0.3)
    assert terms.losses["DML.kl"].abs() < 1e-12
    assert terms.losses["DML.kl_peers"].abs() < 1e-12
    torch.testing.assert_close(terms.total(), 3 * terms.losses["task"])
    assert all(g is None or g.abs().max() < 1e-12 for g in gradients(terms.losses["DML.kl"], distiller.student))


def test_peers_of_the_students_kind_begin_elsewhere() -> None:
    student, first, second = networks(built(DML(peers=2)))
    for name, parameter in student.named_parameters():
        for one, other in ((first, student), (second, student), (first, second)):
            assert not torch.equal(one.get_parameter(name), other.get_parameter(name)), name
        assert torch.equal(first.get_parameter(name).flatten().sort().values, parameter.flatten().sort().values)


def test_one_network_is_plain_training() -> None:
    distiller = built(DML(peers=0))
    terms = distiller((IMAGES, LABELS), 0.3)
    assert set(terms.losses) == {"task", "DML.kl"}
    assert terms.losses["DML.kl"] == 0
    assert distiller.deployables() == {}
    plain = CE(distiller.student(IMAGES), LABELS)
    for mine, theirs in zip(gradients(terms.total(), distiller.student), gradients(plain, distiller.student),
                            strict=True):  # fmt: skip
        assert torch.equal(mine, theirs)  # type: ignore[arg-type]


def test_without_divergence_they_train_alone_to_the_last_bit() -> None:
    distiller = built(DML(peers=2, weight=0.0)).train()
    alone = [copy.deepcopy(network).train() for network in networks(distiller)]
    together = torch.optim.SGD(distiller.parameters(), 0.1, momentum=0.9)
    apart = [torch.optim.SGD(network.parameters(), 0.1, momentum=0.9) for network in alone]
    for _ in range(4):
        together.zero_grad()
        distiller((IMAGES, LABELS), 0.3).total().backward()
        together.step()
        for network, optimizer in zip(alone, apart, strict=True):
            optimizer.zero_grad()
            CE(network(IMAGES), LABELS).backward()
            optimizer.step()
    for mine, own in zip(networks(distiller), alone, strict=True):
        assert all(torch.equal(p, own.get_parameter(name)) for name, p in mine.named_parameters())


def test_they_come_closer() -> None:
    """Trained with the divergence, the networks agree more than trained alone."""
    left = []
    for weight in (0.0, 5.0):
        distiller = built(DML(peers=2, weight=weight)).train()
        optimizer = torch.optim.SGD(distiller.parameters(), 0.1)
        for _ in range(60):
            optimizer.zero_grad()
            terms = distiller((IMAGES, LABELS), 0.3)
            terms.total().backward()
            optimizer.step()
        left.append(terms.losses["DML.kl"].item())
    assert left[1] < 0.5 * left[0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), networks=st.integers(2, 5), temperature=st.sampled_from([1.0, 3.0]))
def test_properties_of_the_divergences(seed: int, networks: int, temperature: float) -> None:
    z = random(networks, seed)
    each = mutual_divergences(z, temperature)
    total = mutual_divergences(z, temperature, reduction="sum")
    pooled = mutual_divergences(z, temperature, target="probabilities")
    attached = mutual_divergences(z, temperature, constant=False)
    for own in range(networks):
        pairs = [kl_divergence(z[own], z[other], temperature) for other in range(networks) if other != own]
        torch.testing.assert_close(each[own], torch.stack(pairs).mean())
        torch.testing.assert_close(total[own], torch.stack(pairs).sum())
        torch.testing.assert_close(each[own], attached[own])
        # The divergence from a mean is no more than the mean divergence.
        assert pooled[own] <= each[own] + 1e-12
    order = torch.randperm(networks, generator=torch.Generator().manual_seed(seed)).tolist()
    for target in ("each", "probabilities", "logits"):
        plain = mutual_divergences(z, temperature, target=target)
        permuted = mutual_divergences([z[k] for k in order], temperature, target=target)
        torch.testing.assert_close(torch.stack(permuted), torch.stack(plain)[order])
        shifted = mutual_divergences([z[0] + 3.0, *z[1:]], temperature, target=target)
        torch.testing.assert_close(torch.stack(shifted), torch.stack(plain))
    if networks == 2:
        for target in ("probabilities", "logits"):
            torch.testing.assert_close(mutual_divergences(z, temperature, target=target), each)
    assert all(value == 0 for value in mutual_divergences(z[:1], temperature))


def test_different_kinds_of_networks_are_reported_and_kept() -> None:
    torch.manual_seed(4)
    distiller = built(DML(peers=[HandWritten(3), Net(3, batch_norm=True)])).train()
    distiller((IMAGES, LABELS), 0.3).total().backward()
    assert all(p.grad is not None for p in distiller.parameters())
    assert list(distiller.deployables()) == ["DML.peer1", "DML.peer2", "DML.ensemble"]
    kept, ensemble = distiller.strip(deployable="DML.peer1"), distiller.strip(deployable="DML.ensemble")
    assert type(kept) is HandWritten
    distiller.eval()
    assert torch.equal(kept(IMAGES), networks(distiller)[1](IMAGES))
    mean = torch.stack([network(IMAGES).softmax(1) for network in networks(distiller)]).mean(0)
    torch.testing.assert_close(ensemble(IMAGES).exp(), mean)
    with pytest.raises(AttarError, match=r"did you mean 'DML\.peer"):
        distiller.strip(deployable="DML.peer7")


def test_beside_one() -> None:
    torch.manual_seed(0)
    methods = [ONE(branches=2), DML()]
    distiller = attar.Distiller(Net().double(), methods, attar.Classification(3)).build(IMAGES)
    distiller((IMAGES, LABELS), 0.3).total().backward()
    assert all(p.grad is not None for p in distiller.parameters())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"peers": -1}, "DML cannot have -1 peers"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"target": "mean"}, "'each', 'probabilities' or 'logits', not 'mean'"),
        ({"reduction": "median"}, "'mean' or 'sum', not 'median'"),
        ({"weight": -1.0}, "must not be negative"),
        ({"target_shift": -1e-7}, "must not be negative"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        DML(**options)  # type: ignore[arg-type]


class TestOfAnotherKind(MethodContract):
    """Replicas are under contract with all methods; this is a peer of another architecture."""

    def method(self) -> attar.Method:
        torch.manual_seed(9)
        return DML(peers=nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, self.num_classes),
        ))  # fmt: skip

    def student(self) -> nn.Module:
        return HandWritten(self.num_classes)
