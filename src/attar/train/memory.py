"""Channels-last where it is safe, and freed memory that stays with the process."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import nn

__all__ = ["keep_freed_memory", "memory_format"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's numbers, from malloc.h


def memory_format(network: nn.Module, device: torch.device, channels_last: bool = True) -> torch.memory_format:
    """Return the memory format in which a network and its images are to be trained.

    On x86 the weight gradient of a strided 1x1 convolution with fewer input channels than the vector has lanes is
    computed wrongly from channels-last tensors, and writes past its workspace (oneDNN #6035, open): such a network
    trains contiguously there. Evaluation is not affected.
    """
    unsafe = device.type == "cpu" and any(_breaks(module) for module in network.modules())
    return torch.channels_last if channels_last and not unsafe else torch.contiguous_format


def _breaks(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or set(module.kernel_size) != {1} or set(module.stride) == {1}:
        return False
    lanes = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    return module.in_channels // module.groups < lanes


def keep_freed_memory() -> bool:
    """Let the C library keep what it frees instead of giving it back to the system; True where it does.

    By default glibc gives the activations back after every step and takes them again page by page in the next, ten
    thousand page faults. The process then stays at its peak until it ends. Other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(_TRIM_THRESHOLD, -1) and library.mallopt(_MMAP_MAX, 0))
