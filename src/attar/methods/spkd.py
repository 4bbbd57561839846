"""SPKD, similarity-preserving distillation: which samples are alike, as a teacher or a deeper layer sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from attar.anatomy import Anatomy, Stage, Tap
from attar.errors import AttarError
from attar.functional import batch_similarity, linear_ramp, similarity_distance
from attar.functional.similarity import Scope
from attar.method import Batch, Method, Outputs, Probe
from attar.reader import TeacherStages, chosen_stages, paired_stages, teacher_anatomy
from attar.teacher import Teacher

__all__ = ["SPKD"]


class SPKD(Method):
    """SPKD, similarity-preserving knowledge distillation: samples alike to the teacher become alike to the student.

    Idea: not the teacher's features are imitated but the relations they draw between the samples of a batch, so that
    channels and resolutions may differ and nothing is projected. Without `teachers` the teacher is the same network's
    deepest stage, which every shallower stage imitates ("deeper layer"); with `teachers` it is any trained network:
    an earlier training of the same one ("frozen self"), or a larger one.

    Definition, with Q [B, CHW] the flattened features of a batch and G = Q Q^T, each row divided by its L2 norm:
        L = CE(z, y) + w (1 / B^2) sum over layers || G_student - stopgrad G_teacher ||_F^2
    Terms: `similarity`, that sum without w; of several teachers the mean.

    Shapes: features [B, C, H, W], any C, H, W. No unit; each layer lies in [0, 4 / B], after ReLUs in [0, 2 / B].
    Data: one view, seen by student and teachers alike; any sampler. Small batches carry few relations. In dense tasks
    the stages are those of the encoder.

    Cost: B CHW multiply-adds an image and layer; with teachers one forward of each. Deployed: nothing.

    When it helps: a teacher of another kind (ResNet32x4 to ShuffleNetV2 on CIFAR-100: 71.82 to 74.56 %), other classes
    than the teacher's, or an earlier training of the same network (ResNet-20: 68.92 to 69.85 %). Between networks of
    one family it stays behind KD. As a teacher of shallower layers it is only a comparator of SCD, unpublished alone,
    and the published weight is made for a teacher: on ResNet-20 in a short training it cost 17 points so, a weight of
    30 none (benchmarks/self_distillation.md). Without a teacher begin there.

    Args:
        teachers: one trained network or several; none for the deeper layer.
        weight: w, by the paper's and all known code's gamma.
        layers: with teachers: the "last" stage, the paper's best, or "all" stages, paired in order, or by resolution
            where they are not as many (see `attar.reader.paired_stages`).
        stages: modules of the student to use as layers instead; the last is the teacher where there is no other.
        teacher_stages: modules of the teachers that those are compared with.
        average: take the mean over layers, as AberHu/Knowledge-Distillation-Zoo, instead of the sum.
        start: share of the run before which the weight is 0.
        ramp: share of the run over which the weight then grows linearly; default: 0.1 for the deeper layer, which is
            meaningless at first (our decision), and 0 with teachers.
        scope: "world" relates the samples of all processes, "rank" those of each.

    Raises:
        AttarError: one stage only, student and teacher layers that are not as many, or the student as its own teacher.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019 (arXiv 1907.09682). There is no
    official code; HobbitLong/RepDistiller's, verified by the first author as it says, has this reduction.
    """

    not_dense = ""

    def __init__(
        self,
        teachers: Teacher | nn.Module | Sequence[Teacher | nn.Module] | None = None,
        *,
        weight: float = 3000.0,
        layers: Literal["last", "all"] = "last",
        stages: tuple[str, ...] | None = None,
        teacher_stages: tuple[str, ...] | None = None,
        average: bool = False,
        start: float = 0.0,
        ramp: float | None = None,
        scope: Scope = "world",
    ) -> None:
        super().__init__()
        given = [teachers] if isinstance(teachers, Teacher | nn.Module) else list(teachers or ())
        if layers not in ("last", "all"):
            raise AttarError(f"SPKD's layers are 'last' or 'all', not '{layers}'.")
        if scope not in ("rank", "world"):
            raise AttarError(f"SPKD's scope is 'rank' or 'world', not '{scope}'.")
        if not given and (layers != "last" or teacher_stages is not None):
            raise AttarError("SPKD without a teacher has neither layers nor teacher_stages: choose layers with stages.")
        self._teachers = tuple(t if isinstance(t, Teacher) else Teacher(t) for t in given)
        self.ramp = ramp if ramp is not None else (0.0 if given else 0.1)
        if not 0.0 <= start <= 1.0 or not 0.0 <= self.ramp <= 1.0:
            raise AttarError(f"SPKD's start and ramp are shares of the run in [0, 1], not {start} and {self.ramp}.")
        self.weight = weight
        self.layers = layers
        self.stages = stages
        self.teacher_stages = teacher_stages
        self.average = average
        self.start = start
        self.scope: Scope = scope
        self._stages: tuple[Stage, ...] = ()
        self._readers: tuple[tuple[tuple[Stage, ...], TeacherStages], ...] = ()

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The frozen networks, where there are any."""
        return self._teachers

    def build(self, probe: Probe) -> None:
        """Choose the student's layers, and the teachers' that they are compared with."""
        self._stages = chosen_stages(probe.anatomy, self.stages, self.layers if self._teachers else "all")
        if not self._teachers and len(self._stages) < 2:
            raise AttarError(
                f"SPKD finds only one stage ('{self._stages[0].name}'), so no layer has a deeper one to learn from: "
                "name two modules or more with stages=, or give a teacher."
            )
        readers = []
        named = self.stages is not None or self.teacher_stages is not None
        for teacher in self._teachers:
            if teacher.network is probe.student:
                raise AttarError("SPKD's teacher is the student itself: give an earlier training, or no teacher.")
            teacher.adapt(probe.normalization, probe.images, probe.task)
            anatomy = teacher_anatomy(teacher, probe.images, self.teacher_stages, dense=probe.task.dense)
            theirs = chosen_stages(anatomy, self.teacher_stages, self.layers)
            pairs = paired_stages(self._stages, theirs, method="SPKD", teacher=teacher.name, named=named)
            own, theirs = zip(*pairs, strict=True)
            readers.append((own, TeacherStages(teacher, probe.images, anatomy, theirs)))
        self._readers = tuple(readers)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The output of every chosen layer."""
        return [stage.tap for stage in self._stages]

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `similarity`."""
        own = {stage: self._similarity(outputs[stage.tap]) for stage in self._stages}
        if not self._readers:
            *shallower, deepest = own.values()
            return {"similarity": self._joined([similarity_distance(shallow, deepest) for shallow in shallower])}
        distances = []
        for stages, reader in self._readers:
            theirs = map(self._similarity, reader(outputs.images).stages)
            pairs = zip(stages, theirs, strict=True)
            distances.append(self._joined([similarity_distance(own[stage], target) for stage, target in pairs]))
        return {"similarity": torch.stack(distances).mean()}

    def _similarity(self, features: Tensor) -> Tensor:
        return batch_similarity(features, scope=self.scope)

    def _joined(self, distances: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(distances))
        return stacked.mean() if self.average else stacked.sum()

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Off before `start`, then grown over `ramp`."""
        return {"similarity": self.weight * linear_ramp(progress, self.ramp, self.start)}
