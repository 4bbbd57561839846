"""The whole comparison: baselines and methods planned, trained, measured, analysed and reported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from attar.compare.analysis import Analysis, analyse
from attar.compare.measure import measure_runs
from attar.compare.primary import primary
from attar.compare.protocol import PLAIN, SMOOTHING, Entry, run_folder, smoothed
from attar.compare.records import Record, read_record, read_records, remember
from attar.compare.report import write_report
from attar.compare.runner import Cell, context, default_jobs, lock, threads_per_run, train_all
from attar.compare.timing import StepTimes, step_times
from attar.distiller import Distiller
from attar.errors import AttarError
from attar.spec import TrainSpec
from attar.train.build import build_methods, build_model, build_source, build_task
from attar.train.files import read_json, storage_errors, write_json

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Plan", "compare", "read_duration", "report"]

_KEPT = "comparison.json"


@dataclass(frozen=True)
class Plan:
    """What is compared with what.

    Attributes:
        entries: the methods, in the order of the table.
        base: what all runs share; its methods and seed are replaced.
        seeds: of the runs of every entry.
        smoothing: label smoothing's candidates; with several, the first seed's hold-out chooses one for all seeds.
        equal: every run has the same epochs, or costs the same time as plain training for the epochs of `base`.
        budget: seconds that all runs together may take; the epochs are then chosen for that.
        corruptions: test images on which robustness is measured (0: it is not).
        epochs: of the entries that differ from `base`, by label; settled by `compare`.
    """

    entries: tuple[Entry, ...]
    base: TrainSpec
    seeds: tuple[int, ...]
    smoothing: tuple[float, ...] = SMOOTHING
    equal: Literal["epochs", "cost"] = "epochs"
    budget: float | None = None
    corruptions: int = 0
    epochs: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what can have no answer.

        Raises:
            AttarError: no seed, no smoothing, an entry that is there already, a budget without time.
        """
        if not self.seeds:
            raise AttarError("A comparison needs at least 1 seed, and at least 2 to tell an effect from chance.")
        if not self.smoothing or not all(0.0 < share < 1.0 for share in self.smoothing):
            raise AttarError(f"Label smoothing lies between 0 and 1 and cannot be {list(self.smoothing)}.")
        if self.budget is not None and self.budget <= 0:
            raise AttarError("The budget must be some time, for example 8h or 90min.")
        labels = [entry.label for entry in self.entries]
        for entry in self.entries:
            if labels.count(entry.label) > 1:
                raise AttarError(f"'{entry.label}' is given {labels.count(entry.label)} times: give each entry once.")
            if [*(method.options.keys() for method in entry.methods)] == [{"label_smoothing"}]:
                raise AttarError(f"Label smoothing is always in the table: give --smoothing instead of {entry.label}.")

    def cell(self, home: Path, entry: Entry, seed: int) -> Cell:
        """Return one run."""
        epochs = self.epochs.get(entry.label, self.base.epochs)
        spec = self.base.model_copy(update={"methods": entry.methods, "seed": seed, "epochs": epochs})
        return Cell(entry.label, spec, run_folder(home, spec))


def compare(
    plan: Plan,
    home: Path,
    *,
    jobs: int | None = None,
    command: str | None = None,
    measure: Callable[[Sequence[Path]], None] | None = None,
    console: Console,
) -> Analysis:
    """Train whatever is missing of a comparison and write its report: `report.html`, `.md`, `.csv` and `.json`.

    Runs are kept under names made from their specs. So an interrupted comparison goes on, an added entry or seed trains
    only what is new, and several processes may work at one folder.

    Args:
        plan: what to compare.
        home: folder of the comparison.
        jobs: runs at a time; default: one per GPU, else one per processor.
        command: what to type for the same comparison; default: written from the specs.
        measure: called with the folders of all finished runs before the report is written, to measure them further.
        console: where progress is shown.

    Raises:
        AttarError: a folder that holds something else, or data, model, method or option that no run can use.
        Interrupted: Ctrl-C or SIGTERM; the same call goes on.
    """
    if (home / "spec.json").is_file() or home.is_file():
        raise AttarError(f"'{home}' is no folder of a comparison: choose another one.")
    if jobs is not None and jobs < 1:
        raise AttarError(f"At least 1 run at a time must be trained, not {jobs}.")
    jobs = jobs or default_jobs()
    _check(plan)
    with storage_errors(home):
        home.mkdir(parents=True, exist_ok=True)
    threads = threads_per_run(jobs)
    with lock(home / _KEPT):
        plan = _settle_epochs(plan, home, threads, jobs, command, console)
    candidates = [plan.cell(home, smoothed(share), plan.seeds[0]) for share in plan.smoothing]
    cells = [
        *candidates,
        *(plan.cell(home, entry, seed) for seed in plan.seeds for entry in (PLAIN, *plan.entries)),
    ]
    train_all(cells, jobs=jobs, console=console)
    best = max(zip(plan.smoothing, candidates, strict=True), key=lambda pair: _on_holdout(pair[1]))[0]
    tuned = [plan.cell(home, smoothed(best), seed) for seed in plan.seeds[1:]]
    train_all(tuned, jobs=jobs, console=console)
    cells += tuned
    finished = [cell for cell in cells if cell.finished]
    if not finished:
        reason = read_record(cells[0].folder).failure
        raise AttarError(f"All {len(cells)} runs failed, the first of them so: {reason}")
    with lock(home / _KEPT):
        labels = {cell.label for cell in finished}
        rows = [entry for entry in (smoothed(best), *plan.entries) if entry.label in labels]
        costs = _relative_costs(plan, home, rows, threads, console)
        measure_runs([cell.folder for cell in finished], plan.corruptions, console)
        for cell in finished:
            if (cost := costs.get(cell.label, 1.0 if cell.label == PLAIN.label else None)) is not None:
                remember(cell.folder, step={"relative": cost, "threads": threads})
        if measure is not None:
            measure([cell.folder for cell in finished])
    return _reported([read_record(folder) for folder in dict.fromkeys(cell.folder for cell in cells)], home, home)


def _check(plan: Plan) -> None:
    """Refuse now what every run, or every run of an entry, would be refused for."""
    source = build_source(plan.base)
    for entry in (PLAIN, *plan.entries):
        spec = plan.base.model_copy(update={"methods": entry.methods})
        student = build_model(spec, source.num_classes)
        methods, task = build_methods(spec, source.num_classes), build_task(spec, source.num_classes)
        distiller = Distiller(student, methods, task, stages=spec.stages)
        if entry is PLAIN:
            distiller.build(torch.zeros(2, 3, *source.image_size))  # a student that is none for this task


def report(paths: Sequence[Path], out: Path) -> Analysis:
    """Write the report of runs that are there, from their folders alone.

    Args:
        paths: run folders, or folders of runs.
        out: where the report goes.

    Raises:
        AttarError: runs that are not of one comparison, or none that is finished.
    """
    home = paths[0] if len(paths) == 1 and (paths[0] / _KEPT).is_file() else out
    return _reported(read_records(paths), out, home)


def _reported(records: Sequence[Record], out: Path, home: Path) -> Analysis:
    kept = _kept(home)
    analysis = analyse(
        records,
        order=kept.get("order", ()),
        seeds=kept.get("seeds", ()),
        reproduce=kept.get("command"),
        notes=kept.get("notes", ()),
    )
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_report(analysis, out)
    return analysis


def _kept(home: Path) -> dict[str, Any]:
    found = read_json(home / _KEPT) if (home / _KEPT).is_file() else {}
    assert isinstance(found, dict)
    return found


def _on_holdout(cell: Cell) -> tuple[float, float]:
    if not cell.finished:
        return -1.0, 0.0
    held = json.loads((cell.folder / "result.json").read_text(encoding="utf-8"))["holdout"]
    return held[primary(cell.spec.task).key], -held["nll"]


# What a step costs decides how many epochs an entry gets, when the cost is to be equal or bounded. It is measured once
# and kept, so that the same call trains the same runs.


def _settle_epochs(plan: Plan, home: Path, threads: int, jobs: int, command: str | None, console: Console) -> Plan:
    kept, notes = _kept_for(plan, home), []
    budgets: dict[str, int] = kept.get("epochs_for_budget", {})
    if plan.budget is not None:
        asked = written_duration(plan.budget)
        if asked not in budgets:
            # Even of entries known already: the seconds of one epoch are needed, not the ratios alone.
            budgets[asked] = _affordable(plan, _measure_steps(plan, home, plan.entries, threads, console), jobs)
        plan = replace(plan, base=plan.base.model_copy(update={"epochs": budgets[asked]}))
        notes.append(f"{budgets[asked]} epochs were chosen for a budget of {asked}.")
    if plan.equal == "cost":
        costs = _relative_costs(plan, home, plan.entries, threads, console)
        epochs = {entry.label: max(1, round(plan.base.epochs / costs.get(entry.label, 1.0))) for entry in plan.entries}
        plan = replace(plan, epochs=epochs)
        notes.append(
            f"Equal training cost: every entry trained for about as long as plain training for {plan.base.epochs} "
            "epochs, by the time of its step; the training of teachers is not counted in that."
        )
    _keep(
        plan,
        home,
        order=[entry.label for entry in plan.entries],
        seeds=list(plan.seeds),
        command=command,
        notes=notes,
        epochs_for_budget=budgets,
    )
    return plan


def _relative_costs(
    plan: Plan, home: Path, entries: Sequence[Entry], threads: int, console: Console
) -> dict[str, float]:
    known: dict[str, float] = _kept_for(plan, home).get("relative_cost", {})
    unknown = [entry for entry in entries if entry.label not in known]
    if unknown:
        _measure_steps(plan, home, unknown, threads, console)
        known = _kept_for(plan, home)["relative_cost"]
    return known


def _measure_steps(plan: Plan, home: Path, entries: Sequence[Entry], threads: int, console: Console) -> StepTimes:
    console.print(f"Measuring the training steps of {len(entries)} entries beside the plain one ...", markup=False)
    specs = {entry.label: plan.cell(home, entry, plan.seeds[0]).spec for entry in entries}
    # In a process of its own, whose memory ends with it.
    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        times = pool.submit(step_times, plan.base, specs, threads).result()
    _keep(plan, home, relative_cost={**_kept_for(plan, home).get("relative_cost", {}), **times.relative})
    return times


def _kept_for(plan: Plan, home: Path) -> dict[str, Any]:
    """Return what is kept; what was measured for another model, data or batch says nothing here."""
    kept = _kept(home)
    return kept if kept.get("base") == _base(plan) else {}


def _keep(plan: Plan, home: Path, **values: Any) -> None:
    write_json(home / _KEPT, {**_kept_for(plan, home), "base": _base(plan), **values})


def _base(plan: Plan) -> str:
    return plan.base.model_copy(update={"epochs": 1}).fingerprint()


def _affordable(plan: Plan, times: StepTimes, jobs: int) -> int:
    """Return the epochs of plain training for which all runs together take the budget."""
    assert plan.budget is not None
    shares = [1.0 if plan.equal == "cost" else times.relative.get(entry.label, 1.0) for entry in plan.entries]
    runs = len(plan.seeds) * (2 + sum(shares)) + len(plan.smoothing) - 1
    one_epoch = runs * times.plain_epoch_seconds / jobs
    epochs = int(plan.budget / one_epoch)
    if epochs < 1:
        needed = written_duration(one_epoch)
        raise AttarError(
            f"One epoch of every run takes about {needed}, more than the budget of {written_duration(plan.budget)}: "
            "give more time, fewer seeds or entries, or a train_limit."
        )
    return epochs


def read_duration(text: str) -> float:
    """Read a time such as `8h`, `1h30min`, `90min` or `45s` as seconds.

    Raises:
        AttarError: no such time.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(h|min|m|s)", text)
    if not parts or re.sub(r"(\d+(?:\.\d+)?)\s*(h|min|m|s)", "", text).strip():
        raise AttarError(f"'{text}' is no time: write 8h, 1h30min, 90min or 45s.")
    return sum(float(number) * {"h": 3600, "s": 1}.get(unit, 60) for number, unit in parts)


def written_duration(seconds: float) -> str:
    """Write seconds as `read_duration` reads them, rounded."""
    if seconds < 90:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    return f"{minutes}min" if minutes < 90 else f"{minutes // 60}h" + (f"{minutes % 60}min" if minutes % 60 else "")
