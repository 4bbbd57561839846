from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import attar.data.cache as cache_module
import attar.data.scan as scan_module
from attar.data import open_source
from attar.data.cache import cache_root, cached_scan
from attar.data.folder import open_folder
from attar.errors import AttarError


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "images").iterdir() if path.suffix != ".lock")


class Counter:
    """A progress callback that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))


def test_pixels_moments_and_sizes_are_those_of_the_files(make_folder: Any) -> None:
    reader = open_folder(make_folder()).train
    found = cached_scan(reader, (20, 16), keep_pixels=True)
    images = np.stack([np.asarray(Image.open(path)) for path in reader.paths])  # type: ignore[attr-defined]
    np.testing.assert_array_equal(found.pixels, images)
    np.testing.assert_array_equal(found.rows, np.arange(40))
    np.testing.assert_array_equal(found.sizes, [[20, 16]] * 40)
    np.testing.assert_allclose(found.moments[:, 0], images.mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found.moments[:, 1], np.square(images.astype(float)).mean((1, 2)), rtol=1e-6)


def test_second_opening_reads_no_image(make_folder: Any, cache: Path) -> None:
    folder, first, second = make_folder(), Counter(), Counter()
    one = open_source(folder, progress=first)
    two = open_source(folder, progress=second)
    assert first.calls[-1] == (40, 40)
    assert second.calls == []
    assert one.fingerprint == two.fingerprint
    assert one.mean == two.mean
    assert isinstance(two.train.pixels.base, np.memmap)  # type: ignore[union-attr]
    assert not two.train.pixels.flags.writeable  # type: ignore[union-attr]
    assert len(entries(cache)) == 1


def test_changed_added_and_resized_images_make_a_new_entry(make_folder: Any, cache: Path) -> None:
    folder = make_folder()
    prints = [open_source(folder).fingerprint, open_source(folder, image_size=8).fingerprint]
    Image.new("RGB", (16, 20), (1, 2, 3)).save(folder / "cat" / "000.png")
    prints.append(open_source(folder).fingerprint)
    Image.new("RGB", (16, 20), (1, 2, 3)).save(folder / "dog" / "zzz.png")
    prints.append(open_source(folder).fingerprint)
    assert len(set(prints)) == 4
    assert len(entries(cache)) == 4


def test_fingerprint_is_of_content_not_of_place_or_time(make_folder: Any) -> None:
    here, there = make_folder("here"), make_folder("there")
    assert open_source(here).fingerprint == open_source(there).fingerprint
    assert open_source(here, split_seed=1).fingerprint != open_source(there).fingerprint


@pytest.mark.parametrize("file", ["pixels.u8", "scan.npz"])
@pytest.mark.parametrize("keep", [0, 0.5, None])
def test_truncated_or_lost_cache_is_rebuilt(make_folder: Any, cache: Path, file: str, keep: float | None) -> None:
    folder = make_folder()
    expected = open_source(folder)
    pixels = np.array(expected.train.pixels)  # a copy: the file under the map is about to be cut
    path = cache / "images" / entries(cache)[0] / file
    data = path.read_bytes()
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(data[: int(len(data) * keep)])
    progress = Counter()
    again = open_source(folder, progress=progress)
    assert progress.calls, "the damaged entry was used"
    assert again.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(again.train.pixels, pixels)
    assert len(entries(cache)) == 1


def test_slow_work_shows_a_bar_by_default(make_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.progress import Progress

    updates: list[float] = []
    monkeypatch.setattr(scan_module, "_BAR_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(Progress, "update", lambda self, task, completed: updates.append(completed))
    open_source(make_folder(size=(120, 120)))
    assert updates[-1] == 40


def test_full_disk_is_one_sentence_and_leaves_nothing(
    make_folder: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "fsync", full)
        with pytest.raises(AttarError, match=r"^No space left under '.*images' for .* MiB .*ATTAR_CACHE") as caught:
            open_source(folder)
    assert "\n" not in str(caught.value)
    assert entries(cache) == []
    assert len(open_source(folder).train) == 28  # and with space it works again


def test_too_small_a_disk_is_refused_before_decoding(
    make_folder: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = cache_module.shutil.disk_usage("/")
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    progress = Counter()
    with pytest.raises(AttarError, match="No space left"):
        open_source(make_folder(), progress=progress)
    assert progress.calls == []
    assert entries(cache) == []


def test_interruption_leaves_nothing_and_a_killed_build_is_swept(make_folder: Any, cache: Path) -> None:
    folder = make_folder()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_source(folder, progress=interrupt)
    assert entries(cache) == []
    open_source(folder)
    (name,) = entries(cache)
    killed = cache / "images" / f"{name}.tmp-killed"
    killed.mkdir()
    (killed / "pixels.u8").write_bytes(b"half")
    (cache / "images" / name / "scan.npz").unlink()
    open_source(folder)
    assert entries(cache) == [name]


def test_unwritable_cache_is_one_sentence(make_folder: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(AttarError, match=r"^Cannot write the image cache under '.*file.*ATTAR_CACHE"):
        open_source(make_folder(), cache_dir=tmp_path / "file")


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root() == tmp_path / "cache"
    assert cache_root(tmp_path / "mine") == tmp_path / "mine"
    monkeypatch.delenv("ATTAR_CACHE")
    assert cache_root() == Path.home() / ".cache" / "attar"


BUILDER = """
import sys
from attar.data import open_source
calls = []
source = open_source(sys.argv[1], progress=lambda done, total: calls.append(done))
print(source.fingerprint, len(calls))
"""


def test_two_processes_build_one_cache(make_folder: Any, cache: Path) -> None:
    folder = make_folder(counts={"cat": 400, "dog": 400}, size=(48, 48))
    processes = [
        subprocess.Popen([sys.executable, "-c", BUILDER, str(folder)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0][0] == outputs[1][0]
    assert sorted(int(calls) > 0 for _, calls in outputs) == [False, True], "exactly one decodes, the other waits"
    assert len(entries(cache)) == 1
