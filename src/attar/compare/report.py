"""The report of a comparison: one page that needs nothing else, and the same figures as CSV, JSON and Markdown."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from attar.compare import figures, pictures, tables
from attar.compare.analysis import Analysis, EntryAnalysis
from attar.compare.statistics import Contrast
from attar.train.files import write_atomically

__all__ = ["html_text", "write_report"]

# Up to so many classes a heat map can be read on a phone; up to the second, its numbers; up to the third, every class
# has a row.
_MAPPED, _NUMBERED, _ALL_CLASSES = 30, 12, 30
# So many confusion changes lie open; the others are folded. With more methods than the second, their sentences are.
_OPEN, _FOLDED = 4, 8
_PAIRS, _CLASSES = 8, 20
_ORDER = {"good": 0, "none": 1, "bad": 2, "open": 3}


def write_report(analysis: Analysis, folder: Path) -> dict[str, Path]:
    """Write `report.html`, `report.csv`, `report.json` and `report.md`, each whole or not at all.

    The same analysis gives the same bytes.

    Returns:
        The path of every file by its name.

    Raises:
        AttarError: the folder cannot be written.
    """
    texts = {
        "report.csv": tables.csv_text(analysis),
        "report.json": tables.json_text(analysis),
        "report.md": tables.markdown_text(analysis),
        "report.html": html_text(analysis),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text.encode("utf-8", "replace"))
    return {name: folder / name for name in texts}


def html_text(analysis: Analysis) -> str:
    """Return the page: styles, script and figures inside, nothing to load, everything escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("attar.compare", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        written=tables.written,
        spread=tables.spread,
        points=tables.points,
        probability=tables.probability,
        value=_value,
        shortened=figures.shortened,
        typeset=_typeset,
        breakable=_breakable,
        svg=lambda drawing: Markup(drawing.svg),
    )
    script, style = (_inlined(environment, name) for name in ("report.js", "report.css"))
    return environment.get_template("report.html").render(
        analysis=analysis,
        metric=analysis.primary.name,
        answer=tables.answer(analysis),
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        facts=_facts(analysis),
        verdicts=_verdicts(analysis),
        baselines=_baselines(analysis),
        accuracy=figures.accuracy(analysis),
        costs=figures.costs(analysis),
        groups=[(name, len(list(group))) for name, group in groupby(analysis.columns, key=lambda one: one.group)],
        rows=[(entry, tables.judged(entry.against_plain), tables.failures(entry)) for entry in analysis.entries],
        curves=_curves(analysis),
        differences=_differences(analysis),
        confusions=_confusions(analysis),
        open_confusions=_OPEN,
        folded=_FOLDED,
        classes=_classes(analysis),
        examples=pictures.examples(analysis),
        attached=[entry for entry in analysis.entries if entry.attached or any(entry.options.values())],
        nothing=[entry.label for entry in analysis.entries if not entry.attached and not any(entry.options.values())],
    )


def _inlined(environment: Any, name: str) -> str:
    source: str = environment.loader.get_source(environment, name)[0]
    return source.strip()


def _breakable(text: str) -> Any:
    """Let a long name end a line where its parts end."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[+,=(_])", text))


def _typeset(sentence: str) -> str:
    """Keep numbers with their signs and units on one line."""
    signed = re.sub(r"(?<![\w.,)\]-])-(?=\d)", "−", sentence)
    return re.sub(r" (?=%|points\b)|(?<=\bp) (?=[=<])|(?<=[=<]) (?=\d)", "\u00a0", signed)


def _value(value: Any) -> str:
    """Write a setting as a person would."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _facts(analysis: Analysis) -> list[tuple[str, str]]:
    images = ", ".join(f"{count:,} {name}" for name, count in analysis.images.items())
    epochs = sorted({entry.epochs for entry in analysis.entries})
    seeds = f"{len(analysis.seeds)} ({', '.join(map(str, analysis.seeds))})"
    return [
        ("Student", analysis.model),
        ("Data", f"{analysis.data}, {len(analysis.classes)} classes"),
        ("Images", images),
        ("Seeds", seeds),
        *([("Task", analysis.primary.task)] if analysis.primary.dense else []),
        ("Epochs", f"{epochs[0]}" if len(set(epochs)) == 1 else f"{epochs[0]} to {epochs[-1]}" if epochs else "none"),
    ]


def _verdicts(analysis: Analysis) -> list[dict[str, Any]]:
    """Return one card per method, those that help first."""
    lines = dict(zip((entry.label for entry in analysis.entries), tables.verdict_lines(analysis), strict=True))
    cards = []
    for entry in analysis.entries:
        if entry.role != "method":
            continue
        verdict = tables.judged(entry.against_plain)
        gain = entry.against_plain.mean if entry.against_plain is not None else -math.inf
        cards.append(
            {
                "entry": entry,
                "verdict": verdict,
                "sentence": lines[entry.label],
                "smoothing": tables.judged(entry.against_smoothing),
                "times": _times(analysis, entry),
                "failures": tables.failures(entry),
                "order": (_ORDER[verdict.tone], -gain),
            }
        )
    return sorted(cards, key=lambda card: card["order"])


def _times(analysis: Analysis, entry: EntryAnalysis) -> str | None:
    """Return training time as a multiple of plain training."""
    cost = tables.cost_column(analysis)
    plain = next((other for other in analysis.entries if other.role == "plain"), None)
    if cost is None or plain is None or cost.key not in plain.figures or cost.key not in entry.figures:
        return None
    base = plain.figures[cost.key].mean
    return f"× {entry.figures[cost.key].mean / base:.2f}" if base > 0 else None


def _baselines(analysis: Analysis) -> list[dict[str, Any]]:
    column = tables.accuracy_column(analysis)
    return [
        {
            "entry": entry,
            "text": tables.summary_text(entry.figures.get(column.key) if column else None, "share"),
            "verdict": tables.judged(entry.against_plain),
            "failures": tables.failures(entry),
        }
        for entry in analysis.entries
        if entry.role != "method"
    ]


def _curves(analysis: Analysis) -> list[tuple[EntryAnalysis, figures.Drawing | None]]:
    return [(entry, figures.curve(analysis, entry, i)) for i, entry in enumerate(analysis.entries)]


def _differences(analysis: Analysis) -> list[tuple[str, figures.Drawing, list[tuple[EntryAnalysis, Contrast]]]]:
    drawn = []
    for baseline, title in (("plain", "To plain training"), ("smoothing", "To label smoothing")):
        drawing = figures.differences(analysis, baseline)
        contrasts = [(entry, getattr(entry, f"against_{baseline}")) for entry in analysis.entries]
        if drawing is not None:
            drawn.append((title, drawing, [(entry, contrast) for entry, contrast in contrasts if contrast is not None]))
    return drawn


def _confusions(analysis: Analysis) -> list[dict[str, Any]]:
    """Return for every entry how its confusions differ from plain: a heat map, the most changed pairs, or both."""
    plain = next((entry for entry in analysis.entries if entry.role == "plain"), None)
    names, shown = analysis.classes, []
    for i, entry in enumerate(analysis.entries):
        change = tables.confusion_change(entry, plain)
        if change is None or plain is None or len(names) != len(change):
            continue
        drawing = figures.confusion(entry.label, change, names, i) if len(names) <= _MAPPED else None
        pairs = []
        if len(names) > _NUMBERED:
            # Stable, so that equal changes come in the order of the classes.
            largest = np.argsort(-np.abs(change), axis=None, kind="stable")[:_PAIRS]
            for row, col in zip(*np.unravel_index(largest, change.shape), strict=True):
                numbers = (float(matrix[row, col]) for matrix in (plain.confusion, entry.confusion, change))
                if change[row, col]:
                    pairs.append((names[row], names[col], *numbers))
        shown.append({"entry": entry, "drawing": drawing, "pairs": pairs})
    return shown


def _classes(analysis: Analysis) -> dict[str, Any]:
    """Return what every class scores: all classes, or those in which the entries differ most."""
    entries = [entry for entry in analysis.entries if entry.seeds and len(entry.per_class) == len(analysis.classes)]
    plain = next((entry for entry in entries if entry.role == "plain"), None)
    chosen = list(range(len(analysis.classes)))
    if len(chosen) > _ALL_CLASSES and entries:
        ranges = np.ptp(np.array([entry.per_class for entry in entries]), axis=0)
        chosen = sorted(np.argsort(-np.nan_to_num(ranges), kind="stable")[:_CLASSES].tolist())
    rows = [
        (
            analysis.classes[i],
            [
                (float(entry.per_class[i]), None if plain in (None, entry) else _over(entry.per_class, plain, i))
                for entry in entries
            ],
        )
        for i in chosen
    ]
    return {"entries": entries, "rows": rows, "left_out": len(analysis.classes) - len(chosen)}


def _over(per_class: Any, plain: EntryAnalysis | None, i: int) -> float | None:
    return None if plain is None else float(per_class[i] - plain.per_class[i])
