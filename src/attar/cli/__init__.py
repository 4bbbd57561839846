"""The `attar` command.

torch and everything that needs it is imported inside the commands: help and mistakes in the words of the command line
must not wait for it.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence

from attar import __version__
from attar.cli.words import rank
from attar.errors import AttarError, unknown_name

__all__ = ["COMMANDS", "main"]

_DOCS = "Make the network you already have more accurate at zero inference cost."
# Sentence of the help, and the module that holds the function of the command's name.
COMMANDS = {
    "demo": ("a whole comparison on embedded images, in about a minute", "comparing"),
    "train": ("train a student with one method or several", "training"),
    "compare": ("does it help? methods against tuned baselines, paired over seeds, with a report", "comparing"),
    "report": ("write the report of runs that are there", "comparing"),
    "reproduce": ("run a paper's setting; published and measured numbers side by side", "comparing"),
    "evaluate": ("measure a trained student on images it has never seen", "training"),
    "export": (
        "the student as a file that runs on the board: ONNX, ExecuTorch, int8, proved and measured",
        "exporting",
    ),
    "methods": ("list the methods, or show one", "looking"),
    "inspect": ("show the stages of a model and what each method would add", "looking"),
    "check": ("try one batch and show every term, gradient and problem", "looking"),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 `check` found a problem, 2 the user's mistake, 130 Ctrl-C."""
    words = list(sys.argv[1:] if words is None else words)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except AttarError as error:
        return _refuse(str(error))
    except KeyboardInterrupt as stopped:
        return _stop(str(stopped) or "Stopped.", 130)
    except BrokenPipeError:
        # The reader has gone (`attar methods | head`); what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        return _refuse(f"'{error.filename}' cannot be used ({error.strerror}): choose a place that can be.")


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"attar {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name.startswith("-"):
        raise unknown_name("option", name, ["--help", "--version"])
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    code: int = getattr(importlib.import_module(f"attar.cli.{COMMANDS[name][1]}"), name)(rest)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {sentence}" for name, (sentence, _) in COMMANDS.items()]
    return "\n".join(
        [
            _DOCS,
            "",
            "usage: attar COMMAND ...     (attar COMMAND --help tells the options)",
            "",
            *lines,
            "",
            "  attar train ONE --model cifar_resnet20 --data ./photos --epochs 100",
            "",
            f"attar {__version__}; attar --version prints this.",
        ]
    )


def _refuse(sentence: str) -> int:
    return _stop(f"attar: {sentence}", 2)


def _stop(sentence: str, code: int) -> int:
    if rank() == 0:
        print(sentence, file=sys.stderr)
    elif code == 2:
        # torchrun ends all processes when the first one leaves; rank 0 is the one that says why.
        time.sleep(2)
    return code
