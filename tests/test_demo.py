"""The demo: the whole command at its smallest setting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attar.cli import main


def test_demo_ends_with_a_verdict_a_report_and_students_that_timm_alone_loads(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["demo", "--epochs", "1", "--seeds", "2", "--out", str(tmp_path / "demo")]
    assert main(words) == 0
    out = capsys.readouterr().out
    results = [json.loads(path.read_text()) for path in (tmp_path / "demo").glob("ONE-seed*/result.json")]
    assert len(results) == 2
    mean = sum(result["test"]["top1"] for result in results) / 2
    assert f"{100 * mean:.2f} %" in next(line for line in out.splitlines() if line.startswith("ONE "))
    assert "2 seeds" in out
    assert (tmp_path / "demo/report.html").is_file()

    lines = out[out.index("import timm") :].splitlines()[:2]
    program = "\n".join([*lines, "import sys", "assert 'attar' not in sys.modules", "print(type(student).__module__)"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "timm.models.resnet", done.stderr

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").glob("*/result.json")}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").glob("*/result.json")} == times


@pytest.mark.parametrize("words", [["--seeds", "1"], ["--epochs", "0"]])
def test_demo_refuses_what_tells_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str]) -> None:
    assert main(["demo", *words, "--out", str(tmp_path / "demo")]) == 2
    assert capsys.readouterr().err.startswith("attar: The demo needs at least")
    assert not (tmp_path / "demo").exists()
