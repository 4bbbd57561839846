"""FitNet: a layer of the student, through a regressor, reproduces a layer of the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.anatomy import Anatomy, Stage, Tap
from attar.errors import AttarError
from attar.functional import full_precision
from attar.method import Batch, Method, Outputs, Phase, Probe
from attar.reader import TeacherStages, adapt_teacher, as_teachers, chosen_stages, paired_stages
from attar.teacher import Teacher

__all__ = ["FitNet", "Regressor"]


class FitNet(Method):
    """FitNet, hint regression: the student's "guided" layer, through a regressor, is the teacher's "hint" layer.

    Idea: what a teacher has in the middle tells a student, above all a thin and deep one, how to begin. A regressor
    brings the guided layer to the hint's channels and size, trains with the student and is dropped.

    Definition, with maps F_s, F_t of a pair, the regressor R (convolution, batch norm, ReLU), sg = stop-gradient:
        one stage:   L = CE(z, y) + w sum over pairs of mean_{n, c, positions} (R(F_s) - sg F_t)^2
        two stages:  at first w times that sum alone, with nothing behind the deepest guided layer computed or trained;
                     then the student learns without it, in the paper by KD: `[FitNet(teacher, form="two-stage"),
                     KD(teacher)]`
    Terms: `hint`, the sum over pairs without w; of several teachers the mean. In the first of two stages w is in it.

    Shapes: maps [N, C_s, H_s, W_s] and [N, C_t, H_t, W_t]. In squared units of the teacher's activations.
    Data: one view, seen by student and teachers alike; any sampler.

    Cost: one forward of every teacher up to the hint, and C_s C_t k^2 parameters of every regressor while training (k
    grows with the difference of the sizes). Deployed: nothing.

    When it helps: little alone (WRN-40-2 to WRN-16-2 on CIFAR-100: 73.26 to 73.58 %, KD 74.92), and across
    architectures it can do harm (VGG-13 to MobileNetV2: 64.60 to 64.14 %). A hint too deep leaves no freedom.

    Args:
        teachers: one trained network or several.
        weight: w; 100 is RepDistiller's, for the mean over elements.
        form: "one-stage", as nearly all use it, or the paper's "two-stage".
        phase: share of the run of the first of two stages; torchdistill's sample for ImageNet has 5 of 20 epochs.
        layers: "middle" pairs the second of three or four stages, RepDistiller's choice; "last"; or "all" stages, as
            FRSKD compares with (see `attar.reader.paired_stages` for stages that are not as many).
        stages: modules of the student to use as guided layers instead.
        teacher_stages: modules of the teachers to use as hints.
        regressor: "convolution" is RepDistiller's, whose kernel makes the sizes agree: 3x3 of stride 2 from twice the
            hint's size, a transposed 4x4 from half of it, otherwise as large as the difference needs; smaller maps are
            refused. "pointwise" is FRSKD's 1x1; where sizes differ the map is resized first, bilinearly (our decision).
        relu: a ReLU ends the regressor, which can then never match the negative values of a hint before activation.
        batch_norm: in the regressor, as in all known code; the paper has none.
        reduction: "mean" over all elements; "paper" is 1/2 the sum over channels and positions, a mean over samples:
            C_t H_t W_t / 2 times that, to be met by w. (torchdistill's sum over the batch is 2 N times the paper's.)

    Raises:
        AttarError: no teacher, the student as its own, named layers that are not as many, sizes that no regressor
            brings together, or a value out of range.

    Source: Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015 (arXiv
    1412.6550), in two stages; the form in one stage and the regressor are HobbitLong/RepDistiller's. Differences: each
    of two stages runs through the whole learning-rate schedule, with one optimiser for both; the paper's lambda, which
    decays in its second stage, is not built (its values are not known for certain).
    """

    not_dense = "its hints have been built for classifiers only (AT and InDistill read the stages of dense networks)"

    def __init__(
        self,
        teachers: Teacher | nn.Module | Sequence[Teacher | nn.Module],
        *,
        weight: float = 100.0,
        form: Literal["one-stage", "two-stage"] = "one-stage",
        phase: float = 0.25,
        layers: Literal["middle", "last", "all"] = "middle",
        stages: tuple[str, ...] | None = None,
        teacher_stages: tuple[str, ...] | None = None,
        regressor: Literal["convolution", "pointwise"] = "convolution",
        relu: bool = True,
        batch_norm: bool = True,
        reduction: Literal["mean", "paper"] = "mean",
    ) -> None:
        super().__init__()
        for option, value, choices in (
            ("form", form, ("one-stage", "two-stage")),
            ("layers", layers, ("middle", "last", "all")),
            ("regressor", regressor, ("convolution", "pointwise")),
            ("reduction", reduction, ("mean", "paper")),
        ):
            if value not in choices:
                raise AttarError(f"FitNet's {option} is one of {', '.join(map(repr, choices))}, not '{value}'.")
        if not 0 < phase < 1:
            raise AttarError(f"FitNet's phase is a share of the run between 0 and 1, not {phase}.")
        self._teachers = as_teachers(teachers, "FitNet")
        self.weight = weight
        self.two_stage = form == "two-stage"
        self.phase = phase
        self.layers: Literal["middle", "last", "all"] = layers
        self.stages = stages
        self.teacher_stages = teacher_stages
        self.pointwise = regressor == "pointwise"
        self.relu = relu
        self.batch_norm = batch_norm
        self.reduction = reduction
        self._readers: tuple[tuple[tuple[Stage, ...], TeacherStages], ...] = ()

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The frozen networks."""
        return self._teachers

    def build(self, probe: Probe) -> None:
        """Pair guided layers with hints and make a regressor for every pair."""
        ours = chosen_stages(probe.anatomy, self.stages, self.layers)
        named = self.stages is not None or self.teacher_stages is not None
        readers, regressors = [], []
        for teacher in self._teachers:
            anatomy = adapt_teacher(
                teacher, probe.student, probe.normalization, probe.images, "FitNet", self.teacher_stages
            )
            theirs = chosen_stages(anatomy, self.teacher_stages, self.layers)
            pairs = paired_stages(ours, theirs, method="FitNet", teacher=teacher.name, named=named)
            convolutions = [_pointwise(*pair) if self.pointwise else _convolution(*pair) for pair in pairs]
            regressors.append(nn.ModuleList(Regressor(c, self.relu, self.batch_norm) for c in convolutions))
            guided, hints = zip(*pairs, strict=True)
            readers.append((guided, TeacherStages(teacher, probe.images, anatomy, hints)))
        self._readers = tuple(readers)
        self.regressors = nn.ModuleList(regressors)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The output of every guided layer."""
        return list(dict.fromkeys(stage.tap for guided, _ in self._readers for stage in guided))

    @property
    def phases(self) -> Sequence[Phase]:
        """The first of two stages."""
        taps = dict.fromkeys(stage.tap for guided, _ in self._readers for stage in guided)
        return [Phase("hint", self.phase, until=tuple(taps), own_schedule=True)] if self.two_stage else []

    def phase_losses(self, phase: Phase, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return `hint`, weighted."""
        return {"hint": self.weight * self._hint(outputs)}

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `hint`; nothing in the second of two stages."""
        return {} if self.two_stage else {"hint": self._hint(outputs)}

    def _hint(self, outputs: Outputs) -> Tensor:
        sums = []
        for (guided, reader), regressors in zip(self._readers, self.regressors, strict=True):
            hints = reader(outputs.images).stages
            distances = []
            assert isinstance(regressors, nn.ModuleList)
            for stage, hint, regressor in zip(guided, hints, regressors, strict=True):
                distances.append(self._distance(regressor(outputs[stage.tap], (hint.shape[2], hint.shape[3])), hint))
            sums.append(torch.stack(distances).sum())
        return torch.stack(sums).mean()

    def _distance(self, regressed: Tensor, hint: Tensor) -> Tensor:
        squared = (full_precision(regressed) - full_precision(hint.detach())).square()
        return squared.mean() if self.reduction == "mean" else squared.flatten(1).sum(dim=1).mean() / 2

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        return {} if self.two_stage else {"hint": self.weight}


class Regressor(nn.Module):
    """A convolution, batch norm and ReLU, from a guided layer [N, C_s, H_s, W_s] to its hint [N, C_t, H_t, W_t]."""

    def __init__(self, conv: nn.Module, relu: bool = True, batch_norm: bool = True) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(int(conv.out_channels)) if batch_norm else nn.Identity()  # type: ignore[arg-type]
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the regressed map at `size`, that of the hint."""
        if self.conv.kernel_size == (1, 1) and tuple(features.shape[2:]) != size:
            features = F.interpolate(features, size=size, mode="bilinear")
        regressed: Tensor = self.relu(self.bn(self.conv(features)))
        return regressed


def _pointwise(ours: Stage, theirs: Stage) -> nn.Module:
    return nn.Conv2d(ours.channels, theirs.channels, 1)


def _convolution(ours: Stage, theirs: Stage) -> nn.Module:
    (h, w), (height, width) = (ours.height, ours.width), (theirs.height, theirs.width)
    if (h, w) == (2 * height, 2 * width):
        return nn.Conv2d(ours.channels, theirs.channels, 3, stride=2, padding=1)
    if (2 * h, 2 * w) == (height, width):
        return nn.ConvTranspose2d(ours.channels, theirs.channels, 4, stride=2, padding=1)
    if h >= height and w >= width:
        return nn.Conv2d(ours.channels, theirs.channels, (1 + h - height, 1 + w - width))
    raise AttarError(
        f"FitNet has no convolution from the student's '{ours.name}' ({h} x {w}) to the larger hint '{theirs.name}' "
        f"({height} x {width}): name other layers with stages= and teacher_stages=, or choose regressor='pointwise'."
    )
