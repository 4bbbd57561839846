"""How long one answer takes: the loop that every measurement of latency shares, and the processor it ran on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

__all__ = ["Repeated", "processor", "time_answers"]

_WARM_UP, _FEWEST, _MOST, _SECONDS = 5, 30, 300, 1.0


class Repeated(TypedDict):
    """Seconds of many answers, one after another."""

    median_seconds: float
    p95_seconds: float
    repeats: int


def time_answers(answer: Callable[[], object]) -> Repeated:
    """Measure how long an answer takes: at least 30 of them after a warm-up, at most 300, for about a second."""
    for _ in range(_WARM_UP):
        answer()
    seconds: list[float] = []
    while len(seconds) < _FEWEST or (len(seconds) < _MOST and sum(seconds) < _SECONDS):
        began = time.perf_counter()
        answer()
        seconds.append(time.perf_counter() - began)
    return {
        "median_seconds": float(np.median(seconds)),
        "p95_seconds": float(np.quantile(seconds, 0.95)),
        "repeats": len(seconds),
    }


def processor() -> str:
    """Return the processor's name, "cpu" where the machine does not tell."""
    told = torch.cpu.get_capabilities().get("cpu_name")
    if told:
        return str(told)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")
