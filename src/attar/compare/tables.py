"""A comparison as text: CSV, JSON, Markdown and a table for the terminal."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attar.compare.analysis import Analysis, Column, EntryAnalysis
from attar.compare.statistics import ALPHA, Contrast, Summary, summary

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "DASH",
    "Verdict",
    "accuracy_column",
    "answer",
    "confusion_change",
    "cost_column",
    "csv_text",
    "failures",
    "json_text",
    "judged",
    "markdown_text",
    "points",
    "probability",
    "seeds_done",
    "spread",
    "summary_text",
    "terminal_table",
    "verdict_lines",
    "written",
]

DASH = "–"
_MINUS = "−"
_BINARY = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_DECIMAL = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def written(value: float, kind: str) -> str:
    """Write a number as people read it: `93.42 %`, `4 min 10 s`, `1.21 GiB`, `40.8 MFLOP`, `272 k`, `1.84 ms`.

    Args:
        value: in the unit of the column: shares in 0..1, times in seconds (also for `milliseconds`).
        kind: of the column.
    """
    if not math.isfinite(value):
        return DASH
    if value < 0:
        return _MINUS + written(-value, kind)
    if kind == "share":
        return f"{100 * value:.2f} %"
    if kind == "seconds":
        return _duration(value)
    if kind == "milliseconds":
        return f"{_three(1000 * value)} ms"
    if kind == "bytes":
        return _scaled(value, _BINARY) or f"{value:.0f} B"
    if kind == "flops":
        return (_scaled(value, _DECIMAL) or f"{value:.0f} ") + "FLOP"
    if kind == "count":
        return _scaled(value, _DECIMAL) or f"{value:.0f}" if value >= 10_000 else f"{value:,.0f}"
    if kind == "rate":
        return f"{value:,.0f}/s" if value >= 100 else f"{_three(value)}/s"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2e}" if 0 < value < 0.0005 else f"{value:.3f}"


def _duration(seconds: float) -> str:
    if seconds < 0.9995:
        return f"{_three(1000 * seconds)} ms" if seconds else "0 s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def _scaled(value: float, units: tuple[tuple[str, float], ...]) -> str | None:
    for unit, size in units:
        # What rounds up to the next unit is written in it.
        if value >= 0.9995 * size:
            return f"{_three(value / size)} {unit}"
    return None


def _three(value: float) -> str:
    """Write three digits, without an exponent."""
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{decimals}f}"


def points(difference: float, digits: int = 2) -> str:
    """Write a difference of shares as signed percentage points."""
    if not math.isfinite(difference):
        return DASH
    text = f"{100 * difference:+.{digits}f}"
    return text.replace("-", _MINUS) if float(text) else text[1:]


def probability(contrast: Contrast | None) -> str:
    """Write the corrected p: three decimals, `< 0.001` below."""
    if contrast is None or not math.isfinite(contrast.p_corrected):
        return DASH
    return f"{contrast.p_corrected:.3f}" if contrast.p_corrected >= 0.001 else "< 0.001"


def seeds_done(entry: EntryAnalysis) -> str:
    """Write how many seeds have finished: `5`, or `4 of 5`."""
    asked = len(entry.seeds) + len(entry.failures)
    return f"{len(entry.seeds)} of {asked}" if entry.failures else f"{asked}"


def failures(entry: EntryAnalysis) -> list[str]:
    """Say which runs have no result and why, one sentence per reason."""
    reasons: dict[str, list[str]] = {}
    for failure in entry.failures:
        reasons.setdefault(failure.reason, []).append(str(failure.seed))
    return [f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}: {reason}" for reason, seeds in reasons.items()]


def spread(summary: Summary, kind: str) -> str:
    """Write half of the 95 % interval, `± 0.35`; nothing where the seeds do not differ or there is one."""
    half = (summary.high - summary.low) / 2
    if not math.isfinite(half) or half <= 1e-12 * max(1.0, abs(summary.mean)):
        return ""
    return "± " + written(half, kind).removesuffix(" %").removesuffix("/s")


def summary_text(summary: Summary | None, kind: str) -> str:
    """Write mean and half interval in one line; a dash for what was not measured."""
    if summary is None:
        return DASH
    return f"{written(summary.mean, kind)} {spread(summary, kind)}".strip()


def accuracy_column(analysis: Analysis) -> Column | None:
    """Return the column that verdicts are about."""
    return _column(analysis, analysis.primary.key, "quality", "share")


def cost_column(analysis: Analysis) -> Column | None:
    """Return the column of training time."""
    return _column(analysis, "training_seconds", "training", "seconds")


def _column(analysis: Analysis, key: str, group: str, kind: str) -> Column | None:
    alike = (column for column in analysis.columns if column.group == group and column.kind == kind)
    return next((column for column in analysis.columns if column.key == key), next(alike, None))


@dataclass(frozen=True)
class Verdict:
    """A difference in a word.

    Attributes:
        word: against plain training: `helps`, `hurts`, `no evidence` or `not judged`.
        rival: against another way of training: `better`, `worse`, `no evidence` or `not judged`.
        symbol: the word as a sign.
        tone: `good`, `bad`, `none` or `open`.
    """

    word: str
    rival: str
    symbol: str
    tone: str


def judged(contrast: Contrast | None) -> Verdict:
    """Say in a word what a difference is evidence of, at 5 % after Holm's correction."""
    if contrast is None or not math.isfinite(contrast.p_corrected):
        return Verdict("not judged", "not judged", "?", "open")
    if contrast.p_corrected >= ALPHA or contrast.mean == 0:
        return Verdict("no evidence", "no evidence", "≈", "none")
    if contrast.mean > 0:
        return Verdict("helps", "better", "▲", "good")
    return Verdict("hurts", "worse", "▼", "bad")


def verdict_lines(analysis: Analysis) -> list[str]:
    """Return one sentence per entry, in the order of the table."""
    return [
        entry.verdict if entry.label in entry.verdict else f"{entry.label}: {entry.verdict}"
        for entry in analysis.entries
    ]


def answer(analysis: Analysis) -> str:
    """Answer "does it help?" in one line."""
    methods = [entry for entry in analysis.entries if entry.role == "method"]
    known = [entry for entry in methods if judged(entry.against_plain).tone != "open"]
    if not methods:
        return "Only the baselines were trained: name a method to compare with them."
    if not known:
        return "No answer yet: a method and plain training need at least two finished seeds in common."
    helping = [entry for entry in known if judged(entry.against_plain).tone == "good"]
    place = f"{analysis.model} on {analysis.data}"
    if not helping:
        hurting = sum(judged(entry.against_plain).tone == "bad" for entry in known)
        more = f"; {_counted(hurting, len(known), 'hurts', 'hurt')}" if hurting else ""
        which = known[0].label if len(known) == 1 else f"any of the {len(known)} methods"
        return f"No evidence that {which} helps {place}{more}."
    best = max(helping, key=_gain)
    contrast = best.against_plain
    assert contrast is not None
    gain = f"{points(contrast.mean)} points over plain training ({points(contrast.low)} to {points(contrast.high)})"
    if len(known) == 1:
        return f"Yes: {best.label} helps {place}, by {gain}. {_over_smoothing([best])}"
    counted = _counted(len(helping), len(known), "methods helps", "methods help")
    most = "it gains" if len(helping) == 1 else "gains most:"
    return (
        f"{counted} {place}. {best.label}{': ' if len(helping) == 1 else ' '}{most} {gain}. {_over_smoothing(helping)}"
    )


def _gain(entry: EntryAnalysis) -> float:
    return entry.against_plain.mean if entry.against_plain is not None else -math.inf


def _counted(some: int, whole: int, one: str, several: str) -> str:
    return f"{some} of {whole} {one if some == 1 else several}"


def _over_smoothing(helping: list[EntryAnalysis]) -> str:
    judgements = [judged(entry.against_smoothing).tone for entry in helping]
    beating = judgements.count("good")
    if all(tone == "open" for tone in judgements):
        return "Nothing can be said against label smoothing yet."
    who = "it" if len(helping) == 1 else "any of them"
    if not beating:
        return f"No evidence that {who} beats label smoothing."
    return "It beats label smoothing too." if len(helping) == 1 else f"{beating} of them beat label smoothing too."


# CSV -----------------------------------------------------------------------------------------------------------------

_DIFFERENCES = {"plain": "against_plain", "smoothing": "against_smoothing"}


def csv_text(analysis: Analysis) -> str:
    """Write one row per entry and figure, and one per entry and difference, for pandas.

    Columns: `label`, `role`, `key` (as in `report.json`; differences are `top1_minus_plain`, `top1_minus_smoothing`, in
    segmentation `miou_minus_plain` and so on; there `iou:NAME` is the intersection over union of a class), `n` (values
    behind the mean; 0 where nothing was measured), `mean`, `low`, `high` (95 % interval), `p`, `p_corrected`,
    `detectable` (differences only) and `seed_S` for every seed that was asked for, empty where that run has no value.
    Numbers are in base units: shares in 0..1, seconds, bytes. A wide table of means is
    `frame.pivot(index="label", columns="key", values="mean")`.
    """
    seeds = list(analysis.seeds)
    head = [*("label", "role", "key", "n", "mean", "low", "high", "p", "p_corrected", "detectable")]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*head, *(f"seed_{seed}" for seed in seeds)])
    for entry in analysis.entries:
        for column in analysis.columns:
            figure = entry.figures.get(column.key)
            start = [entry.label, entry.role, column.key]
            if figure is None:
                rows.writerow([*start, 0, *[""] * (6 + len(seeds))])
                continue
            rows.writerow([*start, *_figure_cells(figure, _by_seed(figure.values, entry.seeds), seeds)])
        for name, shares in zip(analysis.classes, entry.class_iou.T, strict=False):
            known = {seed: share for seed, share in zip(entry.seeds, shares, strict=True) if math.isfinite(share)}
            if known:
                single = tuple(known.values())
                cells = _figure_cells(summary(single), _by_seed(single, tuple(known)), seeds)
                rows.writerow([entry.label, entry.role, f"iou:{name}", *cells])
        for baseline, name in _DIFFERENCES.items():
            contrast: Contrast | None = getattr(entry, name)
            if contrast is None:
                continue
            values = _by_seed(contrast.differences, _common(analysis, entry, baseline))
            numbers = map(
                _number,
                (contrast.mean, contrast.low, contrast.high, contrast.p, contrast.p_corrected, contrast.detectable),
            )
            start = [entry.label, entry.role, f"{analysis.primary.key}_minus_{baseline}"]
            rows.writerow([*start, len(contrast.differences), *numbers, *(values.get(seed, "") for seed in seeds)])
    return text.getvalue()


def _figure_cells(figure: Summary, values: Mapping[int, str], seeds: list[int]) -> list[int | str]:
    numbers = map(_number, (figure.mean, figure.low, figure.high))
    return [len(figure.values), *numbers, "", "", "", *(values.get(seed, "") for seed in seeds)]


def _common(analysis: Analysis, entry: EntryAnalysis, role: str) -> tuple[int, ...]:
    base = next((other.seeds for other in analysis.entries if other.role == role), ())
    return tuple(seed for seed in entry.seeds if seed in base)


def _by_seed(values: tuple[float, ...], seeds: tuple[int, ...]) -> dict[int, str]:
    """Return the value of every seed; none where values are not one per seed (agreement is one per pair of seeds)."""
    return dict(zip(seeds, map(_number, values), strict=True)) if len(values) == len(seeds) else {}


def _number(value: float) -> str:
    return repr(float(value)) if math.isfinite(value) else ""


# JSON ----------------------------------------------------------------------------------------------------------------


def json_text(analysis: Analysis) -> str:
    """Write everything but pixels, by the names of `Analysis` and its parts; what is not finite is null."""
    bare = _bare(analysis, analysis.primary.dense)
    return json.dumps({"format": 1, **bare}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _bare(value: Any, dense: bool) -> Any:
    if dataclasses.is_dataclass(value):
        told = (each for each in dataclasses.fields(value) if _written(each, dense))
        return {each.name: _bare(getattr(value, each.name), dense) for each in told}
    if isinstance(value, np.ndarray | np.generic):
        return _bare(value.tolist(), dense)
    if isinstance(value, Mapping):
        return {str(key): _bare(each, dense) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_bare(each, dense) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def _written(field: dataclasses.Field[Any], dense: bool) -> bool:
    when = field.metadata.get("written")
    return when is None or (dense and when == "dense")


# Markdown ------------------------------------------------------------------------------------------------------------


def markdown_text(analysis: Analysis) -> str:
    """Write verdicts and table for a GitHub issue or a README."""
    seeds, metric = ", ".join(map(str, analysis.seeds)), analysis.primary.name
    lines = [
        f"## Does it help {_safe(analysis.model)} on {_safe(analysis.data)}?",
        "",
        _safe(answer(analysis)),
        "",
        *(f"- {_safe(line)}" for line in verdict_lines(analysis)),
        "",
        f"Seeds {seeds}; means ± half of the 95 % interval. Δ: paired difference of test {metric} in points.",
        "",
    ]
    heads = ["entry", "seeds", "Δ plain", "Δ label smoothing", *(_safe(column.title) for column in analysis.columns)]
    lines += [_row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]
    for entry in analysis.entries:
        figures = [summary_text(entry.figures.get(column.key), column.kind) for column in analysis.columns]
        plain, smoothing = judged(entry.against_plain).word, judged(entry.against_smoothing).rival
        differences = [_difference(entry.against_plain, plain), _difference(entry.against_smoothing, smoothing)]
        lines.append(_row([_safe(entry.label), seeds_done(entry), *differences, *figures]))
    lines += _class_table(analysis)
    missing = [f"- {_safe(entry.label)}. {_safe(line)}" for entry in analysis.entries for line in failures(entry)]
    if missing:
        lines += ["", "Runs without a result:", "", *missing]
    if analysis.notes:
        lines += ["", "Notes:", "", *(f"- {_safe(note)}" for note in analysis.notes)]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", analysis.reproduce)), default=0))
    return "\n".join([*lines, "", "Reproduce:", "", f"{fence}bash", analysis.reproduce, fence, ""])


def _class_table(analysis: Analysis) -> list[str]:
    """Write the IoU of every class of segmentation, mean over seeds, a row for a class."""
    entries = [entry for entry in analysis.entries if len(entry.class_iou)]
    if not entries:
        return []
    heads = ["IoU", *(_safe(entry.label) for entry in entries)]
    rows = [
        _row([_safe(name), *(written(float(entry.per_class[i]), "share") for entry in entries)])
        for i, name in enumerate(analysis.classes)
    ]
    return ["", _row(heads), _row(["---", *["---:"] * len(entries)]), *rows]


def _difference(contrast: Contrast | None, word: str = "") -> str:
    """Write a paired difference in one cell: `+0.84 ± 0.35 (helps)`."""
    if contrast is None:
        return DASH
    text = f"{points(contrast.mean)} ± {100 * (contrast.high - contrast.low) / 2:.2f}"
    return f"{text} ({word})" if word else text


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _safe(text: str) -> str:
    """Escape what Markdown or HTML would read; an underscore inside a word is none of it."""
    escaped = re.sub(r"([\\`*<>|\[\]&~])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", escaped)


# Terminal ------------------------------------------------------------------------------------------------------------


def terminal_table(analysis: Analysis) -> Table:
    """Return the few columns that decide, for a terminal of 100 characters; the files have all of them."""
    from rich.table import Table
    from rich.text import Text

    accuracy, cost = accuracy_column(analysis), cost_column(analysis)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("entry")
    quality = accuracy.title if accuracy else analysis.primary.name
    heads = ["seeds", quality, "over plain", "over smoothing", "p corrected"]
    for head in [*heads, cost.title if cost else "training time"]:
        table.add_column(Text(head), justify="right")
    table.add_column("verdict")
    for entry in analysis.entries:
        contrast = entry.against_plain
        verdict = judged(contrast)
        style = {"good": "green", "bad": "red"}.get(verdict.tone, "")
        said = entry.role if entry.role != "method" else f"{verdict.symbol} {verdict.word}"
        cells = [
            seeds_done(entry),
            _cell(entry, accuracy),
            _difference(contrast),
            _difference(entry.against_smoothing),
            probability(contrast),
            written(entry.figures[cost.key].mean, cost.kind) if cost and cost.key in entry.figures else DASH,
        ]
        # As Text: a label such as ONE(branches=[2,3]) is no markup.
        table.add_row(Text(entry.label), *map(Text, cells), Text(said, style=style))
    return table


def _cell(entry: EntryAnalysis, column: Column | None) -> str:
    return DASH if column is None else summary_text(entry.figures.get(column.key), column.kind)


# Used by the figures and the page ------------------------------------------------------------------------------------


def confusion_change(entry: EntryAnalysis, plain: EntryAnalysis | None) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """Return [K, K] test images per seed that an entry answers otherwise than plain; None where one has no result."""
    if plain is None or entry is plain or not entry.seeds or not plain.seeds:
        return None
    if entry.confusion.ndim != 2 or entry.confusion.shape != plain.confusion.shape or not entry.confusion.size:
        return None
    return np.asarray(entry.confusion - plain.confusion, dtype=np.float64)
