"""What a run costs: arithmetic, counted, and memory, observed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["PeakMemory", "flops", "multiply_adds"]

_PROC = Path("/proc/self")


def flops(run: Callable[[], object]) -> int:
    """Count the floating-point operations of convolutions, linear layers and attention in one call.

    A multiplication and an addition count as two; a backward pass inside the call is counted too.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def multiply_adds(run: Callable[[], object]) -> int:
    """Count the multiply-adds of convolutions, linear layers and attention in one call: half of the FLOPs."""
    return flops(run) // 2


class PeakMemory:
    """The most memory that was in use since this was made.

    On a GPU: what torch had allocated there. On a CPU: the resident memory of the process, less what it held at the
    beginning, so that the libraries do not count.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with suppress(OSError):
            (_PROC / "clear_refs").write_text("5")  # Linux: the peak begins anew
        self._before = _resident()

    def bytes(self) -> int:
        """Return the peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(_peak_resident() - self._before, 0)


def _resident() -> int:
    return _status("VmRSS") or _peak_resident()


def _peak_resident() -> int:
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # no such thing on Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _status(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", (_PROC / "status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
