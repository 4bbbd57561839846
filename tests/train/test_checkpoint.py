"""Checkpoints and other files are whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from attar.errors import AttarError
from attar.train import Interrupted, fit
from attar.train.checkpoint import Checkpoints
from attar.train.files import write_atomically
from runs import quiet, tiny


def state(value: float) -> dict[str, Any]:
    return {"weights": torch.full((1000,), value), "step": int(value), "names": ["a"], "none": None}


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() is None
    for step in (9, 10, 100):
        checkpoints.save(step, state(step))
    checkpoints.save_best(state(10))
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == ["best.pt", "step_00000010.pt", "step_00000100.pt"]
    latest = checkpoints.latest()
    assert latest is not None
    assert latest["step"] == 100
    assert checkpoints.load_best()["step"] == 10


@pytest.mark.parametrize("damage", ["half", "empty", "byte"])
def test_a_checkpoint_cut_short_is_passed_over(damage: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))
    checkpoints.save(2, state(2))
    path = tmp_path / "step_00000002.pt"
    content = bytearray(path.read_bytes())
    content[1000] ^= 0xFF
    path.write_bytes({"half": content[: len(content) // 2], "empty": b"", "byte": bytes(content)}[damage])
    with pytest.warns(UserWarning, match=r"step_00000002.pt' is damaged or cut short"):
        latest = checkpoints.latest()
    assert latest is not None
    assert latest["step"] == 1
    (tmp_path / "step_00000001.pt").write_bytes(b"PK")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(AttarError, match=r"Every checkpoint in .* is damaged"),
    ):
        checkpoints.latest()
    with pytest.raises(AttarError, match=r"best.pt' is missing, damaged or cut short"):
        checkpoints.load_best()


def test_a_run_goes_on_from_the_checkpoint_before_a_broken_one(tmp_path: Path) -> None:
    spec = tiny(log_every=1, checkpoint_seconds=0.0)
    with pytest.raises(Interrupted):
        fit(spec, tmp_path / "run", console=quiet(), stop_after=6)
    newest = tmp_path / "run/checkpoints/step_00000006.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    with pytest.warns(UserWarning, match="passed over"):
        fit(spec, tmp_path / "run", console=quiet())
    fit(spec, tmp_path / "whole", console=quiet())
    weights = [(tmp_path / name / "student/model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]


def test_checkpoints_hold_tensors_and_plain_types(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fit(tiny("ONE", ema=0.9, optimizer="adamw", lr=0.001), tmp_path, console=quiet(), stop_after=11)
    for path in (tmp_path / "checkpoints").iterdir():
        loaded = torch.load(path, weights_only=True)
        assert set(loaded) >= {"distiller", "ema", "step"}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        *("best.pt", "step_00000008.pt", "step_00000011.pt")
    ]


def fail_after(monkeypatch: pytest.MonkeyPatch, whole: int) -> None:
    """Let the disk be full from the `whole`-th checkpoint on, half way through the file."""
    real, count = os.fsync, [0]

    def full(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith(".pt.tmp"):
            count[0] += 1
            if count[0] > whole:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)


def test_no_space_left_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny(log_every=1, checkpoint_seconds=0.0)
    with monkeypatch.context() as patch:
        fail_after(patch, whole=3)
        with pytest.raises(
            AttarError, match=r"^No space is left for '.*step_00000004.pt': free some and run"
        ) as caught:
            fit(spec, tmp_path / "run", console=quiet())
    assert str(caught.value).count(". ") == 0
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step_00000002.pt", "step_00000003.pt"]
    fit(spec, tmp_path / "run", console=quiet())
    fit(spec, tmp_path / "whole", console=quiet())
    weights = [(tmp_path / name / "student/model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]


def test_a_full_disk_in_earnest(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is not there")
    (tmp_path / "old.json").write_text("old")
    (tmp_path / ".old.json.tmp").symlink_to("/dev/full")
    with pytest.raises(AttarError, match="No space is left"):
        write_atomically(tmp_path / "old.json", b"new")
    assert (tmp_path / "old.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AttarError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "inside.json", b"")
