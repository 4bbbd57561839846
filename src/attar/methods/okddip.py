"""OKDDip, online distillation with diverse peers: every peer has a target of its own, a leader learns from them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from attar.anatomy import Anatomy, Split, Tap
from attar.anatomy.branches import Branch, BranchEnsemble, BranchNetwork, embedding_taps, make_branches
from attar.errors import AttarError
from attar.functional import full_precision, kl_divergence, sigmoid_ramp
from attar.functional.peers import peer_attention, peer_targets
from attar.method import Batch, Method, Outputs, Probe
from attar.peers import Peers

__all__ = ["OKDDip"]


class OKDDip(Method):
    """OKDDip, online knowledge distillation with diverse peers: peers that stay different teach a leader.

    Idea: peers that all chase their common average soon are alike and stop helping. Here every peer learns from a
    mixture of the peers' answers of its own, weighed for every sample by an attention between their embeddings that
    is not symmetric (level 1). The leader, who takes no part in the mixing, learns from the plain average of peers
    that have stayed different (level 2). The leader is the student itself.

    Definition, for peers a = 1..m-1 with pooled embeddings f_a and logits z_a, the leader's logits z_m, temperature T
    and ramp w:
        alpha_ab = softmax_b(<Wq f_a, Wk f_b>)    b over all peers, a itself among them; per sample
        t_a = softmax(sum_b alpha_ab z_b / T),    t_m = softmax(mean_b z_b / T)
        L = sum_a CE(z_a, y) + CE(z_m, y) + w T^2 [sum_a KL(t_a || softmax(z_a / T)) + KL(t_m || softmax(z_m / T))]
    Terms: `task` is CE(z_m, y), `ce_peers` the other CE summed, `kl_peers` level 1 and `kl_leader` level 2 with T^2.
    Targets learn too: it is the only way in which Wq and Wk learn, it draws every peer towards those that learn from
    it, and all peers towards the leader. w = exp(-5 (1 - min(p, r) / r)^2) at progress p, r the ramp's share.

    Shapes: embeddings [N, D], logits [N, K]; Wq and Wk [D / 8, D] without bias, shared by the peers. Unit: nats.
    Data: one view, labels, any sampler.

    Cost: one extra tail a peer (ResNet-32: 1.98 times the multiply-adds for m = 4), or one network a peer in network
    form, and 2 D^2 / 8 parameters. Deployed: nothing; or a peer, or the mean of all.

    When it helps: small networks trained from scratch for many epochs; the leader's gain comes from peers that
    differ (`attar.functional.peers.prediction_diversity`). Late in training peers stop learning from each other.

    Args:
        branches: m, peers and leader.
        networks: peers are whole networks beside the student instead of branches on its trunk.
        temperature: T.
        variant: "code" is the released code, which mixes logits and adds 1e-7 to the targets. "paper" mixes softened
            probabilities, sum_b alpha_ab softmax(z_b / T), without a shift, as third-party notes print it
            (unverified).
        ramp: share of the run over which w grows to 1 (0: w = 1 at once); the code's 80 of 300 epochs.
        target_shift: added to every target probability before its logarithm; default: the variant's.
        kl_weight: multiplies w; 0 leaves cross-entropies alone.
        detach_leader_target: the leader's target is a constant, so that peers are not drawn towards the leader.
        reduction: D over the attention's width.
        cut: stage (or module) after which the network is replicated; default: before the last stage.
        tail: for networks that torch.fx cannot cut: a module of the student's own layers from the output of `cut` to
            the logits.

    Raises:
        AttarError: no peer, a cut for whole networks, an unknown stage, a cut that is not exact or that leaves no
            embedding behind it.

    Source: Chen, Mei, Wang, Feng, Chen, "Online Knowledge Distillation with Diverse Peers", AAAI 2020 (arXiv
    1912.00350), by its released code; the paper's own equations are known from third-party notes, one of which prints
    another attention, a negative squared distance over sqrt(D / 8). Differences from the code: progress may move by
    the step; in its DenseNet all branches share their weights by mistake, here none do.
    """

    not_dense = "it weighs its peers by the embeddings that classifiers read, and a dense network has none"

    def __init__(
        self,
        *,
        branches: int = 4,
        networks: bool = False,
        temperature: float = 3.0,
        variant: Literal["code", "paper"] = "code",
        ramp: float = 80 / 300,
        target_shift: float | None = None,
        kl_weight: float = 1.0,
        detach_leader_target: bool = False,
        reduction: int = 8,
        cut: str | None = None,
        tail: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if branches < 2:
            raise AttarError(f"OKDDip needs at least two branches, a peer and the leader, not {branches}.")
        if temperature <= 0:
            raise AttarError(f"OKDDip's temperature must be positive, not {temperature}.")
        if variant not in ("code", "paper"):
            raise AttarError(f"OKDDip's variant is 'code' or 'paper', not '{variant}'.")
        if not 0.0 <= ramp <= 1.0:
            raise AttarError(f"OKDDip's ramp is a share of the run between 0 and 1, not {ramp}.")
        if reduction < 1:
            raise AttarError(f"OKDDip's reduction is at least 1, not {reduction}.")
        if networks and (cut is not None or tail is not None):
            raise AttarError("OKDDip's whole networks are not cut: leave out cut= and tail=, or networks=.")
        self.temperature = temperature
        self.mixture: Literal["logits", "probabilities"] = "logits" if variant == "code" else "probabilities"
        self.ramp = ramp
        self.target_shift = target_shift if target_shift is not None else (1e-7 if variant == "code" else 0.0)
        self.kl_weight = kl_weight
        self.detach_leader_target = detach_leader_target
        self.reduction = reduction
        self.cut = cut
        self.peers: nn.ModuleList | Peers = Peers(branches - 1, "OKDDip") if networks else nn.ModuleList()
        self._count = branches - 1
        # Wrapped, so that the student's own layers do not become children of the method.
        self._given_tail = (tail,)
        self._split: tuple[Split, ...] = ()

    def build(self, probe: Probe) -> None:
        """Make the peers and the two maps of the attention."""
        anatomy = probe.anatomy
        if isinstance(self.peers, Peers):
            self.peers.build(probe, taps=embedding_taps)
        else:
            halves, _, peers = make_branches(
                probe.student,
                anatomy,
                probe.images,
                self._count,
                cut=self.cut,
                tail=self._given_tail[0],
                method="OKDDip",
            )
            self._split = (halves,)
            self.peers.extend(peers)
        width = max(1, anatomy.embedding_dim // self.reduction)
        self.query = nn.Linear(anatomy.embedding_dim, width, bias=False)
        self.key = nn.Linear(anatomy.embedding_dim, width, bias=False)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """What the branches share; nothing for whole networks."""
        return [tap for halves in self._split for tap in halves.carried if tap is not None]

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `ce_peers`, `kl_peers` and `kl_leader`."""
        embeddings, logits = self._answers(outputs)
        z = torch.stack([full_precision(answer) for answer in logits], dim=1)  # [N, m - 1, K]
        targets = self.targets(torch.stack(embeddings, dim=1), z)
        pairs = zip(z.unbind(dim=1), targets.unbind(dim=1), strict=True)
        level_1 = [self._imitation(answer, target) for answer, target in pairs]
        mean = z.mean(dim=1)
        mean = mean.detach() if self.detach_leader_target else mean
        target = torch.log_softmax(mean / self.temperature, dim=1)
        return {
            "ce_peers": torch.stack([outputs.task_loss(answer, batch.targets) for answer in logits]).sum(),
            "kl_peers": torch.stack(level_1).sum(),
            "kl_leader": self._imitation(outputs.logits, target),
        }

    def _imitation(self, logits: Tensor, target_log_probs: Tensor) -> Tensor:
        """The targets learn too: nothing else trains the attention."""
        return kl_divergence(
            logits,
            temperature=self.temperature,
            target_log_probs=target_log_probs,
            shift=self.target_shift,
            constant_target=False,
        )

    def targets(self, embeddings: Tensor, logits: Tensor) -> Tensor:
        """Return the log-probabilities that peers are to learn: [N, P, D] and [N, P, K] of P peers -> [N, P, K]."""
        attention = peer_attention(self.query(embeddings), self.key(embeddings))
        return peer_targets(logits, attention, self.temperature, self.mixture)

    def _answers(self, outputs: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        """Embeddings and logits of the peers."""
        if isinstance(self.peers, Peers):
            answers = self.peers.outputs(outputs.images)
            return [answer.embedding for answer in answers], [answer.logits for answer in answers]
        carried = [outputs.images if tap is None else outputs[tap] for tap in self._split[0].carried]
        branches = [peer(*carried) for peer in self.peers]
        return [branch.embedding for branch in branches], [branch.logits for branch in branches]

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Both levels ramp up; the cross-entropies are never weighted."""
        weight = self.kl_weight * sigmoid_ramp(progress, self.ramp)
        return {"kl_peers": weight, "kl_leader": weight}

    def deployables(self, student: nn.Module) -> dict[str, nn.Module]:
        """Every peer, and the mean of all logits, the leader's among them."""
        if isinstance(self.peers, Peers):
            return self.peers.deployables(student, "logits")
        halves = self._split[0]
        tails = [peer.plain() for peer in self.peers if isinstance(peer, Branch)]
        peers = {f"peer{number}": BranchNetwork(halves.trunk, tail) for number, tail in enumerate(tails, 1)}
        return {**peers, "ensemble": BranchEnsemble(halves.trunk, [halves.tail, *tails])}
