"""Options: words of a command line into values, with names, types and defaults taken from the fields of a spec.

argparse rather than tyro: tyro builds the whole parser before it reads a word, while the options of the methods are
known only once the methods are, and it prints its mistakes as boxes where attar says one sentence. Values stay text
here; the spec itself converts and checks them, as it does for recipes and Python.
"""

from __future__ import annotations

import argparse
import ast
import json
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from attar.errors import AttarError, unknown_name

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

__all__ = ["Parser", "described", "literal", "pairs", "values_of"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are `AttarError`s of one sentence, with the nearest valid name.

    Option names are read whatever their case, and with `_` for `-`.
    """

    def __init__(self, prog: str, description: str, **settings: Any) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            exit_on_error=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )

    def add_fields(
        self,
        title: str,
        kind: type[BaseModel],
        *,
        prefix: str = "",
        only: Collection[str] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Add one option for every field of a spec (or those in `only`), named `--PREFIXfield-name`.

        Only options that were given appear in the result, under `PREFIXfield_name`: defaults stay the spec's matter.
        """
        group = self.add_argument_group(title)
        for name, field in kind.model_fields.items():
            if only is None or name in only:
                option = _option(prefix, name)
                help_text = _help(field, (texts or {}).get(name))
                shape, settings = _shape(field.annotation)
                if shape == "flag":
                    settings["action"] = argparse.BooleanOptionalAction
                group.add_argument(option, dest=prefix + name, default=argparse.SUPPRESS, help=help_text, **settings)

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """Parse the words of a command line.

        Raises:
            AttarError: an unknown option, a missing or superfluous value.
        """
        options = [option for option in self._option_string_actions if option.startswith("--")]
        spelled = {_folded(option): option for option in options}
        words = [_respelled(word, spelled) for word in words]
        try:
            values, unknown = self.parse_known_args(words)
        except argparse.ArgumentError as error:
            raise AttarError(f"Option '{error.argument_name}': {error.message} (see {self.prog} --help).") from error
        for word in unknown:
            if word.startswith("-"):
                raise unknown_name("option", word.partition("=")[0], options)
        if unknown:
            raise AttarError(f"'{unknown[0]}' has no meaning here: options start with --, see {self.prog} --help.")
        return vars(values)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise AttarError(f"{message[:1].upper()}{message[1:]}: see {self.prog} --help.")


def values_of(given: Mapping[str, Any], kind: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Pick the values of one spec from what `Parser.read` returned: text for the spec to convert.

    Raises:
        AttarError: NAME=VALUE pairs that are none.
    """
    values = {}
    for name, field in kind.model_fields.items():
        if prefix + name in given:
            value = given[prefix + name]
            shape, _ = _shape(field.annotation)
            if shape == "pairs":
                value = pairs(_option(prefix, name), value)
            elif value == "none" and type(None) in typing.get_args(field.annotation):
                value = None
            values[name] = value
    return values


def _shape(annotation: Any) -> tuple[Literal["flag", "many", "pairs", "one"], dict[str, Any]]:
    """Return how many words an option of this type takes, and how argparse is told."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        # What may be several words is, whatever else it may be (peers: a number, or names).
        annotation = next((part for part in parts if typing.get_origin(part) is tuple), parts[0])
    origin = typing.get_origin(annotation) or annotation
    if origin is bool:
        return "flag", {}
    if origin is dict:
        return "pairs", {"nargs": "+", "metavar": "NAME=VALUE"}
    if origin is tuple:
        return "many", {"nargs": "+", "metavar": _metavar(typing.get_args(annotation)[0])}
    if origin is Literal:
        return "one", {"metavar": "{" + ",".join(map(str, typing.get_args(annotation))) + "}"}
    return "one", {"metavar": _metavar(annotation)}


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X", str: "TEXT"}.get(kind, "VALUE")


def described(
    kind: type[BaseModel], prefix: str = "", texts: Mapping[str, str] | None = None
) -> list[tuple[str, str, str]]:
    """Return (option, default in words, meaning) for every field of a spec."""
    return [
        (_option(prefix, name), _default(field), (texts or {}).get(name) or field.description or "")
        for name, field in kind.model_fields.items()
    ]


def _option(prefix: str, name: str) -> str:
    return f"--{prefix}{name.replace('_', '-')}"


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if field.is_required():
        return "required"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    return "none" if default is None or default == {} else str(default)


def _help(field: FieldInfo, text: str | None) -> str:
    text, default = text or field.description or "", _default(field)
    if default != "none":
        text += " (required)" if default == "required" else f" (default: {default})"
    return text.strip().replace("%", "%%")


def _folded(option: str) -> str:
    return option.replace("_", "-").casefold()


def _respelled(word: str, spelled: Mapping[str, str]) -> str:
    name, equals, value = word.partition("=")
    return spelled.get(_folded(name), name) + equals + value if name.startswith("--") else word


def pairs(option: str, words: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE words; values are JSON, Python literals or text.

    Raises:
        AttarError: a word that is no such pair.
    """
    values = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise AttarError(f"Option '{option}' takes NAME=VALUE pairs, not '{word}'.")
        values[name] = literal(text)
    return values


def literal(text: str) -> Any:
    """Read a value as JSON, else as Python writes it (True, None, (1, 2)), else as text."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text
