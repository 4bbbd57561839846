"""What may be exported of a finished run, or of a distiller that is still in memory: strip, and what travels along."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attar.data import Source
from attar.deploy.artefact import Candidate
from attar.distiller import Distiller
from attar.errors import AttarError
from attar.method import Method
from attar.methods import find
from attar.spec import TrainSpec
from attar.tasks import Task
from attar.train.build import build_methods, build_source
from attar.train.checkpoint import Checkpoints
from attar.train.evaluate import make_task
from attar.train.files import read_json
from attar.train.models import make_model
from attar.train.student import Student, load_student

__all__ = [
    "LogitsAlone",
    "candidate_from",
    "chosen_deployable",
    "crop_of",
    "first_line",
    "load_candidate",
    "logits_alone",
    "try_size",
]

# What methods call their other branches.
_BRANCHES = ("branch", "peer", "student")
_PROBED = 2


def load_candidate(
    folder: str | Path,
    deployable: str | None = None,
    *,
    data: str | None = None,
    image_size: tuple[int, int] | None = None,
) -> Candidate:
    """Load what a finished run is to ship; nothing is written.

    Args:
        folder: of the run.
        deployable: None for the plain student, else a network of `Distiller.deployables`: its name ("BYOT.exit1"), or
            what stands behind the dot ("exit1", "ensemble"; "branch1" also finds "peer1" and "student1").
        data: the run's images, where they lie elsewhere now.
        image_size: (H, W) to ship at; default: the training's. The network is asked first whether it takes it.

    Raises:
        AttarError: no run, an unfinished one, a damaged student or checkpoint, no such deployable (with the list), an
            image size that the network refuses, images of other classes.
    """
    home = _home(Path(folder))
    result = read_json(home / "result.json")
    spec = TrainSpec.load(home / "spec.json")
    student = _student(home)
    task = make_task(student.task, len(student.classes))
    size = image_size or student.image_size
    # A network of another kind is asked again; this saves opening the data for a size that cannot be.
    try_size(student.network, size, task)
    # The images that the run trained on, no more: they calibrate, and teach int8.
    source = build_source(spec.on(data).model_copy(update={"image_size": size}))
    if source.classes != student.classes:
        raise AttarError(
            f"'{source.name}' has other classes, or in another order, than those the student was trained on "
            f"({len(source.classes)} against {len(student.classes)}): give images of the same classes."
        )
    network, name = student.network, None
    if deployable is not None:
        distiller = _trained_distiller(home, spec, student, source, task)
        name = chosen_deployable(deployable, distiller.deployables(), str(home))
        network = distiller.strip(name, prove_export=False)
        try_size(network, size, task)
    student = dataclasses.replace(student, image_size=size)
    return Candidate(_plain(network, task), student, source, result, home, name)


def candidate_from(
    network: nn.Module | Distiller,
    source: Source,
    *,
    deployable: str | None = None,
    normalization: Sequence[Sequence[float]] | None = None,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    folder: str | Path = ".",
) -> Candidate:
    """Take what is to be shipped from memory: a distiller, which is stripped and proved, or a plain network.

    Args:
        network: a built distiller, or a network of images [N, 3, H, W] -> logits [N, K]; a copy is taken.
        source: images with the classes in the order of the logits, at the size to ship at.
        deployable: of a distiller, as for `load_candidate`.
        normalization: mean and std of the images in 0..1; default: the distiller's, else the source's.
        model: the name by which `timm.create_model` (or `torchvision:NAME`) makes the network; default: what timm has
            written on it.
        options: keyword arguments it was made with.
        folder: the export goes below it unless told otherwise.

    Raises:
        AttarError: the strip is not exact, no such deployable, or the network refuses the source's images.
    """
    name = None
    if isinstance(network, Distiller):
        distiller = network
        normalization = normalization or distiller.normalization
        if deployable is not None:
            name = chosen_deployable(deployable, distiller.deployables(), "the distiller")
        plain, task = distiller.student, distiller.task
        stripped = distiller.strip(name, prove_export=False)
        kept = distiller.kept
    else:
        if deployable is not None:
            raise AttarError(f"Only a distiller yields '{deployable}': give the distiller instead of a network.")
        plain, stripped, kept = network, copy.deepcopy(network), None
        task = make_task(source.task, source.num_classes)
    mean, std = normalization or (source.mean, source.std)
    try_size(stripped.cpu().eval(), source.image_size, task)
    written = getattr(plain, "pretrained_cfg", None) or {}
    student = Student(
        stripped,
        model or str(written.get("architecture") or type(plain).__name__),
        dict(options or {}),
        source.classes,
        tuple(mean),
        tuple(std),
        source.image_size,
        kept,
        task.name,
    )
    return Candidate(_plain(stripped, task), student, source, {}, Path(folder), name)


def crop_of(source: Source) -> float:
    """Return the share of the image's side that evaluation looks at: large photos are resized somewhat larger."""
    return 1.0 if source.test.pixels is not None or source.task == "segmentation" else 0.875


def try_size(network: nn.Module, size: tuple[int, int], task: Task) -> None:
    """Refuse an image size (H, W) that a network does not answer as the task asks, with finite logits."""
    height, width = size
    said = None
    if min(size) < 1:
        raise AttarError(f"The image size must be at least 1 pixel a side, not {height} x {width}.")
    try:
        with torch.no_grad():
            output = network(torch.zeros(1, 3, height, width))
        said = _unfit(output, size, task)
    except Exception as error:  # networks raise many kinds
        said = first_line(error)
    if said is not None:
        raise AttarError(
            f"The network refuses images of {height} x {width} ({said}): leave out --image-size, or give one it takes."
        )


def _unfit(output: object, size: tuple[int, int], task: Task) -> str | None:
    try:
        task.check_logits(output, size=size)
    except AttarError:
        return f"it does not answer with one logit for every class{' and pixel' if task.dense else ''}"
    return None if bool(task.logits(output).isfinite().all()) else "its logits are not finite"


def first_line(error: BaseException) -> str:
    """Return what an error says in one line, without the full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def chosen_deployable(asked: str, offered: Collection[str], whose: str) -> str:
    """Return the one network of those that are offered which is meant.

    Raises:
        AttarError: none is, or several are; the sentence has the complete list.
    """
    match = re.fullmatch(r"branch(\d+)", asked)
    short = {f"{word}{match[1]}" for word in _BRANCHES} if match else {asked}
    found = [name for name in offered if name == asked or name.partition(".")[2] in short]
    if len(found) == 1:
        return found[0]
    if not offered:
        raise AttarError(f"There is no '{asked}' in {whose}: its methods yield nothing besides the plain student.")
    if found:
        raise AttarError(f"'{asked}' of {whose} may be {' or '.join(found)}: give the whole name with --deployable.")
    raise AttarError(f"There is no '{asked}' in {whose}: choose one of {', '.join(offered)}, or the plain student.")


def _home(folder: Path) -> Path:
    if not folder.is_dir():
        raise AttarError(f"There is no folder '{folder}': give the folder of a finished run.")
    home = folder if (folder / "spec.json").is_file() or folder.name != "student" else folder.parent
    if not (home / "spec.json").is_file():
        raise AttarError(f"'{folder}' holds no run: give the folder of a finished run.")
    if not (home / "result.json").is_file():
        raise AttarError(f"The run in '{home}' has not finished: give its attar train command again, which goes on.")
    return home


def _student(home: Path) -> Student:
    try:
        return load_student(home)
    except AttarError:
        raise
    except Exception as error:  # a config.json with parts missing or of the wrong kind
        raise AttarError(
            f"'{home / 'student'}' is damaged ({type(error).__name__}: {first_line(error)}): train the run again."
        ) from error


def _trained_distiller(home: Path, spec: TrainSpec, student: Student, source: Source, task: Task) -> Distiller:
    """Build the methods that yield more than the plain student as `Run.prepare` does, and load what they have learnt.

    The others are left out, and so are their teachers. The student's first weights are no matter here.
    """
    best = Checkpoints(home / "checkpoints").load_best()
    yielding = tuple(m for m in spec.methods if find(m.name).deployables is not Method.deployables)
    methods = build_methods(spec.model_copy(update={"methods": yielding}), len(student.classes))
    network = make_model(spec.model, len(student.classes), spec.model_options, task=task.name)
    distiller = Distiller(
        network,
        methods,
        task,
        normalization=(student.mean, student.std),
        stages=spec.stages,
    )
    distiller.build(torch.randn(_PROBED, 3, *student.image_size), source.train.index_bound)
    try:
        if best.get("kept"):
            distiller.reshape(best["kept"])
        own = ("student.", *(f"methods.{method.name}." for method in methods))
        distiller.load_state_dict({key: value for key, value in best["distiller"].items() if key.startswith(own)})
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise AttarError(
            f"'{home / 'checkpoints' / 'best.pt'}' does not fit the run's spec ({first_line(error)}): it is damaged or "
            "of another version of attar."
        ) from error
    return distiller


class LogitsAlone(nn.Module):
    """A network that returns nothing but its logits, whatever else it has to say."""

    def __init__(self, network: nn.Module, task: Task) -> None:
        super().__init__()
        self.network, self._task = network, task

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self._task.logits(self.network(images))


def logits_alone(student: Student) -> nn.Module:
    """Return a student's network as one that answers with its logits and nothing else."""
    task = make_task(student.task, len(student.classes))
    return LogitsAlone(student.network, task) if task.dense else student.network


def _plain(network: nn.Module, task: Task) -> nn.Module:
    """On the CPU, float32, contiguous, in evaluation mode, with one answer."""
    network = LogitsAlone(network, task) if task.dense else network
    network = network.to("cpu", torch.float32, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return network.eval().requires_grad_(False)
