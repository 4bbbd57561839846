"""BAKE, batch knowledge ensembling: every sample's label is softened by the answers for samples like it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.errors import AttarError
from attar.functional import full_precision, gathered, kl_divergence, rank_and_world
from attar.method import Batch, Method, Outputs
from attar.sampling import Balanced

__all__ = ["BAKE"]


class BAKE(Method):
    """BAKE, batch knowledge ensembling: answers spread between the samples of a batch that look alike.

    Idea: a batch holds several images of each class. Each sample's target is an ensemble of the answers for the whole
    batch, weighted by how alike the embeddings are, and spread on without end, as a random walk would.

    Definition, with embeddings f, logits z, p = softmax(z / T), normalised g = f / ||f||, and the row-wise softmax W of
    g g^T without its diagonal:
        Q = stopgrad (1 - omega) (I - omega W)^-1 p
        L = CE(z, y) + w T^2 (1 / N) sum_n KL(Q_n || softmax(z_n / T))
    Term: `kl`. Rows of Q sum to 1; no gradient reaches Q, nor the embeddings through it.

    Shapes: f [N, D], z [N, K]. Unit: nats. Data: one view, labels, batches with `instances` images of each class.

    Cost: an N x N system of equations a step. Deployed: nothing.

    When it helps: many classes that resemble each other, ImageNet above all; the affinities have no temperature, so
    early in training all samples of a batch are about equally alike.

    Args:
        temperature: T.
        omega: share of the others' answers in the target, in [0, 1).
        weight: w.
        instances: images of a class in a batch.
        scope: "world" ensembles over the batch of all processes, "rank" over each process's part.

    Raises:
        AttarError: a value out of range, or another method that draws batches its own way.

    Source: Ge et al., "Self-distillation with Batch Knowledge Ensembling Improves ImageNet Classification", 2021.
    Nothing differs from the released code.
    """

    needs = frozenset({"labels"})
    not_dense = "it draws batches by the images' classes, and an image of a dense task has several"

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        omega: float = 0.5,
        weight: float = 1.0,
        instances: int = 4,
        scope: Literal["rank", "world"] = "world",
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise AttarError(f"BAKE's temperature must be positive, not {temperature}.")
        if not 0.0 <= omega < 1.0:
            raise AttarError(f"BAKE's omega is a share in [0, 1), not {omega}.")
        self.temperature, self.omega, self.weight, self.scope = temperature, omega, weight, scope
        self.sampling = Balanced(instances)
        self.claims = {"sampler": "BAKE draws several images of each class"}

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `kl`."""
        z, features = outputs.logits.detach(), outputs.embedding.detach()
        rank, world = rank_and_world() if self.scope == "world" else (0, 1)
        if world > 1:
            z, features = gathered(z), gathered(features)
        targets = self.ensemble(z, features)[rank * len(outputs.logits) :][: len(outputs.logits)]
        return {"kl": kl_divergence(outputs.logits, temperature=self.temperature, target_log_probs=targets.log())}

    def ensemble(self, logits: Tensor, features: Tensor) -> Tensor:
        """Return Q [N, K] of logits [N, K] and embeddings [N, D]."""
        p = torch.softmax(full_precision(logits) / self.temperature, dim=1)
        g = F.normalize(full_precision(features), dim=1)
        identity = torch.eye(len(g), dtype=g.dtype, device=g.device)
        # No sample is its own neighbour.
        affinity = torch.softmax(g @ g.T - 1e9 * identity, dim=1)
        # Always solvable, since omega W has row sums below 1; `solve` would make the host wait to hear it.
        spread: Tensor = torch.linalg.solve_ex(identity - self.omega * affinity, p.to(g.dtype))[0]
        return (1.0 - self.omega) * spread

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        return {"kl": self.weight}
