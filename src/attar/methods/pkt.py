"""PKT, probabilistic knowledge transfer: who is whose neighbour in a batch, as a teacher's features see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from attar.anatomy import Anatomy, Tap
from attar.errors import AttarError
from attar.functional.pkt import (
    Divergence,
    Kernel,
    Reduction,
    neighbour_divergence,
    neighbour_log_probs,
    probabilistic_transfer,
    same_class_log_probs,
)
from attar.functional.similarity import Scope
from attar.method import Batch, Method, Outputs, Probe
from attar.reader import TeacherStages, adapt_teacher, as_teachers
from attar.teacher import Teacher

__all__ = ["PKT", "check_divergence"]


class PKT(Method):
    """PKT, probabilistic knowledge transfer: a batch gets the geometry that it has in the teacher's features.

    Idea: not the teacher's features are copied but which samples are neighbours in them, as a probability per sample.
    Widths may differ, nothing is projected, and no label is needed.

    Definition, with pooled embeddings s and t of a batch, a kernel K and `P_ij = K_ij / sum_k K_ik` (the diagonal
    included), sg = stop-gradient:
        base:      L = CE(z, y) + w (1 / N^2) sum_ij Pt_ij log((Pt_ij + eps) / (Ps_ij + eps)),
                   K_ij = (cos(f_i, f_j) + 1) / 2, Pt of sg(t), Ps of s
        combined:  the mean of (Pt - Ps) (log Pt - log Ps) instead, summed over that kernel and 1 / (1 + D_ij) of the
                   distances D of features as they are
    Terms: `divergence`; of several teachers the mean. With `supervised` also `supervised`, the base divergence from
    the neighbours by class (equal among samples of one class, 0 between classes).

    Shapes: embeddings [N, D_s], [N, D_t], any widths. Unit: nats. Data: one view, any sampler, N >= 2: a batch of one
    has no neighbours and the term is 0. Values of 1e-5 to 1e-3 are normal, since non-negative features make all rows
    nearly uniform.

    Cost: N D multiply-adds an image and one forward of every teacher. Deployed: nothing.

    When it helps: retrieval, where it lifts mAP far more than the nearest neighbour (a small CNN taught by ResNet-18 on
    CIFAR-10: 38.96 to 51.19 % mAP, 80.71 to 79.17 % top-1); as a classifier's loss about as much as KD (WRN-40-2 to
    WRN-16-2 on CIFAR-100: 73.26 to 74.54, KD 74.92 %), across architectures too.

    Args:
        teachers: one trained network or several.
        weight: w; 30000 is RepDistiller's beside cross-entropy, for the base form with batches of 64. The authors train
            on the term alone, from a trained student: weight 1 and task_weight 0. For the combined form no weight
            beside labels is known.
        form: "base" or "combined"; sets what follows.
        kernels: of "cosine", "student-t", "rbf", "adaptive-rbf" and "cauchy"; their divergences are summed.
        divergence: "kl", "jeffreys", "abs" or "squared".
        eps: 1e-7 in the base form, 1e-6 in the combined one.
        sigma: width of the kernels "rbf" and "cauchy".
        reduction: "official" is the mean over all N^2 pairs, so that half the batch has about four times the loss of a
            row's sum; "batchmean" the mean over rows, which does not: 30000 at 64 images is 469 then.
        supervised: weight of `supervised`, a share of w (0.001 in the authors' experiment on faces); 0: no such term.
        task_weight: what multiplies the student's own supervised loss. With 0 no classifier is learnt, and the hold-out
            has nothing to choose an epoch by: keep the last one (`--select last`).
        scope: "world" relates the samples of all processes, "rank" those of each.

    Raises:
        AttarError: no teacher, the student as its own, or a value out of range.

    Source: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018 (arXiv
    1803.10837); passalis/probabilistic_kt (base) and passalis/pkth (combined). The paper is remembered to leave out
    j = i (unverified), the code does not. The exponential and Kagan divergences of passalis/pkth are not built.
    """

    not_dense = "it compares the embeddings that classifiers read, and a dense network has none"

    def __init__(
        self,
        teachers: Teacher | nn.Module | Sequence[Teacher | nn.Module],
        *,
        weight: float = 30000.0,
        form: Literal["base", "combined"] = "base",
        kernels: tuple[Kernel, ...] | None = None,
        divergence: Divergence | None = None,
        eps: float | None = None,
        sigma: float = 1.0,
        reduction: Reduction = "official",
        supervised: float = 0.0,
        task_weight: float = 1.0,
        scope: Scope = "world",
    ) -> None:
        super().__init__()
        if form not in ("base", "combined"):
            raise AttarError(f"PKT's form is 'base' or 'combined', not '{form}'.")
        combined = form == "combined"
        self.kernels: tuple[Kernel, ...] = kernels or (("cosine", "student-t") if combined else ("cosine",))
        self.divergence: Divergence = divergence or ("jeffreys" if combined else "kl")
        self.eps = eps if eps is not None else (1e-6 if combined else 1e-7)
        self.sigma = sigma
        self.reduction: Reduction = reduction
        self.scope: Scope = scope
        check_divergence("PKT", self.kernels, self.divergence, self.eps, sigma, reduction, scope)
        if supervised < 0:
            raise AttarError(f"PKT's supervised is a share of its weight, at least 0, not {supervised}.")
        self._teachers = as_teachers(teachers, "PKT")
        self.weight = weight
        self.supervised = supervised
        self._task_weight = task_weight
        self.claims = {"task weight": f"PKT gives the labels weight {task_weight}"} if task_weight != 1.0 else {}
        self.needs = frozenset({"labels"}) if supervised else frozenset()
        self._readers: tuple[TeacherStages, ...] = ()

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The frozen networks."""
        return self._teachers

    def build(self, probe: Probe) -> None:
        """Find every teacher's embedding; there is nothing to train."""
        readers = []
        for teacher in self._teachers:
            anatomy = adapt_teacher(teacher, probe.student, probe.normalization, probe.images, "PKT")
            readers.append(TeacherStages(teacher, probe.images, anatomy, (), embedding=True))
        self._readers = tuple(readers)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The pooled embedding alone."""
        return [anatomy.embedding if anatomy.embedding is not None else anatomy.stages[-1].tap]

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `divergence`, and `supervised` where it is asked for."""
        own = outputs.embedding
        parts = [self.distance(own, reader(outputs.images).embedding) for reader in self._readers]
        losses = {"divergence": torch.stack(parts).mean()}
        if self.supervised:
            assert batch.labels is not None
            neighbours = neighbour_log_probs(own, eps=self.eps, scope=self.scope)
            by_class = same_class_log_probs(batch.labels, scope=self.scope)
            losses["supervised"] = neighbour_divergence(neighbours, by_class, eps=self.eps, reduction=self.reduction)
        return losses

    def distance(self, features: Tensor, target: Tensor) -> Tensor:
        """Return the divergence of features [N, D_s] from those of a teacher, [N, D_t]."""
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

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        weights: dict[str, float | Tensor] = {"divergence": self.weight}
        return weights | {"supervised": self.weight * self.supervised} if self.supervised else weights

    def task_weight(self, progress: Tensor) -> float | Tensor:
        """Constant."""
        return self._task_weight


def check_divergence(
    method: str, kernels: Sequence[str], divergence: str, eps: float, sigma: float, reduction: str, scope: str
) -> None:
    """Refuse options that are none, for every method that compares neighbours.

    Raises:
        AttarError: a name that does not exist, or a number out of range.
    """
    known = ("cosine", "student-t", "rbf", "adaptive-rbf", "cauchy")
    for option, values, choices in (
        ("kernels", kernels, known),
        ("divergence", (divergence,), ("kl", "jeffreys", "abs", "squared")),
        ("reduction", (reduction,), ("official", "batchmean")),
        ("scope", (scope,), ("rank", "world")),
    ):
        for value in values:
            if value not in choices:
                listed = ", ".join(repr(choice) for choice in choices)
                raise AttarError(f"{method}'s {option} is one of {listed}, not '{value}'.")
    if sigma <= 0 or eps < 0:
        raise AttarError(f"{method}'s sigma must be positive and its eps at least 0, not {sigma} and {eps}.")
