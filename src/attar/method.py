"""The contract of a distillation method: what it sees, what it declares and what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from attar.anatomy import Anatomy, Kept, Tap
from attar.functional import average_pool
from attar.sampling import Sampling
from attar.tasks import Task
from attar.teacher import Normalization, Teacher

__all__ = ["Batch", "Method", "Outputs", "Phase", "Probe", "Terms"]

Weight = float | Tensor
_M = TypeVar("_M", bound="Method")


@dataclass(frozen=True)
class Batch:
    """One batch of training data.

    Args:
        images: [V*N, C, H, W], normalised; several views of the same samples stand view after view.
        targets: [V*N] class indices, or [V*N, K] soft targets; in dense tasks masks [V*N, H, W] of class indices.
        index: [V*N] stable sample numbers, for methods that remember samples.
        labels: [V*N] class indices, or the masks; None only where mixing has left no single label.
        views: V.
        partners: another image of the same class for every image, where a method's `sampling` asks for them.
        valid: [V*N, H, W] which pixels are not void, in dense tasks; None: every answer counts.
    """

    images: Tensor
    targets: Tensor
    index: Tensor | None = None
    labels: Tensor | None = None
    views: int = 1
    partners: Batch | None = None
    valid: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch | Sequence[Tensor]) -> Batch:
        """Accept a Batch or a plain (images, targets[, index]) tuple, as most data loaders yield it."""
        if not isinstance(batch, Batch):
            batch = cls(batch[0], batch[1], batch[2] if len(batch) > 2 else None)
        if batch.labels is None and not batch.targets.is_floating_point():
            batch = dataclasses.replace(batch, labels=batch.targets)
        return batch

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch on another device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        images, targets = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.images, self.targets))
        partners = self.partners.to(device, non_blocking) if self.partners is not None else None
        index, labels, valid = move(self.index), move(self.labels), move(self.valid)
        return Batch(images, targets, index, labels, self.views, partners, valid)


@dataclass(frozen=True)
class Terms:
    """What one training step yields: the student's logits and every named, unweighted loss with its weight.

    Args:
        logits: [V*N, K], the student's own, in dense tasks [V*N, K, H, W]; [0, K] in a phase whose student pass ends
            before them.
        losses: scalar tensors by name ("task", "ONE.kl"), in nats or the term's natural unit.
        weights: what multiplies each; the same keys.
    """

    logits: Tensor
    losses: dict[str, Tensor]
    weights: dict[str, Weight]

    def total(self) -> Tensor:
        """Return the weighted sum of all terms: what `backward` is called on."""
        return torch.stack([self.weights[name] * loss for name, loss in self.losses.items()]).sum()


@dataclass(frozen=True)
class Outputs:
    """What the student produced in one pass.

    Args:
        images: what went in, [N, C, H, W].
        logits: [N, K]; in dense tasks [N, K, H, W].
        values: the recorded taps; index the outputs with a `Tap`, `outputs[tap]`.
        anatomy: where the taps are.
        task_loss: the supervised loss, `task_loss(logits, targets)`.
        student: another pass of the same student inside this forward, `student(images) -> Outputs` (rotations,
            partners); wrap it in `torch.no_grad()` for a pass that only teaches.
        auxiliary: further logits that the network returns in training, by name; the task's loss counts them.
    """

    images: Tensor
    logits: Tensor
    values: dict[Tap, Any]
    anatomy: Anatomy
    task_loss: Callable[[Tensor, Tensor], Tensor]
    student: Callable[[Tensor], Outputs]
    auxiliary: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, tap: Tap) -> Any:
        return self.values[tap]

    @property
    def stages(self) -> list[Tensor]:
        """The map of every stage, [N, C_i, H_i, W_i], shallow to deep."""
        return [self.values[stage.tap] for stage in self.anatomy.stages]

    @property
    def embedding(self) -> Tensor:
        """The pooled embedding [N, D] that the classifier reads (the pooled last stage where there is none)."""
        if self.anatomy.embedding is not None:
            return self.values[self.anatomy.embedding]  # type: ignore[no-any-return]
        # Not `stages`, which a method may not have asked for.
        deepest: Tensor = self.values[self.anatomy.stages[-1].tap]
        return average_pool(deepest)


@dataclass(frozen=True)
class Probe:
    """What a method may look at when it makes its auxiliaries.

    Args:
        student: the network to be deployed, to read, never to keep or change.
        anatomy: its stages with channels and sizes.
        task: what labels and loss mean.
        images: a small example batch [N, C, H, W] on the student's device.
        normalization: the mean and std with which images are normalised, when known.
        num_samples: one more than the largest number in `Batch.index`, when known: how large a memory per sample is.
        kept: the channels that the student has left after `Method.reshape`; None: it has its original widths.
    """

    student: nn.Module
    anatomy: Anatomy
    task: Task
    images: Tensor
    normalization: Normalization | None = None
    num_samples: int | None = None
    kept: Kept | None = None

    def check_logits(self, output: object, network: str = "student") -> None:
        """Refuse a network that does not answer for these images as the task asks."""
        self.task.check_logits(output, network, size=(self.images.shape[-2], self.images.shape[-1]))


@dataclass(frozen=True)
class Phase:
    """A part of the run that comes before the main training and that one method has for itself.

    The student learns from that method's `phase_losses` alone: no labels, no other method. Phases begin and end with
    epochs; every phase lasts one at least.

    Args:
        name: what reports call it ("layer 1").
        share: of the whole run.
        until: the student's pass ends as soon as these taps are read, and nothing behind them is computed or trained;
            empty: the student does not run at all; None: it runs to its logits.
        own_schedule: the learning rate runs through its whole schedule in this phase, and begins anew behind it: for
            papers that train in stages, each like a run of its own.
    """

    name: str
    share: float
    until: tuple[Tap, ...] | None = None
    own_schedule: bool = False


class Method(nn.Module):
    """One published way of producing and transferring knowledge while a student trains.

    A method owns its auxiliaries (ordinary child modules: trained, saved, and gone after `strip`) and its teachers
    (frozen, no children). It never owns the student and never runs a loop. Subclasses take hyper-parameters as
    keyword arguments of `__init__`, whose names, types and defaults are also the options of the command line.

    Every auxiliary must receive a gradient on every step: switch a term off by its weight, not by skipping it, or
    distributed training waits for a gradient that never comes.
    """

    # How many independently augmented views of every image the batch must hold.
    views: int = 1
    # How batches must be drawn; None for any. A method that sets it claims "sampler".
    sampling: Sampling | None = None
    # What only one method of a distiller may do ("task weight", "targets", "sampler"), with the reason in words.
    claims: Mapping[str, str] = {}
    # What the method cannot do without ("labels"), and what it takes from the others.
    needs: frozenset[str] = frozenset()
    breaks: frozenset[str] = frozenset()
    # Whether `Teacher.answer` for the batch's images is all that its teachers are asked in a step, so that a run may
    # remember it.
    asks_logits_only: bool = False
    # Whether every process trains a student of its own, so that a run must not average gradients. The student that is
    # measured and kept is the first process's.
    own_replica: bool = False
    # Whether the method wants to see held-out images once an epoch.
    wants_holdout: bool = False
    # Why the method has no form for dense tasks, one answer per pixel; empty: it has one.
    not_dense: str = "it is defined for one label per image"

    @property
    def name(self) -> str:
        """The name under which the method's terms are reported."""
        return type(self).__name__

    @property
    def teachers(self) -> Sequence[Teacher]:
        """Frozen networks that the method asks; they follow the method to its device but are no children of it."""
        return ()

    def build(self, probe: Probe) -> None:
        """Make the auxiliaries from the student's shapes; called before the first step, and again after a `reshape`."""

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """Return the taps that `losses` reads; called after `build`. Default: every stage and the embedding."""
        taps = [stage.tap for stage in anatomy.stages]
        return [*taps, anatomy.embedding] if anatomy.embedding is not None else taps

    @property
    def phases(self) -> Sequence[Phase]:
        """What comes before the main training, in order; read after `build`. Default: nothing."""
        return ()

    def phase_losses(self, phase: Phase, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the named losses of one step of a phase; their weighted sum is all that is learnt from.

        `outputs` holds the taps that the student's pass has reached; its logits are [0, K] where it has not.
        """
        raise TypeError(f"{type(self).__name__} has phases, so it must define phase_losses(phase, outputs, batch).")

    def phase_weights(self, phase: Phase) -> Mapping[str, Weight]:
        """Return what multiplies each loss of a phase; unnamed losses have weight 1."""
        return {}

    def reshape(self, student: nn.Module) -> Kept | None:
        """Decide which channels the student keeps, as the main training begins; default: all of them (None).

        Only one method of a distiller may, and no other may have phases. The method switches off what goes (it may
        change values, no shapes); the distiller then takes it away, proves that the logits stay, and lets every method
        build anew.
        """
        return None

    def prepare(self, batch: Batch) -> Batch:
        """Change the batch before the student sees it (mixing, soft targets); default: leave it."""
        return batch

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return the method's named, unweighted scalar losses for one step."""
        raise TypeError(f"{type(self).__name__} must define losses(outputs, batch, progress).")

    def weights(self, progress: Tensor) -> Mapping[str, Weight]:
        """Return what multiplies each loss at `progress`, a scalar tensor in [0, 1]; unnamed losses have weight 1."""
        return {}

    def task_weight(self, progress: Tensor) -> Weight:
        """Return what multiplies the student's own supervised loss; a method that sets it claims "task weight"."""
        return 1.0

    def lr_scale(self, parameter: str) -> float:
        """Return what multiplies the learning rate of one of the method's own parameters, by its name here."""
        return 1.0

    def epoch_start(self, epoch: int, epochs: int) -> None:
        """Do what is due once an epoch, outside the compiled step; default: nothing."""

    def see_holdout(self, student: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Look at images that nothing is trained on, as every epoch but the first begins; default: do not.

        Called where `wants_holdout` is set, without gradients, with the student and the method in evaluation mode.
        """

    def deployables(self, student: nn.Module) -> dict[str, nn.Module]:
        """Return other networks that this training yields besides the plain student (an ensemble, an early exit).

        They share the student's parameters until `Distiller.strip` copies the one that is asked for.
        """
        return {}

    def _apply(self: _M, fn: Callable[..., Any], recurse: bool = True) -> _M:
        for teacher in self.teachers:
            teacher.apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    if TYPE_CHECKING:
        # nn.Module types every attribute as Tensor | Module; subclasses annotate what they set.
        def __getattr__(self, name: str) -> Any: ...
