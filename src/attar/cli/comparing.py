"""`attar demo`, `compare`, `report` and `reproduce`: what a method is worth."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attar.cli.words import make_console
from attar.errors import AttarError
from attar.options import Parser, values_of

if TYPE_CHECKING:
    from rich.console import Console

    from attar.compare.analysis import Analysis
    from attar.compare.comparison import Plan

__all__ = ["compare", "demo", "report", "reproduce"]

_SEEDS = 5
_CORRUPTED = 1000  # test images on which robustness is measured, unless told otherwise
_COMPARED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("--seeds", {"type": int, "default": _SEEDS, "metavar": "N"}, f"runs of every entry (default: {_SEEDS})"),
    (
        "--smoothing",
        {"type": float, "nargs": "+", "metavar": "X"},
        "label smoothing to choose from on the hold-out of the first seed (default: 0.05 0.1 0.2); one is not tuned",
    ),
    (
        "--equal",
        {"choices": ["epochs", "cost"], "default": "epochs", "metavar": "{epochs,cost}"},
        "what all entries have the same of: epochs, or training time by their measured steps (default: epochs)",
    ),
    ("--budget", {"metavar": "TIME"}, "choose the epochs so that all runs together take this long: 8h, 90min"),
    ("--jobs", {"type": int, "metavar": "N"}, "runs at a time (default: one per GPU, else one per processor)"),
    (
        "--corruptions",
        {"type": int, "nargs": "?", "const": _CORRUPTED, "default": 0, "metavar": "N"},
        f"also measure robustness to corrupted images, on N test images ({_CORRUPTED} when no number is given)",
    ),
    (
        "--int8",
        {"action": "store_true"},
        "also export every student to int8 ONNX, measure it there, and compare the ranges of activations (ranges.md); "
        "classification only",
    ),
    ("--out", {"metavar": "FOLDER"}, "folder of the comparison; default: runs/compare-MODEL-DATA-..."),
)


def compare(words: list[str]) -> int:
    """Train methods and baselines and say what helps; exit code 1 if any run failed."""
    parser = Parser(
        "attar compare",
        "Does it help my network, on my data? Methods against plain training and tuned label smoothing: same seeds,\n"
        "split, order and schedule; selection on the hold-out; paired statistics; costs; a report. The same command\n"
        "goes on where it stopped, and further entries or seeds train only what is new.",
        usage="attar compare ENTRY [ENTRY...] --model MODEL --data DATA [options]",
    )
    parser.epilog = (
        "ENTRY is a method with options in brackets, or several joined by +:\n"
        "  attar compare ONE 'ONE(branches=2)' 'ONE+Supervised(label_smoothing=0.1)' --model resnet18 --data ./photos\n"
        "Several processes may be given the same command at once: they share the runs."
    )
    group = parser.add_argument_group("the comparison")
    for option, settings, meaning in _COMPARED:
        group.add_argument(option, help=meaning, **settings)
    entries, words = _leading(words)
    plan, given = _plan(parser, entries, words)
    home = Path(given["out"] or Path("runs") / _home_name(plan))
    console = make_console()
    from attar.compare.comparison import compare as run

    command = shlex.join(["attar", "compare", *entries, *words])
    measure = None
    if given["int8"]:
        from attar.deploy.program import require

        require(("onnx", "onnxscript", "onnxruntime"), "ONNX", "export")  # before hours of training
        measure = partial(_measure_int8, home=home, console=console)
    analysis = run(plan, home, jobs=given["jobs"], command=command, measure=measure, console=console)
    return _show(analysis, home, console)


def _measure_int8(folders: Sequence[Path], home: Path, console: Console) -> None:
    """Export students to int8 ONNX and measure the ranges of their activations; what is there stays.

    A student that cannot be exported is no reason to lose the report; its columns stay empty.
    """
    from rich.progress import track

    from attar.compare.protocol import label_of
    from attar.compare.records import measured, remember
    from attar.deploy.export import export_run
    from attar.deploy.ranges import Range, ranges_of_run, ranges_text
    from attar.spec import TrainSpec
    from attar.train.files import write_atomically

    shown = console.is_terminal and not console.quiet
    ranges: dict[str, list[list[Range]]] = {}
    for folder in track(folders, "Exporting to int8", console=console, transient=True, disable=not shown):
        if "ranges" not in measured(folder):
            remember(folder, ranges=[each.as_dict() for each in ranges_of_run(folder)])
        found = [Range.of(each) for each in measured(folder)["ranges"]]
        ranges.setdefault(label_of(TrainSpec.load(folder / "spec.json").methods), []).append(found)
        if (folder / "export" / "onnx-int8" / "export.json").is_file():
            continue
        try:
            export_run(folder, int8=True)
        except AttarError as error:
            console.print(f"No int8 figures of {folder.name}: {error}", markup=False, soft_wrap=True)
    try:
        write_atomically(home / "ranges.md", ranges_text(ranges).encode())
    except AttarError as error:
        console.print(f"No comparison of ranges: {error}", markup=False, soft_wrap=True)


def demo(words: list[str]) -> int:
    """Compare ONE with its baselines on embedded digits."""
    from attar.demo import EPOCHS, SEEDS, demo_plan

    parser = Parser("attar demo", "Plain training, label smoothing and ONE on embedded digits, paired over seeds.")
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="where runs go (default: runs/demo)")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"runs per entry (default: {SEEDS})")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"of every run (default: {EPOCHS})")
    given = parser.read(words)
    plan, home, console = demo_plan(given["seeds"], given["epochs"]), Path(given["out"]), make_console()
    from attar.compare.comparison import compare as run

    command = shlex.join(["attar", "demo", *words])
    code = _show(run(plan, home, command=command, console=console), home, console)
    folder = plan.cell(home, plan.entries[0], 0).folder / "student"
    loading = f'import timm\nstudent = timm.create_model("local-dir:{folder}", pretrained=True)'
    told = f"Every run left its student in {home}, the plain network whatever trained it; timm alone loads one:"
    console.print(f"\n{told}\n\n{loading}", markup=False, soft_wrap=True)
    return code


def _leading(words: list[str]) -> tuple[list[str], list[str]]:
    """Split words into those before the first option, and the rest."""
    first = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first], words[first:]


def _plan(parser: Parser, entries: list[str], words: list[str]) -> tuple[Plan, dict[str, Any]]:
    from attar.spec import TrainSpec, parse

    fields = [name for name in TrainSpec.model_fields if name not in ("methods", "seed")]
    parser.add_fields("every run", TrainSpec, only=fields)
    given = parser.read(words)
    if not entries:
        raise AttarError("Name what to compare first, for example attar compare ONE --model resnet18 --data ./photos.")
    if given["seeds"] < 1:
        raise AttarError(f"A comparison needs at least 1 seed, not {given['seeds']}.")
    if given["budget"] is not None and "epochs" in given:
        raise AttarError("Give --epochs or --budget: a budget chooses the epochs.")
    run = values_of({name: given[name] for name in fields if name in given}, TrainSpec)
    base = parse(TrainSpec, {"methods": [], **run})
    from attar.compare.comparison import Plan, read_duration
    from attar.compare.protocol import read_entry

    wanted = [read_entry(text) for text in entries if text.casefold() != "plain"]
    settings: dict[str, Any] = {"equal": given["equal"], "corruptions": given["corruptions"]}
    if given["smoothing"]:
        settings["smoothing"] = tuple(given["smoothing"])
    if given["budget"] is not None:
        settings["budget"] = read_duration(given["budget"])
    return Plan(tuple(wanted), base, tuple(range(given["seeds"])), **settings), given


def _home_name(plan: Plan) -> str:
    data = plan.base.data.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.+-]+", "-", f"compare-{plan.base.model}-{data}-{plan.base.fingerprint()[:8]}")


def report(words: list[str]) -> int:
    """Write the report of run folders."""
    parser = Parser(
        "attar report",
        "Write the report of runs that are there: report.html, .md, .csv and .json, from their folders alone.",
        usage="attar report RUN [RUN...] [--out FOLDER]",
    )
    parser.add_argument("--out", metavar="FOLDER", help="where the report goes (default: the folder of the runs)")
    paths, words = _leading(words)
    given = parser.read(words)
    if not paths:
        raise AttarError("Name the run folders, or the folder of a comparison: attar report runs/compare-...")
    missing = next((path for path in paths if not Path(path).is_dir()), None)
    if missing is not None:
        raise AttarError(f"There is no folder '{missing}': give run folders, or the folder of a comparison.")
    if given["out"] is None and len(paths) > 1:
        raise AttarError("Say with --out where the report of several folders goes.")
    out = Path(given["out"] or paths[0])
    from attar.compare.comparison import report as write

    return _show(write([Path(path) for path in paths], out), out, make_console())


def _show(analysis: Analysis, home: Path, console: Console) -> int:
    from attar.compare.tables import terminal_table, verdict_lines

    console.print()
    console.print(terminal_table(analysis))
    console.print()
    for line in verdict_lines(analysis):
        console.print(line, markup=False, soft_wrap=True)
    failed = [(entry.label, failure) for entry in analysis.entries for failure in entry.failures]
    for label, failure in failed:
        console.print(f"{label}, seed {failure.seed}: {failure.reason}", markup=False, soft_wrap=True)
    console.print(f"\nThe report is {home / 'report.html'} (and .md, .csv, .json).", markup=False, soft_wrap=True)
    return 1 if failed else 0


def reproduce(words: list[str]) -> int:
    """Run a recipe and put the published numbers beside the measured ones; exit code 1 if any run failed."""
    parser = Parser(
        "attar reproduce",
        "Run one row of a paper's table and put the published numbers beside the measured ones; without a name, list\n"
        "the rows. Rows that share runs share them in one folder, and what is finished is not trained again.",
        usage="attar reproduce [NAME] [options]",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="row to run, for example one_resnet32_cifar100")
    parser.add_argument(
        "--scale",
        choices=["full", "small"],
        default="full",
        metavar="{full,small}",
        help="small shows in seconds that the row runs, on digits; its numbers are comparable with nothing",
    )
    parser.add_argument("--data", metavar="TEXT", help="your own copy of the row's images, for example parquet:DIR")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each kind (default: 1)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one per GPU, else processor)")
    parser.add_argument("--out", metavar="FOLDER", help="where runs go (default: runs/reproduce, runs/reproduce-small)")
    given = parser.read(words)
    from attar.recipes import find, recipe_table
    from attar.recipes import reproduce as run

    console = make_console()
    if given["name"] is None:
        console.print(recipe_table())
        console.print("\nattar reproduce NAME runs one; --scale small shows in seconds that it runs.")
        return 0
    scale = given["scale"]
    out = Path(given["out"] or ("runs/reproduce" if scale == "full" else "runs/reproduce-small"))
    answer = run(
        find(given["name"]),
        scale=scale,
        out=out,
        data=given["data"],
        seeds=given["seeds"],
        jobs=given["jobs"],
        console=console,
    )
    return 0 if answer.complete else 1
