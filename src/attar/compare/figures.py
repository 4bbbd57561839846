"""The figures of a comparison, as inline SVG that follows the theme of the page.

Every figure is laid out for the width of a phone, 360 units, and says in words what it shows. Colours are written as
placeholders and become CSS variables; matplotlib is imported only when a figure is drawn.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from attar.compare.analysis import Analysis, EntryAnalysis
from attar.compare.statistics import Contrast
from attar.compare.tables import accuracy_column, cost_column, judged, points, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Drawing", "accuracy", "clean", "confusion", "costs", "curve", "differences", "shortened"]

# What matplotlib draws with, and what the page makes of it.
_INK, _MUTED, _LINE, _PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
_GOOD, _BAD, _PLAIN, _SMOOTHING = "#0a0b05", "#0a0b06", "#0a0b07", "#0a0b08"
_SERIES = tuple(f"#0a0c0{i}" for i in range(1, 7))
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
    _PAPER: "var(--card)",
    _GOOD: "var(--good)",
    _BAD: "var(--bad)",
    _PLAIN: "var(--plain)",
    _SMOOTHING: "var(--smoothing)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES, 1)},
}
_TONES = {"good": _GOOD, "bad": _BAD, "none": _MUTED, "open": _MUTED}
_CLOCK = (("days", 86400), ("hours", 3600), ("minutes", 60))
_WIDTH, _TEXT, _SMALL = 360, 11.5, 10.5


@dataclass(frozen=True)
class Drawing:
    """One figure.

    Attributes:
        svg: markup, without a namespace or anything to load.
        finding: what it shows, in a sentence.
    """

    svg: str
    finding: str


def clean(text: str) -> str:
    """Return text on one line, without the control characters that markup cannot hold."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def shortened(text: str, length: int) -> str:
    """Cut a long name in its middle: beginnings and ends tell names apart."""
    text = clean(text)
    if len(text) <= length:
        return text
    ahead = (length - 1) // 2
    return f"{text[:ahead]}…{text[len(text) - (length - 1 - ahead) :]}"


def colour(analysis: Analysis, entry: EntryAnalysis) -> str:
    """Return the colour of an entry, the same in every figure."""
    if entry.role != "method":
        return _PLAIN if entry.role == "plain" else _SMOOTHING
    methods = [other.label for other in analysis.entries if other.role == "method"]
    return _SERIES[methods.index(entry.label) % len(_SERIES)]


# Dots and whiskers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    label: str
    text: str
    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    colour: str
    shade: float = 0.0


def accuracy(analysis: Analysis) -> Drawing | None:
    """Draw the test images' primary metric, mean, 95 % interval and every seed; None where nothing was measured."""
    column = accuracy_column(analysis)
    if column is None:
        return None
    rows = []
    for entry in analysis.entries:
        figure = entry.figures.get(column.key)
        if figure is None:
            rows.append(_Row(entry.label, "no finished run", math.nan, math.nan, math.nan, (), _MUTED))
            continue
        ends = max(0.0, figure.low), min(1.0, figure.high)
        hue = colour(analysis, entry)
        rows.append(_Row(entry.label, written(figure.mean, column.kind), figure.mean, *ends, figure.values, hue))
    done = [row for row in rows if math.isfinite(row.mean)]
    if not done:
        return None
    best = max(done, key=lambda row: row.mean)
    finding = f"Mean {column.title} of {len(done)} entries; the highest is {best.label} with {best.text}."
    plain = next((e.figures[column.key].mean for e in analysis.entries if e.role == "plain" and e.seeds), None)
    return _rows("accuracy", rows, plain, lambda value: f"{100 * value:.4g} %", finding)


def differences(analysis: Analysis, baseline: str) -> Drawing | None:
    """Draw the paired difference of every entry to a baseline, `plain` or `smoothing`, around a zero line."""
    rows = []
    for entry in analysis.entries:
        contrast: Contrast | None = entry.against_plain if baseline == "plain" else entry.against_smoothing
        if contrast is None:
            continue
        verdict = judged(contrast)
        rows.append(
            _Row(
                entry.label,
                f"{points(contrast.mean)} {verdict.word if baseline == 'plain' else verdict.rival}",
                contrast.mean,
                contrast.low,
                contrast.high,
                contrast.differences,
                _TONES[verdict.tone],
                contrast.detectable,
            )
        )
    if not rows:
        return None
    name = "plain training" if baseline == "plain" else "label smoothing"
    told = "; ".join(f"{row.label} {row.text}" for row in rows[:12]) + ("; ..." if len(rows) > 12 else "")
    finding = f"Paired differences of test {analysis.primary.name} to {name} in points. {told}."
    return _rows(f"differences-{baseline}", rows, 0.0, lambda value: points(value, 1), finding)


def _rows(name: str, rows: Sequence[_Row], zero: float | None, tick: Callable[[float], str], finding: str) -> Drawing:
    step, top, bottom = 40, 6, 24
    height = top + step * len(rows) + bottom
    with _drawing(name, _WIDTH, height, finding) as (figure, out):
        axes = _axes(figure, 8, bottom, _WIDTH - 16, step * len(rows))
        axes.set_ylim(len(rows), 0)
        edge = axes.get_yaxis_transform()
        about: dict[str, Any] = {"transform": edge, "color": _INK, "size": _TEXT}
        for i, row in enumerate(rows):
            # The label has a line of its own above the whisker: long names and a narrow screen leave no other place.
            axes.text(0, i + 0.36, shortened(row.label, 50 - int(1.2 * len(row.text))), **about)
            axes.text(1, i + 0.36, row.text, ha="right", weight="bold" if row.values else "normal", **about)
            if i:
                axes.plot([0, 1], [i, i], transform=edge, color=_LINE, lw=0.6)
            if not math.isfinite(row.mean):
                continue
            if zero is not None:
                # Not one line through all rows: it would strike the labels out.
                axes.plot([zero, zero], [i + 0.45, i + 0.92], color=_INK, lw=0.9, dashes=(2.5, 1.5))
            y = i + 0.6
            if math.isfinite(row.shade) and row.shade > 0:
                axes.plot([-row.shade, row.shade], [y, y], color=_LINE, lw=7, alpha=0.75, solid_capstyle="butt")
            axes.plot([row.low, row.high], [y, y], color=row.colour, lw=2, solid_capstyle="butt")
            for end in (row.low, row.high):
                axes.plot([end, end], [y - 0.075, y + 0.075], color=row.colour, lw=2)
            axes.plot([row.mean], [y], "o", color=row.colour, ms=6.5, mec=_PAPER, mew=1)
            axes.plot(row.values, [y + 0.2] * len(row.values), "o", color="none", ms=3.6, mec=_MUTED, mew=0.9)
        numbers = [x for row in rows for x in (row.low, row.high, *row.values) if math.isfinite(x)]
        # Shades may be far longer than anything measured; they need not be seen whole.
        low, high = min([*numbers, *([zero] if zero is not None else [])]), max([*numbers, *([zero] if zero else [])])
        high = max(high, zero or high)
        room = 0.05 * (high - low) or 0.01
        axes.set_xlim(low - room, high + room)
        _ticks(axes.xaxis, 4, tick)
        axes.tick_params(axis="x", length=0, pad=4)
    return out[0]


# Accuracy against cost -----------------------------------------------------------------------------------------------


def costs(analysis: Analysis) -> Drawing | None:
    """Draw the mean primary metric against mean training time; None where either is missing."""
    quality, cost = accuracy_column(analysis), cost_column(analysis)
    if quality is None or cost is None:
        return None
    longest = max((entry.figures[cost.key].mean for entry in analysis.entries if cost.key in entry.figures), default=0)
    unit, second = next(((unit, size) for unit, size in _CLOCK if longest >= 2 * size), ("seconds", 1))
    dots = [
        (entry, entry.figures[cost.key].mean / second, entry.figures[quality.key])
        for entry in analysis.entries
        if quality.key in entry.figures and cost.key in entry.figures
    ]
    if not dots:
        return None
    best = max(dots, key=lambda dot: dot[2].mean)
    finding = (
        f"{quality.title} against training time: {best[0].label} is highest with "
        f"{written(best[2].mean, quality.kind)} after {written(best[1] * second, cost.kind)}."
    )
    dots.sort(key=lambda dot: -dot[2].mean)
    gap, left, bottom, top, names = 17, 40, 40, 22, 138
    inner = max((gap + 6) * len(dots) if len(dots) > 12 else 0, min(300, max(210, 40 * len(analysis.entries) - 40)))
    height, width = inner + top + bottom, _WIDTH - left - names
    # From the left end of a label, so that no line runs through another label.
    leader = {"arrowstyle": "-", "lw": 0.7, "alpha": 0.55, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
    with _drawing("costs", _WIDTH, height, finding) as (figure, out):
        axes = _axes(figure, left, bottom, width, inner)
        times = [dot[1] for dot in dots]
        if min(times) > 0 and max(times) / min(times) > 20:
            axes.set_xscale("log")
            axes.set_xlim(min(times) / 1.5, max(times) * 1.5)
        else:
            axes.set_xlim(0, 1.08 * max(times) or 1)
        ends = [end for _, _, figure_ in dots for end in (max(0.0, figure_.low), min(1.0, figure_.high))]
        room = 0.05 * (max(ends) - min(ends)) or 0.01
        axes.set_ylim(min(ends) - room, max(ends) + room)
        axes.grid(color=_LINE, lw=0.6)
        axes.spines["bottom"].set(visible=True, color=_MUTED, linewidth=0.8)
        axes.spines["left"].set(visible=True, color=_MUTED, linewidth=0.8)
        wanted = [float(axes.transAxes.inverted().transform(axes.transData.transform((1, d[2].mean)))[1]) for d in dots]
        for (entry, seconds, one), place in zip(dots, _apart([w * inner for w in wanted], gap, inner), strict=True):
            hue, mean = colour(analysis, entry), one.mean
            low, high = max(0.0, one.low), min(1.0, one.high)
            axes.annotate(
                shortened(entry.label, 20),
                (seconds, mean),
                (1.05, place / inner),
                textcoords="axes fraction",
                va="center",
                size=_SMALL,
                color=_INK,
                arrowprops=leader | {"color": hue},
                annotation_clip=False,
            )
            axes.plot([seconds, seconds], [low, high], color=hue, lw=1.6, solid_capstyle="butt")
            axes.plot([seconds], [mean], "o", color=hue, ms=7, mec=_PAPER, mew=1)
        _ticks(axes.yaxis, 5, lambda value: f"{100 * value:.4g}")
        if axes.get_xscale() == "linear":
            _ticks(axes.xaxis, 4, lambda value: f"{value:.3g}")
        axes.text(
            -left + 4, inner + 9, f"{quality.title} (%)", transform=_units(figure, axes), size=_SMALL, color=_MUTED
        )
        axes.text(
            width, -33, f"{cost.title} ({unit})", transform=_units(figure, axes), size=_SMALL, color=_MUTED, ha="right"
        )
    return out[0]


def _apart(wanted: Sequence[float], gap: float, whole: float) -> list[float]:
    """Move places, given in falling order, as little as needed to lie a gap apart inside 0..whole."""
    places: list[float] = []
    for place in wanted:
        places.append(min(place, places[-1] - gap) if places else min(place, whole - gap / 2))
    floor = gap / 2
    for i in range(len(places) - 1, -1, -1):
        places[i] = max(places[i], floor)
        floor = places[i] + gap
    return places


# Learning curves -----------------------------------------------------------------------------------------------------


def curve(analysis: Analysis, entry: EntryAnalysis, index: int) -> Drawing | None:
    """Draw the primary metric of one entry on the hold-out over epochs, mean and range of seeds, over plain in grey."""
    if not np.isfinite(entry.curve).any():
        return None
    drawn = [(other, shade) for other, shade in ((_plain(analysis), _PLAIN), (entry, colour(analysis, entry)))]
    lines = [(other.curve, shade) for other, shade in drawn if other is not None and np.isfinite(other.curve).any()]
    if entry.role == "plain":
        lines = lines[-1:]
    everything = [other.curve for other in analysis.entries if np.isfinite(other.curve).any()]
    longest = max(each.shape[1] for each in everything)
    top = max(float(np.nanmax(each)) for each in everything)
    low = min(float(np.nanmin(each)) for each in everything)
    if longest > 10:
        # The first epochs would squeeze what matters: down to as far below the late ones as those reach up.
        late = min(float(np.nanmean(each[:, each.shape[1] // 3 :])) for each in everything)
        low = max(low, min(late, top - 0.02) - 1.2 * (top - late))
    low = max(0.0, low - 0.02 * (top - low))
    last = entry.curve[:, -1]
    finding = (
        f"Hold-out {analysis.primary.name} of {entry.label} over {entry.curve.shape[1]} epochs, ending at a mean of "
        f"{100 * last.mean():.2f} % over {len(last)} seeds."
    )
    width, height, left, bottom = 172, 122, 26, 20
    with _drawing(f"curve-{index}", width, height, finding) as (figure, out):
        axes = _axes(figure, left, bottom, width - left - 5, height - bottom - 5)
        axes.grid(axis="y", color=_LINE, lw=0.6)
        axes.spines["bottom"].set(visible=True, color=_MUTED, linewidth=0.8)
        for values, shade in lines:
            epochs = np.arange(1, values.shape[1] + 1)
            if len(values) > 1:
                axes.fill_between(epochs, values.min(0), values.max(0), color=shade, alpha=0.22, lw=0)
            axes.plot(epochs, values.mean(0), color=shade, lw=1.7, marker="o" if len(epochs) == 1 else "", ms=4)
        axes.set_xlim(1 if longest > 1 else 0.5, max(longest, 1.5))
        axes.set_ylim(low, top + 0.04 * (top - low) if top > low else top + 0.01)
        _ticks(axes.yaxis, 3, lambda value: f"{100 * value:.3g}")
        axes.set_xticks([1, longest] if longest > 1 else [1])
        for text, side in zip(axes.get_xticklabels(), ("left", "right"), strict=False):
            text.set(ha=side if longest > 1 else "center")
        axes.text(
            left + (width - left) / 2 - 13, 5, "epochs", transform=_units(figure), size=9.5, color=_MUTED, ha="center"
        )
        axes.tick_params(labelsize=9.5)
    return out[0]


def _plain(analysis: Analysis) -> EntryAnalysis | None:
    return next((entry for entry in analysis.entries if entry.role == "plain"), None)


# Confusion -----------------------------------------------------------------------------------------------------------


def confusion(label: str, change: np.ndarray[Any, Any], classes: Sequence[str], index: int) -> Drawing:
    """Draw how the confusion matrix changed against plain training, [K, K] test images per seed.

    What is better, more right answers or fewer confusions, has the colour of help; what is worse that of harm.
    """
    count = len(classes)
    better = np.where(np.eye(count, dtype=bool), change, -change)
    row, col = divmod(int(np.argmax(np.abs(change))), count)
    finding = (
        f"Confusion of {label} minus plain: the largest change is {change[row, col]:+.1f} images per seed of "
        f"{classes[row]} answered as {classes[col]}."
    )
    size = 9.5 if count <= 16 else 7.5
    names = [shortened(name, 9) for name in classes]
    left = max(54.0, 8 + 0.6 * size * max(map(len, names)))
    top = max(30.0, 8 + 0.6 * size * max(map(len, names)) if max(map(len, names)) > 2 else 0.0)
    inner = min(_WIDTH - left - 4, 52.0 * count)
    with _drawing(f"confusion-{index}", _WIDTH, inner + top + 4, finding) as (figure, out):
        from matplotlib.collections import PolyCollection
        from matplotlib.colors import to_rgba

        axes = _axes(figure, left, 4, inner, inner)
        axes.set(xlim=(0, count), ylim=(count, 0))
        largest = float(np.abs(change).max()) or 1.0
        cells, faces = [], []
        for i, j in zip(*np.nonzero(np.abs(change) >= 0.02 * largest), strict=True):
            cells.append([(j, i), (j + 1, i), (j + 1, i + 1), (j, i + 1)])
            faces.append(to_rgba(_GOOD if better[i, j] > 0 else _BAD, round(0.75 * abs(change[i, j]) / largest, 3)))
        axes.add_collection(PolyCollection(cells, facecolors=faces, edgecolors="none"))
        grid = np.arange(count + 1)
        axes.vlines(grid, 0, count, color=_LINE, lw=0.5)
        axes.hlines(grid, 0, count, color=_LINE, lw=0.5)
        axes.plot([0, count], [0, count], color=_MUTED, lw=0.5, dashes=(2, 3))
        if count <= 12:
            for (i, j), value in np.ndenumerate(change):
                text = points(value / 100, 1) if abs(value) < 9.95 else points(value / 100, 0)
                if abs(value) >= 0.05:
                    axes.text(j + 0.5, i + 0.5, text, ha="center", va="center_baseline", size=9, color=_INK)
        for i, name in enumerate(names):
            axes.text(-0.1, i + 0.5, name, ha="right", va="center_baseline", size=size, color=_INK)
            upright = max(map(len, names)) <= 2
            turned: dict[str, Any] = {
                "rotation": 0 if upright else 90,
                "rotation_mode": "anchor",
                "ha": "center" if upright else "left",
            }
            axes.text(
                i + 0.5, -0.12, name, va="baseline" if upright else "center_baseline", size=size, color=_INK, **turned
            )
        axes.set_xticks([])
        axes.set_yticks([])
        for text, line in (("answered →", 22), ("true ↓", 10)):
            axes.text(1, inner + line, text, transform=_units(figure), size=9, color=_MUTED)
    return out[0]


# From matplotlib to the page -----------------------------------------------------------------------------------------


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes at a place in units, without frame or ticks."""
    whole, tall = figure.get_size_inches() * 72
    axes = figure.add_axes((left / whole, bottom / tall, width / whole, height / tall))
    axes.patch.set_visible(False)
    axes.set_yticks([])
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, pad=4, labelcolor=_MUTED, labelsize=_SMALL)
    return axes


def _units(figure: Figure, axes: Axes | None = None) -> Any:
    """Return coordinates in units from the lower left corner of axes or figure."""
    from matplotlib.transforms import Affine2D, ScaledTranslation

    scale = Affine2D().scale(1 / 72) + figure.dpi_scale_trans
    if axes is None:
        return scale
    box = axes.get_position()
    width, height = figure.get_size_inches()
    return scale + ScaledTranslation(box.x0 * width, box.y0 * height, figure.dpi_scale_trans)


def _ticks(axis: Any, count: int, write: Callable[[float], str]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(float(value))))


@contextmanager
def _drawing(name: str, width: float, height: float, finding: str) -> Iterator[tuple[Figure, list[Drawing]]]:
    """Give a figure in units of 1/72 inch and a list that holds the drawing after the block."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        **matplotlib.rcParamsDefault,
        "svg.fonttype": "none",
        "svg.hashsalt": f"attar-{name}",
        "text.parse_math": False,  # a label may hold dollars
    }
    out: list[Drawing] = []
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names in scripts that matplotlib's font lacks: the page's fonts have them
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        figure.patch.set_visible(False)
        yield figure, out
        text = io.BytesIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    out.append(Drawing(_inline(text.getvalue(), name, finding), finding))


def _inline(svg: bytes, name: str, finding: str) -> str:
    """Turn matplotlib's file into markup for a page: own ids, the page's colours and font, nothing to load."""
    root = ElementTree.fromstring(svg)
    kept = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', svg.decode()))
    parents = {child: parent for parent in root.iter() for child in parent}
    for element in list(root.iter()):
        element.tag = _local(element.tag)
        element.tail = None
        if element.tag != "text":
            element.text = None
        if element.tag in ("metadata", "style"):
            parents[element].remove(element)
            continue
        attributes = {_local(key): value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in attributes.items():
            new = _attribute(key, value, name, kept)
            if new is not None:
                element.set(key, new)
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib.clear()
    root.attrib.update({"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": clean(finding)})
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _attribute(key: str, value: str, name: str, kept: set[str]) -> str | None:
    if key == "id":
        return f"{name}-{value}" if value in kept else None
    if key in ("href", "clip-path"):
        return value.replace("#", f"#{name}-")
    if key == "transform" and value.startswith("rotate(-0 "):
        return None
    if key == "d":
        return " ".join(value.split())
    if key == "style":
        value = re.sub(r"font-family: [^;]+;? ?", "", re.sub(r"font: ([^;]*?)([\d.]+px)[^;]*", _font, value))
        return re.sub(r"#[0-9a-f]{6}", lambda match: _VARIABLES.get(match[0], match[0]), value).rstrip("; ")
    return value


def _font(match: re.Match[str]) -> str:
    """Rewrite the short form that older versions of matplotlib use."""
    weight = re.search(r"\b(\d{3}|bold)\b", match[1])
    return (f"font-weight: {weight[1]}; " if weight else "") + f"font-size: {match[2]}"
