"""The end of a run: the selected weights, stripped and saved, the test set read once, the result."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from contextlib import closing
from typing import Any, cast

import torch
import torchvision
from torch import nn

from attar import __version__
from attar.data import Normalization, Sample, Source
from attar.errors import AttarError
from attar.method import Method
from attar.train.cost import flops, multiply_adds
from attar.train.evaluate import measure
from attar.train.run import Run
from attar.train.run_folder import RunFolder
from attar.train.student import Student, load_student, save_student

__all__ = ["finish"]


def finish(run: Run, home: RunFolder) -> dict[str, Any]:
    """Save the plain student with the weights that the hold-out chose, measure it on the test images, write the result.

    The test images are read here and nowhere before. The student is measured as it was saved, so that whoever loads it
    gets the same numbers.
    """
    spec, source, ranks = run.spec, run.source, run.ranks
    best = ranks.on_first(home.checkpoints.load_best)
    if best["step"] != run.best["step"]:
        raise AttarError(
            f"'{home.checkpoints.best}' is not this run's: delete '{home.checkpoints.folder}' and run the same command "
            "again to train from the beginning."
        )
    run.take(best)
    others = {name: _measure_other(run, name) for name in run.distiller.deployables()}
    if run.best["selected"] == "ema":
        run.distiller.student.load_state_dict(best["ema"])
    stripped, refusal = _strip(run)
    student = Student(
        stripped,
        spec.model,
        dict(spec.model_options),
        source.classes,
        source.mean,
        source.std,
        source.image_size,
        run.distiller.kept,
        spec.task,
    )
    # Large images are evaluated on the central part of a slightly larger resize.
    crop = 1.0 if source.test.pixels is not None or run.distiller.task.dense else 0.875
    ranks.on_first(lambda: save_student(home.student, student, crop=crop))
    saved = load_student(home.student).network if ranks.first else stripped
    saved.to(device=ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ranks.share(itertools.chain(saved.parameters(), saved.buffers()))
    test, predictions = measure(
        saved,
        source.test,
        Normalization(source.mean, source.std),
        run.distiller.task,
        ranks=ranks,
    )
    ranks.on_first(lambda: predictions.save(home.predictions))
    chosen = {name: value for name, value in run.best.items() if name not in ("epoch", "step", "selected")}
    result = {
        **({"task": spec.task} if spec.task != "classification" else {}),
        "methods": [method.model_dump(mode="json") for method in spec.methods],
        "model": spec.model,
        "data": spec.data,
        "seed": spec.seed,
        "test": test.as_dict(),
        "holdout": chosen,
        "best_epoch": run.best["epoch"],
        "selected": run.best["selected"],
        "deployables": others,
        "epochs": spec.epochs,
        "steps": run.total_steps,
        "parameters": {"deployed": _count(stripped), "training": _count(run.distiller)},
        "attached": {name: _attached(method, run) for name, method in run.distiller.methods.items()},
        "flops": {"deployed": _deployed_flops(saved, source), "training": _training_flops(run)},
        "peak_memory_bytes": run.peak_memory.bytes(),
        "training_seconds": run.seconds,
        "images_per_second": run.total_steps * run.batch / run.seconds,
        "terms": {name: {"loss": mean, "weight": run.weights[name]} for name, mean in run.means.items()},
        "exportable": refusal is None,
        "export_refusal": refusal,
        "precision": run.precision,
        "device": ranks.device.type,
        "processes": ranks.world,
        "data_fingerprint": source.fingerprint,
        "versions": {"attar": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__},
    }
    return ranks.on_first(lambda: home.finish(result))


def _measure_other(run: Run, name: str) -> dict[str, Any]:
    """Measure another network that the training yields (ONE's ensemble), as it would stand alone."""
    network = run.distiller.strip(name, prove_export=False)
    return {
        "holdout": run.evaluate(network, "holdout").as_dict(),
        "test": run.evaluate(network, "test").as_dict(),
        "parameters": _count(network),
    }


def _strip(run: Run) -> tuple[nn.Module, str | None]:
    """Return the proved plain student, and why `torch.export` refuses it if it does: training was not in vain.

    One process asks `torch.export` for all.
    """
    try:
        return run.distiller.strip(prove_export=run.ranks.first), None
    except AttarError as error:
        # Refuses again unless export alone was the reason.
        return run.distiller.strip(prove_export=False), str(error)


def _deployed_flops(network: nn.Module, source: Source) -> int:
    """Count the operations for one image."""
    device = next(network.parameters()).device
    with torch.no_grad():
        return 2 * multiply_adds(lambda: network(torch.zeros(1, 3, *source.image_size, device=device)))


def _training_flops(run: Run) -> int:
    """Count the operations of one step, backward pass included, per image of its batch, as a mean over the run.

    A real step, since a method may need more than images and labels. It moves batch statistics and leaves gradients;
    nothing is read from the distiller after it.
    """
    run.distiller.train()
    with closing(cast(Generator[Sample, None, None], run.loader.epoch(0))) as batches:
        batch = run.batch_of(next(batches))
    images = len(batch.images) // batch.views

    def step() -> int:
        return flops(lambda: run.distiller(batch, torch.ones((), device=run.ranks.device)).total().backward()) // images

    if run.remembered is None:
        return step()
    with run.remembered.forgotten():
        asked = step()
    share = min(1.0, run.remembered.slots / run.spec.epochs)
    return round(share * asked + (1 - share) * step())


def _attached(method: nn.Module, run: Run) -> dict[str, Any]:
    """Say what a method added to the student and read from it while training."""
    assert isinstance(method, Method)
    return {
        "auxiliaries": {name: _count(child) for name, child in method.named_children()},
        "taps": list(dict.fromkeys(tap.module for tap in method.taps(run.distiller.anatomy))),
        "teachers": [teacher.name for teacher in method.teachers],
        "views": method.views,
    }


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
