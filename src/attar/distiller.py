"""The distiller: a student and the methods that train it, in one forward."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attar.anatomy import Anatomy, Kept, Recorder, Tap, overwritten, slice_, survey
from attar.errors import AttarError, unknown_name
from attar.method import Batch, Method, Outputs, Phase, Probe, Terms
from attar.sampling import ClassPairs, Sampling
from attar.tasks import Task
from attar.teacher import Normalization

__all__ = ["Distiller"]

# Enough for batch statistics in the probe passes, few enough to cost nothing.
_PROBE_IMAGES = 2
# What a channel's removal may change of the logits, relative to the largest: rounding in another order of summation.
_SAME_LOGITS = 1e-3


class Distiller(nn.Module):
    """A student and the methods that train it; its forward is the only forward of a training step.

    Definition: `total = w_task L_task(z, y) + sum_methods sum_terms w L`, with the student's logits z from one pass
    whose taps all methods share. Every auxiliary is a child module, so an optimiser, `DistributedDataParallel`,
    `SyncBatchNorm` and `torch.compile` need nothing special; teachers are no children.

    Args:
        student: any module of images [N, C, H, W] -> logits [N, K], in dense tasks [N, K, H, W].
        methods: the methods that train it; none is plain supervised training.
        task: what labels and the supervised loss mean.
        normalization: the mean and std with which the images are normalised; teachers with their own need it.
        stages: module paths to use as stages, where the ones found by themselves do not suit.

    Raises:
        AttarError: two methods that cannot work together, with the reason.

    Example:
        >>> import torch, attar
        >>> student = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(),
        ...     torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, 2), torch.nn.ReLU()),
        ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 10))
        >>> distiller = attar.Distiller(student, [attar.methods.ONE(branches=2, cut="1")], attar.Classification(10))
        >>> _ = distiller.build(torch.randn(4, 3, 32, 32))
        >>> terms = distiller((torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])), progress=torch.tensor(0.5))
        >>> sorted(terms.losses)
        ['ONE.ce_branches', 'ONE.ce_ensemble', 'ONE.kl', 'task']
    """

    def __init__(
        self,
        student: nn.Module,
        methods: Sequence[Method] = (),
        task: Task | None = None,
        *,
        normalization: Normalization | Sequence[Sequence[float]] | None = None,
        stages: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if task is None:
            raise AttarError("Give the distiller a task, for example task=attar.Classification(num_classes=10).")
        names = [method.name for method in methods]
        for name in names:
            if names.count(name) > 1:
                raise AttarError(f"{name} is given {names.count(name)} times: give each method once.")
        refuse_impossible(methods)
        refuse_dense(methods, task)
        self.student = student
        self.methods = nn.ModuleDict({method.name: method for method in methods})
        self.task = task
        self.normalization = Normalization(*map(tuple, normalization)) if normalization is not None else None
        self._stages = tuple(stages) if stages is not None else None
        self._keys = tuple(student.state_dict())
        self._anatomy: Anatomy | None = None
        self._recorder: Recorder | None = None
        self._example: Tensor | None = None
        self._made_out_of_place: tuple[str, ...] = ()
        self._phase: tuple[Method, Phase] | None = None
        self._num_samples: int | None = None
        self._kept: Kept | None = None

    def build(self, example_images: Tensor, num_samples: int | None = None) -> Distiller:
        """Probe the student once on example images [N, C, H, W] and make every auxiliary; return the distiller.

        The student's weights, buffers and mode are left as they are. Auxiliaries are drawn from torch's global
        generator: seed it for a repeatable run.

        Args:
            example_images: what the student sees; two images are used.
            num_samples: one more than the largest number in `Batch.index`, for methods that remember samples.

        Raises:
            AttarError: the student refuses the images, its output is not [N, num_classes], a stage does not exist, or
                a method cannot work on this student.
        """
        if self._recorder is not None:
            raise AttarError("The distiller is built already: make a new one for another student.")
        if example_images.ndim != 4:
            raise AttarError(f"Example images must be [N, C, H, W], not {list(example_images.shape)}.")
        self._num_samples = num_samples
        self._build(example_images[:_PROBE_IMAGES].detach(), self._stages)
        refuse_other_phases(self._methods())
        return self

    def _build(self, images: Tensor, stages: Sequence[str] | None) -> None:
        anatomy, output = survey(self.student, images, stages, self.task.num_classes, dense=self.task.dense)
        probe = Probe(self.student, anatomy, self.task, images, self.normalization, self._num_samples, self._kept)
        probe.check_logits(output)
        self._check_training_output(probe)
        taps: list[Tap] = []
        for method in self._methods():
            method.build(probe)
            # Auxiliaries are made in float32 on the CPU; teachers have been adapted to the images by `build`.
            nn.Module.to(method, device=images.device, dtype=images.dtype)
            taps += method.taps(anatomy)
        training = {module: module.training for module in self.student.modules()}
        self.student.eval()
        cloned, self._made_out_of_place = self._guard(taps, images)
        for module, mode in training.items():
            module.training = mode
        self._recorder = Recorder(self.student, taps, cloned)
        self._anatomy = anatomy
        self._example = images

    def _check_training_output(self, probe: Probe) -> None:
        """Refuse now what would be refused at the first step: some networks return auxiliary outputs in training."""
        modes = {module: module.training for module in self.student.modules()}
        buffers = {name: buffer.clone() for name, buffer in self.student.named_buffers()}
        images = probe.images
        self.student.train()
        try:
            with torch.random.fork_rng([images.device] if images.is_cuda else []), torch.no_grad():
                probe.check_logits(self.student(images))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise  # one small example image has no batch statistics; the first step will tell
        finally:
            with torch.no_grad():
                for name, buffer in self.student.named_buffers():
                    buffer.copy_(buffers[name])
            for module, mode in modes.items():
                module.training = mode

    def _guard(self, taps: Sequence[Tap], images: Tensor) -> tuple[set[Tap], tuple[str, ...]]:
        """Keep tapped tensors from being overwritten: in-place activations are switched off, the rest is copied."""
        touched, writers = overwritten(self.student, taps, images)
        for path in writers:
            self.student.get_submodule(path).inplace = False  # type: ignore[assignment]
        if writers:
            touched, _ = overwritten(self.student, taps, images)
        return touched, tuple(writers)

    def _methods(self) -> list[Method]:
        return [method for method in self.methods.values() if isinstance(method, Method)]

    @property
    def anatomy(self) -> Anatomy:
        """The student's stages and taps; known after `build`."""
        if self._anatomy is None:
            raise AttarError("Call build(example_images) on the distiller before using it.")
        return self._anatomy

    @property
    def views(self) -> int:
        """How many augmented views of every image a batch must hold."""
        return max((method.views for method in self._methods()), default=1)

    @property
    def sampling(self) -> Sampling | None:
        """How batches must be drawn; None for any order."""
        return next((method.sampling for method in self._methods() if method.sampling is not None), None)

    def forward(self, batch: Batch | Sequence[Tensor], progress: Tensor | float) -> Terms:
        """Run one training step's only forward.

        Args:
            batch: a `Batch` or a plain (images, targets[, index]) tuple.
            progress: fraction of the whole run that is done, in [0, 1]; a scalar tensor, so that compiled steps are
                not compiled again when it changes.
        """
        batch = Batch.of(batch)
        if not isinstance(progress, Tensor):
            progress = torch.tensor(float(progress), device=batch.images.device)
        if batch.views < self.views:
            raise AttarError(f"The methods need {self.views} views of every image, but the batch holds {batch.views}.")
        if isinstance(self.sampling, ClassPairs) and batch.partners is None:
            raise AttarError("The methods need a partner of the same class for every image: give Batch.partners.")
        if self._phase is not None:
            return self._phase_step(*self._phase, batch)
        methods = self._methods()
        batch = self._marked(batch)
        for method in methods:
            batch = method.prepare(batch)
        outputs = self._pass(batch.images)
        task_weight: Tensor | float = 1.0
        losses = {"task": self.task.loss(outputs.logits, batch.targets)}
        losses |= {name: self.task.loss(logits, batch.targets) for name, logits in outputs.auxiliary.items()}
        weights: dict[str, Tensor | float] = {}
        for method in methods:
            task_weight = task_weight * method.task_weight(progress)
            declared = method.weights(progress)
            for term, loss in method.losses(outputs, batch, progress).items():
                losses[f"{method.name}.{term}"] = loss
                weights[f"{method.name}.{term}"] = declared.get(term, 1.0)
        auxiliary = dict.fromkeys(outputs.auxiliary, task_weight * self.task.auxiliary_weight)
        return Terms(outputs.logits, losses, {"task": task_weight, **auxiliary, **weights})

    def _marked(self, batch: Batch) -> Batch:
        valid = self.task.valid(batch.targets)
        return batch if valid is None else dataclasses.replace(batch, valid=valid)

    def _pass(self, images: Tensor) -> Outputs:
        if self._recorder is None:
            raise AttarError("Call build(example_images) on the distiller before its first step.")
        output, values = self._recorder.run(images)
        logits, auxiliary = self.task.logits(output), self.task.auxiliary(output)
        return Outputs(images, logits, values, self.anatomy, self.task.loss, self._pass, auxiliary)

    def _phase_step(self, method: Method, phase: Phase, batch: Batch) -> Terms:
        if self._recorder is None:
            raise AttarError("Call build(example_images) on the distiller before its first step.")
        batch = method.prepare(self._marked(batch))
        if phase.until is None:
            outputs = self._pass(batch.images)
        else:
            values = self._recorder.run_until(batch.images, phase.until)
            none = batch.images.new_empty(0, self.task.num_classes)
            outputs = Outputs(batch.images, none, values, self.anatomy, self.task.loss, self._pass)
        found, declared = method.phase_losses(phase, outputs, batch), method.phase_weights(phase)
        losses = {f"{method.name}.{term}": loss for term, loss in found.items()}
        return Terms(outputs.logits, losses, {f"{method.name}.{term}": declared.get(term, 1.0) for term in found})

    @property
    def phases(self) -> list[tuple[Method, Phase]]:
        """What comes before the main training, in the order of the methods; known after `build`."""
        return [(method, phase) for method in self._methods() for phase in method.phases]

    @property
    def phase(self) -> Phase | None:
        """The phase that steps belong to now; None: the main training."""
        return self._phase[1] if self._phase is not None else None

    def enter(self, phase: int | None) -> None:
        """Let the following steps belong to a phase, by its number in `phases`, or to the main training (None)."""
        self._phase = self.phases[phase] if phase is not None else None

    def epoch_start(self, epoch: int, epochs: int) -> None:
        """Tell every method that an epoch begins (0-based), and enter the phase that it belongs to.

        Raises:
            AttarError: the phases leave no epoch for the main training.
        """
        self.enter(self._phase_at(epoch, epochs))
        for method in self._methods():
            method.epoch_start(epoch, epochs)

    @property
    def wants_holdout(self) -> bool:
        """Whether a method wants to see held-out images once an epoch (`see_holdout`)."""
        return any(method.wants_holdout for method in self._methods())

    @torch.no_grad()
    def see_holdout(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Show held-out images to the methods that want them, as an epoch begins.

        Args:
            batches: images [N, C, H, W] and class indices [N], on the distiller's device; walked through once for each
                of these methods. Nothing must be trained on them.
        """
        modes = {module: module.training for module in self.modules()}
        self.eval()
        for method in self._methods():
            if method.wants_holdout:
                method.see_holdout(self.student, batches)
        for module, mode in modes.items():
            module.training = mode

    def schedule_starts(self, epochs: int) -> list[int]:
        """Return the epochs (0-based) of a run of so many at which the learning rate begins its schedule."""
        ends = self._phase_ends(epochs)
        starts = {0}
        for begin, end, (_, phase) in zip([0, *ends], ends, self.phases, strict=False):
            if phase.own_schedule:
                starts |= {begin, end}
        return sorted(starts)

    def _phase_ends(self, epochs: int) -> list[int]:
        ends: list[int] = []
        share = 0.0
        for _, phase in self.phases:
            share += phase.share
            ends.append(max(round(share * epochs), ends[-1] + 1 if ends else 1))
        return ends

    def _phase_at(self, epoch: int, epochs: int) -> int | None:
        phases, ends = self.phases, self._phase_ends(epochs)
        if ends and ends[-1] >= epochs:
            names = " and ".join(dict.fromkeys(method.name for method, _ in phases))
            raise AttarError(
                f"The {len(phases)} phases of {names} take {ends[-1]} epochs and leave none of {epochs} for the main "
                "training: train for more epochs or shorten the phases."
            )
        return next((number for number, end in enumerate(ends) if epoch < end), None)

    @property
    def kept(self) -> Kept | None:
        """The channels that the student has left, by module; None: all of them."""
        return self._kept

    @property
    def may_reshape(self) -> bool:
        """Whether `reshape` may still change the student's widths, now that the main training goes on."""
        return self._kept is None and self._phase is None and any(map(_reshapes, self._methods()))

    def reshape(self, kept: Kept | None = None) -> bool:
        """Let a method take channels away from the student; call it after `epoch_start` and before the epoch's steps.

        It happens at most once, when the main training begins (see `Method.reshape`). The student shrinks in place and
        keeps its class and keys. That its logits stay is proved; then it is probed anew, at the same stages, and every
        method builds anew.

        Args:
            kept: take away everything but these channels without asking the methods, before a state is loaded.

        Returns:
            Whether the student has changed: make a new optimiser, since its parameters are new ones.

        Raises:
            AttarError: the channels are not the student's, or removing them changes the logits.
        """
        if self._recorder is None or self._example is None:
            raise AttarError("Call build(example_images) on the distiller before reshape().")
        decided = kept is None
        if decided:
            if not self.may_reshape:
                return False
            kept = next((found for method in self._methods() if (found := method.reshape(self.student))), None)
        if not kept:
            return False
        example = self._example.to(next(self.student.parameters()).device)
        before = self._answer(example) if decided else None
        slice_(self.student, kept)
        if before is not None:
            allowed = _SAME_LOGITS * before.abs().max()
            if not bool((self._answer(example) - before).abs().max() <= allowed):
                raise AttarError(
                    "The student without the channels that were switched off does not give the same logits: "
                    "choose another network for this method."
                )
        self._kept = kept
        self._recorder.remove()
        for path in self._made_out_of_place:
            self.student.get_submodule(path).inplace = True  # type: ignore[assignment]
        self._build(example, [stage.name for stage in self.anatomy.stages])
        return True

    def _answer(self, images: Tensor) -> Tensor:
        modes = {module: module.training for module in self.student.modules()}
        self.student.eval()
        with torch.no_grad():
            logits = self.task.logits(self.student(images))
        for module, mode in modes.items():
            module.training = mode
        return logits

    def deployables(self) -> dict[str, nn.Module]:
        """Networks besides the plain student that this training yields, by name ("ONE.ensemble")."""
        return {
            f"{method.name}.{name}": network
            for method in self._methods()
            for name, network in method.deployables(self.student).items()
        }

    def strip(self, deployable: str | None = None, *, prove_export: bool = True) -> nn.Module:
        """Give back the plain student, proved: original class, original keys, bit-identical logits, exportable.

        Returns a copy in evaluation mode with no trace of the distiller; training may go on afterwards.

        Args:
            deployable: name of another network to give back instead (see `deployables`).
            prove_export: also prove that `torch.export` accepts it.

        Raises:
            AttarError: any part of the proof fails.
        """
        if self._recorder is None or self._example is None:
            raise AttarError("Call build(example_images) on the distiller before strip().")
        if deployable is None:
            source: nn.Module = self.student
        else:
            others = self.deployables()
            if deployable not in others:
                raise unknown_name("deployable network", deployable, others)
            source = others[deployable]
        stripped = copy.deepcopy(source).eval().requires_grad_(True)
        self._recorder.remove_from_copy(stripped)
        if deployable is None:
            for path in self._made_out_of_place:
                stripped.get_submodule(path).inplace = True  # type: ignore[assignment]
        self._prove(source, stripped, plain=deployable is None, export=prove_export)
        return stripped

    def _prove(self, source: nn.Module, stripped: nn.Module, *, plain: bool, export: bool) -> None:
        assert self._example is not None
        example = self._example.to(next(source.parameters()).device)
        if plain and (type(stripped) is not type(self.student) or tuple(stripped.state_dict()) != self._keys):
            raise AttarError("The stripped student has not its original class and keys: was it changed after build?")
        modes = {module: module.training for module in source.modules()}
        source.eval()
        with torch.no_grad():
            before, after = (self.task.logits(network(example)) for network in (source, stripped))
        for module, mode in modes.items():
            module.training = mode
        if not torch.equal(before, after) and not (before.isnan() | (before == after)).all():
            raise AttarError("The stripped network does not give the same logits to the last bit: it is not returned.")
        if export:
            try:
                torch.export.export(stripped, (example,))
            except Exception as error:  # torch.export raises many kinds
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise AttarError(
                    f"torch.export refuses the stripped {type(stripped).__name__} ({reason}): "
                    "use strip(prove_export=False) if it need not be exported."
                ) from error

    def __getstate__(self) -> dict[str, Any]:
        if self._recorder is not None:
            raise AttarError("A built distiller is not pickled or copied whole: save its state_dict() instead.")
        return self.__dict__


def _reshapes(method: Method) -> bool:
    return type(method).reshape is not Method.reshape


def refuse_other_phases(methods: Sequence[Method]) -> None:
    """Raise where auxiliaries that one method's phases have trained would be made anew by another's `reshape`."""
    for method in filter(_reshapes, methods):
        for other in methods:
            if other is not method and (other.phases or _reshapes(other)):
                what = "also changes its widths" if _reshapes(other) else "trains in phases before that"
                raise AttarError(f"{method.name} changes the student's widths and {other.name} {what}: leave one out.")


def refuse_dense(methods: Sequence[Method], task: Task) -> None:
    """Raise for methods that have no form for one answer per pixel."""
    for method in methods:
        if task.dense and method.not_dense:
            raise AttarError(
                f"{method.name} cannot train {task.name}, since {method.not_dense}: choose a method that 'attar "
                "inspect' lists for it."
            )


def refuse_impossible(methods: Sequence[Method]) -> None:
    """Raise for methods that claim one resource twice, or need what another takes away."""
    claimed: dict[str, tuple[Method, str]] = {}
    for method in methods:
        for resource, reason in method.claims.items():
            if resource in claimed:
                other, other_reason = claimed[resource]
                raise AttarError(
                    f"{other.name} and {method.name} cannot be combined, since both set the {resource} "
                    f"({other_reason}; {reason}): leave one out."
                )
            claimed[resource] = (method, reason)
    for method in methods:
        for other in methods:
            needed = method.needs | ({"views"} if method.views > 1 else set())
            missing = needed & other.breaks
            if missing and other is not method:
                raise AttarError(
                    f"{method.name} needs {', '.join(sorted(missing))}, which {other.name} as configured takes away: "
                    "leave one out."
                )
