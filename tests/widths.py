"""Networks with random batch norms, their groups of channels, and what they really cost."""

from __future__ import annotations

import functools

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import attar.zoo  # noqa: F401 - registers the CIFAR networks
from attar.anatomy import Limit, Structure, channel_groups

# Networks by name, with the side of their images.
SIDES = {"cifar_resnet20": 16, "cifar_resnet56": 32, "mobilenetv2_100": 32, "torchvision:mobilenet_v2": 32}


def stirred(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm scales, shifts and statistics as a trained one might have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for value, low, high in (
                    (module.weight, -1.0, 2.0),
                    (module.bias, -0.3, 0.5),
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 2.0),
                ):
                    value.copy_(torch.empty_like(value).uniform_(low, high, generator=generator))
    return network.eval()


@functools.cache
def network(name: str) -> nn.Module:
    """In float64, to read only: copy it before changing it."""
    torch.manual_seed(0)
    kind = name.removeprefix("torchvision:")
    made = torchvision.models.get_model(kind) if kind != name else timm.create_model(name)
    return stirred(made.double())


@functools.cache
def images(name: str) -> Tensor:
    side = SIDES[name]
    return torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@functools.cache
def structure(name: str) -> Structure:
    return channel_groups(network(name), images(name))


def whole(known: Structure) -> list[int]:
    return [group.channels for group in known.groups]


def scales(known: Structure, of: nn.Module) -> list[list[float]]:
    """|gamma| of every channel of every group, the largest of its norms."""
    found = []
    for group in known.groups:
        norms = [of.get_submodule(gate.module).weight[list(gate.indices)].abs() for gate in group.gates]
        found.append(torch.stack(norms).amax(dim=0).tolist())
    return found


def limit(known: Structure, share: float, resource: str) -> Limit:
    return Limit(share * known.cost(whole(known), resource), tuple(range(len(known.groups))))  # type: ignore[arg-type]


def counted(of: nn.Module, resource: str, side: int) -> int:
    """Parameters, or multiply-adds of one image, of a real network."""
    if resource == "params":
        return sum(parameter.numel() for parameter in of.parameters())
    like = next(of.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        of(torch.zeros(1, 3, side, side, dtype=like.dtype))
    return counter.get_total_flops() // 2
