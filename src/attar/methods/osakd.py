"""OSAKD, online self-acquired knowledge distillation: the classes of the nearest samples as a soft label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.anatomy import Anatomy, Tap
from attar.errors import AttarError
from attar.functional import full_precision, gathered, linear_ramp, nearest, rank_and_world, squared_distances
from attar.method import Batch, Method, Outputs

__all__ = ["OSAKD"]


class OSAKD(Method):
    """OSAKD, online self-acquired knowledge distillation: neighbours in the batch vote on a sample's soft label.

    RECONSTRUCTION, mostly. Verified from the abstract: one stage, and the k nearest neighbours in the network's output
    space, which estimate every class's posterior probability. The estimate itself follows from textbook density
    estimation; form of the loss, k, weight and ramp are this project's, and options.

    Idea: with k_c of the k neighbours of a sample in class c, k_c / k estimates p(c | x): volume and class priors
    cancel. That estimate says how near a sample lies to every class, and is its soft label. (OSKD looks inside the
    sample's own class alone.)

    Definition, with logits z and the k nearest other samples S_i of the batch (ties: lower number first):
        q_ic = stopgrad (1 / k) #{j in S_i: y_j = c}
        L = CE(z, y) + w(p) (1 / N) sum_i D(q_i, z_i)
        "ce": D = -sum_c q_ic log softmax(z_i)_c;  "mse": D = ||softmax(z_i) - q_i||^2, summed over classes.
    Term: `soft`. q is a constant, built from labels, not from predictions. w grows over the first `ramp` of the run:
    before features form, q is noise.

    Shapes: logits [N, K]. Unit: nats for "ce". Data: one view, labels, any sampler.

    Cost: an N x N table of distances. Deployed: nothing.

    When it helps: unknown; no published figure could be verified. With many classes most of k neighbours are of others
    even for a perfect network and q contradicts the label: keep k at the number of mates a batch holds, or below.
    Near the end q is the label itself.

    Args:
        k: neighbours.
        space: where they are searched: "logits", or "penultimate", the embedding.
        divergence: D.
        weight: w at the end of the ramp; default: 0.1 for "ce", 1 for "mse".
        ramp: share of the run over which w grows linearly from 0.
        include_self: count the sample itself as one of the k.
        scope: "world" searches neighbours in the batch of all processes, "rank" in each process's part.

    Raises:
        AttarError: k below 1, or a ramp that is no share.

    Source: Tzelepi, Tefas, "Efficient training of lightweight neural networks using Online Self-Acquired Knowledge
    Distillation", ICME 2021 (arXiv 2108.11798).
    """

    needs = frozenset({"labels"})
    not_dense = "its neighbours vote with one label per image"

    def __init__(
        self,
        *,
        k: int = 8,
        space: Literal["logits", "penultimate"] = "logits",
        divergence: Literal["ce", "mse"] = "ce",
        weight: float | None = None,
        ramp: float = 0.1,
        include_self: bool = False,
        scope: Literal["rank", "world"] = "world",
    ) -> None:
        super().__init__()
        if k < 1:
            raise AttarError(f"OSAKD needs at least one neighbour, not {k}.")
        if not 0.0 <= ramp <= 1.0:
            raise AttarError(f"OSAKD's ramp is a share of the run between 0 and 1, not {ramp}.")
        self.k, self.space, self.divergence = k, space, divergence
        self.weight = weight if weight is not None else (0.1 if divergence == "ce" else 1.0)
        self.ramp, self.include_self, self.scope = ramp, include_self, scope

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The embedding, where neighbours are searched there."""
        return super().taps(anatomy) if self.space == "penultimate" else ()

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `soft`."""
        z = full_precision(outputs.logits)
        posterior = self.posterior(outputs, batch).to(z.dtype)
        if self.divergence == "mse":
            return {"soft": (torch.softmax(z, dim=1) - posterior).square().sum(dim=1).mean()}
        return {"soft": -(posterior * torch.log_softmax(z, dim=1)).sum(dim=1).mean()}

    def posterior(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return q [N, K], rows sum to 1; fewer than k other samples leave as many votes."""
        assert batch.labels is not None
        points = (outputs.embedding if self.space == "penultimate" else outputs.logits).detach()
        rank, world = rank_and_world() if self.scope == "world" else (0, 1)
        others, labels = (gathered(points), gathered(batch.labels)) if world > 1 else (points, batch.labels)
        allowed = torch.ones(len(points), len(others), dtype=torch.bool, device=points.device)
        if not self.include_self:
            itself = torch.arange(len(points), device=points.device) + rank * len(points)
            allowed = allowed.scatter(1, itself[:, None], torch.zeros_like(allowed[:, :1]))
        voters = nearest(squared_distances(points, others), allowed, self.k).to(points.dtype)
        votes = voters @ F.one_hot(labels, outputs.logits.shape[1]).to(points.dtype)
        return votes / voters.sum(dim=1, keepdim=True).clamp(min=1)

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Linear ramp, then constant."""
        return {"soft": self.weight * linear_ramp(progress, self.ramp)}
