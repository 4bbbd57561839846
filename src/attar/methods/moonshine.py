"""Moonshine: a teacher's own architecture with cheap convolutions learns from where the teacher looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from attar.anatomy import Anatomy, Stage, Tap
from attar.anatomy.energy import stages_with_maps
from attar.errors import AttarError
from attar.functional import attention_transfer, ensemble_log_probs, kl_divergence
from attar.method import Batch, Method, Outputs, Probe
from attar.reader import TeacherStages, adapt_teacher, as_teachers, paired_stages
from attar.teacher import Teacher

__all__ = ["Moonshine"]


class Moonshine(Method):
    """Moonshine, distilling with cheap convolutions: the teacher's architecture, made cheap, with attention transfer.

    Idea: the student is the teacher with every 3x3 convolution inside its blocks replaced by a grouped or bottleneck
    one. Depth and map sizes stay, so that its attention maps can be compared with the teacher's as they are; at equal
    parameters this beats a shallower or thinner student. Any network of attar's zoo takes the option `cheap`
    (`--model cifar_wrn_40_2 --model-options cheap=G8B2`), `attar.zoo.cheapen` makes any other residual network cheap.

    Definition, over J paired stages, with AT the mean squared distance of normalised energy maps (see `AT`):
        L = (1 - alpha) CE(z, y) + 2 alpha T^2 KL(softmax(z_t / T) || softmax(z / T)) + (3 beta / J) sum_j AT_j
    Terms: `attention`, the mean of AT_j over stages, and with alpha > 0 `kl`, T^2 included; of several teachers the
    mean of the attention terms and the KL to their mean probabilities.

    Shapes: maps [N, C, H, W], channels free; logits [N, K]. Unit: nats (`kl`), none (`attention`). Where sizes differ,
    the larger features are average-pooled. Data: one view, seen by student and teachers alike; any sampler.

    Cost: one forward of every teacher, up to its last stage with alpha = 0. Deployed: nothing beside the cheap student.

    When it helps: where parameters are counted. Grouped and depth-wise convolutions save more parameters than time on
    most hardware: measure. The paper's tables could not be read, so no published gain is given here.

    Stages behind a layer norm over channels and stages of one position have no attention map and are left out.

    Args:
        teachers: one trained network or several; the paper has one, the student's own architecture.
        alpha: share of the soft labels.
        beta: weight of the attention; the sum of J = 3 stages is weighted by it as in `AT`.
        temperature: T.
        kl_mean: "batch" is the mean over samples; "elements" divides by the number of classes too, as released.
        stages: modules of the student to use as stages instead.
        teacher_stages: modules of the teachers that those are compared with.

    Raises:
        AttarError: no teacher, the student as its own, named stages that are not as many or have no map, a network
            without any map, or a value out of range.

    Source: Crowley, Gray, Storkey, "Moonshine: Distilling with Cheap Convolutions", NeurIPS 2018 (arXiv 1711.02613),
    official BayesWatch/pytorch-moonshine. The released code reads the sums before the last batch norm and ReLU of a
    group; here stages are read as the student has them.
    """

    not_dense = "it has been built for classifiers only (use AT and KD beside a network made cheap)"

    def __init__(
        self,
        teachers: Teacher | nn.Module | Sequence[Teacher | nn.Module],
        *,
        alpha: float = 0.0,
        beta: float = 1000.0,
        temperature: float = 4.0,
        kl_mean: Literal["batch", "elements"] = "batch",
        stages: tuple[str, ...] | None = None,
        teacher_stages: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        self._teachers = tuple(as_teachers(teachers, "Moonshine"))
        if not 0.0 <= alpha <= 1.0:
            raise AttarError(f"Moonshine's alpha is a share in [0, 1], not {alpha}.")
        if temperature <= 0:
            raise AttarError(f"Moonshine's temperature must be positive, not {temperature}.")
        if kl_mean not in ("batch", "elements"):
            raise AttarError(f"Moonshine's kl_mean is 'batch' or 'elements', not '{kl_mean}'.")
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.kl_mean = kl_mean
        self.stages = stages
        self.teacher_stages = teacher_stages
        self.claims = {"task weight": f"Moonshine gives the labels weight {1 - alpha:g}"} if alpha else {}
        self._readers: tuple[tuple[tuple[Stage, ...], TeacherStages], ...] = ()

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The frozen networks."""
        return self._teachers

    def build(self, probe: Probe) -> None:
        """Pair the student's stages with those of every teacher."""
        self._readers = tuple(self._paired(teacher, probe) for teacher in self._teachers)

    def _paired(self, teacher: Teacher, probe: Probe) -> tuple[tuple[Stage, ...], TeacherStages]:
        anatomy = adapt_teacher(teacher, probe.student, probe.normalization, probe.images, "Moonshine")
        as_seen = probe.images.new_empty(2, *anatomy.input_shape)
        ours = _with_maps("student", probe.student, probe.anatomy, self.stages, probe.images)
        theirs = _with_maps(teacher.name, teacher.network, anatomy, self.teacher_stages, as_seen)
        named = self.stages is not None or self.teacher_stages is not None
        pairs = paired_stages(ours, theirs, method="Moonshine", teacher=teacher.name, named=named)
        reader = TeacherStages(teacher, probe.images, anatomy, [stage for _, stage in pairs], logits=self.alpha > 0)
        if self.alpha > 0:
            probe.task.check_logits(reader(probe.images).logits, network=teacher.name)
        return tuple(stage for stage, _ in pairs), reader

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The output of every stage that has a partner."""
        return [stage.tap for stages, _ in self._readers for stage in stages]

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `attention` and, with alpha > 0, `kl`."""
        attention, answers = [], []
        for stages, reader in self._readers:
            reading = reader(outputs.images)
            pairs = zip(stages, reading.stages, strict=True)
            levels = [attention_transfer(outputs[stage.tap], theirs, resize=True) for stage, theirs in pairs]
            attention.append(torch.stack(levels).mean())
            if self.alpha > 0:
                answers.append(reading.logits)
        losses = {"attention": torch.stack(attention).mean()}
        if answers:
            target = ensemble_log_probs(answers, self.temperature)
            kl = kl_divergence(outputs.logits, temperature=self.temperature, target_log_probs=target)
            losses["kl"] = kl / target.shape[1] if self.kl_mean == "elements" else kl
        return losses

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        return {"attention": 3 * self.beta, **({"kl": 2 * self.alpha} if self.alpha > 0 else {})}

    def task_weight(self, progress: Tensor) -> float | Tensor:
        """Constant."""
        return 1 - self.alpha


def _with_maps(
    owner: str, network: nn.Module, anatomy: Anatomy, names: Sequence[str] | None, images: Tensor
) -> list[Stage]:
    """Return the stages that have an attention map of more than one position."""
    stages = stages_with_maps(network, anatomy, names, images)
    kept = [stage for stage in stages if stage.height * stage.width > 1]
    if not kept or (names is not None and len(kept) < len(stages)):
        lost = next((stage for stage in stages if stage not in kept), anatomy.stages[-1])
        raise AttarError(
            f"Moonshine finds no attention map in '{lost.name}' of the {owner}, which has a single position or a layer "
            "norm over channels: give larger images, or name modules with stages= and teacher_stages=."
        )
    return kept
