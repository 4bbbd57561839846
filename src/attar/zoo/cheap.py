"""Cheap convolutions: a network's own 3x3 convolutions replaced, its depth and the sizes of its maps unchanged."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple, TypeVar

from torch import nn

from attar.errors import AttarError, unknown_name

__all__ = ["cheap_convolution", "cheapen"]

_KINDS = ("Conv", "Conv2x2", "DConv", "DConvG8", "DConvA8", "ConvB2", "DConvB2", "G8B2", "A8B2")
_Network = TypeVar("_Network", bound=nn.Module)


def cheapen(network: _Network, kind: str) -> _Network:
    """Replace every 3x3 convolution inside the blocks of a network by a cheap one, in place; return the network.

    Kinds, for N channels in and out, with their weights (batch norm and ReLU between the layers, none after the last):
        Conv            3x3                                                     9 N^2
        Conv2x2         2x2, dilated by 2                                       4 N^2
        DConv           depth-wise 3x3, 1x1                                     9 N + N^2
        DConvG{k}       3x3 in groups of k channels, 1x1                        9 k N + N^2
        DConvA{g}       3x3 in g groups, 1x1                                    9 N^2 / g + N^2
        ConvB{b}        1x1 to N / b channels, 3x3, 1x1 back                    2 N^2 / b + 9 N^2 / b^2
        DConvB{b}       the same around a depth-wise 3x3                        2 N^2 / b + 9 N / b
        G{k}B{b}        the same around a 3x3 in groups of k channels           2 N^2 / b + 9 k N / b
        A{g}B{b}        the same around a 3x3 in g groups                       2 N^2 / b + 9 N^2 / (g b^2)

    k counts the channels of a group, not the groups. The stride is the 3x3 layer's; N / b is that of the output. New
    weights are drawn from normal(0, sqrt(2 / (s s out))), s the side of the kernel.

    A block is a module of the network's own classes (no container of torch.nn) with two convolutions or more; the one
    that holds the first convolution is the stem and stays, as do 1x1, grouped and larger convolutions.

    Args:
        network: any residual network; its other weights stay.
        kind: as above, with numbers: "G8B2".

    Raises:
        AttarError: an unknown kind, no such convolution, or channels that a convolution's groups or bottleneck do not
            divide (it is named). The network is unchanged then.

    Source: Crowley, Gray, Storkey, "Moonshine: Distilling with Cheap Convolutions", NeurIPS 2018 (arXiv 1711.02613).
    """
    replaced = {name: cheap_convolution(module, kind, name) for name, module in _replaceable(network).items()}
    if not replaced:
        raise AttarError(
            f"{type(network).__name__} has no 3x3 convolution inside a block, so nothing of it can be made cheap: "
            "choose a residual network."
        )
    for name, module in replaced.items():
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, module)
    return network


def cheap_convolution(conv: nn.Conv2d, kind: str, name: str = "the convolution") -> nn.Module:
    """Return a new, cheap substitute of one 3x3 convolution; see `cheapen` for its kinds.

    Shapes: [N, inputs, H, W] -> [N, outputs, H', W'], as the convolution itself.

    Raises:
        AttarError: an unknown kind, or channels that its groups or its bottleneck do not divide.
    """
    form = _form(kind)
    inputs, outputs = conv.in_channels, conv.out_channels

    def divided(channels: int, by: int) -> int:
        if channels % by:
            raise AttarError(
                f"{kind} cannot replace '{name}': its {channels} channels are not divisible by {by}, so choose "
                "another kind or another width."
            )
        return channels // by

    def spatial(channels: int, into: int, bias: bool) -> nn.Conv2d:
        groups = divided(channels, form.of_channels) if form.of_channels else form.groups
        divided(channels, groups)
        # Two weights that are two apart reach as far as three.
        dilation = (2 * conv.dilation[0], 2 * conv.dilation[1]) if form.side == 2 else conv.dilation
        settings: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": dilation}
        return nn.Conv2d(
            channels, into, form.side, groups=groups, bias=bias, padding_mode=conv.padding_mode, **settings
        )

    def point(channels: int, into: int, bias: bool = False) -> nn.Conv2d:
        return nn.Conv2d(channels, into, 1, bias=bias)

    def between(channels: int) -> tuple[nn.Module, nn.Module]:
        return nn.BatchNorm2d(channels), nn.ReLU(inplace=True)

    bias = conv.bias is not None
    layers: tuple[nn.Module, ...]
    if form.bottleneck:
        inner = divided(outputs, form.bottleneck)
        layers = (
            *(point(inputs, inner), *between(inner)),
            *(spatial(inner, inner, False), *between(inner)),
            point(inner, outputs, bias),
        )
    elif form.pointwise:
        layers = (spatial(inputs, inputs, False), *between(inputs), point(inputs, outputs, bias))
    else:
        layers = (spatial(inputs, outputs, bias),)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2 / (math.prod(layer.kernel_size) * layer.out_channels)))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    cheap = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    return cheap.to(conv.weight.device, conv.weight.dtype).train(conv.training)


class _Form(NamedTuple):
    side: int = 3
    pointwise: bool = False  # a 1x1 convolution behind
    bottleneck: int = 0  # b; 0: none
    groups: int = 1
    of_channels: int = 0  # k, where channels per group are given instead of groups


def _form(kind: str) -> _Form:
    numbers = [int(digits) for digits in re.findall(r"\d+", kind)]
    match (re.sub(r"\d+", "#", kind), *numbers):
        case ("Conv",):
            return _Form()
        case ("Conv#x#", 2, 2):
            return _Form(side=2)
        case ("DConv",):
            return _Form(pointwise=True, of_channels=1)
        case ("DConvG#", int(k)) if k:
            return _Form(pointwise=True, of_channels=k)
        case ("DConvA#", int(g)) if g:
            return _Form(pointwise=True, groups=g)
        case ("ConvB#", int(b)) if b:
            return _Form(bottleneck=b)
        case ("DConvB#", int(b)) if b:
            return _Form(bottleneck=b, of_channels=1)
        case ("G#B#", int(k), int(b)) if k and b:
            return _Form(bottleneck=b, of_channels=k)
        case ("A#B#", int(g), int(b)) if g and b:
            return _Form(bottleneck=b, groups=g)
    raise unknown_name("cheap convolution", kind, _KINDS)


def _replaceable(network: nn.Module) -> dict[str, nn.Conv2d]:
    """Find the 3x3 convolutions inside blocks, by name."""
    convolutions = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    first = next(iter(convolutions), "")
    found: dict[str, nn.Conv2d] = {}
    for block, module in network.named_modules():
        if not block or isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            continue
        inside = [name for name in convolutions if name.startswith(f"{block}.")]
        if len(inside) < 2 or first in inside:
            continue
        for name in inside:
            conv = convolutions[name]
            if conv.kernel_size == (3, 3) and conv.groups == 1:
                if type(conv) is not nn.Conv2d:
                    raise AttarError(
                        f"'{name}' is a {type(conv).__name__}, which pads or scales in its own way and cannot be "
                        "replaced by a cheap convolution: choose another network."
                    )
                found[name] = conv
    return found
