"""Every command and code block of README runs, in order, in one folder, as a reader would type them.

Blocks of nothing but attar commands, and those in Python, run in processes that have imported everything beforehand;
all others, some attar commands among them, in a shell.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pictures import write_discs
from runs import Said, attar_command, python_code, python_script, said_in_child

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


def commands(code: str) -> list[list[str]] | None:
    """Return the words of every line, where all of them are attar commands that need nothing of a shell but quotes."""
    if "\\\n" in code or not all(line.startswith("attar ") for line in code.splitlines()):
        return None
    return [shlex.split(line) for line in code.splitlines()]


def run(block: dict[str, str], folder: Path) -> list[Said]:
    code = block["code"]
    if block["language"] == "python":
        return [said_in_child(python_code, code, folder=folder)]
    assert block["language"] == "bash"
    if words := commands(code):
        return [said_in_child(attar_command, each[1:], folder=folder) for each in words]
    command = ["bash", "-euo", "pipefail", "-c", code]
    return [subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)]


def test_some_attar_commands_run_in_a_shell() -> None:
    typed = [block["code"] for block in REST if block["language"] == "bash" and not commands(block["code"])]
    assert any(code.startswith("attar train") for code in typed)
    assert any(code.startswith("torchrun") and "-m attar train" in code for code in typed)


@pytest.mark.timeout(900)
def test_every_block_runs_in_order(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "orange").save(tmp_path / "photo.jpg")
    write_discs(tmp_path / "streets")
    for block in REST:
        for done in run(block, tmp_path):
            assert done.returncode == 0, f"{block['code']}\n{done.stdout}\n{done.stderr}"
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
        (None, "user_loop.py", "MobileNetV3: accuracy"),
        (None, "accelerate_loop.py", "CifarResNet, 68,786 parameters, trained by 1 process(es)"),
        (TORCHRUN, "accelerate_loop.py", "CifarResNet, 68,786 parameters, trained by 2 process(es)"),
    ],
    ids=["user-loop", "accelerate", "accelerate-two-processes"],
)
def test_examples(launch: list[str] | None, script: str, last_line: str, tmp_path: Path) -> None:
    path, words, cpu = ROOT / "examples" / script, ["--epochs", "1"], {"ACCELERATE_USE_CPU": "true"}
    if launch is None:
        done = said_in_child(python_script, path, words, folder=tmp_path, **cpu)
    else:
        command, variables = [*launch, str(path), *words], {**environment(), **cpu}
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith(last_line)
