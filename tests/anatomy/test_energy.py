from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attar.anatomy import survey
from attar.anatomy.energy import flat_stages, stages_with_maps
from attar.errors import AttarError

IMAGES = torch.zeros(2, 3, 16, 16)


class Block(nn.Module):
    """A convolution that a layer norm over channels ends, or is only a branch of."""

    def __init__(self, into: int, out: int, residual: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.residual = nn.Conv2d(into, out, 3, 2, 1), nn.LayerNorm(out), residual

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x * 9 + y if self.residual else y


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.head = Block(3, 6, residual=False), Block(6, 8, residual=True), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.high(self.low(images)).mean(dim=(2, 3)))


def found(network: nn.Module, *names: str) -> list[str]:
    anatomy, _ = survey(network, IMAGES, names)
    return [stage.name for stage in flat_stages(network, anatomy, anatomy.stages, IMAGES)]


def test_a_layer_norm_over_channels_is_flat_until_it_is_trained() -> None:
    torch.manual_seed(0)
    network = Normed().train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    assert found(network, "low", "low.conv", "high.conv", "high") == ["low"]
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training and not module._forward_hooks for module in network.modules())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        network.low.norm.weight[0] = 2.0
    assert found(network, "low") == []


def test_what_only_moves_values_stands_behind_the_norm_too() -> None:
    network = nn.Sequential(Block(3, 6, residual=False), nn.Dropout(), nn.ReLU(), nn.Flatten(), nn.Linear(384, 3))
    assert found(network, "0", "1", "2") == ["0", "1"]


def test_own_stages_without_a_map_are_left_out_and_named_ones_refused() -> None:
    torch.manual_seed(0)
    network = Normed()
    anatomy, _ = survey(network, IMAGES)
    assert [stage.name for stage in anatomy.stages] == ["low", "high"]
    assert [stage.name for stage in stages_with_maps(network, anatomy, None, IMAGES)] == ["high"]
    assert [stage.name for stage in stages_with_maps(network, anatomy, ["low.conv"], IMAGES)] == ["low.conv"]
    with pytest.raises(AttarError, match=r"^Stage 'low' has no attention map, .*: name a module before it\.$"):
        stages_with_maps(network, anatomy, ["low", "high"], IMAGES)


def test_a_single_position_is_not_judged() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 3))
    assert found(network, "0") == []
    norm = nn.Sequential(nn.Conv2d(3, 4, 16), nn.LayerNorm([4, 1, 1]), nn.Flatten(), nn.Linear(4, 3))
    assert found(norm, "1") == []
