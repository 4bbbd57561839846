"""A recipe carried out: its runs trained, the published figures and the measured ones side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attar.compare.protocol import run_folder
from attar.compare.records import FAILURE, measured, remember
from attar.compare.runner import Cell, train_all
from attar.compare.statistics import Summary, summary
from attar.errors import AttarError, unknown_name
from attar.methods import find
from attar.recipes.recipe import CLASSES, IMAGENET, UNITS, Metric, Published, Recipe, missing_methods, runs_of
from attar.recipes.scale import small
from attar.spec import MethodSpec, TrainSpec, teacher_options
from attar.train import build_source, retrieve_run
from attar.train.files import read_json

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Figure", "Reproduction", "reproduce", "show"]

Scale = Literal["full", "small"]


@dataclass(frozen=True)
class Figure:
    """One line of the answer: a metric of one network, as published and as measured.

    Attributes:
        run: label of the run.
        network: "student", or another network that the run yields ("ONE.ensemble").
        metric: in the unit of `UNITS`.
        published: None where nobody published it.
        measured: over the seeds that finished; None when none did, or when it is not measured on this network.
    """

    run: str
    network: str
    metric: Metric
    published: Published | None
    measured: Summary | None

    @property
    def difference(self) -> float | None:
        """Measured minus published, in the metric's unit."""
        if self.published is None or self.measured is None:
            return None
        return self.measured.mean - self.published.value


@dataclass(frozen=True)
class Reproduction:
    """What came of carrying out a recipe.

    Attributes:
        recipe: as it was carried out, small where that was asked.
        seeds: how many were asked.
        figures: run by run.
        failures: (label and seed, reason) of every run without a result.
        folders: of all runs, by label.
    """

    recipe: Recipe
    seeds: int
    figures: tuple[Figure, ...]
    failures: tuple[tuple[str, str], ...]
    folders: Mapping[str, tuple[Path, ...]]

    @property
    def complete(self) -> bool:
        """Whether every run has finished."""
        return not self.failures


def reproduce(
    recipe: Recipe,
    *,
    scale: Scale = "full",
    out: Path,
    data: str | None = None,
    seeds: int = 1,
    jobs: int | None = None,
    console: Console,
) -> Reproduction:
    """Train a recipe's runs into `out`, going on from where an earlier call stopped, and print what came of it.

    Recipes may share a folder: what two of them train alike is trained once. A teacher is trained once (seed 0), the
    other runs with seeds 0 to `seeds` - 1.

    Args:
        recipe: what to do.
        scale: "full" is the paper's, "small" shows in seconds that the recipe runs.
        out: folder of run folders.
        data: where the recipe's images are, instead of a download.
        seeds: runs of each kind.
        jobs: runs at a time.
        console: where progress and the answer are shown.

    Raises:
        AttarError: a method that attar does not have, data that cannot be opened or are not the recipe's.
        Interrupted: as `train_all`.
    """
    if scale not in ("full", "small"):
        raise unknown_name("scale", scale, ["full", "small"])
    if seeds < 1:
        raise AttarError(f"At least 1 seed is needed, not {seeds}.")
    if missing := missing_methods(recipe):
        raise AttarError(f"{recipe.name} needs {', '.join(missing)}, which attar does not have yet.")
    chosen = _on(small(recipe) if scale == "small" else recipe, data)
    if scale == "full":
        _check_data(recipe, chosen.spec, data)
    for line in (f"{chosen.name}: {chosen.title}", f"{chosen.paper}, {chosen.table}"):
        console.print(line, markup=False, soft_wrap=True)
    cells = _train(chosen, out, seeds, jobs, console)
    answer = Reproduction(
        chosen,
        seeds,
        tuple(_figures(chosen, cells, console)),
        tuple(_failures(cells)),
        {label: tuple(cell.folder for cell in group) for label, group in cells.items()},
    )
    show(answer, console)
    return answer


def _on(recipe: Recipe, data: str | None) -> Recipe:
    if data is None:
        return recipe
    teacher, *others = (
        None if spec is None else spec.model_copy(update={"data": data})
        for spec in (recipe.teacher, recipe.spec, *recipe.beside)
    )
    spec, *beside = filter(None, others)
    return dataclasses.replace(recipe, teacher=teacher, spec=spec, beside=tuple(beside))


def _check_data(recipe: Recipe, spec: TrainSpec, data: str | None) -> None:
    """Refuse data that cannot be opened, or that are others than the recipe's, before anything is trained."""
    wanted = recipe.spec.data
    if wanted == IMAGENET and data is None:
        raise AttarError(f"{recipe.name} needs ImageNet, which cannot be downloaded: give its folder with --data.")
    try:
        source = build_source(spec)
    except AttarError as error:
        if data is not None:
            raise
        said = str(error).rstrip(".")
        raise AttarError(f"{said}, or give your own copy with --data, for example --data parquet:DIR.") from error
    classes = CLASSES.get(wanted, source.num_classes)
    if source.num_classes != classes:
        raise AttarError(
            f"{recipe.name} is about {wanted}, which has {classes} classes, but '{spec.data}' has "
            f"{source.num_classes}: give {wanted}."
        )


def _train(recipe: Recipe, out: Path, seeds: int, jobs: int | None, console: Console) -> dict[str, list[Cell]]:
    """Train the teacher, then everything else; return the runs by label, those without a teacher left out."""
    cells: dict[str, list[Cell]] = {}
    taught: Path | None = None
    if recipe.teacher is not None:
        taught = run_folder(out, recipe.teacher)
        cells["teacher"] = [Cell("teacher", recipe.teacher, taught)]
        train_all(cells["teacher"], jobs=jobs, console=console)
    for label, spec in runs_of(recipe).items():
        if label == "teacher":
            continue
        seeded = [spec.model_copy(update={"seed": seed, "methods": _taught(spec, taught)}) for seed in range(seeds)]
        cells[label] = [Cell(label, each, run_folder(out, each)) for each in seeded]
    if taught is not None and not cells["teacher"][0].finished:
        # What needs the teacher would fail for a reason that is not its own.
        ready = [cell for group in cells.values() for cell in group if not _needs_teacher(cell.spec)]
    else:
        ready = [cell for group in cells.values() for cell in group]
    # Seed by seed, so that a reproduction that is stopped half way has whole rows.
    train_all(sorted(ready, key=lambda cell: cell.spec.seed), jobs=jobs, console=console)
    return cells


def _needs_teacher(spec: TrainSpec) -> bool:
    return any(teacher_options(find(method.name)) for method in spec.methods)


def _taught(spec: TrainSpec, teacher: Path | None) -> tuple[MethodSpec, ...]:
    """Return the methods with the teacher's folder where they want one and have none."""
    if teacher is None:
        return spec.methods
    methods = []
    for method in spec.methods:
        wanted = {name: [str(teacher)] for name in teacher_options(find(method.name))}
        methods.append(method.model_copy(update={"options": {**wanted, **method.options}}))
    return tuple(methods)


def _figures(recipe: Recipe, cells: Mapping[str, Sequence[Cell]], console: Console) -> list[Figure]:
    """Return every published figure with what was measured, and the top-1 of whatever nobody published."""
    metric = recipe.published[0].metric if recipe.published else "top-1 error"
    figures = []
    for label, group in cells.items():
        published = [figure for figure in recipe.published if figure.run == label]
        searched = any(figure.metric in _DISTANCES for figure in recipe.published)
        results = [_result(cell, searched, console) for cell in group if cell.finished]
        networks = dict.fromkeys(("student", *(name for result in results for name in result["deployables"])))
        for network in networks:
            own = [figure for figure in published if figure.network == network]
            if not any(figure.metric in (*_TOP1, *_DISTANCES) for figure in own):
                figures.append(Figure(label, network, metric, None, _measured(results, network, metric)))
            for figure in own:
                measured = _measured(results, network, figure.metric)
                figures.append(Figure(label, network, figure.metric, figure, measured))
        for figure in published:
            if figure.network not in networks:  # of a run that has not finished
                figures.append(Figure(label, figure.network, figure.metric, figure, None))
    return figures


_TOP1: dict[Metric, Callable[[float], float]] = {
    "top-1 error": lambda top1: 100 * (1 - top1),
    "top-1 accuracy": lambda top1: 100 * top1,
}


# By which distance a network's images search the training images.
_DISTANCES: dict[Metric, str] = {"mAP (cosine)": "cosine", "mAP (euclidean)": "euclidean"}


def _result(cell: Cell, searched: bool, console: Console) -> dict[str, Any]:
    """Return what a run has measured, with its student's retrieval where a figure is about that."""
    result: dict[str, Any] = read_json(cell.folder / "result.json")
    if not searched:
        return result
    found = measured(cell.folder).get("retrieval")
    if found is None:
        found = {distance: score.as_dict() for distance, score in retrieve_run(cell.folder).items()}
        remember(cell.folder, retrieval=found)
    scores = ", ".join(f"{score['batch_interpolated_map']:.2%} ({distance})" for distance, score in found.items())
    console.print(f"{cell}: mAP {scores}", markup=False, soft_wrap=True)
    return {**result, "retrieval": found}


def _measured(results: Sequence[dict[str, Any]], network: str, metric: Metric) -> Summary | None:
    values = [value for result in results if (value := _value(result, network, metric)) is not None]
    return summary(values) if values else None


def _value(result: dict[str, Any], network: str, metric: Metric) -> float | None:
    if metric in _TOP1:
        test = result["test"] if network == "student" else result["deployables"][network]["test"]
        return _TOP1[metric](test["top1"])
    if metric in _DISTANCES:
        scores = result["retrieval"][_DISTANCES[metric]] if network == "student" else None
        return float(100 * scores["batch_interpolated_map"]) if scores is not None else None
    if metric == "parameters":
        deployed = result["parameters"]["deployed"]
        return float((deployed if network == "student" else result["deployables"][network]["parameters"]) / 1e6)
    return float(result["flops"]["deployed"] / 1e8) if network == "student" else None


def _failures(cells: Mapping[str, Sequence[Cell]]) -> list[tuple[str, str]]:
    failures = []
    for cell in (cell for group in cells.values() for cell in group if not cell.finished):
        said = cell.folder / FAILURE
        reason = "It was not trained, since its teacher failed."
        failures.append((str(cell), str(read_json(said)["reason"]) if said.is_file() else reason))
    return failures


def show(answer: Reproduction, console: Console) -> None:
    """Print the figures, the runs that failed and the notes."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("network", "metric"):
        table.add_column(heading)
    for heading in ("published", "measured", "95 % interval", "difference"):
        table.add_column(heading, justify="right")
    table.add_column("how the published figure is known")
    for figure in answer.figures:
        table.add_row(*map(Text, _cells(figure, answer)))
    console.print()
    console.print(table)
    said = [f"FAILED: {label}: {reason}" for label, reason in answer.failures]
    said += [f"note: {note}" for note in answer.recipe.notes]
    if answer.seeds == 1:
        said.append("note: One seed has no interval; --seeds 3 or more gives one.")
    console.print()
    for line in said:
        console.print(line, markup=False, soft_wrap=True)


def _cells(figure: Figure, answer: Reproduction) -> list[str]:
    unit, published, measured = UNITS[figure.metric], figure.published, figure.measured
    name = figure.run if figure.network == "student" else f"{figure.run}, {figure.network.rpartition('.')[2]}"
    shown = "-" if published is None else _number(published.value, figure.metric)
    if published is not None and published.spread is not None:
        shown += f" +- {published.spread:.2f}"
    interval = "-"
    if measured is not None and len(measured.values) > 1 and figure.metric in (*_TOP1, *_DISTANCES):
        low, high = (min(max(end, 0.0), 100.0) for end in (measured.low, measured.high))
        interval = f"{low:.2f} to {high:.2f}"
    difference = "-"
    if figure.difference is not None:
        # The sum turns -0.0 into 0.0.
        told = f"{round(figure.difference, 2) + 0.0:+.2f}"
        difference = "not comparable" if answer.recipe.scale == "small" else told
    known = "-"
    if published is not None:
        known = published.known + (f" ({published.table})" if published.table else "")
    value = "-" if measured is None else _number(measured.mean, figure.metric)
    return [name, f"{figure.metric}, {unit}", shown, value, interval, difference, known]


def _number(value: float, metric: Metric) -> str:
    return f"{value:.2f}" if metric in (*_TOP1, *_DISTANCES) else f"{value:.3g}"
