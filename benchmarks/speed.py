"""Speed of the training step and of the data path, as ratios in one run.

    python benchmarks/speed.py --rounds 7 --markdown benchmarks/speed.md

Two processes take turns, one epoch each, so that whatever the machine does meanwhile hits both:

- *plain*: ONE as its released code trains it: float32, contiguous tensors, eager, images through torchvision's PIL
  transforms in a `DataLoader`;
- *attar*: the same network, method, batch and images through `attar train`'s own loop with its defaults.

An epoch counts whole: data, transfer, forward, backward and optimiser. Then the data path alone is timed against what
the attar step consumes. Images are scikit-learn's digits at 32 x 32 in three channels (what they show does not matter
for speed), so nothing need be downloaded. No absolute time is worth quoting from a shared machine; ratios are.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BATCH = 128


def plain_epochs(model: str, workers: int) -> Callable[[], tuple[int, float]]:
    """The way released code works: PIL images, torchvision transforms, float32, contiguous, eager."""
    import timm
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    import attar
    import attar.zoo
    from attar.data import open_source

    source = open_source("digits", image_size=32)
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(source.mean, source.std),
        ]
    )

    class Images(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(source.train)

        def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
            assert source.train.pixels is not None
            pixels = source.train.pixels[source.train.rows[item]]
            return transform(Image.fromarray(pixels)), int(source.train.targets[item])

    torch.manual_seed(0)
    student = timm.create_model(model, num_classes=10)
    distiller = attar.Distiller(student, [attar.methods.ONE()], attar.Classification(10))
    distiller.build(torch.zeros(2, 3, 32, 32)).train()
    # Workers persist: starting them anew would weigh on these short epochs as it does not on CIFAR's.
    loader = DataLoader(
        Images(), BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def epoch() -> tuple[int, float]:
        start = time.perf_counter()
        for images, labels in loader:
            terms = distiller((images, labels), torch.tensor(0.5))
            terms.total().backward()
            optimizer.step()
            optimizer.zero_grad()
        return len(loader) * BATCH, time.perf_counter() - start

    return epoch


def attar_run(model: str, **changes: object):  # type: ignore[no-untyped-def]
    from attar.spec import MethodSpec, TrainSpec
    from attar.train.distributed import join
    from attar.train.run import Run

    spec = TrainSpec(
        methods=(MethodSpec(name="ONE"),),
        model=model,
        data="digits",
        image_size=32,
        augment="crop-flip",
        batch=BATCH,
        epochs=10**6,
        lr=0.01,
        **changes,  # type: ignore[arg-type]
    )
    with join() as ranks:
        return Run.prepare(spec, ranks)


def attar_epochs(model: str, **changes: object) -> Callable[[], tuple[int, float]]:
    """What `attar train` does between two evaluations."""
    import torch

    from attar.train.loop import train_step

    run = attar_run(model, **changes)
    run.distiller.train()
    progress = torch.tensor(0.5)

    def epoch() -> tuple[int, float]:
        start, number = time.perf_counter(), run.step // run.steps_per_epoch
        for sample in run.loader.epoch(number):
            run.meter.add(train_step(run, sample, run.step, progress), run.step)
            run.step += 1
        run.meter.epoch()
        return run.steps_per_epoch * run.batch, time.perf_counter() - start

    return epoch


def data_epochs(model: str) -> Callable[[], tuple[int, float]]:
    """The data path alone: batches as the step receives them, many epochs at a time."""
    run = attar_run(model)

    def epoch() -> tuple[int, float]:
        start = time.perf_counter()
        images = sum(len(sample.images) for number in range(20) for sample in run.loader.epoch(number))
        return images, time.perf_counter() - start

    return epoch


SIDES: dict[str, Callable[[argparse.Namespace], Callable[[], tuple[int, float]]]] = {
    "plain": lambda o: plain_epochs(o.model, o.workers),
    "attar": lambda o: attar_epochs(o.model),
    "attar, contiguous": lambda o: attar_epochs(o.model, channels_last=False),
    "attar, float32": lambda o: attar_epochs(o.model, precision="fp32"),
    "data path alone": lambda o: data_epochs(o.model),
}


class Side:
    """One process that runs an epoch whenever it is told to."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        command = [
            sys.executable,
            __file__,
            "--side",
            name,
            "--model",
            options.model,
            "--workers",
            str(options.workers),
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.rates: list[float] = []

    def epoch(self) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("epoch\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        if len(answer) != 2:
            raise SystemExit(f"the side '{self.name}' failed")
        self.rates.append(int(answer[0]) / float(answer[1]))
        return self.rates[-1]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet32")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, after one that is not counted")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the plain DataLoader")
    parser.add_argument("--sides", nargs="*", default=["plain", "attar", "data path alone"], choices=list(SIDES))
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.side:
        answers = os.fdopen(os.dup(1), "w")  # only answers on the pipe, whatever libraries print
        os.dup2(2, 1)
        epoch = SIDES[options.side](options)
        for _ in sys.stdin:
            images, seconds = epoch()
            print(images, seconds, file=answers, flush=True)
        return

    sides = [Side(name, options) for name in options.sides]
    for number in range(options.rounds + 1):
        for side in sides:
            rate = side.epoch()
            print(
                f"round {number}: {side.name:20s} {rate:9.1f} images/s{'' if number else '  (not counted)'}", flush=True
            )
    for side in sides:
        side.close()
        side.rates = side.rates[1:]

    first = sides[0]
    lines = [f"| side | images/s, median | times {first.name}, median (range) |", "|---|---|---|"]
    for side in sides:
        ratios = [rate / base for rate, base in zip(side.rates, first.rates, strict=True)]
        lines.append(f"| {side.name} | {statistics.median(side.rates):.0f} | {spread(ratios)} |")
    by_name = {side.name: side for side in sides}
    if {"attar", "data path alone"} <= by_name.keys():
        supply = [d / a for d, a in zip(by_name["data path alone"].rates, by_name["attar"].rates, strict=True)]
        lines += ["", f"The data path alone supplies {spread(supply)} times what the attar step consumes."]
    print("\n" + "\n".join(lines))
    if options.markdown:
        import torch

        from attar.train.models import make_model
        from attar.train.precision import resolved

        precision = resolved("auto", torch.device("cpu"), make_model(options.model, 10))
        head = [
            "# Speed",
            "",
            f"`{' '.join(['python', *sys.argv])}`, {datetime.date.today().isoformat()}, {processor()}, "
            f"{os.cpu_count()} processors, torch {torch.__version__}, {options.model}, batch {BATCH}, "
            f"precision auto = {precision}, {options.rounds} rounds.",
            "",
        ]
        options.markdown.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


def processor() -> str:
    found = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return found[0] if found else platform.processor()


if __name__ == "__main__":
    main()
