"""The protocol of a comparison: which runs answer "does it help?", and under which names they are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attar.errors import AttarError
from attar.methods import find
from attar.options import literal
from attar.spec import MethodSpec, TrainSpec, method_options, parse

__all__ = ["PLAIN", "SMOOTHING", "Entry", "label_of", "read_entry", "run_folder", "smoothed"]

_OPENING, _CLOSING = "([{", ")]}"


@dataclass(frozen=True)
class Entry:
    """One row of a comparison.

    Attributes:
        label: what it is called, `ONE(branches=2)`.
        methods: what trains the student; none is plain training.
    """

    label: str
    methods: tuple[MethodSpec, ...]


def label_of(methods: Sequence[MethodSpec]) -> str:
    """Write methods and the options that differ from the defaults as they are typed: `ONE(branches=2)+SCD`."""
    return "+".join(_written(method) for method in methods) or "plain"


def _written(method: MethodSpec) -> str:
    options = ",".join(f"{name}={_text(value)}" for name, value in method.options.items())
    return f"{method.name}({options})" if options else method.name


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return _text(value[0]) if len(value) == 1 else "[" + ",".join(map(_text, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def read_entry(text: str) -> Entry:
    """Read `METHOD[(OPTION=VALUE,...)][+METHOD...]`; the options are checked, those at their default left out.

    Raises:
        AttarError: an unknown method or option (with the nearest name), brackets that do not match, a method twice.
    """
    methods = [_read_method(part.strip(), text) for part in _parted(text, "+")]
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise AttarError(f"{name} is given {names.count(name)} times in '{text}': give each method once.")
    return Entry(label_of(methods), tuple(methods))


def _read_method(text: str, whole: str) -> MethodSpec:
    shape = re.fullmatch(r"([\w-]+)(?:\((.*)\))?", text, re.DOTALL)
    if shape is None:
        raise AttarError(f"'{whole}' cannot be read: write METHOD, METHOD(OPTION=VALUE,...) or several joined by +.")
    kind = find(shape[1])
    given = {}
    for pair in filter(None, map(str.strip, _parted(shape[2] or "", ","))):
        name, equals, value = pair.partition("=")
        if not equals:
            raise AttarError(f"'{pair}' in '{whole}' is no OPTION=VALUE.")
        given[name.strip().replace("-", "_")] = literal(value.strip())
    try:
        options = parse(method_options(kind), given)
    except AttarError as error:
        raise AttarError(f"{kind.__name__}: {error}") from error
    return MethodSpec(name=kind.__name__, options=options.model_dump(mode="json", exclude_defaults=True))


def _parted(text: str, separator: str) -> list[str]:
    """Split at separators that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if depth < 0:
            break
        if letter == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise AttarError(f"The brackets of '{text}' do not match.")
    return parts


PLAIN = Entry("plain", ())
SMOOTHING = (0.05, 0.1, 0.2)


def smoothed(share: float) -> Entry:
    """Return plain training with label smoothing."""
    return read_entry(f"Supervised(label_smoothing={share})")


def run_folder(home: Path, spec: TrainSpec) -> Path:
    """Return where the run of a spec is kept: a readable name, and one that no other spec has."""
    slug = re.sub(r"[^\w.]+", "-", label_of(spec.methods)).strip("-")[:48].rstrip("-")
    return home / f"{slug}-seed{spec.seed}-{spec.fingerprint()[:12]}"
