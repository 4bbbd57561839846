"""Information-flow distillation: neighbours at every layer of a teacher, most in the first epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.anatomy import Anatomy, Stage, Tap
from attar.errors import AttarError
from attar.functional.pkt import Divergence, Kernel, Reduction, probabilistic_transfer
from attar.functional.similarity import Scope
from attar.method import Batch, Method, Outputs, Probe
from attar.methods.pkt import check_divergence
from attar.reader import TeacherStages, adapt_teacher, as_teachers, chosen_stages, paired_stages
from attar.teacher import Teacher

__all__ = ["InformationFlow"]


class InformationFlow(Method):
    """Information-flow distillation: PKT at every stage, whose weight starts high and falls geometrically.

    Idea: a network forms the flow of information through its layers early, in a critical period. So the stages
    between are supervised strongly at first, and soon only the final embedding is. A teacher of quite another
    architecture is first distilled into an auxiliary teacher with the student's layout (about twice as wide), by
    `PKT(form="combined")`, which then is the teacher here.

    Definition, with D the combined divergence of `PKT` (kernels cosine and Student-t, Jeffreys, mean over N^2 pairs) at
    the embedding and at paired stages l, flattened, and the share p of the run that is done:
        L = CE(z, y) + w (D_embedding + v(p) sum_l D_l),  v(p) = v0 0.7^(50 p)
    Terms: `embedding`, `stages` (the sum); of several teachers the mean.

    Shapes: maps [N, C, H, W] -> [N, CHW], embeddings [N, D], any widths. Unit: nats. Data: one view, any sampler,
    N >= 2; labels are not needed.

    Cost: at every stage N C H W multiply-adds an image for each kernel, and one forward of every teacher. With
    processes that share a batch (scope "world") the flattened maps travel: `pool` makes them small. Deployed: nothing.

    When it helps: retrieval with a student of another architecture (a small CNN taught by ResNet-18 through an
    auxiliary CNN on CIFAR-10: mAP 35.30 to 49.20 % Euclidean, 39.00 to 53.06 % cosine). As a classifier's loss it is
    not published.

    Args:
        teachers: one trained network or several.
        weight: w. The published code has 1 and no labels (task_weight 0, Adam); beside labels the final term is then
            faint: what PKT is given there is its weight of 30000.
        initial: v0; 0 leaves PKT at the embedding alone.
        decay: what v falls by in every `interval`.
        interval: share of the run; the published run has 50 epochs, at whose ends v falls (`progress="epoch"` of a run
            keeps it constant within an epoch).
        stages: modules of the student to use as stages; default: all of its own, paired with the teacher's in order, or
            by resolution where they are not as many (see `attar.reader.paired_stages`).
        teacher_stages: modules of the teachers that those are compared with.
        pool: maps with a longer side than this are average-pooled to it, per axis; the published code does so for
            ResNets (8 and 4) and not for its CNNs. None: maps as they are.
        kernels: of "cosine", "student-t", "rbf", "adaptive-rbf" and "cauchy". Distances between flattened maps are
            large, so that "student-t" sees hardly anyone but oneself and its gradients are small: hence v0.
        divergence: "jeffreys", "kl", "abs" or "squared".
        eps: of the norms, and of the logarithms of "kl".
        sigma: width of the kernels "rbf" and "cauchy".
        reduction: "official" is the mean over N^2 pairs, "batchmean" N times that.
        task_weight: what multiplies the student's own supervised loss; 0 as published, which
            learns no classifier by which an epoch could be chosen: keep the last one (`--select last`).
        scope: "world" relates the samples of all processes, "rank" those of each.

    Raises:
        AttarError: no teacher, the student as its own, named stages that are not as many, or a value out of range.

    Source: Passalis, Tzelepi, Tefas, "Heterogeneous Knowledge Distillation using Information Flow Modeling", CVPR 2020
    (arXiv 2005.00727), by its code passalis/pkth. The paper also derives which layers belong together from their
    divergences; the code, with an auxiliary of equal depth, pairs them in order, as here. Differences: the weight moves
    with the run; the released optimiser is new in every epoch.
    """

    not_dense = "it compares the embeddings that classifiers read, and a dense network has none"

    def __init__(
        self,
        teachers: Teacher | nn.Module | Sequence[Teacher | nn.Module],
        *,
        weight: float = 1.0,
        initial: float = 100.0,
        decay: float = 0.7,
        interval: float = 1 / 50,
        stages: tuple[str, ...] | None = None,
        teacher_stages: tuple[str, ...] | None = None,
        pool: int | None = None,
        kernels: tuple[Kernel, ...] = ("cosine", "student-t"),
        divergence: Divergence = "jeffreys",
        eps: float = 1e-6,
        sigma: float = 1.0,
        reduction: Reduction = "official",
        task_weight: float = 1.0,
        scope: Scope = "world",
    ) -> None:
        super().__init__()
        check_divergence("InformationFlow", kernels, divergence, eps, sigma, reduction, scope)
        if not 0 < decay <= 1 or not 0 < interval <= 1:
            raise AttarError(
                "InformationFlow's decay is a factor and its interval a share of the run, both above 0 and at most 1, "
                f"not {decay} and {interval}."
            )
        if pool is not None and pool < 1:
            raise AttarError(f"InformationFlow's pool is a side of at least 1, not {pool}.")
        self._teachers = as_teachers(teachers, "InformationFlow")
        self.weight, self.initial, self.decay, self.interval = weight, initial, decay, interval
        self.stages = stages
        self.teacher_stages = teacher_stages
        self.pool = pool
        self.kernels: tuple[Kernel, ...] = kernels
        self.divergence: Divergence = divergence
        self.eps, self.sigma = eps, sigma
        self.reduction: Reduction = reduction
        self.scope: Scope = scope
        self._task_weight = task_weight
        reason = f"InformationFlow gives the labels weight {task_weight}"
        self.claims = {"task weight": reason} if task_weight != 1.0 else {}
        self._readers: tuple[tuple[tuple[Stage, ...], TeacherStages], ...] = ()

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The frozen networks."""
        return self._teachers

    def build(self, probe: Probe) -> None:
        """Pair the student's stages with those of every teacher."""
        ours = chosen_stages(probe.anatomy, self.stages, "all")
        named = self.stages is not None or self.teacher_stages is not None
        readers = []
        for teacher in self._teachers:
            anatomy = adapt_teacher(
                teacher, probe.student, probe.normalization, probe.images, "InformationFlow", self.teacher_stages
            )
            theirs = chosen_stages(anatomy, self.teacher_stages, "all")
            pairs = paired_stages(ours, theirs, method="InformationFlow", teacher=teacher.name, named=named)
            own, other = zip(*pairs, strict=True)
            readers.append((own, TeacherStages(teacher, probe.images, anatomy, other, embedding=True)))
        self._readers = tuple(readers)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The output of every stage that has a partner, and the embedding."""
        embedding = anatomy.embedding if anatomy.embedding is not None else anatomy.stages[-1].tap
        return [*dict.fromkeys(stage.tap for stages, _ in self._readers for stage in stages), embedding]

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `embedding` and `stages`."""
        finals, between = [], []
        for stages, reader in self._readers:
            reading = reader(outputs.images)
            finals.append(self.distance(outputs.embedding, reading.embedding))
            pairs = zip(stages, reading.stages, strict=True)
            parts = [self.distance(self._pooled(outputs[own.tap]), self._pooled(other)) for own, other in pairs]
            between.append(torch.stack(parts).sum())
        return {"embedding": torch.stack(finals).mean(), "stages": torch.stack(between).mean()}

    def distance(self, features: Tensor, target: Tensor) -> Tensor:
        """Return the divergence of features [N, ...] from those of a teacher."""
        return probabilistic_transfer(
            features,
            target,
            kernels=self.kernels,
            divergence=self.divergence,
            eps=self.eps,
            sigma=self.sigma,
            reduction=self.reduction,
            scope=self.scope,
        )

    def _pooled(self, features: Tensor) -> Tensor:
        if self.pool is None or max(features.shape[2:]) <= self.pool:
            return features
        size = (min(features.shape[2], self.pool), min(features.shape[3], self.pool))
        pooled: Tensor = F.adaptive_avg_pool2d(features, size)
        return pooled

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant at the embedding, falling geometrically at the stages."""
        return {
            "embedding": self.weight,
            "stages": self.weight * self.initial * self.decay ** (progress / self.interval),
        }

    def task_weight(self, progress: Tensor) -> float | Tensor:
        """Constant."""
        return self._task_weight
