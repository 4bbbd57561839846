"""What the commands share: the words of a run, how tables and numbers look, which process speaks."""

from __future__ import annotations

import os
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attar.errors import AttarError
from attar.options import Parser, values_of

if TYPE_CHECKING:
    from rich.console import Console

    from attar.method import Method
    from attar.spec import MethodSpec, TrainSpec

__all__ = ["PLAIN_TABLE", "count", "make_console", "names_of", "rank", "read_run"]

# How tables look: columns and nothing else, so that they read well in a log too.
PLAIN_TABLE: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0), "header_style": "bold"}


def rank() -> int:
    """Return which of the processes that `torchrun` started this is."""
    return int(os.environ.get("RANK", "0"))


def make_console(stderr: bool = False) -> Console:
    """Return where the first process prints, and nowhere for the others."""
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, quiet=rank() != 0, width=None if terminal else 120, highlight=False)


def count(number: float) -> str:
    """Write a large number with three digits: 1.23 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


# The words of train and check: METHOD[+METHOD...], the fields of a spec, the options of the methods.


def _method_classes(word: str) -> list[type[Method]]:
    from attar.methods import find

    kinds = [] if word.casefold() == "plain" else [find(name) for name in word.split("+")]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise AttarError(f"{kind.__name__} is given {kinds.count(kind)} times: give each method once.")
    return kinds


def read_run(
    parser: Parser, words: list[str], only: Sequence[str] | None, **fixed: Any
) -> tuple[TrainSpec, dict[str, Any]]:
    """Read a run's spec and the command's own options from words that begin with the methods."""
    from attar.spec import TrainSpec, method_options, parse, teacher_options

    fields = [name for name in TrainSpec.model_fields if name != "methods" and (only is None or name in only)]
    parser.add_fields("the run", TrainSpec, only=fields)
    if "model" in fields:
        parser.add_argument("--student", dest="model", default=SUPPRESS, metavar="TEXT", help="the same as --model")
    if not words or words[0] in ("-h", "--help"):
        parser.epilog = "METHOD is one of `attar methods`, several joined by +, or plain for no method at all.\n"
        parser.epilog += f"{parser.prog} METHOD --help tells the options of the method too."
        parser.print_help()
        raise SystemExit(0)
    if words[0].startswith("-"):
        raise AttarError(f"Name the method first, for example {parser.prog} ONE {words[0]} ... (or plain for none).")
    kinds = _method_classes(words[0])
    options = {kind: method_options(kind) for kind in kinds}
    for kind in kinds:
        from attar.inspection import card

        prefix = f"{kind.__name__}."
        parser.add_fields(f"{kind.__name__}", options[kind], prefix=prefix, texts=card(kind).arguments)
    taught = [kind for kind in kinds if "teachers" in teacher_options(kind)]
    if taught:
        parser.add_argument(
            *("--teacher", "--teachers"),
            dest="teachers",
            nargs="+",
            default=[],
            metavar="TEXT",
            help="teachers of every method that has some: folders of finished runs, or MODEL=FILE",
        )
    given = parser.read(words[1:])
    chosen = []
    for kind in kinds:
        if kind in taught and given["teachers"]:
            given.setdefault(f"{kind.__name__}.teachers", given["teachers"])
        try:
            values = parse(options[kind], values_of(given, options[kind], f"{kind.__name__}."))
        except AttarError as error:
            raise AttarError(str(error).replace("Option '", f"Option '--{kind.__name__}.", 1)) from error
        chosen.append({"name": kind.__name__, "options": values.model_dump(mode="json", exclude_defaults=True)})
    run = {name: value for name, value in values_of(given, TrainSpec).items() if name in fields}
    return parse(TrainSpec, {"methods": chosen, **fixed, **run}), given


def names_of(methods: Sequence[MethodSpec]) -> str:
    """Return the names of methods as they are typed, without their options."""
    return "+".join(method.name for method in methods) or "plain"
