"""Stages whose maps say nothing about where: the same energy at every position, whatever the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attar.anatomy.stages import Anatomy, Stage
from attar.anatomy.taps import Recorder
from attar.errors import AttarError
from attar.functional import attention_map

__all__ = ["flat_stages", "stages_with_maps"]

# Energies behind a fresh layer norm differ by little more than its epsilon; trained weights soon spread them further.
_SAME = 0.05


def stages_with_maps(
    network: nn.Module, anatomy: Anatomy, names: Sequence[str] | None, images: Tensor
) -> tuple[Stage, ...]:
    """Return the stages named, or all of the network's own that have an attention map.

    Raises:
        AttarError: a stage that was named has none, or does not exist.
    """
    chosen = anatomy.stages if names is None else tuple(anatomy.find(name) for name in names)
    flat = flat_stages(network, anatomy, chosen, images)
    if names is not None and flat:
        raise AttarError(
            f"Stage '{flat[0].name}' has no attention map, since a layer norm over channels gives every position the "
            "same energy: name a module before it."
        )
    return tuple(stage for stage in chosen if stage not in flat)


def flat_stages(network: nn.Module, anatomy: Anatomy, stages: Sequence[Stage], images: Tensor) -> list[Stage]:
    """Return the stages behind a layer norm over channels that have equal energy at every position.

    Such a norm fixes the sum of squares over channels until its own weights have been trained. Energies are judged by
    one evaluation pass on noise of the shape of `images`; the network is left as it is.
    """
    normed = [stage for stage in stages if _behind_layer_norm(network, anatomy, stage.name)]
    if not normed:
        return []
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
    taps = [stage.tap for stage in normed]
    recorder = Recorder(network, taps, cloned=taps)
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            _, values = recorder.run(noise)
    finally:
        recorder.remove()
        for module, mode in modes.items():
            module.training = mode
    return [stage for stage in normed if _flat(attention_map(values[stage.tap]).flatten(1))]


def _behind_layer_norm(network: nn.Module, anatomy: Anatomy, name: str) -> bool:
    """Whether the last leaf with parameters that ran until a module returned is a layer norm or RMS norm."""
    end = max(position for position, call in enumerate(anatomy.calls) if call.module == name)
    for call in reversed(anatomy.calls[: end + 1]):
        module = network.get_submodule(call.module)
        if call.leaf and next(module.parameters(), None) is not None:
            # By name: timm, torchvision and others have classes of their own.
            kind = type(module).__name__.casefold()
            return "layernorm" in kind or "rmsnorm" in kind
    return False


def _flat(energy: Tensor) -> bool:
    low, high = energy.aminmax(dim=1)
    return energy.shape[1] > 1 and bool((high - low <= _SAME * high).all())
