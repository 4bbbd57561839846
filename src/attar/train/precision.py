"""Which numbers the network computes in: float32, or bfloat16 where that is faster."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

__all__ = ["autocast", "computes_bf16", "resolved"]


def computes_bf16(device: torch.device) -> bool:
    """Say whether the hardware multiplies bfloat16 natively (elsewhere it is emulated, and slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return False


def resolved(precision: str, device: torch.device, network: nn.Module) -> str:
    """Turn `auto` into the numbers that `network` trains faster in on this device: `bf16` or `fp32`.

    bfloat16 where the hardware multiplies it, but on processors not for networks with depthwise convolutions, whose
    bfloat16 kernels there are slow enough to cost MobileNets more than the other layers gain (benchmarks/speed.md).
    """
    if precision != "auto":
        return precision
    slow = device.type == "cpu" and any(map(_is_depthwise, network.modules()))
    return "bf16" if computes_bf16(device) and not slow else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return the context of a forward pass; weights stay float32 and losses are computed in float32 by the methods."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
