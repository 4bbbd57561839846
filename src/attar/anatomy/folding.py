"""What a channel still says when its scale is zero, moved into the layer that hears it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attar.anatomy.groups import Structure

__all__ = ["switch_off_"]

# Relative to the largest value that a layer reads: a channel that varies by no more is constant.
_CONSTANT = 1e-6


def switch_off_(network: nn.Module, structure: Structure, channels: Sequence[Collection[int]], images: Tensor) -> int:
    """Set the scales and shifts of every channel but these to zero, in place, and keep what their shifts said.

    With its scale alone at zero a channel is a constant, act(beta) behind its activation. A layer without padding that
    reads the constant c adds W c to its output: that goes into its bias, or is taken from the running mean of the batch
    norm that alone follows. So the answers in evaluation mode stay what they were with the scales at zero. Behind
    padding the constant ends at the border, and nothing is moved: there, and in training mode, where batch statistics
    follow by themselves, only the shift is lost.

    Args:
        network: whole.
        structure: its groups.
        channels: of every group, those that stay.
        images: an example batch; what varies with the image is no constant.

    Returns:
        How many layers took a constant over.
    """
    structure.mask_(network, channels, shifts=False)
    leaving = {
        path: sorted(set(range(_inputs(network.get_submodule(path)))) - set(sides["in"]))
        for path, sides in structure.kept(channels).items()
        if "in" in sides
    }
    shifts = {path: shift for path, shift in _heard(network, images, leaving).items() if bool(shift.any())}
    taken = 0
    with torch.no_grad():
        for path, shift in shifts.items():
            layer = network.get_submodule(path)
            if isinstance(layer.bias, Tensor):
                layer.bias += shift
            elif path in structure.followers:
                mean = network.get_submodule(structure.followers[path]).running_mean
                if not isinstance(mean, Tensor):
                    continue
                mean -= shift
            else:
                continue
            taken += 1
    structure.mask_(network, channels)
    return taken


def _inputs(module: nn.Module) -> int:
    width = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    assert isinstance(width, int)
    return width


def _heard(network: nn.Module, images: Tensor, leaving: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return what the leaving channels add to the output of every layer [C_out] that reads them as constants."""
    found: dict[str, Tensor] = {}
    varied: set[str] = set()

    def listen(path: str, places: list[int]) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            read = args[0].movedim(1 if isinstance(module, nn.Conv2d) else -1, 0)[places].flatten(1)
            low, high = read.aminmax(dim=1)
            if path in found or bool((high - low > _CONSTANT * args[0].abs().max()).any()):
                varied.add(path)
            found[path] = weight[:, places].flatten(2).sum(2).mv(low) if weight.ndim == 4 else weight[:, places].mv(low)

        return hook

    handles = []
    for path, places in leaving.items():
        layer = network.get_submodule(path)
        # Subclasses may pad or rescale by themselves.
        if type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.padding in ((0, 0), "valid")):
            handles.append(layer.register_forward_pre_hook(listen(path, places)))
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            network(torch.cat([images, images.flip(0).roll(1, -1) * 0.5]))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return {path: shift for path, shift in found.items() if path not in varied}
