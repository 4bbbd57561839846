"""ONE, On-the-fly Native Ensemble: the student's last stage replicated, its gated ensemble the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from attar.anatomy import Anatomy, Split, Stage, Tap, replica, split, to_nchw
from attar.anatomy.branches import BranchNetwork
from attar.errors import AttarError
from attar.functional import average_pool, full_precision, gated_logits, kl_divergence, sigmoid_ramp
from attar.method import Batch, Method, Outputs, Probe

__all__ = ["ONE", "Gate", "NativeEnsemble"]


class Gate(nn.Module):
    """One weight per sample and branch from the shared features.

    Definition: `g = softmax(relu(bn(W mean_hw(h) + b)))`, so that no branch is ever switched off: a branch at 0 while
    the others sit at u keeps 1 / (1 + (B-1) e^u), and g is uniform where all are at 0.

    Shapes: h [N, C, H, W] -> g [N, B], rows sum to one.

    A training batch of one sample has no batch statistics; it is normalised by the running ones.
    """

    def __init__(self, channels: int, branches: int, batch_norm: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, branches)
        self.norm = nn.BatchNorm1d(branches) if batch_norm else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Return g [N, B] for shared features [N, C, H, W]."""
        scores = self.linear(average_pool(features))
        if isinstance(self.norm, nn.BatchNorm1d) and self.training and scores.shape[0] == 1:
            norm = self.norm
            scores = nn.functional.batch_norm(
                scores, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
            )
        else:
            scores = self.norm(scores)
        return torch.softmax(torch.relu(full_precision(scores)), dim=1)


class ONE(Method):
    """ONE, On-the-fly Native Ensemble: branches share the trunk and learn from their own gated ensemble.

    Idea: everything behind a cut is replicated into B branches with fresh weights (branch 0 is the student itself). A
    gate mixes the branch logits into a teacher, whose softened prediction is distilled into every branch while all
    train together, in one stage. At deployment branch 0 remains, the plain student; or keep everything (ONE-E).

    Definition, with branch logits z_i, z_e = sum_i g_i z_i, temperature T and ramp w:
        L = sum_i CE(z_i, y) + CE(z_e, y) + w T^2 sum_i KL(stopgrad softmax(z_e / T) || softmax(z_i / T))
    Terms: `task` is CE(z_0, y), `ce_branches` the other CE summed, `ce_ensemble` CE(z_e, y), `kl` the T^2-scaled sum.
    Sums, not means: the trunk's gradient grows with B, as in the released code. The KL never reaches the gate.
    w = exp(-5 (1 - min(p, r) / r)^2) at progress p, with r the ramp's share of the run.

    Shapes: taps at the cut, logits [N, K]. Unit: nats. Data: one view, labels, any sampler.

    Dense tasks: logits [N, K, H, W], CE and KL averaged over valid pixels, and still one gate value per sample and
    branch. Decoder and head are replicated: by default the cut lies behind the encoder. A student's auxiliary answers
    stay its own; no branch has them.

    Cost: one extra tail per auxiliary branch (ResNet-32: 1.65 times the multiply-adds for B = 3), no extra pass.
    Deployed: nothing.

    When it helps: small networks trained from scratch for many epochs; the gain saturates at three branches. Little
    when the part behind the cut is tiny, since the branches then hardly differ.

    Args:
        branches: B, the student's own included.
        temperature: T.
        cut: stage (or module) after which the network is replicated; default: before the last stage, in dense tasks
            behind it.
        variant: "code" is the released code: ramp over 80 of 300 epochs, 1e-7 added to the targets. "paper" is the
            printed objective: no ramp, no shift.
        ramp: share of the run over which w grows to 1 (0: w = 1 at once); default: the variant's.
        target_shift: added to every target probability before its logarithm; default: the variant's.
        kl_weight: multiplies w; 0 leaves a multi-branch network trained with cross-entropy alone.
        gate: "learned", or "mean" for the plain average of the branches (the paper's ablation).
        gate_norm: batch norm in the gate, as published; without it the loss is a mean over samples and does not
            depend on how a batch is spread over processes.
        tail: for networks that torch.fx cannot cut: a module of the student's own layers from the output of `cut` to
            the logits.

    Raises:
        AttarError: fewer than one branch, an unknown stage, or a cut that is not exact.

    Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018 (arXiv 1806.04606).
    Differences: the gate pools globally instead of over a fixed 16 x 16 map; progress moves by the step instead of
    by the epoch (the same values at every epoch's start); the student and any cut are free.
    """

    not_dense = ""

    def __init__(
        self,
        *,
        branches: int = 3,
        temperature: float = 3.0,
        cut: str | None = None,
        variant: Literal["code", "paper"] = "code",
        ramp: float | None = None,
        target_shift: float | None = None,
        kl_weight: float = 1.0,
        gate: Literal["learned", "mean"] = "learned",
        gate_norm: bool = True,
        tail: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if branches < 1:
            raise AttarError(f"ONE needs at least one branch, not {branches}.")
        if temperature <= 0:
            raise AttarError(f"ONE's temperature must be positive, not {temperature}.")
        if variant not in ("code", "paper"):
            raise AttarError(f"ONE's variant is 'code' or 'paper', not '{variant}'.")
        if gate not in ("learned", "mean"):
            raise AttarError(f"ONE's gate is 'learned' or 'mean', not '{gate}'.")
        self.branches = branches
        self.temperature = temperature
        self.cut = cut
        self.ramp = ramp if ramp is not None else (80 / 300 if variant == "code" else 0.0)
        self.target_shift = target_shift if target_shift is not None else (1e-7 if variant == "code" else 0.0)
        if not 0.0 <= self.ramp <= 1.0:
            raise AttarError(f"ONE's ramp is a share of the run between 0 and 1, not {self.ramp}.")
        self.kl_weight = kl_weight
        self.gate_kind = gate
        self.gate_norm = gate_norm
        # Wrapped, so that the student's own layers do not become children of the method.
        self._given_tail = (tail,)
        self._split: tuple[Split, ...] = ()
        self._stage: Stage | None = None

    def build(self, probe: Probe) -> None:
        """Cut the student and make the auxiliary branches and the gate."""
        anatomy = probe.anatomy
        if self.cut is not None:
            stage = anatomy.find(self.cut)
        elif probe.task.dense:
            stage = anatomy.stages[-1]
        else:
            if len(anatomy.stages) < 2:
                raise AttarError("ONE finds only one stage, so it cannot cut before the last: name a module with cut=.")
            stage = anatomy.stages[-2]
        halves = split(probe.student, stage.name, probe.images, self._given_tail[0], answer=probe.task.logits)
        self._split, self._stage = (halves,), stage
        self.tails = nn.ModuleList(replica(halves.tail) for _ in range(self.branches - 1))
        self.gate = Gate(stage.channels, self.branches, self.gate_norm) if self.gate_kind == "learned" else None

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The shared features at the cut: as the branches take them, and as the map that the gate pools."""
        assert self._stage is not None
        return [self._stage.tap, *(tap for tap in self._split[0].carried if tap is not None)]

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `ce_branches`, `ce_ensemble` and `kl`."""
        assert self._stage is not None
        carried = [outputs.images if tap is None else outputs[tap] for tap in self._split[0].carried]
        logits = [outputs.logits, *(tail(*carried) for tail in self.tails)]
        ensemble = self.ensemble(logits, outputs[self._stage.tap])
        ce = [outputs.task_loss(z, batch.targets) for z in logits[1:]]
        kl = [kl_divergence(z, ensemble, self.temperature, shift=self.target_shift, valid=batch.valid) for z in logits]
        return {
            "ce_branches": torch.stack(ce).sum() if ce else ensemble.new_zeros(()),
            "ce_ensemble": outputs.task_loss(ensemble, batch.targets),
            "kl": torch.stack(kl).sum(),
        }

    def ensemble(self, logits: Sequence[Tensor], features: Tensor) -> Tensor:
        """Return the teacher's logits z_e, shaped as those of the branches, from them and the map [N, C, H, W]."""
        return _ensemble(logits, features, self.gate)

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """The distillation weight ramps up; the cross-entropies are never weighted."""
        return {"kl": self.kl_weight * sigmoid_ramp(progress, self.ramp)}

    def deployables(self, student: nn.Module) -> dict[str, nn.Module]:
        """Every other branch, and ONE-E: the whole ensemble, where accuracy matters more than size."""
        assert self._stage is not None
        branches = {f"branch{k}": BranchNetwork(self._split[0].trunk, tail) for k, tail in enumerate(self.tails, 1)}
        return {**branches, "ensemble": NativeEnsemble(self._split[0], self.tails, self.gate, self._stage)}


def _ensemble(logits: Sequence[Tensor], features: Tensor, gate: nn.Module | None) -> Tensor:
    if gate is None:
        return torch.stack([full_precision(z) for z in logits]).mean(dim=0)
    return gated_logits(logits, gate(features))


class NativeEnsemble(nn.Module):
    """ONE-E: trunk, every branch and the gate as one network, images [N, C, H, W] -> logits [N, K] or [N, K, H, W]."""

    def __init__(self, halves: Split, tails: nn.ModuleList, gate: nn.Module | None, stage: Stage) -> None:
        super().__init__()
        self.trunk = halves.trunk
        self.tails = nn.ModuleList([halves.tail, *tails])
        self.gate = gate
        self._carried, self._stage = halves.carried, stage

    def forward(self, images: Tensor) -> Tensor:
        """Return the gated mixture of all branches' logits."""
        carried = self.trunk(images)
        position = next(i for i, tap in enumerate(self._carried) if tap and tap.module == self._stage.name)
        logits = [tail(*carried) for tail in self.tails]
        return _ensemble(logits, to_nchw(carried[position], self._stage.tap), self.gate)
