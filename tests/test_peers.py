"""Peers: networks that train beside the student, in one forward, and can be kept instead of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attar
from architectures import HandWritten
from attar.anatomy import Anatomy, Tap
from attar.errors import AttarError
from attar.functional import full_precision
from attar.method import Batch, Method, Outputs, Probe
from attar.peers import Peers, one_view_each
from attar.testing import MethodContract
from attar.train import fit
from attar.train.models import make_model
from networks import IMAGES, LABELS, Net
from runs import quiet, tiny


class Mimic(Method):
    """The peers imitate the student's embedding and the labels; it reads everything that peers can show."""

    def __init__(self, peers: int | nn.Module | Sequence[nn.Module] = 1) -> None:
        super().__init__()
        self.peers = Peers(peers, "Mimic")

    def build(self, probe: Probe) -> None:
        self.peers.build(probe, taps=self.taps)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        return super().taps(anatomy)

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        peers = self.peers.outputs(outputs.images)
        ce = torch.stack([peer.task_loss(peer.logits, batch.targets) for peer in peers]).sum()
        near = [(full_precision(peer.embedding) - full_precision(outputs.embedding).mean()).mean() for peer in peers]
        maps = [full_precision(peer.stages[0]).square().mean() for peer in peers]
        return {"ce": ce, "near": torch.stack(near).square().sum() + torch.stack(maps).sum()}

    def deployables(self, student: nn.Module) -> dict[str, nn.Module]:
        return self.peers.deployables(student)


def drawn(seed: int = 5, classes: int = 3) -> Net:
    torch.manual_seed(seed)
    return Net(classes)


def built(method: Method, student: nn.Module | None = None) -> attar.Distiller:
    torch.manual_seed(0)
    student = (Net() if student is None else student).double()
    return attar.Distiller(student, [method], attar.Classification(3)).build(IMAGES)


def test_replicas_are_drawn_afresh_and_differ() -> None:
    distiller = built(Mimic(peers=2))
    own = dict(distiller.student.named_parameters())
    first, second = distiller.methods["Mimic"].peers.networks
    for name, parameter in first.named_parameters():
        assert not torch.equal(parameter, own[name]), name
        assert torch.equal(parameter.flatten().sort().values, own[name].flatten().sort().values), name
        assert not torch.equal(parameter, dict(second.named_parameters())[name]), name
    assert not torch.equal(first(IMAGES), distiller.student(IMAGES))


def test_they_outlive_a_student_that_shrinks() -> None:
    """Then every method builds again; the peers have learnt meanwhile and keep what they know."""
    method = Mimic(2)
    attar.Distiller(Net().double(), [method], attar.Classification(3)).build(IMAGES)
    before = list(method.peers.networks)
    attar.Distiller(Net().double(), [method], attar.Classification(3)).build(IMAGES)
    assert list(method.peers.networks) == before
    assert len(method.peers.outputs(IMAGES)) == 2


def test_outputs_are_those_of_each_network_alone() -> None:
    distiller = built(Mimic([drawn(1), drawn(2)]))
    peers = distiller.methods["Mimic"].peers
    assert len(peers) == 2
    halves = list(IMAGES.chunk(2))
    for images in ([IMAGES, IMAGES], halves):
        for network, x, shown, logits in zip(peers.networks, images, peers.outputs(images), peers(images), strict=True):
            low = network.low(x)
            torch.testing.assert_close(shown.stages[0], low)
            torch.testing.assert_close(shown.stages[1], network.high(low))
            torch.testing.assert_close(shown.embedding, network.high(low).mean(dim=(2, 3)))
            torch.testing.assert_close(shown.logits, network(x))
            torch.testing.assert_close(logits, network(x))
            torch.testing.assert_close(shown.student(x.flip(-1)).logits, network(x.flip(-1)))
    torch.testing.assert_close(peers(IMAGES)[1], peers.networks[1](IMAGES))


def test_they_are_children_and_are_gone_after_strip() -> None:
    method = Mimic(peers=2)
    distiller = built(method)
    plain = sum(p.numel() for p in distiller.student.parameters())
    assert sum(p.numel() for p in distiller.parameters()) == 3 * plain
    terms = distiller((IMAGES, LABELS), 0.5)
    terms.total().backward()
    assert all(p.grad is not None for p in method.parameters())
    assert list(distiller.strip().state_dict()) == list(Net().state_dict())


def test_every_network_can_be_stripped() -> None:
    class Overwritten(Mimic):
        """Reads what an activation in place overwrites."""

        name = "Mimic"

        def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
            inside = any(call.module == "first.1" for call in anatomy.calls)
            return [*super().taps(anatomy), *([Tap("first.1", layout="nchw")] if inside else [])]

    distiller = built(Overwritten([drawn(1), HandWritten(3)]))
    names = ["Mimic.peer1", "Mimic.peer2", "Mimic.ensemble"]
    assert list(distiller.deployables()) == names
    networks = [distiller.student, *distiller.methods["Mimic"].peers.networks]
    distiller.train()
    distiller((IMAGES, LABELS), 0.5).total().backward()
    first, second, ensemble = (distiller.strip(name) for name in names)
    distiller.eval()
    logits = [network(IMAGES) for network in networks]
    assert torch.equal(first(IMAGES), logits[1])
    assert torch.equal(second(IMAGES), logits[2])
    mean = torch.stack([z.softmax(1) for z in logits]).mean(0)
    torch.testing.assert_close(ensemble(IMAGES).softmax(1), mean)
    assert type(second) is HandWritten
    HandWritten(3).load_state_dict(second.state_dict(), strict=True)
    # No hook stays, and activations that had to leave their place are back in it.
    for network in (first, second, ensemble):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert second.first[2].inplace
    assert not networks[2].first[2].inplace  # type: ignore[union-attr]
    # A copy: training goes on without it.
    assert not {id(p) for p in second.parameters()} & {id(p) for p in distiller.parameters()}


def test_given_networks_are_used_as_they_are() -> None:
    peer = drawn()
    before = copy.deepcopy(peer).double().state_dict()
    distiller = built(Mimic(peer))
    assert distiller.methods["Mimic"].peers.networks[0] is peer
    assert all(torch.equal(value, before[key]) for key, value in peer.state_dict().items())
    assert len(built(Mimic(nn.ModuleList([drawn(1), drawn(2)]))).methods["Mimic"].peers) == 2


class _Auxiliary(Net):
    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return (logits, logits) if self.training else logits  # type: ignore[return-value]


def refusals() -> dict[str, tuple[object, str]]:
    student = drawn(0)
    twice = drawn(1)
    return {
        "negative": (-1, "cannot have -1 peers"),
        "no network": (["resnet18"], "networks or their number, not 'resnet18'"),
        "the student": (student, r"peer 1 \(Net\) has the student's own weights"),
        "a copy": (copy.deepcopy(student), "begins with a copy of the student's weights"),
        "twice": ([twice, twice], r"peer 2 \(Net\) has another peer's own weights"),
        "classes": (drawn(2, classes=5), r"The peer 1 returns \[2, 5\] instead of \[N, 3\]"),
        "images": (
            nn.Sequential(nn.Flatten(), nn.Linear(7, 3)),
            r"refuses images of shape \[3, 16, 16\] .* give a net",
        ),
        "training": (_Auxiliary(), "returns a tuple instead of one logits tensor"),
        "student": (student, "x"),
    }


@pytest.mark.parametrize("name", [name for name in refusals() if name != "student"])
def test_what_cannot_be_a_peer_is_refused(name: str) -> None:
    cases = refusals()
    student, (given, sentence) = cases["student"][0], cases[name]
    assert isinstance(student, nn.Module)
    with pytest.raises(AttarError, match=sentence):
        built(Mimic(given), student).train()((IMAGES, LABELS), 0.5)  # type: ignore[arg-type]


def test_a_network_without_stages_can_be_a_peer_that_only_answers() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))

    class Answering(Mimic):
        def build(self, probe: Probe) -> None:
            self.peers.build(probe)

        def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
            return {"ce": torch.stack([outputs.task_loss(z, batch.targets) for z in self.peers(outputs.images)]).sum()}

    distiller = built(Answering(flat))
    distiller((IMAGES, LABELS), 0.5).total().backward()
    assert flat[1].weight.grad is not None
    with pytest.raises(TypeError, match="Say beforehand"):
        distiller.methods["Answering"].peers.outputs(IMAGES)
    with pytest.raises(AttarError, match="No stage was found"):
        built(Mimic(copy.deepcopy(flat)))


def test_one_view_each() -> None:
    images = torch.arange(12.0).view(6, 1, 1, 2)
    labels = torch.tensor([3, 4, 3, 4, 3, 4])
    partners = Batch(-images, labels, labels, labels, 3)
    whole = Batch(images, labels, torch.arange(2).repeat(3), labels, 3, partners)
    cut = one_view_each(whole, 2)
    assert cut.views == 1
    assert torch.equal(cut.images, images[:2])
    assert all(torch.equal(a, b) for a, b in zip(cut.peer_images, (images[2:4], images[4:]), strict=True))
    assert cut.labels is not None
    assert cut.index is not None
    assert cut.partners is not None
    assert [t.tolist() for t in (cut.targets, cut.labels, cut.index)] == [[3, 4], [3, 4], [0, 1]]
    assert torch.equal(cut.partners.images, -images[:2])
    assert len(one_view_each(whole, 1).peer_images) == 1


def test_a_run_measures_every_network_and_a_kept_one_is_that(tmp_path: Path) -> None:
    method = {"name": "DML", "options": {"peers": ["cifar_resnet20"]}}
    result = fit(tiny(method, train_limit=64, epochs=1), tmp_path, console=quiet())
    assert list(result["deployables"]) == ["DML.peer1", "DML.ensemble"]
    student, peer = result["parameters"]["deployed"], result["deployables"]["DML.peer1"]["parameters"]
    assert student < peer == sum(p.numel() for p in make_model("cifar_resnet20", 10).parameters())
    assert result["deployables"]["DML.ensemble"]["parameters"] == student + peer
    assert all(0 <= other["test"]["top1"] <= 1 for other in result["deployables"].values())
    assert result["attached"]["DML"]["auxiliaries"] == {"peers": peer}


class TestContract(MethodContract):
    """Peers whose features are read, of another kind than the student."""

    def method(self) -> Method:
        torch.manual_seed(9)
        return Mimic([HandWritten(self.num_classes)])

    def student(self) -> nn.Module:
        return HandWritten(self.num_classes)
