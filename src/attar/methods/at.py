"""AT, attention transfer: the student looks where the teacher looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from attar.anatomy import Anatomy, Stage, Tap
from attar.anatomy.energy import flat_stages
from attar.errors import AttarError
from attar.functional import attention_transfer
from attar.method import Batch, Method, Outputs, Probe
from attar.reader import TeacherStages, adapt_teacher, as_teachers, chosen_stages, paired_stages
from attar.teacher import Teacher

__all__ = ["AT"]


class AT(Method):
    """AT, activation-based attention transfer: every stage has its energy where the teacher's stage has it.

    Idea: a feature map is reduced to one spatial map, its energy at every position, and only that is imitated. Channels
    vanish, so that no adaptor is needed and the student may be as narrow as it likes.

    Definition, with features F [C, H, W] of a stage, `A = sum_c |F_c|^p` over positions and a = A / max(||A||_2, 1e-12)
    per sample, sg = stop-gradient, over paired stages j:
        "code":  L = CE(z, y) + w sum_j mean_{n, positions} (a_s - sg a_t)^2
        "paper": L = CE(z, y) + w sum_j (1/N) sum_n || a_s - sg a_t ||_2      (the paper prints w as beta / 2)
    Terms: `attention`, the sum over stages without w; of several teachers the mean.

    Shapes: maps [N, C, H, W] and [N, C', H', W'], channels free; where sizes differ the larger features are
    average-pooled to the smaller size first, each axis on its own. No unit; with "code" a stage lies in
    [0, 2 / (H W)], so that w depends on the resolution: twice the side is a quarter of the term.
    Data: one view, seen by student and teachers alike; any sampler. In dense tasks the stages are those of the encoder.

    Cost: one forward of every teacher, up to the deepest stage that is read; the rest is negligible. Deployed: nothing.

    With KD, as the paper's best rows: `[AT(teacher), KD(teacher, ...)]`, whose weights for labels and soft labels hold
    beside this term (official: KD with temperature 4, weight 0.9 and task_weight 0.1). The teacher then runs twice.

    When it helps: networks of one family (WRN-40-2 to WRN-16-2 on CIFAR-100: 73.26 to 74.08 %, less than KD's 74.92).
    Across architectures it can do harm (VGG-13 to MobileNetV2: 64.60 to 59.40 %).

    Stages behind a layer norm over channels have the same energy everywhere until its weights are trained, and stages
    of one position say nothing about where: pairs with such a stage are left out.

    Args:
        teachers: one trained network or several.
        weight: w; 1000 is the released code's. Form "paper" is larger by orders and has no known weight: give one.
        form: the released code's distance or the printed one.
        power: p, at least 1.
        reduce: how channels are joined: "mean" (the same as the sum here), or the paper's "max".
        layers: "all" stages in pairs, or the "last" alone. Stages that are not as many are paired by resolution (see
            `attar.reader.paired_stages`).
        stages: modules of the student to use as stages instead.
        teacher_stages: modules of the teachers that those are compared with.

    Raises:
        AttarError: no teacher, the student as its own, named stages that are not as many or have no map, no pair with
            a map, or a value out of range.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017 (arXiv 1612.03928), and its
    released code, which squares the distance and takes the mean. Pooling follows RepDistiller, which takes heights
    for both axes. The released code reads the sums before the last batch norm and ReLU of a group; here stages are
    read as the student has them. The gradient-based variant, absent from the released code, is not built.
    """

    not_dense = ""

    def __init__(
        self,
        teachers: Teacher | nn.Module | Sequence[Teacher | nn.Module],
        *,
        weight: float | None = None,
        form: Literal["code", "paper"] = "code",
        power: float = 2.0,
        reduce: Literal["mean", "max"] = "mean",
        layers: Literal["last", "all"] = "all",
        stages: tuple[str, ...] | None = None,
        teacher_stages: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        for option, value, choices in (
            ("form", form, ("code", "paper")),
            ("reduce", reduce, ("mean", "max")),
            ("layers", layers, ("last", "all")),
        ):
            if value not in choices:
                raise AttarError(f"AT's {option} is '{choices[0]}' or '{choices[1]}', not '{value}'.")
        if power < 1:
            raise AttarError(f"AT's power is at least 1, not {power}.")
        if weight is None and form == "paper":
            raise AttarError("AT's form 'paper' has no known weight: give one.")
        self._teachers = as_teachers(teachers, "AT")
        self.weight = 1000.0 if weight is None else weight
        self.form: Literal["code", "paper"] = form
        self.power = power
        self.reduce: Literal["mean", "max"] = reduce
        self.layers: Literal["last", "all"] = layers
        self.stages = stages
        self.teacher_stages = teacher_stages
        self._readers: tuple[tuple[tuple[Stage, ...], TeacherStages], ...] = ()

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The frozen networks."""
        return self._teachers

    def build(self, probe: Probe) -> None:
        """Pair the student's stages with those of every teacher."""
        ours = chosen_stages(probe.anatomy, self.stages, self.layers)
        without = flat_stages(probe.student, probe.anatomy, ours, probe.images)
        readers = []
        for teacher in self._teachers:
            anatomy = adapt_teacher(
                teacher,
                probe.student,
                probe.normalization,
                probe.images,
                "AT",
                self.teacher_stages,
                task=probe.task,
            )
            theirs = chosen_stages(anatomy, self.teacher_stages, self.layers)
            as_seen = probe.images.new_empty(2, *anatomy.input_shape)
            without_theirs = flat_stages(teacher.network, anatomy, theirs, as_seen)
            named = self.stages is not None or self.teacher_stages is not None
            pairs = paired_stages(ours, theirs, method="AT", teacher=teacher.name, named=named)
            mapped = [
                (own, other)
                for own, other in pairs
                if own not in without
                and other not in without_theirs
                and min(own.height, other.height) * min(own.width, other.width) > 1
            ]
            if not mapped or (named and len(mapped) < len(pairs)):
                own, other = next(pair for pair in pairs if pair not in mapped)
                raise AttarError(
                    f"AT finds no attention map in the student's '{own.name}' ({own.height} x {own.width}) and the "
                    f"{teacher.name}'s '{other.name}' ({other.height} x {other.width}), since behind a layer norm over "
                    "channels every position has the same energy and a single one says nothing about where: give "
                    "larger images or name modules with stages= and teacher_stages=."
                )
            own_stages, their_stages = zip(*mapped, strict=True)
            readers.append((own_stages, TeacherStages(teacher, probe.images, anatomy, their_stages)))
        self._readers = tuple(readers)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The output of every stage that has a partner."""
        return [stage.tap for stages, _ in self._readers for stage in stages]

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `attention`."""
        sums = []
        for stages, reader in self._readers:
            pairs = zip(stages, reader(outputs.images).stages, strict=True)
            sums.append(torch.stack([self.distance(outputs[stage.tap], theirs) for stage, theirs in pairs]).sum())
        return {"attention": torch.stack(sums).mean()}

    def distance(self, features: Tensor, target: Tensor) -> Tensor:
        """Return the loss of one pair: features [N, C, H, W] that imitate, [N, C', H', W'] that are imitated."""
        return attention_transfer(features, target, form=self.form, power=self.power, reduce=self.reduce, resize=True)

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        return {"attention": self.weight}
