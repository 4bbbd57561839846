"""What artefacts cost: how often and how they are asked, and the memory that is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from attar.deploy.artefact import Images, Logits, Runtime
from attar.deploy.latency import measure_latency, measure_memory
from attar.train.timing_loop import processor, time_answers

SHAPE = (1, 3, 8, 8)
MEGABYTE = 2**20
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells peaks of memory")


def test_the_loop_warms_up_and_repeats() -> None:
    asked = []
    found = time_answers(lambda: asked.append(None))
    assert found["repeats"] == 300
    assert len(asked) > found["repeats"]
    assert 0 <= found["median_seconds"] <= found["p95_seconds"]


def test_an_artefact_is_timed_on_one_thread_and_on_all() -> None:
    loaded: list[int] = []
    shapes = set()

    def load(threads: int) -> Runtime:
        loaded.append(threads)

        def answer(images: Images) -> Logits:
            assert images.dtype == np.float32
            assert images.flags["C_CONTIGUOUS"]
            shapes.add(images.shape)
            return images.reshape(1, -1)[:, :10]

        return answer

    found = measure_latency(load, SHAPE)
    assert shapes == {SHAPE}
    assert loaded == [1, found["all_threads"]["threads"]]
    assert found["one_thread"]["threads"] == 1 <= found["all_threads"]["threads"]
    for timing in (found["one_thread"], found["all_threads"]):
        assert 30 <= timing["repeats"] <= 300
        assert 0 < timing["median_seconds"] <= timing["p95_seconds"]
    assert found["device"] == processor() != ""


def holding(weights: int, scratch: int) -> Callable[[int], Runtime]:
    """Return what loads an artefact with so many bytes of weights, and uses so many more while it answers."""

    def load(threads: int) -> Runtime:
        held = np.ones(weights, np.uint8)

        def answer(images: Images) -> Logits:
            used = np.ones(scratch, np.uint8)
            return np.full((len(images), 10), float(used[-1] + held[-1]), np.float32)

        return answer

    return load


@linux
@pytest.mark.parametrize(("weights", "scratch"), [(64, 16), (8, 48)])
def test_memory_is_weights_and_the_peak_of_an_answer(weights: int, scratch: int) -> None:
    found = measure_memory(holding(weights * MEGABYTE, scratch * MEGABYTE), SHAPE)
    assert found is not None
    assert found == pytest.approx((weights + scratch) * MEGABYTE, rel=0.1, abs=2 * MEGABYTE)


@linux
def test_memory_that_was_free_before_counts() -> None:
    # In pieces that the allocator keeps for itself when they are freed.
    kept = [np.ones(60_000, np.uint8) for _ in range(1000)]
    del kept

    def load(threads: int) -> Runtime:
        held = [np.ones(60_000, np.uint8) for _ in range(700)]
        return lambda images: np.full((len(images), 10), float(held[-1][-1]), np.float32)

    found = measure_memory(load, SHAPE)
    assert found is not None
    assert found == pytest.approx(42e6, rel=0.15)


def test_a_system_that_does_not_tell_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("attar.deploy.latency._PEAK", tmp_path / "absent" / "clear_refs")
    assert measure_memory(holding(10, 10), SHAPE) is None


def test_a_real_artefact(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    from functools import partial

    from attar.deploy.artefact import Settings
    from attar.deploy.onnx import ONNX
    from networks import Net

    torch.manual_seed(0)
    path = tmp_path / "model.onnx"
    ONNX().write(Net().eval(), Settings(image_size=(8, 8)), path, None)
    load = partial(ONNX().load, path)
    found = measure_latency(load, SHAPE)
    assert found["one_thread"]["repeats"] >= 30
    memory = measure_memory(load, SHAPE)
    assert memory is None or 0 < memory < 200 * MEGABYTE
