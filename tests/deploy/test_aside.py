"""Folders appear whole or not at all, whatever ends the writing."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from attar.deploy.aside import refuse_present, written_aside
from attar.errors import AttarError


def fill(folder: Path, text: str) -> None:
    with written_aside(folder) as aside:
        (aside / "export.json").write_text(text)


def failing(folder: Path, error: BaseException) -> None:
    def work() -> None:
        with written_aside(folder) as aside:
            (aside / "export.json").write_text("half")
            raise error

    with pytest.raises(type(error)):
        work()


def test_whole_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    fill(folder, "one")
    assert [path.name for path in folder.parent.iterdir()] == ["b"]
    fill(folder, "two")
    assert [path.name for path in folder.parent.iterdir()] == ["b"]
    assert (folder / "export.json").read_text() == "two"


@pytest.mark.parametrize("error", [AttarError("no"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_nothing_is_left_by_what_goes_wrong(tmp_path: Path, error: BaseException) -> None:
    failing(tmp_path / "a" / "b", error)
    assert list(tmp_path.iterdir()) == []
    fill(tmp_path / "b", "one")
    failing(tmp_path / "b", error)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert (tmp_path / "b" / "export.json").read_text() == "one"


def killed_in(folder: Path) -> None:
    child = os.fork()
    if child == 0:
        with written_aside(folder) as aside:
            (aside / "model").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_kill_leaves_nothing_by_the_name_and_the_next_attempt_nothing_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    killed_in(folder)
    assert not folder.exists()
    fill(folder, "one")
    killed_in(folder)
    assert [path.name for path in folder.iterdir()] == ["export.json"]
    fill(folder, "two")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    # Killed between the two renames of a replacement: the old folder comes back.
    os.rename(folder, tmp_path / ".export.999999999.old")
    failing(folder, AttarError("no"))
    assert (folder / "export.json").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_what_must_not_be_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    refuse_present(folder, overwrite=False)
    folder.mkdir()
    refuse_present(folder, overwrite=False)
    (folder / "photo.jpg").write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(AttarError, match="no export"):
            refuse_present(folder, overwrite=overwrite)
        with pytest.raises(AttarError, match="no export"):
            refuse_present(folder / "photo.jpg", overwrite=overwrite)
    (folder / "export.json").write_text("{}")
    with pytest.raises(AttarError, match="--overwrite"):
        refuse_present(folder, overwrite=False)
    refuse_present(folder, overwrite=True)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AttarError, match="cannot be written"), written_aside(tmp_path / "file" / "export"):
        pass
