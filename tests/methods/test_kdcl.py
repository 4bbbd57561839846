from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import attar
from architectures import HandWritten
from attar.errors import AttarError
from attar.functional import collaborative_target, kl_divergence
from attar.functional.collaborative import error_covariance, general_weights
from attar.methods import KDCL, Supervised
from attar.testing import MethodContract
from networks import IMAGES, LABELS, Net

CE = attar.Classification(3).loss
RULES = ("naive", "linear", "minlogit")


def views(count: int) -> attar.Batch:
    """Views that differ: the images, and the images moved to the side."""
    images = torch.cat([IMAGES.roll(3 * view, dims=-1) for view in range(count)])
    labels = LABELS.repeat(count)
    return attar.Batch(images, labels, torch.arange(len(LABELS)).repeat(count), labels, count)


def built(method: KDCL, student: nn.Module | None = None, seed: int = 0) -> attar.Distiller:
    torch.manual_seed(seed)
    student = Net() if student is None else student
    return attar.Distiller(student.double(), [method], attar.Classification(3)).build(IMAGES)


def networks(distiller: attar.Distiller) -> list[nn.Module]:
    return [distiller.student, *distiller.methods["KDCL"].peers.networks]


def each_on_its_view(distiller: attar.Distiller, batch: attar.Batch) -> list[Tensor]:
    return [network(x) for network, x in zip(networks(distiller), batch.images.chunk(batch.views), strict=True)]


def moves(loss: Tensor, module: nn.Module) -> bool:
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return any(g is not None and bool(g.any()) for g in found)


def test_as_many_views_as_networks() -> None:
    assert [KDCL(peers=peers).views for peers in (0, 1, 3)] == [1, 2, 4]
    assert built(KDCL(peers=2)).views == 3
    with pytest.raises(AttarError, match="need 3 views of every image, but the batch holds 1"):
        built(KDCL(peers=2))((IMAGES, LABELS), 0.3)


@pytest.mark.parametrize("rule", RULES)
def test_every_network_sees_its_view_and_learns_from_the_common_target(rule: str) -> None:
    distiller = built(KDCL(peers=2, target=rule, weight=0.5))
    seen: list[tuple[int, Tensor]] = []
    for number, network in enumerate(networks(distiller)):
        network.register_forward_pre_hook(lambda module, args, number=number: seen.append((number, args[0])))
    batch = views(3)
    terms = distiller(batch, 0.3)
    assert [number for number, _ in seen] == [0, 1, 2]
    for (_, images), view in zip(seen, batch.images.chunk(3), strict=True):
        assert torch.equal(images, view)
    z = each_on_its_view(distiller, batch)
    target = collaborative_target(z, LABELS, rule)
    kl = [kl_divergence(own, target, 2.0) for own in z]
    torch.testing.assert_close(terms.losses["task"], CE(z[0], LABELS))
    torch.testing.assert_close(terms.losses["KDCL.kl"], kl[0])
    torch.testing.assert_close(terms.losses["KDCL.ce_peers"], CE(z[1], LABELS) + CE(z[2], LABELS))
    torch.testing.assert_close(terms.losses["KDCL.kl_peers"], kl[1] + kl[2])
    torch.testing.assert_close(terms.total(), sum(CE(own, LABELS) for own in z) + 0.5 * sum(kl))
    assert terms.logits.shape == (6, 3)


@pytest.mark.parametrize("rule", RULES)
def test_the_target_is_a_constant(rule: str) -> None:
    distiller = built(KDCL(target=rule))
    student, peer = networks(distiller)
    losses = distiller(views(2), 0.3).losses
    own, theirs = losses["task"] + losses["KDCL.kl"], losses["KDCL.ce_peers"] + losses["KDCL.kl_peers"]
    assert moves(losses["KDCL.kl_peers"], peer)
    assert moves(own, student)
    assert not moves(own, peer)
    assert not moves(theirs, student)


@pytest.mark.parametrize("rule", RULES)
def test_the_target_is_better_than_both_of_a_heterogeneous_pair_at_every_step(rule: str) -> None:
    torch.manual_seed(3)
    distiller = built(KDCL(peers=HandWritten(3), target=rule)).train()
    optimizer = torch.optim.SGD(distiller.parameters(), 0.05)
    batch = views(2)
    started = distiller(batch, 0.0).losses["KDCL.ce_peers"].item()
    for _ in range(15):
        frozen = copy.deepcopy([network.state_dict() for network in networks(distiller)])
        z = each_on_its_view(distiller, batch)
        for network, state in zip(networks(distiller), frozen, strict=True):
            network.load_state_dict(state)  # this look moved the running statistics
        target = collaborative_target(z, LABELS, rule)
        assert all(CE(target, LABELS) <= CE(own, LABELS) + 1e-9 for own in z)
        optimizer.zero_grad()
        terms = distiller(batch, 0.3)
        assert torch.isfinite(terms.total())
        terms.total().backward()
        optimizer.step()
    assert terms.losses["KDCL.ce_peers"] < started


def test_the_general_target_is_the_mean_until_held_out_images_weight_it() -> None:
    distiller = built(KDCL(peers=HandWritten(3), target="general", ridge=0.0))
    method, batch = distiller.methods["KDCL"], views(2)

    def expected(weights: Tensor) -> Tensor:
        z = each_on_its_view(distiller, batch)
        mixed = sum(w * (own / 2.0).softmax(1) for w, own in zip(weights, z, strict=True)).clamp_min(0.0)
        mixed = mixed / mixed.sum(1, keepdim=True)
        return kl_divergence(z[0], temperature=2.0, target_log_probs=mixed.log())

    torch.testing.assert_close(distiller(batch, 0.3).losses["KDCL.kl"], expected(torch.tensor([0.5, 0.5])))
    images, labels = IMAGES.flip(-1), LABELS
    with torch.no_grad():
        for logit in distiller.student.head.parameters():
            logit.mul_(3.0)  # so that the two do not agree
    distiller.train()
    modes = {module: module.training for module in distiller.modules()}
    statistics = copy.deepcopy(distiller.state_dict())
    # Two batches of unequal size are the same images as one.
    distiller.see_holdout([(images[:4], labels[:4]), (images[4:], labels[4:])])
    assert all(module.training == mode for module, mode in modes.items())
    distiller.eval()
    probabilities = [network(images).softmax(1) for network in networks(distiller)]
    weights = general_weights(error_covariance(probabilities, labels))
    assert (weights - 0.5).abs().max() > 0.01
    torch.testing.assert_close(method.mixture, weights)
    assert all(torch.equal(v, statistics[k]) for k, v in distiller.state_dict().items() if "mixture" not in k)
    torch.testing.assert_close(distiller(batch, 0.3).losses["KDCL.kl"], expected(weights))


def test_only_the_general_target_asks_for_held_out_images() -> None:
    for rule in RULES:
        distiller = built(KDCL(target=rule))
        assert not distiller.wants_holdout
        before = copy.deepcopy(distiller.state_dict())
        distiller.see_holdout([(IMAGES, LABELS)])
        assert all(torch.equal(value, before[name]) for name, value in distiller.state_dict().items())
    assert built(KDCL(target="general")).wants_holdout


def test_one_network_is_plain_training() -> None:
    for rule in RULES:
        distiller = built(KDCL(peers=0, target=rule))
        terms = distiller((IMAGES, LABELS), 0.3)
        assert set(terms.losses) == {"task", "KDCL.kl"}
        assert terms.losses["KDCL.kl"].abs() < 1e-12
        torch.testing.assert_close(terms.total(), CE(distiller.student(IMAGES), LABELS))
        assert distiller.deployables() == {}


def test_without_divergence_they_train_alone_to_the_last_bit() -> None:
    distiller = built(KDCL(weight=0.0)).train()
    alone = [copy.deepcopy(network).train() for network in networks(distiller)]
    together = torch.optim.SGD(distiller.parameters(), 0.1, momentum=0.9)
    apart = [torch.optim.SGD(network.parameters(), 0.1, momentum=0.9) for network in alone]
    batch = views(2)
    for _ in range(3):
        together.zero_grad()
        distiller(batch, 0.3).total().backward()
        together.step()
        for network, optimizer, images in zip(alone, apart, batch.images.chunk(2), strict=True):
            optimizer.zero_grad()
            CE(network(images), LABELS).backward()
            optimizer.step()
    for mine, own in zip(networks(distiller), alone, strict=True):
        assert all(torch.equal(p, own.get_parameter(name)) for name, p in mine.named_parameters())


def test_a_constant_added_to_one_networks_logits_changes_nothing() -> None:
    for rule in RULES:
        distiller = built(KDCL(target=rule))
        before = distiller(views(2), 0.3).losses
        with torch.no_grad():
            networks(distiller)[1].head.bias.add_(2.5)
        after = distiller(views(2), 0.3).losses
        near = {"rtol": 1e-4, "atol": 1e-6} if rule == "linear" else {}
        for name, loss in before.items():
            torch.testing.assert_close(after[name], loss, msg=f"{rule} {name}", **near)


def test_every_network_can_be_kept() -> None:
    torch.manual_seed(4)
    distiller = built(KDCL(peers=[HandWritten(3)])).train()
    distiller(views(2), 0.3).total().backward()
    assert all(p.grad is not None for p in distiller.parameters())
    assert list(distiller.deployables()) == ["KDCL.peer1", "KDCL.ensemble"]
    kept, ensemble = distiller.strip(deployable="KDCL.peer1"), distiller.strip(deployable="KDCL.ensemble")
    assert type(kept) is HandWritten
    distiller.eval()
    student, peer = networks(distiller)
    assert torch.equal(kept(IMAGES), peer(IMAGES))
    torch.testing.assert_close(ensemble(IMAGES).exp(), (student(IMAGES).softmax(1) + peer(IMAGES).softmax(1)) / 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"peers": -1}, "KDCL cannot have -1 peers"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"weight": -1.0}, "must not be negative"),
        ({"target": "mean"}, "'minlogit', 'linear', 'naive' or 'general', not 'mean'"),
        ({"ridge": -0.1}, "ridge must not be negative"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        KDCL(**options)  # type: ignore[arg-type]


def test_it_needs_the_label_of_every_image() -> None:
    with pytest.raises(AttarError, match="KDCL needs labels, which Supervised as configured takes away"):
        attar.Distiller(Net(), [KDCL(), Supervised(mixup=0.2)], attar.Classification(3))
    # Smoothed labels are no obstacle, and hold for the peers too.
    torch.manual_seed(0)
    methods = [KDCL(), Supervised(label_smoothing=0.1)]
    distiller = attar.Distiller(Net().double(), methods, attar.Classification(3)).build(IMAGES).train()
    terms = distiller(views(2), 0.3)
    z = each_on_its_view(distiller, views(2))
    smoothed = nn.functional.cross_entropy(z[1], LABELS, label_smoothing=0.1)
    torch.testing.assert_close(terms.losses["KDCL.ce_peers"], smoothed)


class TestOfAnotherKindByLinear(MethodContract):
    """MinLogit with a replica is under contract with all methods; this is the solved mixture with another network."""

    def method(self) -> attar.Method:
        torch.manual_seed(9)
        return KDCL(target="linear", peers=nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, self.num_classes),
        ))  # fmt: skip

    def student(self) -> nn.Module:
        return HandWritten(self.num_classes)

    @pytest.mark.slow  # the solver is a long graph
    def test_compiled_step_equals_eager(self) -> None:
        super().test_compiled_step_equals_eager()
