"""One thread per test process, and nothing that costs time and proves nothing: see each hook."""

from __future__ import annotations

import gc
import os
from typing import Any

# Processes with several threads each wait for one another, tens of times longer. Before torch is imported, and for
# every subprocess.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

gc.disable()  # until everything is imported and collected: none of it is garbage

NOT_SLOW = "not slow"  # the default -m, from pyproject.toml


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: Any, obj: object) -> list[pytest.Item] | None:
    """Do not even collect slow classes, thousands of methods on networks, only to deselect them: it takes seconds."""
    slow = isinstance(obj, type) and any(mark.name == "slow" for mark in getattr(obj, "pytestmark", ()))
    return [] if slow and collector.config.option.markexpr == NOT_SLOW else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test: of several processes none is to work on it alone while the others have ended."""
    items.sort(key=lambda item: item.name != "test_every_block_runs_in_order")


def pytest_collection_finish() -> None:
    """Keep what has been imported and collected out of garbage collection, which walks through all of it each time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Let go of it again: what is still frozen at the end is reported as leaked by the bindings that made it."""
    gc.unfreeze()
