"""What self-distillation between the layers of one network shares: who imitates whom, and from when on."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

__all__ = ["Pairing", "layer_pairs", "linear_ramp"]

Pairing = Literal["adjacent", "deepest", "all"]


def layer_pairs(layers: int, pairing: Pairing) -> tuple[tuple[int, int], ...]:
    """Return the (shallow, deep) pairs among layers 0 .. L - 1, shallow to deep.

    Definition: "adjacent" {(l, l + 1)}, "deepest" {(l, L - 1)}, "all" every l < m; empty for fewer than two layers.
    """
    if pairing == "adjacent":
        return tuple((shallow, shallow + 1) for shallow in range(layers - 1))
    if pairing == "deepest":
        return tuple((shallow, layers - 1) for shallow in range(layers - 1))
    return tuple((shallow, deep) for shallow in range(layers) for deep in range(shallow + 1, layers))


def linear_ramp(progress: Tensor, length: float, start: float = 0.0) -> Tensor:
    """Ramp a weight from 0 to 1: `min(max((progress - start) / length, 0), 1)`; a step at `start` when length is 0.

    Shapes: `progress` a scalar tensor in [0, 1], the share of the run that is done; `start` and `length` are shares.
    """
    if length <= 0:
        return (progress >= start).to(progress.dtype)
    return ((progress - start) / length).clamp(0.0, 1.0)
