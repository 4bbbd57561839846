"""Why ensembles and distillation help: multi-view data, where the answer is known, and controls on real images.

python examples/multi_view.py                                             # the findings, 5 seeds, a table and a plot
python examples/multi_view.py --steps 500                                 # a quicker look
python examples/multi_view.py --controls --data parquet:DIR               # what does not help, on real images

A run that was stopped goes on when the same command is given again. docs/multi_view.md says what is predicted and seen.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import re
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from timm.models import register_model
from torch import Tensor, nn

import attar
from attar.data import EvalLoader, Normalization, Source
from attar.lab import Ensemble, MultiView, MultiViewNetwork, MultiViewSamples
from attar.spec import TrainSpec, parse
from attar.train import build_source, evaluate, fit, load_student
from attar.train.files import write_atomically, write_json

Scores = dict[str, list[dict[str, float]]]

SINGLE, LONGER, SELF = "single network", "single network, trained twice as long", "self-distillation"


@dataclass(frozen=True)
class Setting:
    """What is trained for every data seed; anything else gets another folder."""

    steps: int = 1500
    members: int = 5
    students: int = 2  # of the ensemble, at every temperature
    pairs: int = 2  # networks that go on: with the labels alone, and as another one's students
    temperatures: tuple[float, ...] = (4.0, 1.0)
    weight: float = 3.0  # of the soft labels, beside 0.1 for the labels
    task_weight: float = 0.1
    rate: float = 1.0
    train_samples: int = 300
    train_single_view: float = 0.05
    test_samples: int = 2000
    test_single_view: float = 0.5  # half, so that both groups are measured


class RememberingTeacher(attar.Teacher):
    """A teacher that is shown one and the same batch at every step: it answers once."""

    def __call__(self, images: Tensor) -> Tensor:
        if getattr(self, "_seen", None) is not images:
            self._seen, self._answer = images, super().__call__(images)
        return self._answer


class Experiment:
    """Everything that is trained on the data of one seed.

    A job trains one network and keeps it in a file; where the file is there already, it is read instead.
    """

    def __init__(self, seed: int, setting: Setting, folder: Path, tick: Callable[[int], None]) -> None:
        self.seed, self.setting, self.folder, self.tick = seed, setting, folder / f"seed{seed}", tick
        self.distribution = MultiView(seed=seed)
        self.train_set = self.distribution.sample(setting.train_samples, setting.train_single_view, seed=1)
        self.test_set = self.distribution.sample(setting.test_samples, setting.test_single_view, seed=2)
        self.images = self.train_set.images
        self.trained: dict[str, list[nn.Module]] = {}

    def first_jobs(self) -> list[Callable[[], None]]:
        """Train the single networks, which everything else builds on."""
        return [
            self._job(SINGLE, i, partial(self._fresh, i), attar.methods.Supervised) for i in range(self.setting.members)
        ]

    def second_jobs(self) -> list[Callable[[], None]]:
        """Train all that starts from the single networks, or learns from them."""
        chosen, singles = self.setting, self.trained[SINGLE]
        jobs = []
        for i in range(chosen.pairs):
            start = partial(singles.__getitem__, i)
            jobs.append(self._job(LONGER, i, start, attar.methods.Supervised))
            # First its own views, then another network's: fresh students would only learn the teacher's.
            jobs.append(self._job(SELF, i, start, partial(self._from_another, i)))
        for temperature in chosen.temperatures:
            for i in range(chosen.students):
                start = partial(self._fresh, 1000 + i)
                method = partial(self._from_all, temperature)
                jobs.append(self._job(distilled(temperature), i, start, method))
        return jobs

    def _fresh(self, number: int) -> MultiViewNetwork:
        return MultiViewNetwork(self.distribution.classes, self.distribution.dim, seed=10_000 * self.seed + number)

    def _from_another(self, i: int) -> attar.Method:
        teacher = RememberingTeacher(copy.deepcopy(self.trained[SINGLE][(i + 1) % self.setting.members]))
        return attar.methods.TfKD(
            teacher, temperature=4.0, weight=self.setting.weight, task_weight=self.setting.task_weight
        )

    def _from_all(self, temperature: float) -> attar.Method:
        teacher = RememberingTeacher(copy.deepcopy(Ensemble(self.trained[SINGLE])))
        return attar.methods.KD(
            teacher, temperature=temperature, weight=self.setting.weight, task_weight=self.setting.task_weight
        )

    def _job(
        self, kind: str, number: int, start: Callable[[], nn.Module], method: Callable[[], attar.Method]
    ) -> Callable[[], None]:
        places = self.trained.setdefault(kind, [])
        places.append(None)  # type: ignore[arg-type]
        path = self.folder / f"{re.sub(r'[^a-zA-Z0-9]+', '_', kind)}_{number}.safetensors"

        def job() -> None:
            network = copy.deepcopy(start())
            if path.is_file():
                network.load_state_dict(safetensors.torch.load_file(path))
                self.tick(self.setting.steps)
            else:
                network = self._train(network, method())
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, safetensors.torch.save(network.state_dict()))
            places[number] = network

        return job

    def _train(self, network: nn.Module, method: attar.Method) -> nn.Module:
        task = attar.Classification(self.distribution.classes)
        distiller = attar.Distiller(network.requires_grad_(True), [method], task).build(self.images)
        optimizer = torch.optim.SGD(distiller.parameters(), lr=self.setting.rate)
        progress = torch.zeros(())
        for step in range(self.setting.steps):
            progress.fill_(step / self.setting.steps)
            distiller((self.images, self.train_set.labels), progress).total().backward()
            optimizer.step()
            optimizer.zero_grad()
            self.tick(1)
        return distiller.strip(prove_export=False)

    def scores(self) -> Scores:
        """Measure every network, and the ensembles of every subset of the single ones."""
        found = {kind: [accuracies(n, self.test_set) for n in networks] for kind, networks in self.trained.items()}
        for size in (2, 3, self.setting.members):
            subsets = itertools.combinations(self.trained[SINGLE], size)
            found[f"ensemble of {size}"] = [accuracies(Ensemble(subset), self.test_set) for subset in subsets]
        return {kind: found[kind] for kind in kinds(self.setting) if kind in found}


def distilled(temperature: float) -> str:
    """Name the students of the whole ensemble."""
    return f"distilled from the ensemble, T = {temperature:g}"


def kinds(setting: Setting) -> list[str]:
    """List the rows of the table."""
    ensembles = [f"ensemble of {size}" for size in dict.fromkeys((2, 3, setting.members))]
    return [SINGLE, LONGER, *ensembles, *map(distilled, setting.temperatures), SELF]


@torch.no_grad()
def accuracies(network: nn.Module, samples: MultiViewSamples) -> dict[str, float]:
    """Measure the two kinds of samples apart: any other accuracy is a mixture of these two."""
    right = (network(samples.patches).argmax(dim=1) == samples.labels).double()
    single = samples.single_view
    return {"single_view": right[single].mean().item(), "multi_view": right[~single].mean().item()}


def run(seeds: Sequence[int], setting: Setting, folder: Path, jobs: int, console: Console) -> dict[str, Scores]:
    """Train whatever is missing, `jobs` networks at a time, and measure everything; by seed."""
    stop = threading.Event()
    ways = setting.members + 2 * setting.pairs + setting.students * len(setting.temperatures)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        total = len(seeds) * ways
        task = progress.add_task(f"{total} networks", total=total * setting.steps)

        def tick(steps: int) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            progress.advance(task, steps)

        experiments = [Experiment(seed, setting, folder, tick) for seed in seeds]
        # One thread a network: a result does not depend on how many train at a time.
        torch.set_num_threads(1)
        results = {}
        with ThreadPoolExecutor(jobs) as pool:
            for experiment in experiments:
                for phase in (experiment.first_jobs, experiment.second_jobs):
                    waiting = [pool.submit(job) for job in phase()]
                    try:
                        for done in waiting:
                            done.result()
                    except BaseException:
                        stop.set()
                        pool.shutdown(cancel_futures=True)
                        raise
                results[str(experiment.seed)] = experiment.scores()
                if not console.is_terminal:
                    console.print(f"seed {experiment.seed} is done")
    return results


def summary(results: dict[str, Scores]) -> dict[str, dict[str, float]]:
    """Average over seeds: every seed counts the same, however many networks it has."""
    rows: dict[str, dict[str, float]] = {}
    for kind in next(iter(results.values())):
        by_seed = [[network["single_view"] for network in scores[kind]] for scores in results.values()]
        means = [statistics.fmean(values) for values in by_seed]
        # Those that went on from a single network are held against just these.
        own = len(by_seed[0]) if kind in (LONGER, SELF) else None
        base = [statistics.fmean(n["single_view"] for n in scores[SINGLE][:own]) for scores in results.values()]
        multi = [network["multi_view"] for scores in results.values() for network in scores[kind]]
        rows[kind] = {
            "networks": sum(map(len, by_seed)),
            "single_view": statistics.fmean(means),
            "lowest": min(map(min, by_seed)),
            "highest": max(map(max, by_seed)),
            "over_single": statistics.fmean(a - b for a, b in zip(means, base, strict=True)),
            "multi_view": statistics.fmean(multi),
            "multi_view_lowest": min(multi),
        }
    return rows


def table_of(rows: dict[str, dict[str, float]]) -> Table:
    """Show a summary."""
    table = Table("test accuracy", "networks", "single-view", "lowest to highest", "over single", "multi-view")
    for kind, row in rows.items():
        spread = f"{row['lowest']:.3f} to {row['highest']:.3f}"
        cells = [f"{row['single_view']:.3f}", spread, f"{row['over_single']:+.3f}", f"{row['multi_view']:.3f}"]
        table.add_row(kind, f"{row['networks']:.0f}", *cells)
    return table


def plot(results: dict[str, Scores], path: Path) -> None:
    """Draw every network's accuracy on single-view samples, a colour a seed, and the means of both kinds."""
    from matplotlib.figure import Figure

    rows = summary(results)
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for place, (kind, row) in enumerate(rows.items()):
        for number, scores in enumerate(results.values()):
            values = [network["single_view"] for network in scores[kind]]
            shift = (number - (len(results) - 1) / 2) * 0.1
            axes.plot(values, [place + shift] * len(values), "o", ms=3.5, alpha=0.6, color=f"C{number % 10}")
        axes.plot(row["single_view"], place, "|", ms=24, mew=2.5, color="black", label="mean, single-view samples")
        axes.plot(row["multi_view"], place, "D", ms=6, mfc="none", color="grey", label="mean, multi-view samples")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy")
    axes.set_title("Networks (a colour a seed) on samples that show one view", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[:2], labels[:2], loc="lower left", fontsize=8, markerscale=0.5)
    figure.savefig(path, dpi=150)


# The controls: what the theory says does not help, on real images and ordinary networks.


def _plain(base: str, num_classes: int, in_chans: int, options: dict[str, Any]) -> nn.Module:
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(name, None)
    return timm.create_model(base, num_classes=num_classes, in_chans=in_chans, **options)


@register_model
def joint_average(
    pretrained: bool = False,
    members: int = 3,
    base: str = "cifar_resnet20",
    num_classes: int = 10,
    in_chans: int = 3,
    **options: Any,
) -> nn.Module:
    """The mean of several networks' logits as one network, trained jointly."""
    return Ensemble([_plain(base, num_classes, in_chans, dict(options)) for _ in range(members)])


@register_model
def random_features(
    pretrained: bool = False, base: str = "cifar_resnet20", num_classes: int = 10, in_chans: int = 3, **options: Any
) -> nn.Module:
    """A network whose features stay as they were drawn: only the classifier on top of them is trained."""
    network = _plain(base, num_classes, in_chans, options).requires_grad_(False)
    network.get_classifier().requires_grad_(True)
    return network


def weight_average(networks: list[nn.Module], source: Source, normalization: Normalization) -> nn.Module:
    """Average the weights of trained networks; batch norm is given new statistics, without which nothing works."""
    averaged = copy.deepcopy(networks[0])
    states = [network.state_dict() for network in networks]
    averaged.load_state_dict(
        {
            key: torch.stack([state[key] for state in states]).mean(dim=0) if value.is_floating_point() else value
            for key, value in states[0].items()
        }
    )
    for module in averaged.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over all batches
    averaged.train()
    with torch.no_grad():
        for sample in EvalLoader(source.train, 250, normalization):
            averaged(sample.images)
    return averaged.eval()


def controls(arguments: argparse.Namespace, folder: Path, console: Console) -> dict[str, float]:
    """Train networks on real images by attar's own training, and return the test accuracy of every row."""
    options = attar_options(arguments.model_options)
    common = {"data": arguments.data, "train_limit": arguments.images, "epochs": arguments.epochs, "lr": 0.1}

    def trained(name: str, seed: int, **fields: Any) -> Path:
        spec = parse(TrainSpec, {"methods": [], **common, "seed": seed, **fields})
        console.print(f"{name}, seed {seed}", markup=False)
        fit(spec, folder / f"{name}-{seed}", console=console)
        return folder / f"{name}-{seed}"

    def own(**more: Any) -> dict[str, Any]:
        return {"model": arguments.model, "model_options": {**options, **more}}

    def random(**more: Any) -> dict[str, Any]:
        return {"model": "random_features", "model_options": {"base": arguments.model, **options, **more}}

    def soft(teachers: list[Path]) -> dict[str, Any]:
        given = {"teachers": [str(t) for t in teachers], "temperature": 4.0, "weight": 0.9, "task_weight": 0.1}
        return {"methods": [{"name": "KD", "options": given}]}

    members = range(arguments.members)
    singles = [trained("single", seed, **own()) for seed in members]
    students = [trained("distilled", 100 + seed, **own(), **soft(singles)) for seed in members]
    joint = {"base": arguments.model, "members": arguments.members, **options}
    jointly = [trained("joint", 0, model="joint_average", model_options=joint)]
    frozen = [trained("random", seed, **random()) for seed in members]
    frozen_students = [trained("random-distilled", 100 + seed, **random(), **soft(frozen)) for seed in members]

    source = build_source(parse(TrainSpec, {"methods": [], **common, **own()}))
    normalization = Normalization(source.mean, source.std)

    def accuracy(network: nn.Module) -> float:
        return evaluate(network.eval(), source.test, normalization, attar.Classification(source.num_classes)).score

    def mean(folders: list[Path]) -> float:
        return statistics.fmean(accuracy(load_student(f).network) for f in folders)

    networks = [load_student(f).network for f in singles]
    return {
        "single network": mean(singles),
        f"ensemble of {len(singles)}": accuracy(Ensemble(networks)),
        "distilled from the ensemble": mean(students),
        "the average, trained jointly": mean(jointly),
        "the average of the weights": accuracy(weight_average(networks, source, normalization)),
        "random features": mean(frozen),
        f"random features, ensemble of {len(frozen)}": accuracy(Ensemble([load_student(f).network for f in frozen])),
        "random features, distilled from their ensemble": mean(frozen_students),
    }


def attar_options(words: list[str]) -> dict[str, Any]:
    """Read NAME=VALUE words as attar's command line does."""
    from attar.options import pairs

    return pairs("--model-options", words)


def same_setting(folder: Path, setting: dict[str, Any]) -> None:
    """Remember what a folder is of, and refuse to mix two."""
    path = folder / "setting.json"
    setting = json.loads(json.dumps(setting))
    if path.is_file() and json.loads(path.read_text()) != setting:
        raise attar.AttarError(f"'{folder}' holds an experiment of other settings: choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, setting)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="data seeds (default: 5)")
    parser.add_argument("--steps", type=int, default=Setting.steps, help="of every training (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder; default: runs/multi_view or runs/multi_view_controls")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="networks at a time (default: all cores)")
    group = parser.add_argument_group("controls on real images")
    group.add_argument("--controls", action="store_true", help="run these instead")
    group.add_argument("--data", default="digits", help="parquet:DIR, cifar10, ... (default: digits)")
    group.add_argument("--model", default="cifar_resnet20", help="any timm model (default: %(default)s)")
    group.add_argument("--model-options", nargs="+", default=[], metavar="NAME=VALUE", help="its arguments")
    group.add_argument("--members", type=int, default=3, help="networks of an ensemble (default: 3)")
    group.add_argument("--epochs", type=int, default=15, help="of every training (default: 15)")
    group.add_argument("--images", type=int, help="training images (default: all)")
    arguments = parser.parse_args(words)
    console = Console()
    folder = arguments.out or Path("runs/multi_view_controls" if arguments.controls else "runs/multi_view")
    try:
        if min(arguments.seeds, arguments.steps, arguments.jobs, arguments.epochs) < 1 or arguments.members < 2:
            raise attar.AttarError("Seeds, steps, jobs and epochs must be at least 1, and members at least 2.")
        if arguments.controls:
            names = ("data", "model", "model_options", "members", "epochs", "images")
            same_setting(folder, {name: getattr(arguments, name) for name in names})
            measured = controls(arguments, folder, console)
            table = Table("on real images", "test top-1")
            for name, value in measured.items():
                table.add_row(name, f"{value:.2%}")
            write_json(folder / "result.json", measured)
        else:
            setting = Setting(steps=arguments.steps)
            same_setting(folder, asdict(setting))
            results = run(range(arguments.seeds), setting, folder, arguments.jobs, console)
            rows = summary(results)
            table = table_of(rows)
            write_json(folder / "result.json", {"setting": asdict(setting), "summary": rows, "seeds": results})
            plot(results, folder / "multi_view.png")
    except attar.AttarError as error:
        print(f"multi_view: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped: run the same command again to go on.", file=sys.stderr)
        return 130
    console.print(table)
    console.print(f"Everything is in {folder}.", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
