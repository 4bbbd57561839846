"""Every command and code block of README runs, in order, in one folder, as a reader would type them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?P<note><!-- set-up: [^\n]*\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
BLOCKS = [match.groupdict() for match in BLOCK.finditer((ROOT / "README.md").read_text())]
SETUP = [block for block in BLOCKS if block["note"]]
REST = [block for block in BLOCKS if not block["note"]]


def environment() -> dict[str, str]:
    """The console scripts of this interpreter first, as in an activated environment."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.timeout(900)
def test_every_block_runs_in_order(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "orange").save(tmp_path / "photo.jpg")
    for block in REST:
        assert block["language"] in ("bash", "python")
        command = ["bash", "-euo", "pipefail", "-c"] if block["language"] == "bash" else [sys.executable, "-c"]
        code = block["code"]
        done = subprocess.run(
            [*command, code], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs/first/result.json").exists()
    assert (tmp_path / "student.pt").exists()
    assert (tmp_path / "runs/first/export/onnx-int8/model_card.md").exists()


def test_two_set_up_commands_which_ci_runs_as_they_stand() -> None:
    assert len(SETUP) == 2
    first, second = (block["code"].strip() for block in SETUP)
    assert all(command.startswith("python3 -m venv .venv && ") for command in (first, second))
    assert first.endswith("attar demo")
    assert second.endswith("pytest -n 2")
    assert "^<!-- set-up:" in (ROOT / ".ci/run").read_text()


def test_every_linked_file_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize(
    ("launch", "script", "last_line"),
    [
        ([sys.executable], "user_loop.py", "MobileNetV3: accuracy"),
        ([sys.executable], "accelerate_loop.py", "CifarResNet, 68,786 parameters, trained by 1 process(es)"),
        (TORCHRUN, "accelerate_loop.py", "CifarResNet, 68,786 parameters, trained by 2 process(es)"),
    ],
    ids=["user-loop", "accelerate", "accelerate-two-processes"],
)
def test_examples(launch: list[str], script: str, last_line: str, tmp_path: Path) -> None:
    command = [*launch, str(ROOT / "examples" / script), "--epochs", "1"]
    variables = {**environment(), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith(last_line)
