from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MakeFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has its own cache and never touches the user's."""
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Return a function that writes class folders of random PNG images."""

    def make(
        name: str = "photos", counts: Mapping[str, int] | None = None, size: tuple[int, int] = (20, 16), seed: int = 0
    ) -> Path:
        rng = np.random.default_rng(seed)
        for label, count in (counts or {"cat": 20, "dog": 20}).items():
            folder = tmp_path / name / label
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{number:03}.png")
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of real data for development; tests that need it skip where it is absent."""
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    path = Path(os.environ.get("ATTAR_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}: set ATTAR_DATA")
    return path


@pytest.fixture
def make_pairs(tmp_path: Path) -> MakeFolder:
    """Return a function that writes images of blocks, and masks that hold the class of each block, as PNG."""

    def make(
        name: str = "scenes", count: int = 10, size: tuple[int, int] = (20, 16), classes: int = 4, seed: int = 0
    ) -> Path:
        rng = np.random.default_rng(seed)
        colors = np.random.default_rng(99).integers(0, 256, (classes, 3), dtype=np.uint8)
        for folder in ("images", "masks"):
            (tmp_path / name / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            blocks = rng.integers(0, classes, (-(-size[0] // 4), -(-size[1] // 4)), dtype=np.uint8)
            blocks[0, 0] = classes - 1
            mask = np.kron(blocks, np.ones((4, 4), np.uint8))[: size[0], : size[1]]
            Image.fromarray(colors[mask]).save(tmp_path / name / "images" / f"{number:03}.png")
            Image.fromarray(mask).save(tmp_path / name / "masks" / f"{number:03}.png")
        return tmp_path / name

    return make
