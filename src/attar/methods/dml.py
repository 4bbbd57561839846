"""DML, deep mutual learning: untrained networks train together and imitate each other's predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from attar.anatomy import Anatomy, Tap
from attar.errors import AttarError
from attar.functional import MutualTarget, mutual_divergences
from attar.method import Batch, Method, Outputs, Probe
from attar.peers import Peers

__all__ = ["DML"]


class DML(Method):
    """DML, deep mutual learning: untrained networks train together and imitate each other's predictions.

    Idea: student and peers start from different draws and see the same images. Besides the label each one learns from
    what the others currently predict, which tells it how alike the classes are. There is no teacher, and no network
    needs to be larger than another.

    Definition, with networks 1 (the student) to M, logits z_k and p_k = softmax(z_k / T):
        L_k = CE(z_k, y) + w T^2 (1/(M-1)) sum_{l != k} KL(stopgrad p_l || p_k),    total = sum_k L_k
    Since targets are constants, network k receives the gradient of L_k alone.
    Terms: `task` is CE(z_1, y) and `kl` the student's divergence; `ce_peers` and `kl_peers` are the peers' summed.

    Shapes: logits [N, K]; in dense tasks [N, K, H, W], CE and KL are averaged over the valid pixels of the batch, and
    peers learn their auxiliary answers too (in `ce_peers`). Unit: nats. Data: one view, labels, any sampler.

    Cost: M whole networks in memory, forward and backward; two of a kind cost twice the student. The KL is free.
    Deployed: nothing; every peer can be kept instead ("peer1"), or the mean of all probabilities ("ensemble").

    When it helps: networks of similar strength, small ones most; more peers help further. A much weaker peer can cost
    the stronger one accuracy (reported: ResNet-50 with ResNet-18 on ImageNet, 76.8 to 75.8): see KDCL.

    Args:
        peers: how many further networks of the student's kind, or untrained networks (on the command line the names of
            their models); 0 is plain training.
        temperature: T; the paper has none.
        weight: w.
        target: "each" compares with every other network in turn. "probabilities" compares with the mean of the others'
            probabilities, the paper's DML_e, which it reports to be worse. "logits" compares with the softmax of the
            mean of their logits, as OKDDip's re-implementation does.
        reduction: of "each" over the others: "mean", or "sum" as the official code, which is the same for two networks.
        target_shift: added to every target probability before its logarithm; OKDDip's re-implementation has 1e-7.
        constant_targets: False lets a divergence move the network that its target comes from too, as OKDDip's
            re-implementation does.

    Raises:
        AttarError: a negative number of peers, a peer that is not a network for these images and classes, or a value
            out of range.

    Source: Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning", CVPR 2018 (arXiv 1706.00384); the paper's text was not
    at hand, so that temperature 1, the mean over peers and the order of updates are from memory and public notes.
    Differences: all networks are updated at once, from one forward, as common re-implementations do. Algorithm 1, as
    remembered, updates them in turn and predicts anew in between, which one forward and one optimiser step cannot do;
    the official code does too, with another batch for every network. Its 1e-8 inside the logarithm's ratio is not
    needed here and left out.
    """

    not_dense = ""

    def __init__(
        self,
        *,
        peers: int | nn.Module | Sequence[nn.Module] = 1,
        temperature: float = 1.0,
        weight: float = 1.0,
        target: MutualTarget = "each",
        reduction: Literal["mean", "sum"] = "mean",
        target_shift: float = 0.0,
        constant_targets: bool = True,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise AttarError(f"DML's temperature must be positive, not {temperature}.")
        if target not in ("each", "probabilities", "logits"):
            raise AttarError(f"DML's target is 'each', 'probabilities' or 'logits', not '{target}'.")
        if reduction not in ("mean", "sum"):
            raise AttarError(f"DML's reduction is 'mean' or 'sum', not '{reduction}'.")
        if weight < 0 or target_shift < 0:
            raise AttarError(f"DML's weight and target_shift must not be negative, not {weight} and {target_shift}.")
        self.peers = Peers(peers, "DML")
        self.temperature = temperature
        self.weight = weight
        self.target: MutualTarget = target
        self.reduction: Literal["mean", "sum"] = reduction
        self.target_shift = target_shift
        self.constant_targets = constant_targets

    def build(self, probe: Probe) -> None:
        """Draw the peers."""
        self.peers.build(probe)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """None: the networks exchange predictions."""
        return []

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `kl`, and `ce_peers` and `kl_peers` where there are peers."""
        peers = self.peers.answers(outputs.images)
        own, *others = mutual_divergences(
            [outputs.logits, *(answer.logits for answer in peers)],
            self.temperature,
            target=self.target,
            reduction=self.reduction,
            shift=self.target_shift,
            constant=self.constant_targets,
            valid=batch.valid,
        )
        if not peers:
            return {"kl": own}
        ce = [self.peers.supervised(answer, batch.targets) for answer in peers]
        return {"kl": own, "ce_peers": torch.stack(ce).sum(), "kl_peers": torch.stack(others).sum()}

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        return {"kl": self.weight, "kl_peers": self.weight} if len(self.peers) else {"kl": self.weight}

    def deployables(self, student: nn.Module) -> dict[str, nn.Module]:
        """Every peer, and the mean of all networks' probabilities."""
        return self.peers.deployables(student)
