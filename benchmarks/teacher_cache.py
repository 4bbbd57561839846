"""What a remembered teacher saves: epochs of KD with and without the cache of teacher logits, as ratios to plain ones.

    python benchmarks/teacher_cache.py --rounds 7 --markdown benchmarks/teacher_cache.md

Three runs in one process take turns, one epoch each, so that whatever the machine does meanwhile hits all of them:

- *plain*: the student learns from labels;
- *KD*: it also learns from a teacher that is asked in every step;
- *KD, remembered*: the same with `augment_cycle` 1 and `cache_teachers`, after an epoch in which everything was asked.

Epochs go through `attar train`'s own loop and count whole: data, transfer, forward, backward, optimiser, and what is
planned and written for the cache at their ends. Images are scikit-learn's digits at 32 x 32 in three channels, and the
teacher is untrained: what it says does not matter for speed. No absolute time is worth quoting from a shared machine;
ratios are.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed import processor, spread

from attar.spec import TrainSpec, parse
from attar.train.distributed import Ranks, join
from attar.train.loop import train_step
from attar.train.run import Run
from attar.train.run_folder import RunFolder

PLAIN, KD, REMEMBERED = "plain", "KD", "KD, remembered"


def specs(options: argparse.Namespace, teacher: Path) -> dict[str, TrainSpec]:
    common: dict[str, Any] = {
        "methods": [],
        "model": options.model,
        "data": "digits",
        "image_size": options.image_size,
        "train_limit": options.images,
        "augment": "crop-flip",
        "augment_cycle": 1,
        "batch": options.batch,
        "epochs": 10**6,
        "lr": 0.01,
    }
    taught = [{"name": "KD", "options": {"teachers": [f"{options.teacher}={teacher}"]}}]
    return {
        PLAIN: parse(TrainSpec, common),
        KD: parse(TrainSpec, {**common, "methods": taught}),
        REMEMBERED: parse(TrainSpec, {**common, "methods": taught, "cache_teachers": True}),
    }


def epochs(spec: TrainSpec, ranks: Ranks, home: Path) -> Callable[[], float]:
    """What `attar train` does between two evaluations, checkpoints left out; returns the seconds of an epoch."""
    import torch

    run = Run.prepare(spec, ranks)
    run.remember_teachers(RunFolder(home))
    run.distiller.train()
    progress = torch.full((), 0.5, device=ranks.device)

    def epoch() -> float:
        start, number = time.perf_counter(), run.step // run.steps_per_epoch
        run.plan(number, 0)
        for sample in run.loader.epoch(number):
            run.meter.add(train_step(run, sample, run.step, progress), run.step)
            run.step += 1
        run.meter.epoch()
        if run.remembered is not None:
            run.remembered.save(epoch_ends=True)
        return time.perf_counter() - start

    return epoch


def untrained(model: str, path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from attar.train.models import make_model

    torch.manual_seed(1)
    save_file({name: value.contiguous() for name, value in make_model(model, 10).state_dict().items()}, path)


def table(seconds: dict[str, list[float]], first: dict[str, float]) -> list[str]:
    lines = ["| epoch | times plain, median (range) | first epoch, times plain |", "|---|---|---|"]
    base = statistics.median(seconds[PLAIN])
    for name, times in seconds.items():
        ratios = [mine / plain for mine, plain in zip(times, seconds[PLAIN], strict=True)]
        lines.append(f"| {name} | {spread(ratios)} | {first[name] / base:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--teacher", default="cifar_resnet56")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--images", type=int, help="use only so many training images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, after one that is not counted")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder, join() as ranks:
        home = Path(folder)
        untrained(options.teacher, home / "teacher.safetensors")
        runs = specs(options, home / "teacher.safetensors")
        sides = {name: epochs(spec, ranks, home / str(number)) for number, (name, spec) in enumerate(runs.items())}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(options.rounds + 1):
            for name, epoch in sides.items():
                seconds[name].append(epoch())
                note = "" if number else "  (not counted)"
                print(f"round {number}: {name:16s} {seconds[name][-1]:8.2f} s{note}", flush=True)
        device = ranks.device
    lines = table({name: times[1:] for name, times in seconds.items()}, {name: t[0] for name, t in seconds.items()})
    print("\n" + "\n".join(lines))
    if options.markdown:
        import torch

        from attar.train.models import make_model
        from attar.train.precision import resolved

        precision = resolved("auto", device, make_model(options.model, 10))
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()}, {os.cpu_count()} CPUs"
        head = [
            "# A remembered teacher",
            "",
            f"`{' '.join(['python', *sys.argv])}`, {datetime.date.today().isoformat()}, {where}, torch "
            f"{torch.__version__}, student {options.model}, teacher {options.teacher}, batch {options.batch}, "
            f"precision auto = {precision}, {options.rounds} rounds.",
            "",
        ]
        options.markdown.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
