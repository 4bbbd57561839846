from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from attar.anatomy import survey
from attar.anatomy.branches import BranchEnsemble, BranchNetwork, make_branches
from attar.errors import AttarError
from networks import IMAGES, Net


class ClassMaps(nn.Module):
    """Its classifier is a convolution, and the last stage is overwritten in place behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Tanh())
        self.high = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.Tanh())
        self.leave = nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.relu(self.high(self.low(images)), inplace=True)
        return self.leave(x).mean(dim=(2, 3))


class TwoHeads(Net):
    """The mean of two classifiers, each in a module that nothing cuts open."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Linear(8, 3))

    def forward(self, images: Tensor) -> Tensor:
        x = self.high(self.low(images)).mean(dim=(2, 3))
        return (self.head(x) + self.other(x)) / 2


def made(network: nn.Module, count: int = 2, **options: object):  # type: ignore[no-untyped-def]
    network.double()
    anatomy, _ = survey(network, IMAGES, num_classes=3)
    return make_branches(network, anatomy, IMAGES, count, method="Somebody", **options)


@pytest.mark.parametrize("network", [Net, TwoHeads])
def test_a_branch_tells_the_embedding_of_its_own_classifier(network: type[Net]) -> None:
    torch.manual_seed(0)
    halves, _, branches = made(network())
    carried = halves.trunk(IMAGES)
    for branch in branches:
        embedding, logits = branch(*carried)
        torch.testing.assert_close(embedding, branch.tail.high(carried[0]).mean(dim=(2, 3)))
        torch.testing.assert_close(logits, branch.tail(*carried))
        assert embedding.requires_grad
    assert not torch.equal(branches[0](*carried).embedding, branches[1](*carried).embedding)


def test_without_a_linear_classifier_it_is_the_pooled_last_stage() -> None:
    torch.manual_seed(0)
    halves, _, (branch,) = made(ClassMaps(), 1)
    carried = halves.trunk(IMAGES)
    expected = branch.tail.high(carried[0])
    assert (expected < 0).any()
    torch.testing.assert_close(branch(*carried).embedding, expected.mean(dim=(2, 3)))


def test_a_plain_tail_has_the_same_tensors_and_no_hooks() -> None:
    _, _, (branch,) = made(Net(), 1)
    plain = branch.plain()
    assert any(module._forward_pre_hooks for module in branch.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
    ours, theirs = dict(branch.tail.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert any(module._forward_pre_hooks for module in branch.modules())


def test_a_copied_branch_is_independent() -> None:
    halves, _, (branch,) = made(Net(), 1)
    carried = halves.trunk(IMAGES)
    before = branch(*carried)
    copied = copy.deepcopy(branch).eval()
    assert branch.training
    assert not copied.training
    assert all(torch.equal(*pair) for pair in zip(copied(*carried), before, strict=True))
    assert sum(len(module._forward_pre_hooks) for module in copied.modules()) == 1
    with torch.no_grad():
        copied.tail.high[0].weight.zero_()
    assert not torch.equal(copied(*carried).embedding, before.embedding)
    assert torch.equal(branch(*carried).embedding, before.embedding)


def test_networks_of_branches() -> None:
    network = Net()
    halves, _, branches = made(network)
    tails = [halves.tail, *(branch.plain() for branch in branches)]
    logits = [BranchNetwork(halves.trunk, tail)(IMAGES) for tail in tails]
    torch.testing.assert_close(logits[0], network(IMAGES))
    torch.testing.assert_close(logits[1], branches[0](*halves.trunk(IMAGES)).logits)
    torch.testing.assert_close(BranchEnsemble(halves.trunk, tails)(IMAGES), sum(logits) / 3)


def test_what_cannot_be_branched_is_refused() -> None:
    with pytest.raises(AttarError, match=r"^Somebody finds only one stage, so it cannot cut before the last"):
        made(nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)))
    with pytest.raises(AttarError, match=r"'high' does not lie behind 'high': cut at an earlier stage"):
        made(ClassMaps(), cut="high")
    with pytest.raises(AttarError, match="did you mean 'low'"):
        made(Net(), cut="lew")
