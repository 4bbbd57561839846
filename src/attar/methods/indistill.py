"""InDistill: maps of the teacher, cut down to the student's channels, are matched stage by stage before the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.anatomy import Anatomy, Stage, Tap
from attar.anatomy.filters import last_convolution, layers_behind
from attar.errors import AttarError
from attar.functional import full_precision
from attar.functional.filters import filter_norms, strongest
from attar.functional.pooling import pooled
from attar.method import Batch, Method, Outputs, Phase, Probe
from attar.reader import TeacherStages, adapt_teacher, as_teachers, chosen_stages, paired_stages
from attar.teacher import Teacher

__all__ = ["InDistill"]

_POOLINGS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class _Layer:
    """One pair of stages: the student's tap, and what is read of the teacher.

    `official` is the batch norm and the layers that stand between a convolution that is read and the stage's map.
    """

    tap: Tap
    reader: TeacherStages
    official: tuple[nn.BatchNorm2d, nn.Sequential] | None


class InDistill(Method):
    """InDistill: a warm-up in which the student's stages imitate a selection of the teacher's channels, one by one.

    Idea: an encoder between maps of unequal width spoils what flows through the layers. So the teacher's map is cut
    down to the student's width instead, by taking the channels whose filters are strongest, and is regressed as it
    is, shallow stages first. Then ordinary training takes over: with the methods that stand beside this one
    (`[InDistill(teacher), PKT(teacher)]`, `[InDistill(teacher), KD(teacher)]`), or with the labels alone.

    Definition, for stage l = 1 .. L of the student with map S_l and the teacher's T_l, made by filters W:
        score_k = ||W[k]||_1,  idx = the C_S largest in their own order,  T'_l = T_l[:, idx]
        L_l = (1 / (N C H W)) ||stopgrad T'_l - S_l||^2 alone, for e_l = a + l epochs of a run of 70
    Terms: `mse`, in the phases only; in the main training the method adds nothing.

    Shapes: maps [N, C, H, W], any C, H, W: the larger map is averaged to the smaller one's size (our extension).
    Stages are paired in order, or by resolution where they are not as many; in dense tasks they are those of the
    encoder. No unit. Data: one view, no labels.

    Cost: in phase l both forwards end at stage l: cheaper than plain training. No auxiliary. Training FLOPs and step
    time, where they are reported, are those of the main training. Deployed: nothing.

    When it helps: retrieval with tiny students (CIFAR-10, mAP by cosine distance: 54.61 % against 53.06 % for the
    information-flow method with the same networks). For a teacher far larger than the student the authors distil a
    teacher assistant first: another run's network, given here as the teacher. Not to be expected where the student's
    maps cannot become the teacher's (before a ReLU here, behind it there).

    Args:
        teachers: the trained network, exactly one.
        a: stage l (from 1) is matched for a + l epochs ...
        epochs: ... of a run of so many; in other runs for the same share.
        criterion: how channels are scored: "l1" or "l2" norm of their filters, or |"gamma"| of the batch norm behind
            them (not in the sources).
        wider: where the student has more channels than the teacher: "refuse" it, or "adapt" them by a 1x1 convolution
            that is trained in the phase and then dropped (our extension).
        official_bn: the target of the released code, whose pruned copy of a teacher layer has lost the batch norm's
            shift and normalises with the batch: `pool(relu(gamma standardise(conv(x))))`. For convolution, batch
            norm, ReLU and pooling only. Statistics are those of each process.
        stages: modules of the student to use as stages; none at all leaves the other methods without a warm-up.
        teacher_stages: modules of the teacher to pair them with.

    Raises:
        AttarError: no teacher or several, the student itself, phases as long as the run, a stage of the teacher that
            ends in no convolution of its own, or a wider student.

    Source: Sarridis, Koutlis, Kordopatis-Zilos, Kompatsiaris, Papadopoulos, "InDistill: Information flow-preserving
    knowledge distillation for model compression", WACV 2025 (arXiv 2205.10003), by the code of its second version,
    gsarridis/InDistill; the body of the paper was not read. Differences: channels are selected from the teacher's
    own map (see `official_bn`) by index, not by a zero sum of weights; the optimiser keeps its state from epoch to
    epoch. The released main training is PKT without labels; here the labels are learnt too unless a method says
    otherwise.
    """

    not_dense = ""

    def __init__(
        self,
        teachers: Teacher | nn.Module | Sequence[Teacher | nn.Module],
        *,
        a: int = 2,
        epochs: int = 70,
        criterion: Literal["l1", "l2", "gamma"] = "l1",
        wider: Literal["refuse", "adapt"] = "refuse",
        official_bn: bool = False,
        stages: tuple[str, ...] | None = None,
        teacher_stages: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        given = as_teachers(teachers, "InDistill")
        if len(given) > 1:
            raise AttarError(f"InDistill selects the channels of one teacher, not of {len(given)}: give one.")
        if a < 0:
            raise AttarError(f"InDistill's first stage is matched for a + 1 epochs, so a cannot be {a}.")
        if criterion not in ("l1", "l2", "gamma"):
            raise AttarError(f"InDistill's criterion is 'l1', 'l2' or 'gamma', not '{criterion}'.")
        if wider not in ("refuse", "adapt"):
            raise AttarError(f"InDistill can 'refuse' or 'adapt' a wider student, not '{wider}'.")
        self._teacher = (given[0],)
        self.a = a
        self.epochs = epochs
        self.criterion = criterion
        self.wider = wider
        self.official_bn = official_bn
        self.stages = stages
        self.teacher_stages = teacher_stages
        self._layers: tuple[_Layer, ...] = ()

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The frozen network."""
        return self._teacher

    def build(self, probe: Probe) -> None:
        """Pair the stages and select the teacher's channels."""
        (teacher,) = self._teacher
        anatomy = adapt_teacher(teacher, probe.student, probe.normalization, probe.images, "InDistill", task=probe.task)
        ours = chosen_stages(probe.anatomy, self.stages, "all")
        theirs = chosen_stages(anatomy, self.teacher_stages, "all") if ours else ()
        named = self.stages is not None or self.teacher_stages is not None
        pairs = paired_stages(ours, theirs, method="InDistill", teacher=teacher.name, named=named)
        lengths = [self.a + layer for layer in range(1, len(pairs) + 1)]
        if sum(lengths) >= self.epochs:
            raise AttarError(
                f"InDistill's warm-up of {' + '.join(map(str, lengths))} epochs leaves none of {self.epochs} for the "
                "main training: choose a smaller a or more epochs."
            )
        self.adapters = nn.ModuleList()
        self._layers = tuple(self._layer(number, *pair, anatomy, probe) for number, pair in enumerate(pairs))

    def _layer(self, number: int, ours: Stage, theirs: Stage, anatomy: Anatomy, probe: Probe) -> _Layer:
        (teacher,) = self._teacher
        adapted = ours.channels > theirs.channels
        if adapted and self.wider == "refuse":
            raise AttarError(
                f"The student's '{ours.name}' has {ours.channels} channels and the {teacher.name}'s '{theirs.name}' "
                f"only {theirs.channels} to select from: let wider be 'adapt', or choose stages with stages= and "
                "teacher_stages=."
            )
        self.adapters.append(nn.Conv2d(ours.channels, theirs.channels, 1, bias=False) if adapted else nn.Identity())
        selected, source, official = None, theirs, None
        if ours.channels < theirs.channels or (self.official_bn and not adapted):
            convolution = last_convolution(teacher.network, anatomy, theirs)
            if convolution is None:
                raise AttarError(
                    f"InDistill finds no convolution inside the {teacher.name}'s '{theirs.name}' whose filters are its "
                    f"{theirs.channels} channels: choose other stages with stages= and teacher_stages=."
                )
            behind = [teacher.network.get_submodule(path) for path in layers_behind(anatomy, convolution, theirs)]
            selected = strongest(self._scores(convolution, behind), ours.channels)
            if self.official_bn:
                source = anatomy.find(convolution)
                official = self._official(behind, theirs, source, anatomy, probe)
        self.register_buffer(f"selected{number}", selected, persistent=False)
        return _Layer(ours.tap, TeacherStages(teacher, probe.images, anatomy, [source]), official)

    def _scores(self, convolution: str, behind: Sequence[nn.Module]) -> Tensor:
        weight: Tensor = self._teacher[0].network.get_submodule(convolution).weight  # type: ignore[assignment]
        if self.criterion != "gamma":
            return filter_norms(weight, 1.0 if self.criterion == "l1" else 2.0)
        norm = behind[0] if behind else None
        if not isinstance(norm, nn.BatchNorm2d) or norm.weight is None or len(norm.weight) != len(weight):
            raise AttarError(
                f"InDistill finds no batch norm behind '{convolution}' of the {self._teacher[0].name}: "
                "let criterion be 'l1'."
            )
        return norm.weight.abs()

    def _official(
        self, behind: Sequence[nn.Module], stage: Stage, source: Stage, anatomy: Anatomy, probe: Probe
    ) -> tuple[nn.BatchNorm2d, nn.Sequential]:
        """Return the batch norm and what stands behind it, proved: of the convolution they make the stage's map."""
        (teacher,) = self._teacher
        kinds: list[Any] = [nn.BatchNorm2d, nn.ReLU, _POOLINGS][: len(behind)]
        if len(behind) in (2, 3) and all(isinstance(layer, kind) for layer, kind in zip(behind, kinds, strict=True)):
            norm, *rest = behind
            made, whole = TeacherStages(teacher, probe.images, anatomy, [source, stage])(probe.images).stages
            if type(norm) is nn.BatchNorm2d and norm.affine and torch.equal(nn.Sequential(*behind)(made), whole):
                return norm, nn.Sequential(*rest)
        raise AttarError(
            "InDistill's official_bn needs stages of convolution, batch norm, ReLU and pooling, which the "
            f"{teacher.name}'s '{stage.name}' is not: leave it off."
        )

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The output of every stage that is matched."""
        return [layer.tap for layer in self._layers]

    @property
    def phases(self) -> Sequence[Phase]:
        """One for every stage, shallow to deep; each longer than the one before."""
        numbered = enumerate(self._layers, 1)
        return [Phase(f"layer {i}", (self.a + i) / self.epochs, (layer.tap,)) for i, layer in numbered]

    def phase_losses(self, phase: Phase, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return `mse`."""
        number = int(phase.name.removeprefix("layer ")) - 1
        ours, target = full_precision(outputs[self._layers[number].tap]), self.target(number, outputs.images)
        ours = full_precision(self.adapters[number](ours))
        size = (min(ours.shape[2], target.shape[2]), min(ours.shape[3], target.shape[3]))
        return {"mse": (pooled(target, size) - pooled(ours, size)).square().mean()}

    @torch.no_grad()
    def target(self, number: int, images: Tensor) -> Tensor:
        """Return T' [N, C, H, W] of a stage (from 0): the selected channels of the teacher's map."""
        layer = self._layers[number]
        features = full_precision(layer.reader(images).stages[0])
        selected: Tensor | None = getattr(self, f"selected{number}")
        if selected is not None:
            features = features[:, selected]
        if layer.official is None:
            return features
        norm, rest = layer.official
        gamma = full_precision(norm.weight[selected])
        standardised = F.batch_norm(features, None, None, gamma, torch.zeros_like(gamma), training=True, eps=norm.eps)
        return rest(standardised)  # type: ignore[no-any-return]

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return nothing: the main training is that of the other methods."""
        return {}
