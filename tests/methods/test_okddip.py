from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.errors import AttarError
from attar.functional import kl_divergence
from attar.methods import OKDDip
from networks import IMAGES, LABELS, Net

BATCH = (IMAGES, LABELS)


def built(method: OKDDip, seed: int = 0, batch_norm: bool = False) -> attar.Distiller:
    torch.manual_seed(seed)
    distiller = attar.Distiller(Net(batch_norm=batch_norm), [method], attar.Classification(3))
    distiller.double().build(IMAGES)
    with torch.no_grad():  # weights of a Linear's usual size hardly tell the peers apart
        method.query.weight.mul_(5)
        method.key.weight.mul_(5)
        for parameter in distiller.parameters():
            parameter.mul_(1.5)
    return distiller


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor | None]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True), strict=True))


def nothing(found: dict[str, Tensor | None]) -> bool:
    return all(gradient is None or not gradient.any() for gradient in found.values())


def everything(found: dict[str, Tensor | None]) -> bool:
    return all(gradient is not None and gradient.any() for gradient in found.values())


def answers(distiller: attar.Distiller) -> tuple[Tensor, Tensor]:
    """Embeddings and logits of the peers, from their own layers."""
    method = distiller.methods["OKDDip"]
    low = distiller.student.low(IMAGES)
    f = [peer.tail.high(low).mean(dim=(2, 3)) for peer in method.peers]
    return torch.stack(f, 1), torch.stack([peer.tail.head(x) for peer, x in zip(method.peers, f, strict=True)], 1)


def test_worked_example() -> None:
    method = OKDDip(branches=3, temperature=1.0, reduction=4)
    built(method)
    with torch.no_grad():
        method.query.weight.zero_()[:, :2] = torch.tensor([[1.0, 0], [0, 1]])
        method.key.weight.zero_()[:, :2] = torch.tensor([[1.0, 1], [0, 1]])
    embeddings = torch.eye(8, dtype=torch.float64)[None, :2]  # Wq f = (1,0), (0,1); Wk f = (1,0), (1,1)
    logits = torch.tensor([[[2.0, 0, -1], [0, 1, 0]]], dtype=torch.float64)
    mixed = torch.tensor([[[1.0, 0.5, -0.5], [0.537883, 0.731059, -0.268941]]], dtype=torch.float64)
    torch.testing.assert_close(method.targets(embeddings, logits).exp(), mixed.softmax(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_the_objective_by_hand(variant: str) -> None:
    distiller = built(OKDDip(variant=variant, temperature=2.0))
    method = distiller.methods["OKDDip"]
    terms = distiller(BATCH, 1.0)
    f, z = answers(distiller)
    shift = 1e-7 if variant == "code" else 0.0

    def divergence(answer: Tensor, target: Tensor) -> Tensor:
        target = target + shift
        return 4 * (target * (target.log() - (answer / 2).log_softmax(0))).sum() / 6

    peers = leader = torch.zeros((), dtype=torch.float64)
    student = distiller.student(IMAGES)
    for n in range(6):
        energy = (f[n] @ method.query.weight.T) @ (f[n] @ method.key.weight.T).T
        for a in range(3):
            alpha = energy[a].softmax(0)
            if variant == "code":
                target = (sum(alpha[b] * z[n, b] for b in range(3)) / 2).softmax(0)
            else:
                target = sum(alpha[b] * (z[n, b] / 2).softmax(0) for b in range(3))
            peers = peers + divergence(z[n, a], target)
        leader = leader + divergence(student[n], (z[n].mean(0) / 2).softmax(0))
    ce = distiller.task.loss
    hard = sum(ce(z[:, a], LABELS) for a in range(3))
    torch.testing.assert_close(terms.losses["OKDDip.ce_peers"], hard)
    torch.testing.assert_close(terms.losses["OKDDip.kl_peers"], peers)
    torch.testing.assert_close(terms.losses["OKDDip.kl_leader"], leader)
    whole = hard + ce(student, LABELS) + peers + leader
    torch.testing.assert_close(terms.total(), whole)
    expected, found = gradients(whole, distiller), gradients(terms.total(), distiller)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_the_attention_learns_from_level_1_alone() -> None:
    distiller = built(OKDDip())
    method = distiller.methods["OKDDip"]
    losses = distiller(BATCH, 1.0).losses
    for part in (method.query, method.key):
        assert everything(gradients(losses["OKDDip.kl_peers"], part))
        for other in ("task", "OKDDip.ce_peers", "OKDDip.kl_leader"):
            assert nothing(gradients(losses[other], part))
    # With constant targets it would never train.
    f, z = answers(distiller)
    targets = method.targets(f, z)
    detached = sum(kl_divergence(z[:, a], temperature=3.0, target_log_probs=targets[:, a]) for a in range(3))
    assert nothing(gradients(detached, method.query))
    assert nothing(gradients(detached, method.key))


def test_without_distillation_every_gradient_of_the_attention_is_zero_and_there() -> None:
    distiller = built(OKDDip(kl_weight=0.0))
    distiller(BATCH, 1.0).total().backward()
    method = distiller.methods["OKDDip"]
    for part in (method.query, method.key):
        assert part.weight.grad is not None
        assert not part.weight.grad.any()


def test_without_attention_the_targets_are_the_average() -> None:
    distiller = built(OKDDip(target_shift=0.0))
    method = distiller.methods["OKDDip"]
    with torch.no_grad():
        method.query.weight.zero_()
        method.key.weight.zero_()
    f, z = answers(distiller)
    average = (z.mean(1, keepdim=True) / 3).log_softmax(2).expand(-1, 3, -1)
    torch.testing.assert_close(method.targets(f, z), average)
    by_hand = sum(kl_divergence(z[:, a], z.mean(1), 3.0) for a in range(3))
    torch.testing.assert_close(distiller(BATCH, 1.0).losses["OKDDip.kl_peers"], by_hand)


def test_identical_branches_have_nothing_to_teach() -> None:
    distiller = built(OKDDip())
    method = distiller.methods["OKDDip"]
    for peer in method.peers:
        peer.tail.load_state_dict(method._split[0].tail.state_dict())
    losses = distiller(BATCH, 1.0).losses
    assert 0 <= losses["OKDDip.kl_peers"].item() < 1e-4  # the shift alone
    assert 0 <= losses["OKDDip.kl_leader"].item() < 1e-4
    exact = built(OKDDip(target_shift=0.0))
    for peer in exact.methods["OKDDip"].peers:
        peer.tail.load_state_dict(exact.methods["OKDDip"]._split[0].tail.state_dict())
    for name in ("OKDDip.kl_peers", "OKDDip.kl_leader"):
        assert exact(BATCH, 1.0).losses[name].abs().item() < 1e-12


def test_of_two_branches_the_leader_learns_from_the_only_peer() -> None:
    distiller = built(OKDDip(branches=2, target_shift=0.0))
    method = distiller.methods["OKDDip"]
    losses = distiller(BATCH, 1.0).losses
    assert losses["OKDDip.kl_peers"].abs().item() < 1e-12
    _, z = answers(distiller)
    torch.testing.assert_close(losses["OKDDip.kl_leader"], kl_divergence(distiller.student(IMAGES), z[:, 0], 3.0))
    distiller(BATCH, 1.0).total().backward()
    assert method.query.weight.grad is not None
    assert method.query.weight.grad.abs().max() < 1e-12


@pytest.mark.parametrize("networks", [False, True])
def test_the_leader_never_influences_the_peers_targets(networks: bool) -> None:
    distiller = built(OKDDip(networks=networks))
    before = distiller(BATCH, 1.0).losses
    for part in (distiller.student.high, distiller.student.head):
        assert nothing(gradients(before["OKDDip.kl_peers"], part))
    with torch.no_grad():
        distiller.student.head.weight.normal_()
    after = distiller(BATCH, 1.0).losses
    assert torch.equal(after["OKDDip.kl_peers"], before["OKDDip.kl_peers"])
    assert not torch.equal(after["OKDDip.kl_leader"], before["OKDDip.kl_leader"])


def test_the_leader_draws_the_peers_unless_its_target_is_detached() -> None:
    for detached in (False, True):
        distiller = built(OKDDip(detach_leader_target=detached))
        loss = distiller(BATCH, 1.0).losses["OKDDip.kl_leader"]
        for peer in distiller.methods["OKDDip"].peers:
            found = gradients(loss, peer)
            assert nothing(found) if detached else everything(found)
        assert everything(gradients(loss, distiller.student))


def test_level_1_sends_gradients_through_every_target() -> None:
    """Peer a's divergence alone reaches every peer b that its target mixes."""
    distiller = built(OKDDip())
    method = distiller.methods["OKDDip"]
    f, z = answers(distiller)
    of_first = method.targets(f, z.detach())[:, 0].exp().square().sum()
    assert all(everything(gradients(of_first, peer.tail.high)) for peer in method.peers)


def test_permuting_the_peers_and_adding_a_constant_change_nothing() -> None:
    distiller = built(OKDDip())
    method = distiller.methods["OKDDip"]
    before = distiller(BATCH, 1.0).losses
    method.peers = nn.ModuleList(reversed(method.peers))
    with torch.no_grad():
        for peer in method.peers:
            peer.tail.head.bias.add_(2.5)
        distiller.student.head.bias.sub_(1.5)
    after = distiller(BATCH, 1.0).losses
    for name, loss in before.items():
        torch.testing.assert_close(after[name], loss, msg=name)


@pytest.mark.parametrize("progress", [0.0, 10 / 300, 40 / 300, 80 / 300, 1.0])
def test_ramp(progress: float) -> None:
    expected = torch.exp(torch.tensor(-5.0 * (1 - min(300 * progress, 80) / 80) ** 2)).item()
    weights = OKDDip(kl_weight=2.0).weights(torch.tensor(progress))
    assert {name: float(weight) for name, weight in weights.items()} == pytest.approx(
        {"kl_peers": 2 * expected, "kl_leader": 2 * expected}, rel=1e-5
    )


@pytest.mark.parametrize(("model", "width"), [("cifar_resnet32", 64), ("cifar_densenet_bc_40_12", 132)])
def test_published_sizes(model: str, width: int) -> None:
    import timm

    import attar.zoo

    student = timm.create_model(model, num_classes=100)
    distiller = attar.Distiller(student, [OKDDip(branches=2)], attar.Classification(100))
    method = distiller.build(torch.zeros(2, 3, 32, 32)).methods["OKDDip"]
    for part in (method.query, method.key):
        assert part.weight.shape == (width // 8, width)
        assert part.bias is None


@pytest.mark.parametrize("networks", [False, True])
def test_peers_and_ensemble_to_keep(networks: bool) -> None:
    distiller = built(OKDDip(branches=3, networks=networks), batch_norm=True).train()
    distiller(BATCH, 1.0).total().backward()
    assert list(distiller.deployables()) == ["OKDDip.peer1", "OKDDip.peer2", "OKDDip.ensemble"]
    distiller.eval()
    logits = distiller.methods["OKDDip"].peers(IMAGES) if networks else answers(distiller)[1].unbind(1)
    for number, expected in enumerate(logits, 1):
        peer = distiller.strip(f"OKDDip.peer{number}")
        torch.testing.assert_close(peer(IMAGES), expected)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in peer.modules())
    mean = (distiller.student(IMAGES) + sum(logits)) / 3
    torch.testing.assert_close(distiller.strip(deployable="OKDDip.ensemble")(IMAGES), mean)


class ClassMaps(nn.Module):
    """Its classifier is a convolution: the embedding is the pooled last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Tanh())
        self.high = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.Tanh())
        self.leave = nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.leave(self.high(self.low(images))).mean(dim=(2, 3))


@pytest.mark.parametrize("networks", [False, True])
def test_without_a_linear_classifier_the_pooled_last_stage_is_attended(networks: bool) -> None:
    distiller = attar.Distiller(ClassMaps().double(), [OKDDip(networks=networks)], attar.Classification(3))
    method = distiller.build(IMAGES).methods["OKDDip"]
    assert method.query.weight.shape == (1, 8)
    losses = distiller(BATCH, 1.0).losses
    assert everything(gradients(losses["OKDDip.kl_peers"], method.query))
    low = distiller.student.low(IMAGES)
    tails = list(method.peers.networks) if networks else [peer.tail for peer in method.peers]
    maps = [tail.high(tail.low(IMAGES) if networks else low) for tail in tails]
    z = torch.stack([tail.leave(x).mean(dim=(2, 3)) for tail, x in zip(tails, maps, strict=True)], 1)
    targets = method.targets(torch.stack([x.mean(dim=(2, 3)) for x in maps], 1), z)
    by_hand = sum(kl_divergence(z[:, a], temperature=3.0, target_log_probs=targets[:, a]) for a in range(3))
    torch.testing.assert_close(losses["OKDDip.kl_peers"], by_hand, rtol=1e-4, atol=1e-5)  # without the shift


def test_whole_networks_share_nothing() -> None:
    distiller = built(OKDDip(networks=True))
    method = distiller.methods["OKDDip"]
    assert len(method.peers.networks) == 3
    low = [distiller.student.low[0].weight, *(network.low[0].weight for network in method.peers.networks)]
    assert not any(torch.equal(one, other) for i, one in enumerate(low) for other in low[:i])
    losses = distiller(BATCH, 1.0).losses
    assert nothing(gradients(losses["OKDDip.kl_peers"], distiller.student))
    assert everything(gradients(losses["OKDDip.kl_peers"], method.peers))
    f = torch.stack([network.high(network.low(IMAGES)).mean(dim=(2, 3)) for network in method.peers.networks], 1)
    z = torch.stack([network(IMAGES) for network in method.peers.networks], 1)
    targets = method.targets(f, z)
    by_hand = sum(kl_divergence(z[:, a], temperature=3.0, target_log_probs=targets[:, a]) for a in range(3))
    torch.testing.assert_close(losses["OKDDip.kl_peers"], by_hand, rtol=1e-4, atol=1e-5)  # without the shift


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"branches": 1}, "at least two branches, a peer and the leader, not 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"ramp": 1.5}, "between 0 and 1"),
        ({"variant": "thesis"}, "'code' or 'paper'"),
        ({"reduction": 0}, "at least 1"),
        ({"networks": True, "cut": "low"}, "are not cut"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        OKDDip(**options)
