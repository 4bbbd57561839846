"""Groups of channels: tied rightly, priced as counted, removed as masked; what has no rule is refused or left alone."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
from torch import Tensor, nn

import widths
from architectures import HandWritten
from attar.anatomy import channel_groups, slice_
from attar.errors import AttarError

NETWORKS = ["cifar_resnet56", "mobilenetv2_100"]


class Pair(nn.Module):
    """The worked example: 3x3 16 -> 32 on 8 x 8, then a depth-wise 3x3 on 32 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 16, 1, bias=False)
        self.dense = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.leave = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.dense(self.enter(x))))
        return self.leave(torch.relu(self.norm2(self.depthwise(x))).mean(dim=(2, 3)))


def test_the_worked_costs() -> None:
    network, images = Pair(), torch.randn(2, 3, 8, 8)
    structure = channel_groups(network, images)
    costs = {layer.module: (layer.cost([0], "params"), layer.cost([0], "macs")) for layer in structure.layers}
    assert costs["dense"] == (4608, 294912)
    assert costs["depthwise"] == (288, 18432)
    assert costs["norm1"] == (64, 0)
    assert costs["leave"] == (165, 160)
    # Expansion and depth-wise convolution live or die together.
    (group,) = structure.groups
    assert [gate.module for gate in group.gates] == ["norm1", "norm2"]
    assert structure.marginal([32], 0, "params") == 16 * 9 + 9 + 4 + 5
    assert structure.marginal([32], 0, "macs") == 64 * (16 * 9 + 9) + 5
    assert structure.rest == {"macs": 0, "params": 0}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("resource", ["macs", "params"])
def test_the_formula_is_what_is_counted(name: str, resource: str) -> None:
    structure, network, side = widths.structure(name), copy.deepcopy(widths.network(name)), widths.SIDES[name]
    assert structure.cost(widths.whole(structure), resource) == widths.counted(network, resource, side)
    draw = torch.Generator().manual_seed(3)
    staying = [
        torch.randperm(count, generator=draw)[: int(torch.randint(1, count + 1, (), generator=draw))].tolist()
        for count in widths.whole(structure)
    ]
    slice_(network, structure.kept(staying))
    assert structure.cost([len(channels) for channels in staying], resource) == widths.counted(network, resource, side)


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_equals_sliced(name: str) -> None:
    structure, network, images = widths.structure(name), widths.network(name), widths.images(name)
    draw = torch.Generator().manual_seed(4)
    staying = [
        [channel for channel in range(count) if float(torch.rand((), generator=draw)) < 0.6] or [0]
        for count in widths.whole(structure)
    ]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        masked = structure.mask_(copy.deepcopy(network).to(dtype), staying)
        sliced = slice_(copy.deepcopy(network).to(dtype), structure.kept(staying))
        with torch.no_grad():
            expected, found = masked(images.to(dtype)), sliced(images.to(dtype))
        scale = float(expected.abs().max())
        assert scale > 0
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(scale, 1.0))
        assert type(sliced) is type(network)
        assert list(sliced.state_dict()) == list(network.state_dict())
        assert sum(p.numel() for p in sliced.parameters()) < sum(p.numel() for p in network.parameters())


def test_a_residual_sum_ties_its_writers_over_the_whole_stage() -> None:
    structure = widths.structure("cifar_resnet20")
    gates = {tuple(gate.module for gate in group.gates) for group in structure.groups}
    assert len(structure.groups) == 3 + 9
    stream = {"layer2.0.bn2", "layer2.0.downsample.1", "layer2.1.bn2", "layer2.2.bn2"}
    assert any(set(tied) == stream for tied in gates)
    assert ("layer2.1.bn1",) in gates
    # The classifier's outputs and the stem's inputs are in no group.
    members = {(member.module, member.side) for group in structure.groups for member in group.members}
    assert ("fc", "out") not in members
    assert ("fc", "in") in members
    assert ("conv1", "in") not in members


def test_squeeze_and_excitation_is_tied_with_what_it_scales() -> None:
    torch.manual_seed(0)
    network = timm.create_model("mobilenetv3_small_050", num_classes=5).double().eval()
    structure = channel_groups(network, torch.randn(2, 3, 32, 32))
    expand = "blocks.0.0.se.conv_expand"
    tied = next(group for group in structure.groups if any(m.module == expand for m in group.members))
    assert {"blocks.0.0.conv_dw", "blocks.0.0.se.conv_reduce"} <= {member.module for member in tied.members}


def test_a_sum_with_a_writer_that_no_batch_norm_decides_keeps_its_width() -> None:
    torch.manual_seed(0)
    network = HandWritten(5)
    before = copy.deepcopy(network.state_dict())
    structure = channel_groups(network, torch.randn(2, 3, 32, 32))
    # `enter` has no batch norm, and `shortcut` writes into the sum behind `second` without one.
    assert [gate.module for group in structure.groups for gate in group.gates] == ["first.1", "third.1"]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training


class Shuffled(nn.Module):
    """Channels of two convolutions interleaved by a reshape that no rule follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.mixed = nn.Conv2d(16, 8, 1)
        self.leave = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = x.unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2)
        return self.leave(self.mixed(x).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)), "has no batch norm"),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten()),
            "Convolution '2' has 2 groups without being depth-wise",
        ),
        (Shuffled(), r"No channels of Shuffled can be taken away|cannot follow the channels of Shuffled"),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten()),
            "No channels of Sequential can be taken away",
        ),
    ],
    ids=["no batch norm", "grouped", "shuffled", "only outputs"],
)
def test_refusals(network: nn.Module, said: str) -> None:
    with pytest.raises(AttarError, match=said) as refused:
        channel_groups(network, torch.randn(2, 3, 8, 8))
    assert len(re.findall(r"[.!?](?:\s|$)", str(refused.value))) == 1


@pytest.mark.parametrize(
    "kept",
    [
        {"nowhere": {"out": [0]}},
        {"layer1.0.conv1": {"out": [0, 99]}},
        {"layer1.0.conv1": {"out": []}},
        {"layer1.0.bn1": {"in": [0]}},
        {"layer1": {"out": [0]}},
    ],
)
def test_lists_of_another_network_are_refused(kept: dict[str, dict[str, list[int]]]) -> None:
    with pytest.raises(AttarError, match=r"does not fit '.*' of CifarResNet: it was made for another network"):
        slice_(timm.create_model("cifar_resnet20"), kept)
