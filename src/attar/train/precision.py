"""Which numbers the network computes in: float32, or bfloat16 where the hardware has it."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

__all__ = ["autocast", "computes_bf16", "resolved"]


def computes_bf16(device: torch.device) -> bool:
    """Say whether the hardware multiplies bfloat16 natively (elsewhere it is emulated, and slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return False


def resolved(precision: str, device: torch.device) -> str:
    """Turn `auto` into `bf16` or `fp32`."""
    if precision == "auto":
        return "bf16" if computes_bf16(device) else "fp32"
    return precision


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return the context of a forward pass; weights stay float32 and losses are computed in float32 by the methods."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=resolved(precision, device) == "bf16")
