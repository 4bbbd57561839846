"""Channel surgery: a network loses channels in place and keeps its class and keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from attar.errors import AttarError

__all__ = ["Kept", "is_depthwise", "slice_"]

# What is left of a network, in plain types: by module, which of its "in" and "out" channels, counted as the whole
# network counts them. A module that keeps everything is not named; a depth-wise convolution has "out" alone.
Kept = Mapping[str, Mapping[str, Sequence[int]]]


def is_depthwise(module: nn.Module) -> bool:
    """Whether a module is a convolution with one filter per channel."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def slice_(network: nn.Module, kept: Kept) -> nn.Module:
    """Take away every channel that is not kept, in place; return the network.

    Weights and batch statistics are sliced by torch-pruning, one module at a time, so that nothing but the network and
    the lists is needed. Parameters that lose channels are new objects: an optimiser must be made anew.

    Args:
        network: whole, as it was when the lists were made.
        kept: what stays.

    Raises:
        AttarError: the lists are not of this network.
    """
    for path, sides in kept.items():
        try:
            module = network.get_submodule(path)
        except AttributeError:
            module = nn.Module()  # which has nothing to cut
        for side, indices in sides.items():
            cut = _cut(module, side)
            if cut is None or not indices or not 0 <= min(indices) <= max(indices) < cut[0]:
                raise AttarError(
                    f"The list of kept channels does not fit '{path}' of {type(network).__name__}: "
                    "it was made for another network."
                )
            channels, prune = cut
            removed = sorted(set(range(channels)) - set(indices))
            flag = next(module.parameters()).requires_grad
            prune(module, removed)
            module.requires_grad_(flag)
            for value in module.parameters():
                value.grad = None
    return network


def _cut(module: nn.Module, side: str) -> tuple[int, Callable[[nn.Module, list[int]], Any]] | None:
    """How many channels that side of a module has, and what takes some of them away."""
    from torch_pruning.pruner import function

    if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
        return (module.num_features, function.prune_batchnorm_out_channels) if side == "out" else None
    if isinstance(module, nn.Linear):
        if side == "out":
            return module.out_features, function.prune_linear_out_channels
        return module.in_features, function.prune_linear_in_channels
    if is_depthwise(module):
        channels: int = module.out_channels  # type: ignore[assignment]
        return (channels, function.prune_depthwise_conv_out_channels) if side == "out" else None
    if isinstance(module, nn.Conv2d):
        if side == "out":
            return module.out_channels, function.prune_conv_out_channels
        return module.in_channels, function.prune_conv_in_channels
    return None
