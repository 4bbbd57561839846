from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from attar.spec import TrainSpec
from attar.train import fit
from runs import quiet, tiny


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Numbers depend on the number of threads in the last bit: every process of these tests uses one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainSpec, dict[str, Any]]:
    """One finished run of ONE: its folder, spec and result."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    spec = tiny("ONE")
    return folder, spec, fit(spec, folder, console=quiet())


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Return a function that writes two classes of 40 random 8 x 8 images, other ones for another seed."""
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))

    def write(seed: int) -> Path:
        rng = np.random.default_rng(seed)
        for label in ("cat", "dog"):
            folder = tmp_path / "photos" / label
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(40):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number:03}.png")
        return tmp_path / "photos"

    return write
