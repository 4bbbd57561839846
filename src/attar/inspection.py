"""What attar knows before any training: method cards, the anatomy of a model, and one real batch checked."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attar import methods
from attar.anatomy import Anatomy, Recorder, split
from attar.distiller import Distiller
from attar.errors import AttarError
from attar.method import Batch, Method
from attar.sampling import ClassPairs
from attar.spec import teacher_options
from attar.tasks import Task
from attar.teacher import Teacher
from attar.train.cost import multiply_adds

__all__ = [
    "Card",
    "Checked",
    "Cost",
    "MethodCost",
    "TermCheck",
    "card",
    "check",
    "cost",
    "cut_at",
    "method_cost",
    "method_costs",
    "native_input",
    "specimen",
]


@dataclass(frozen=True)
class Card:
    """A method's docstring, taken apart.

    Attributes:
        name: of the method.
        idea: its first line.
        text: the docstring, dedented, without the arguments.
        arguments: what each constructor argument means.
    """

    name: str
    idea: str
    text: str
    arguments: dict[str, str]


def card(method: type[Method]) -> Card:
    """Read a method's card from its docstring."""
    text = inspect.cleandoc(method.__doc__ or "")
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n(?=[ ]))*)\n*", text, re.MULTILINE)
    arguments: dict[str, str] = {}
    if section is not None:
        text = text[: section.start()] + text[section.end() :]
        for name, meaning in re.findall(r"^ {4}(\w+): ((?:.|\n {8,})*)", section[1], re.MULTILINE):
            arguments[name] = " ".join(meaning.split())
    return Card(method.__name__, text.split("\n", 1)[0], text.strip(), arguments)


def specimen(method: type[Method], network: Callable[[], nn.Module]) -> Method:
    """Make a method with its default options; where it asks for a teacher, that is an untrained `network()`."""
    parameters = inspect.signature(method).parameters
    required = [name for name in teacher_options(method) if parameters[name].default is inspect.Parameter.empty]
    return method(**{name: [Teacher(network())] for name in required})


@dataclass(frozen=True)
class Cost:
    """What one training image costs.

    Attributes:
        parameters: trainable numbers, the student's own included.
        multiply_adds: of the forward pass of one image.
    """

    parameters: int
    multiply_adds: int


def cost(network: nn.Module, images: Tensor) -> Cost:
    """Price the forward pass of a plain network on images [N, C, H, W]."""
    return _cost(network, lambda: network(images), len(images))


def _cost(network: nn.Module, run: Callable[[], object], images: int) -> Cost:
    modes = {module: module.training for module in network.modules()}
    # Evaluation mode leaves running statistics alone; the multiply-adds are those of training.
    network.eval()
    with torch.no_grad():
        total = multiply_adds(run)
    for module, mode in modes.items():
        module.training = mode
    return Cost(sum(p.numel() for p in network.parameters() if p.requires_grad), total // images)


@dataclass(frozen=True)
class MethodCost:
    """What a method with its default options would do to a student, or why it cannot.

    Attributes:
        name: of the method.
        terms: the losses it adds, in its phases or in the main training, unprefixed.
        auxiliaries: child modules it adds, with their numbers of parameters.
        taps: the student's modules it reads.
        cost: of student and method together, in the main training.
        needs: what must be given besides labelled images, in words.
        refusal: why it cannot work on this student; the rest is then empty.
    """

    name: str
    terms: tuple[str, ...] = ()
    auxiliaries: tuple[tuple[str, int], ...] = ()
    taps: tuple[str, ...] = ()
    cost: Cost = Cost(0, 0)
    needs: str = ""
    refusal: str | None = None


def method_costs(
    network: Callable[[], nn.Module], task: Task, images: Tensor, stages: Sequence[str] | None = None
) -> list[MethodCost]:
    """Attach every method in turn to a new student and price it.

    Args:
        network: makes the student.
        task: what the student answers.
        images: example batch [N, C, H, W], N at least 2.
        stages: modules to use as stages instead of those found.
    """
    return [method_cost(kind, network, task, images, stages) for kind in methods.available().values()]


def method_cost(
    kind: type[Method],
    network: Callable[[], nn.Module],
    task: Task,
    images: Tensor,
    stages: Sequence[str] | None = None,
) -> MethodCost:
    """Attach one method with its default options to a new student and price it; arguments as in `method_costs`."""
    try:
        method = specimen(kind, network)
        distiller = Distiller(network(), [method], task, stages=stages)
        distiller.build(images, len(images))
    except AttarError as error:
        return MethodCost(kind.__name__, refusal=str(error))
    views = images.repeat(method.views, 1, 1, 1)
    targets = (torch.arange(len(images)) % task.num_classes).repeat(method.views)
    if task.dense:
        targets = targets.view(-1, 1, 1).expand(-1, *images.shape[-2:])
    batch = Batch(views, targets, torch.arange(len(images)).repeat(method.views), targets, method.views)
    if isinstance(method.sampling, ClassPairs):
        batch = replace(batch, partners=batch)
    distiller.eval()
    names: dict[str, None] = {}
    for phase in range(len(distiller.phases)):
        distiller.enter(phase)
        with torch.no_grad():
            names |= dict.fromkeys(distiller(batch, 0.5).losses)
    distiller.enter(None)
    # The pass that is priced also tells the terms: on large images every pass counts.
    priced = _cost(
        distiller, lambda: names.update(dict.fromkeys(distiller(batch, 0.5).losses)), len(batch.images) // batch.views
    )
    return MethodCost(
        kind.__name__,
        tuple(name.partition(".")[2] for name in names if name != "task"),
        tuple((name, sum(p.numel() for p in child.parameters())) for name, child in method.named_children()),
        tuple(dict.fromkeys(tap.module for tap in method.taps(distiller.anatomy))),
        priced,
        ", ".join(
            [
                *(["a teacher"] if method.teachers else []),
                *([f"{method.views} views"] if method.views > 1 else []),
                *sorted(method.needs - {"views"}),
            ]
        ),
    )


def cut_at(network: nn.Module, stage: str, images: Tensor) -> tuple[int, str | None]:
    """Try to cut a network after a stage: parameters behind the cut, and None for exact or the refusal's sentence."""
    try:
        tail = split(network, stage, images).tail
    except AttarError as error:
        return 0, str(error)
    return sum(p.numel() for p in tail.parameters()), None


@dataclass(frozen=True)
class TermCheck:
    """One term on one batch.

    Attributes:
        name: of the term.
        value: unweighted.
        weights: at the start, half way through and at the end of a run.
        gradient: Euclidean norm of the unweighted term's gradient over all of the student's parameters.
        phase: that it belongs to; None: the main training.
    """

    name: str
    value: float
    weights: tuple[float, float, float]
    gradient: float
    phase: str | None = None

    def __str__(self) -> str:
        return self.name if self.phase is None else f"{self.name} ({self.phase})"


@dataclass(frozen=True)
class Checked:
    """What one batch on the CPU showed.

    Attributes:
        terms: every term, those of phases first, in order.
        phases: (method, phase, share of the run) of what comes before the main training, in order.
        taps: (module, side, shape) of every tapped tensor.
        added: trainable parameters that each method adds.
        without_gradient: parameters that no step reaches, neither of a phase nor of the main training.
        teachers: (name, whether it is frozen and in evaluation mode).
        made_out_of_place: activations whose in-place mode is off while training.
        graph_breaks: reasons why torch.compile would break the graph; None when it was not asked.
        strip: None when the stripped student is proved, else the refusal's sentence.
        problems: what must be mended, in sentences; empty when all is well.
        remarks: what is worth knowing, likewise.
    """

    terms: tuple[TermCheck, ...]
    phases: tuple[tuple[str, str, float], ...]
    taps: tuple[tuple[str, str, tuple[int, ...]], ...]
    added: dict[str, int]
    without_gradient: tuple[str, ...]
    teachers: tuple[tuple[str, bool], ...]
    made_out_of_place: tuple[str, ...]
    graph_breaks: tuple[str, ...] | None
    strip: str | None
    problems: tuple[str, ...]
    remarks: tuple[str, ...]


def check(distiller: Distiller, batch: Batch, *, compiled: bool = False) -> Checked:
    """Take one step with a new, unbuilt distiller on one batch and look at everything that can go wrong.

    Where methods train in phases, one step of each and one of the main training; graph breaks are of the latter.

    Args:
        distiller: not built yet; it is built here and its batch statistics move by one batch.
        batch: real training data.
        compiled: also count the graph breaks of torch.compile.

    Raises:
        AttarError: the student or a method refuses the data.
    """
    batch = Batch.of(batch)
    distiller.task.check_targets(batch.targets)
    student = distiller.student
    was_inplace = _inplace(student)
    # No more samples than this batch names will be remembered.
    distiller.build(batch.images, int(batch.index.max()) + 1 if batch.index is not None else None).train()
    attached = {name: method for name, method in distiller.methods.items() if isinstance(method, Method)}
    terms, without_gradient = _steps(distiller, batch)
    phases = tuple((method.name, phase.name, phase.share) for method, phase in distiller.phases)
    # In these the student does not run, so nothing could move it.
    idle = {phase.name for _, phase in distiller.phases if phase.until == ()}
    breaks = _graph_breaks(distiller, batch) if compiled else None
    teachers = tuple(
        (teacher.name, not teacher.network.training and not any(p.requires_grad for p in teacher.network.parameters()))
        for method in attached.values()
        for teacher in method.teachers
    )
    refusal = _strip_refusal(distiller)
    problems = [f"Term {term} is {term.value}." for term in terms if not _finite(term.value)]
    problems += [f"Term {term} has a gradient that is not finite." for term in terms if not _finite(term.gradient)]
    problems += [f"Parameter {name} gets no gradient." for name in without_gradient]
    problems += [f"The {name} is not frozen in evaluation mode." for name, frozen in teachers if not frozen]
    problems += [refusal] if refusal else []
    still = [term for term in terms if term.gradient == 0.0 and term.phase not in idle]
    remarks = [f"Term {term} does not move the student." for term in still]
    return Checked(
        terms,
        phases,
        _tap_shapes(student, attached.values(), distiller.anatomy, batch.images),
        {name: sum(p.numel() for p in method.parameters() if p.requires_grad) for name, method in attached.items()},
        without_gradient,
        teachers,
        tuple(sorted(was_inplace - _inplace(student))),
        breaks,
        refusal,
        tuple(problems),
        tuple(remarks),
    )


def _inplace(network: nn.Module) -> set[str]:
    return {path for path, module in network.named_modules() if getattr(module, "inplace", False) is True}


def _finite(value: float) -> bool:
    return abs(value) < float("inf")  # false for NaN too


def _steps(distiller: Distiller, batch: Batch) -> tuple[tuple[TermCheck, ...], tuple[str, ...]]:
    checks: list[TermCheck] = []
    without = {name: None for name, p in distiller.named_parameters() if p.requires_grad}
    for phase in (*range(len(distiller.phases)), None):
        distiller.enter(phase)
        checks += _step(distiller, batch)
        for name, parameter in distiller.named_parameters():
            if parameter.grad is not None:
                without.pop(name, None)
        distiller.zero_grad(set_to_none=True)
    return tuple(checks), tuple(without)


def _step(distiller: Distiller, batch: Batch) -> list[TermCheck]:
    """Look at the terms of one step, and leave the gradient of their sum."""
    with torch.no_grad():
        first, last = distiller(batch, 0.0), distiller(batch, 1.0)
    half = distiller(batch, 0.5)
    phase = distiller.phase.name if distiller.phase is not None else None
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    checks = []
    for name, loss in half.losses.items():
        gradients: Sequence[Tensor | None] = [None]
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        norms = [gradient.detach().double().norm() for gradient in gradients if gradient is not None]
        norm = float(torch.stack(norms).norm()) if norms else 0.0
        weights = (float(first.weights[name]), float(half.weights[name]), float(last.weights[name]))
        checks.append(TermCheck(name, float(loss.detach()), weights, norm, phase))
    half.total().backward()
    return checks


def _tap_shapes(
    student: nn.Module, attached: Iterable[Method], anatomy: Anatomy, images: Tensor
) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    recorder = Recorder(student, [tap for method in attached for tap in method.taps(anatomy)])
    try:
        with torch.no_grad():
            _, values = recorder.run(images)
    finally:
        recorder.remove()
    shapes = ((tap.module, tap.side, tuple(getattr(value, "shape", ()))) for tap, value in values.items())
    return tuple(dict.fromkeys(shapes))


def _graph_breaks(distiller: Distiller, batch: Batch) -> tuple[str, ...]:
    torch._dynamo.reset()
    explained = torch._dynamo.explain(distiller)(batch, torch.tensor(0.5))
    torch._dynamo.reset()
    return tuple(str(reason.reason).strip().splitlines()[0] for reason in explained.break_reasons)


def _strip_refusal(distiller: Distiller) -> str | None:
    try:
        distiller.strip()
    except AttarError as error:
        return str(error)
    return None


def native_input(model: str) -> tuple[int, int]:
    """Return the channels and the side of the images that a model was made for."""
    import timm

    import attar.zoo  # noqa: F401 - registers with timm

    cfg = timm.get_pretrained_cfg(model, allow_unregistered=True) if not model.startswith("torchvision:") else None
    channels, side, _ = cfg.input_size if cfg is not None else (3, 224, 224)
    return channels, side
