"""What an artefact costs in its own runtime: the time of one answer, and the memory it takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from attar.deploy.artefact import Images, Runtime
from attar.deploy.report import Latency, Timing
from attar.train.timing_loop import processor, time_answers

__all__ = ["measure_latency", "measure_memory"]

_PEAK = Path("/proc/self/clear_refs")


def measure_latency(load: Callable[[int], Runtime], shape: tuple[int, int, int, int]) -> Latency:
    """Measure how long an artefact takes for a batch in its own runtime, on one thread and on all of them.

    At least 30 answers after a warm-up, at most 300, for about a second, each.

    Args:
        load: number of threads -> the loaded artefact.
        shape: [N, 3, H, W] of the images; N = 1 is what devices do.
    """
    return {"one_thread": _timed(load, 1, shape), "all_threads": _timed(load, _threads(), shape), "device": processor()}


def _timed(load: Callable[[int], Runtime], threads: int, shape: tuple[int, int, int, int]) -> Timing:
    runtime, images = load(threads), _images(shape)
    return {**time_answers(lambda: runtime(images)), "threads": threads}


def _threads() -> int:
    """Return how many processors this process may use."""
    with contextlib.suppress(AttributeError):  # macOS and Windows do not tell
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _images(shape: Sequence[int]) -> Images:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def measure_memory(load: Callable[[int], Runtime], shape: tuple[int, int, int, int]) -> int | None:
    """Measure the bytes that loading an artefact and answering a batch add to this process, at their peak.

    It is loaded once before, so that the runtime's own libraries are not counted, and what was freed goes back to the
    system, so that it counts when it is taken again. Nothing else may run meanwhile.

    Args:
        load: number of threads -> the loaded artefact.
        shape: [N, 3, H, W] of the images.

    Returns:
        None where the system does not tell: it is not Linux with glibc.
    """
    images = _images(shape)
    load(1)(images)
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _PEAK.write_text("5")  # begins anew
        before = _status("VmRSS")
        load(1)(images)
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, TypeError, StopIteration):
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024
