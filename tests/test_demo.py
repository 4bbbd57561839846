"""The demo: its statistics against worked numbers, and the whole command at its smallest setting."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from attar.cli import main
from attar.demo import METHODS, Difference, demo_spec, interval, paired, verdict


def test_interval_is_students() -> None:
    # n = 3, mean 2, s = 1, t_{0.975, 2} = 4.302653
    low, high = interval([1.0, 2.0, 3.0])
    assert math.isclose(high - 2.0, 4.302653 / math.sqrt(3), rel_tol=1e-6)
    assert math.isclose(2.0 - low, 4.302653 / math.sqrt(3), rel_tol=1e-6)
    assert interval([0.5, 0.5]) == (0.5, 0.5)


def test_paired_uses_the_pairs() -> None:
    """Seeds that differ much from each other do not hide a steady gain."""
    found = paired([0.52, 0.71, 0.93], [0.50, 0.70, 0.90])
    # differences 0.02, 0.01, 0.03: mean 0.02, s 0.01, t = 0.02 / (0.01 / sqrt 3) = 3.4641; p = 0.0742 for 2 degrees
    assert math.isclose(found.mean, 0.02)
    assert math.isclose(found.p, 0.07418, rel_tol=1e-3)
    assert math.isclose(found.high - found.mean, 4.302653 * 0.01 / math.sqrt(3), rel_tol=1e-6)
    same = paired([0.9, 0.8], [0.9, 0.8])
    assert (same.mean, same.p) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Difference(0.02, 0.01, 0.03, 0.01, 3), "ONE helped here: +2.00 points"),
        (Difference(-0.02, -0.03, -0.01, 0.01, 3), "ONE hurt here: -2.00 points"),
        (Difference(0.02, -0.01, 0.05, 0.2, 3), "No evidence that ONE helped at 3 seeds: +2.00 points"),
        (Difference(0.0, 0.0, 0.0, 1.0, 2), "No evidence that ONE helped at 2 seeds"),
    ],
)
def test_verdict_claims_no_more_than_the_test(difference: Difference, words: str) -> None:
    assert verdict("ONE", difference).startswith(words)


def test_both_methods_have_the_same_budget() -> None:
    plain, one = (demo_spec(method, 1, 5).model_dump() for method in METHODS)
    assert [name for name in plain if plain[name] != one[name]] == ["methods"]


def test_demo_ends_with_a_table_and_students_that_timm_alone_loads(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["demo", "--epochs", "1", "--seeds", "2", "--out", str(tmp_path / "demo")]
    assert main(words) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("plain  ", "ONE  "))}
    results = {
        (method, seed): json.loads((tmp_path / f"demo/{method}-seed{seed}/result.json").read_text())
        for method in METHODS
        for seed in range(2)
    }
    for method in METHODS:
        mean = (results[method, 0]["test"]["top1"] + results[method, 1]["test"]["top1"]) / 2
        assert rows[method][1] == f"{mean:.2%}"
    assert "373,658" in rows["plain"]
    assert " at 2 seeds: " in out or " here: " in out

    lines = out[out.index("import timm") :].splitlines()[:2]
    program = "\n".join([*lines, "import sys", "assert 'attar' not in sys.modules", "print(type(student).__module__)"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "timm.models.resnet", done.stderr

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")}
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-3:-1] == out.splitlines()[-3:-1]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")} == times

    words[2] = "2"
    assert main(words) == 2
    assert "differs in epochs (1 there, 2 now)" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--seeds", "1"], ["--epochs", "0"]])
def test_demo_refuses_what_tells_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str]) -> None:
    assert main(["demo", *words, "--out", str(tmp_path / "demo")]) == 2
    assert capsys.readouterr().err.startswith("attar: The demo needs at least")
    assert not (tmp_path / "demo").exists()
