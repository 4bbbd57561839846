"""OSKD, online subclass knowledge distillation: the nearest answers of one's own class as a soft label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.anatomy import Anatomy, Tap
from attar.errors import AttarError
from attar.functional import full_precision, gathered, linear_ramp, nearest, rank_and_world, squared_distances
from attar.method import Batch, Method, Outputs, Probe
from attar.sampling import Balanced

__all__ = ["OSKD"]

# Up to here a batch of ordinary size holds several images of every class anyway.
_FEW_CLASSES = 20


class OSKD(Method):
    """OSKD, online subclass knowledge distillation: a sample learns from its nearest samples of the same class.

    RECONSTRUCTION. Neither paper's full text was available. What is verified: one stage, no second network, soft labels
    taken from the network itself that tell how a sample resembles others inside its own class. Everything else below is
    this project's reading, and an option; no published number stands behind it.

    Idea: classes have hidden subclasses. In the mini-batch the k samples of the same class whose answers are nearest
    stand for a sample's subclass; their mean answer is its soft label.

    Definition, with logits z, p(T) = softmax(z / T), S_i the k nearest samples of i's class (ties: lower number first),
    t_i(T) = stopgrad mean_{j in S_i} p_j(T), and V the samples that have any:
        L = CE(z, y) + w(p) / |V| sum_{i in V} D(t_i, z_i)
        "kl": D = T^2 KL(t_i(T) || p_i(T));  "mse": D = ||p_i(1) - t_i(1)||^2, summed over classes;
        "mse_logits": D = ||z_i - mean_j z_j||^2.
    Term: `subclass`. Neighbours and targets are constants; w grows from 0 over the first `ramp` of the run.

    Shapes: logits [N, K]. Unit: nats for "kl". Data: one view, labels. With more than 20 classes batches are drawn
    class-balanced, for otherwise most samples have no mate (CIFAR-100, batch 128: 28 % have none); compare with plain
    training on the same batches.

    Cost: an N x N table of distances. Deployed: nothing.

    When it helps: unknown; no published figure could be verified. Expect little where a batch holds few images of each
    class, and with k near their number, when the target is just the mean of the class.

    Args:
        k: neighbours.
        space: where they are searched: "logits", "probs", or "penultimate", the embedding.
        divergence: D.
        temperature: T, of "kl" only.
        averaging: of "kl": the mean of probabilities, or the softmax of mean "logits".
        weight: w at the end of the ramp.
        ramp: share of the run over which w grows linearly from 0; 0: at once.
        sampler: "auto" balances batches from 21 classes on; "balanced" always, "plain" never.
        instances: images of a class in a balanced batch.
        scope: "world" searches neighbours in the batch of all processes, "rank" in each process's part.

    Raises:
        AttarError: k below 1, or another value out of range.

    Sources: Tzelepi, Passalis, Tefas, "Efficient Online Subclass Knowledge Distillation for Image Classification", ICPR
    2020; the same, "Online Subclass Knowledge Distillation", Expert Systems with Applications 181, 2021.
    """

    needs = frozenset({"labels"})
    not_dense = "it looks for neighbours among the images of one class, and an image of a dense task has several"

    def __init__(
        self,
        *,
        k: int = 3,
        space: Literal["logits", "probs", "penultimate"] = "logits",
        divergence: Literal["kl", "mse", "mse_logits"] = "kl",
        temperature: float = 4.0,
        averaging: Literal["probs", "logits"] = "probs",
        weight: float = 1.0,
        ramp: float = 0.0,
        sampler: Literal["auto", "balanced", "plain"] = "auto",
        instances: int = 8,
        scope: Literal["rank", "world"] = "world",
    ) -> None:
        super().__init__()
        if k < 1:
            raise AttarError(f"OSKD needs at least one neighbour, not {k}.")
        if temperature <= 0:
            raise AttarError(f"OSKD's temperature must be positive, not {temperature}.")
        if not 0.0 <= ramp <= 1.0:
            raise AttarError(f"OSKD's ramp is a share of the run between 0 and 1, not {ramp}.")
        self.k, self.space, self.divergence, self.averaging = k, space, divergence, averaging
        self.temperature, self.weight, self.ramp, self.scope = temperature, weight, ramp, scope
        self._sampler, self._balanced = sampler, Balanced(instances)
        if sampler != "plain":
            self.claims = {"sampler": "OSKD balances the classes of a batch"}

    def build(self, probe: Probe) -> None:
        """Decide how batches are drawn."""
        many = probe.task.num_classes > _FEW_CLASSES
        if self._sampler == "balanced" or (self._sampler == "auto" and many):
            self.sampling = self._balanced

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The embedding, where neighbours are searched there."""
        return super().taps(anatomy) if self.space == "penultimate" else ()

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `subclass`."""
        assert batch.labels is not None
        z, points = full_precision(outputs.logits), self._points(outputs).detach()
        rank, world = rank_and_world() if self.scope == "world" else (0, 1)
        others, labels, answers = points, batch.labels, z.detach()
        if world > 1:
            others, labels, answers = gathered(points), gathered(batch.labels), gathered(z.detach())
        # [N, M]: N samples here, M in the batch of all processes.
        mates = batch.labels[:, None] == labels[None, :]
        itself = torch.arange(len(z), device=z.device) + rank * len(z)
        mates = mates.scatter(1, itself[:, None], torch.zeros_like(mates[:, :1]))
        chosen = nearest(squared_distances(points, others), mates, self.k)
        share = chosen.to(z.dtype) / chosen.sum(dim=1, keepdim=True).clamp(min=1)
        valid = chosen.any(dim=1)
        each = torch.where(valid, self._divergence(z, share, answers), 0.0)
        count = valid.sum()[None]
        count = (gathered(count) if world > 1 else count).sum().clamp(min=1)
        # A mean over the valid samples of all processes, whose mean over processes it is to be.
        return {"subclass": world * each.sum() / count}

    def _points(self, outputs: Outputs) -> Tensor:
        match self.space:
            case "logits":
                return outputs.logits
            case "probs":
                return torch.softmax(full_precision(outputs.logits), dim=1)
            case "penultimate":
                return F.normalize(full_precision(outputs.embedding), dim=1)

    def _divergence(self, z: Tensor, share: Tensor, answers: Tensor) -> Tensor:
        """Return D of every sample, [N], for target weights `share` [N, M] over the answers [M, K]."""
        if self.divergence == "mse_logits":
            return (z - share @ answers).square().sum(dim=1)
        temperature = self.temperature if self.divergence == "kl" else 1.0
        if self.averaging == "probs" or self.divergence == "mse":
            target = share @ torch.softmax(answers / temperature, dim=1)
        else:
            target = torch.softmax(share @ answers / temperature, dim=1)
        if self.divergence == "mse":
            return (torch.softmax(z, dim=1) - target).square().sum(dim=1)
        log_p = torch.log_softmax(z / temperature, dim=1)
        return temperature**2 * (torch.xlogy(target, target) - target * log_p).sum(dim=1)

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Linear ramp, then constant."""
        return {"subclass": self.weight * linear_ramp(progress, self.ramp)}
