"""KDCL, collaborative learning: networks of any size learn from one target that is better than each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from attar.anatomy import Anatomy, Tap
from attar.errors import AttarError
from attar.functional import CollaborativeTarget, collaborative_target, full_precision, kl_divergence
from attar.functional.collaborative import error_covariance, general_target, general_weights
from attar.method import Batch, Method, Outputs, Probe
from attar.peers import PeerBatch, Peers, one_view_each

__all__ = ["KDCL"]


class KDCL(Method):
    """KDCL, collaborative learning: networks of any size learn from one target that is better than each of them.

    Idea: student and peers train together from scratch, each on an augmented view of its own of the same images. Their
    logits and the label make one target, which is on every sample at least as good as the best network, so that a weak
    peer does not drag a strong one down as in mutual learning (see DML).

    Definition, with networks 1 (the student) to M, logits z_i on view i, u_i = z_i - z_i[y] and temperature T:
        L = sum_i CE(z_i, y) + w T^2 sum_i KL(stopgrad softmax(z_t / T) || softmax(z_i / T))
        "minlogit": z_t = min_i u_i, class by class
        "linear":   z_t = sum_i a_i u_i, a_i >= 0 with sum 1 and the smallest CE(z_t, y), sample by sample
        "naive":    z_t = u_k of the network with the smallest CE(z_k, y), sample by sample
        "general":  softmax(z_t / T) is replaced by t = sum_i w_i softmax(z_i / T), negative entries set to 0 and the
                    rest made to sum to one; w = C^-1 1 / (1^T C^-1 1) with C_ij = (1/N_v) sum_n <e_i(x_n), e_j(x_n)>
                    over held-out images, e_i = softmax(z_i) minus the one-hot label; w is uniform in the first epoch
                    and is found anew as every further one begins
    On every sample CE(minlogit) <= CE(linear) <= CE(naive) = min_i CE(z_i).
    Terms: `task` is CE(z_1, y) and `kl` the student's divergence, T^2 included; `ce_peers` and `kl_peers` are the
    peers' summed.

    Shapes: logits [N, K]. Unit: nats. Data: M views of every image, one for each network (the student sees the first
    alone), from one augmentation; labels; any sampler.

    Cost: M whole networks in memory, forward and backward, and M views of every image. "linear" adds a small convex
    problem for every sample; "general" every network's pass over the hold-out once an epoch. Deployed: nothing; every
    peer can be kept instead ("peer1"), or the mean of all probabilities ("ensemble").

    When it helps: pairs of different strength too, where mutual learning costs the stronger one accuracy. On small
    images the targets get very confident on what is learnt by heart; "naive" and "linear" are then reported to do
    worse than "general", whose weights the training images do not see.

    Args:
        peers: how many further networks of the student's kind, or untrained networks (on the command line the names of
            their models); 0 is plain training.
        temperature: T.
        weight: w; reported stable from 0.2 to 5.
        target: "minlogit", "linear", "naive" or "general". In `attar train` the held-out images of "general" are those
            that also choose the epoch; in a loop of your own call `Distiller.see_holdout` once an epoch.
        ridge: share of C's mean diagonal that is added to its diagonal, for networks that nearly agree.

    Raises:
        AttarError: a negative number of peers, a peer that is not a network for these images and classes, or a value
            out of range.

    Source: Guo, Wang, Wu et al., "Online Knowledge Distillation via Collaborative Learning", CVPR 2020. There is no
    official code and the paper's text was not at hand: the formulas are those of two sets of public notes that agree.
    From memory or unverified: T = 2 beyond CIFAR, whether "linear" is solved by the sample or by the batch (here by the
    sample), which rule the paper prefers (here the cheapest), whether "general" mixes logits or probabilities (here
    probabilities, of which C is made), what it does with negative entries, how large its hold-out is, and the ridge.
    """

    needs = frozenset({"labels"})
    not_dense = "every network sees a view of its own, and the pixels of the views do not correspond"

    def __init__(
        self,
        *,
        peers: int | nn.Module | Sequence[nn.Module] = 1,
        temperature: float = 2.0,
        weight: float = 1.0,
        target: Literal["minlogit", "linear", "naive", "general"] = "minlogit",
        ridge: float = 1e-3,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise AttarError(f"KDCL's temperature must be positive, not {temperature}.")
        if weight < 0:
            raise AttarError(f"KDCL's weight must not be negative, not {weight}.")
        if target not in ("minlogit", "linear", "naive", "general"):
            raise AttarError(f"KDCL's target is 'minlogit', 'linear', 'naive' or 'general', not '{target}'.")
        if ridge < 0:
            raise AttarError(f"KDCL's ridge must not be negative, not {ridge}.")
        self.peers = Peers(peers, "KDCL")
        self.views = 1 + len(self.peers)
        if self.views > 1:
            # It gives all views but the first away, and cannot share them with a method that does so too.
            self.needs, self.breaks = frozenset({"labels", "views"}), frozenset({"views"})
        self.temperature = temperature
        self.weight = weight
        self.target: CollaborativeTarget | Literal["general"] = target
        self.ridge = ridge
        self.wants_holdout = target == "general"
        if self.wants_holdout:
            self.register_buffer("mixture", torch.full((self.views,), 1.0 / self.views))

    def build(self, probe: Probe) -> None:
        """Draw the peers."""
        self.peers.build(probe)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """None: the networks exchange predictions."""
        return []

    def prepare(self, batch: Batch) -> Batch:
        """Give every network its own view."""
        return one_view_each(batch, len(self.peers))

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `kl`, and `ce_peers` and `kl_peers` where there are peers."""
        assert isinstance(batch, PeerBatch)
        if batch.labels is None:
            raise AttarError("KDCL needs class indices as labels: leave out what mixes images.")
        peers = self.peers(batch.peer_images)
        own, *others = self._divergences([outputs.logits, *peers], batch.labels)
        losses = {"kl": own}
        if peers:
            losses["ce_peers"] = torch.stack([outputs.task_loss(z, batch.targets) for z in peers]).sum()
            losses["kl_peers"] = torch.stack(others).sum()
        return losses

    def _divergences(self, logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
        """Return every network's divergence from the common target."""
        if self.target != "general":
            target = collaborative_target(logits, labels, self.target)
            return [kl_divergence(z, target, self.temperature) for z in logits]
        softened = [torch.softmax(full_precision(z) / self.temperature, dim=1) for z in logits]
        mixed = general_target(softened, self.mixture)
        log_t = mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()
        return [kl_divergence(z, temperature=self.temperature, target_log_probs=log_t) for z in logits]

    def see_holdout(self, student: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Find the weights of "general"."""
        covariance, count = self.mixture.new_zeros(self.views, self.views), 0
        for images, labels in batches:
            answers = [torch.softmax(full_precision(z), dim=1) for z in (student(images), *self.peers(images))]
            covariance += len(labels) * error_covariance(answers, labels)
            count += len(labels)
        if count:
            self.mixture.copy_(general_weights(covariance / count, self.ridge))

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        return {"kl": self.weight, "kl_peers": self.weight} if len(self.peers) else {"kl": self.weight}

    def deployables(self, student: nn.Module) -> dict[str, nn.Module]:
        """Every peer, and the mean of all networks' probabilities."""
        return self.peers.deployables(student)
