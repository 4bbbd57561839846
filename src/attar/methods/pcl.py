"""PCL, peer collaborative learning: an ensemble of concatenated features and averaged peers teach branches."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from attar.anatomy import Anatomy, Split, Tap
from attar.anatomy.branches import Branch, BranchNetwork, embedding_taps, make_branches, same_tensors
from attar.errors import AttarError
from attar.functional import kl_divergence, sigmoid_ramp
from attar.method import Batch, Method, Outputs, Probe
from attar.peers import PeerBatch, one_view_each

__all__ = ["PCL", "FeatureEnsemble"]


class PCL(Method):
    """PCL, peer collaborative learning: branches learn from their joint classifier and from each other's averages.

    Idea: everything behind a cut is replicated into m branches (the first is the student itself), and each sees an
    augmented view of its own. Two teachers arise. The ensemble teacher is a classifier on the concatenated embeddings
    of all branches, trained with labels. The mean teachers are the branches of a second network that is the moving
    average of the whole first one; each teaches all branches but its own.

    Definition, for branches j = 1..m with view x_j, embedding f_j and logits z_j, z_e = W_e cat(f_1..f_m) + b_e,
    averaged network's logits zbar_j on x_j, temperature T and ramp w:
        L = CE(z_e, y) + sum_j CE(z_j, y) + w T^2 sum_j KL(stopgrad softmax(z_e / T) || softmax(z_j / T))
            + w T^2 sum_j 1/(m-1) sum_{k != j} KL(softmax(zbar_k / T) || softmax(z_j / T))
    Terms: `task` is CE(z_1, y), `ce_branches` the other CE of branches summed, `ce_ensemble` CE(z_e, y), which trains
    all branches too, `kl_ensemble` and `kl_mean` the two sums of KL, T^2 included. w = exp(-5 (1 - min(p, r) / r)^2)
    at progress p, r the ramp's share of the run. After optimiser step g = 0, 1, ..:
        thetabar <- d thetabar + (1 - d) theta,    d = min(1 - 1 / (g + 1), mean_decay)

    Shapes: embeddings [N, D], logits [N, K]; W_e [K, m D]. Unit: nats. Data: m views of every image, labels, any
    sampler. The student itself sees the first view alone, and so do methods beside this one.

    Cost: m passes of the trunk, m tails, and the same once more forward for the averages (ResNet-32, m = 3: 4 times
    the multiply-adds of plain training), and a second copy of the weights, which is saved with checkpoints.
    Deployed: nothing; or a branch, an average, or everything with the joint classifier (PCL-E).

    When it helps: small networks trained from scratch for many epochs. The ensemble teacher is reported to give most
    of the gain; one view for all branches loses 0.7 points (third-party notes).

    Args:
        branches: m, the student's own included.
        temperature: T.
        ramp: share of the run over which w grows to 1 (0: w = 1 at once); 80 of 300 epochs, from memory.
        ensemble_weight: of `kl_ensemble`, beside w.
        mean_weight: of `kl_mean`, beside w.
        mean_decay: the largest d.
        own_views: every branch sees its own view; off: all see the same (an ablation), and the trunk runs once.
        cut: stage (or module) after which the network is replicated; default: before the last stage.
        tail: for networks that torch.fx cannot cut: a module of the student's own layers from the output of `cut` to
            the logits.

    Raises:
        AttarError: fewer than one branch, an unknown stage, a cut that is not exact or that leaves no embedding
            behind it, or another method that gives views away.

    Source: Wu and Gong, "Peer Collaborative Learning for Online Knowledge Distillation", AAAI 2021 (arXiv 2006.04147).
    No official code is known and the paper could not be read for this: definition by third-party notes, constants by
    the re-implementation of shaoeric. Unverified: whether a mean teacher sees its own view, as here, or the view of
    the branch that it teaches, and how its batch norm works. Here, as in the re-implementation, the averaged network is
    in training mode while it teaches: it normalises by the batch and keeps running statistics of its own, with
    which it is deployed. Differences from the re-implementation: its ramp, which is 1 in the second epoch, next to 0
    until the 80th and then 1, is not copied; all classifiers are drawn afresh. The averages are brought up to date
    when the next step begins, so after the last one they lag by it.
    """

    not_dense = "every branch sees a view of its own, and the pixels of the views do not correspond"

    def __init__(
        self,
        *,
        branches: int = 3,
        temperature: float = 3.0,
        ramp: float = 80 / 300,
        ensemble_weight: float = 1.0,
        mean_weight: float = 1.0,
        mean_decay: float = 0.999,
        own_views: bool = True,
        cut: str | None = None,
        tail: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if branches < 1:
            raise AttarError(f"PCL needs at least one branch, not {branches}.")
        if temperature <= 0:
            raise AttarError(f"PCL's temperature must be positive, not {temperature}.")
        if not 0.0 <= ramp <= 1.0:
            raise AttarError(f"PCL's ramp is a share of the run between 0 and 1, not {ramp}.")
        if not 0.0 <= mean_decay < 1.0:
            raise AttarError(f"PCL's mean_decay is at least 0 and below 1, not {mean_decay}.")
        self.temperature = temperature
        self.ramp = ramp
        self.ensemble_weight = ensemble_weight
        self.mean_weight = mean_weight
        self.mean_decay = mean_decay
        self.cut = cut
        self.views = branches if own_views else 1
        if self.views > 1:
            # It gives all views but the first away, and cannot share them with a method that does so too.
            self.needs = self.breaks = frozenset({"views"})
        self._count = branches - 1
        # Wrapped, so that the student's own layers do not become children of the method.
        self._given_tail = (tail,)
        self._split: tuple[Split, ...] = ()
        self._unowned: tuple[nn.Module, ...] = ()
        # Modules of the trained network with their twins in the averaged one, and every tensor that is averaged.
        self._pairs: tuple[tuple[nn.Module, nn.Module], ...] = ()
        self._averaged: tuple[tuple[nn.Module, nn.Module, str], ...] = ()

    def build(self, probe: Probe) -> None:
        """Cut the student, make the other branches, the joint classifier and the averaged network."""
        anatomy = probe.anatomy
        halves, self._tap, branches = make_branches(
            probe.student,
            anatomy,
            probe.images,
            self._count,
            cut=self.cut,
            tail=self._given_tail[0],
            method="PCL",
        )
        self._split = (halves,)
        # The trunk shares the student's layers; what cutting added to it belongs to no network whose mode is set.
        students = set(probe.student.modules())
        self._unowned = tuple(part for part in halves.trunk.modules() if part not in students)
        self.branches = nn.ModuleList(branches)
        self.classifier = nn.Linear((1 + self._count) * anatomy.embedding_dim, probe.task.num_classes)
        self.mean = nn.ModuleList(copy.deepcopy([halves.trunk, halves.tail, *(branch.plain() for branch in branches)]))
        live = nn.ModuleList([halves.trunk, halves.tail, *(branch.tail for branch in branches)])
        self._pairs = tuple((live.get_submodule(path), part) for path, part in self.mean.named_modules())
        self._averaged = tuple(_buffers_for_parameters(self._pairs))
        # Training steps begun, which decide how much of the weights goes into the averages.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, also of what cutting added to the student's trunk."""
        super().train(mode)
        for part in self._unowned:
            part.training = mode
        return self

    def prepare(self, batch: Batch) -> Batch:
        """Give the first view to the student and the others to the other branches."""
        return one_view_each(batch, self._count) if self.views > 1 else batch

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The student's embedding and what it shares with the branches."""
        return [*embedding_taps(anatomy), *(tap for tap in self._split[0].carried if tap is not None)]

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `ce_branches`, `ce_ensemble`, `kl_ensemble` and `kl_mean`; first bring the averages up to date."""
        if self.training:
            self._average()
        views = [outputs.images, *(batch.peer_images if isinstance(batch, PeerBatch) else ())]
        answers = [(outputs.embedding, outputs.logits), *self._branches(outputs, views)]
        embeddings, logits = zip(*answers, strict=True)
        ensemble = self.classifier(torch.cat(embeddings, dim=1))
        means = self._means(views)
        ce_ensemble = outputs.task_loss(ensemble, batch.targets)
        ce = [outputs.task_loss(z, batch.targets) for z in logits[1:]]
        kl_mean = [
            kl_divergence(z, mean, self.temperature) / self._count
            for j, z in enumerate(logits)
            for k, mean in enumerate(means)
            if k != j
        ]
        return {
            "ce_branches": torch.stack(ce).sum() if ce else ce_ensemble.new_zeros(()),
            "ce_ensemble": ce_ensemble,
            "kl_ensemble": torch.stack([kl_divergence(z, ensemble, self.temperature) for z in logits]).sum(),
            "kl_mean": torch.stack(kl_mean).sum() if kl_mean else ce_ensemble.new_zeros(()),
        }

    def _branches(self, outputs: Outputs, views: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Embedding and logits of every branch but the student's own, on its own view or on what the student saw."""
        halves = self._split[0]
        if self.views > 1:
            carried = [halves.trunk(view) for view in views[1:]]
        else:
            shared = tuple(outputs.images if tap is None else outputs[tap] for tap in halves.carried)
            carried = [shared] * self._count
        return [branch(*values) for branch, values in zip(self.branches, carried, strict=True)]

    @torch.no_grad()
    def _means(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Logits of every averaged branch, on its own view or on the one that all see."""
        trunk, *tails = self.mean
        carried = [trunk(view) for view in views]
        if self.views == 1:
            carried *= len(tails)
        return [tail(*values) for tail, values in zip(tails, carried, strict=True)]

    @torch.no_grad()
    def _average(self) -> None:
        """Take the weights that the last optimiser step left into the average; before the first they are copied."""
        dtype = self.classifier.weight.dtype
        share = (1.0 / self.steps.clamp(min=1).to(dtype)).clamp(min=1.0 - self.mean_decay)
        for live, mean, name in self._averaged:
            average = getattr(mean, name)
            average.lerp_(getattr(live, name), share.to(average.dtype))
        self.steps += 1

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Both distillation weights ramp up; the cross-entropies are never weighted."""
        ramp = sigmoid_ramp(progress, self.ramp)
        return {"kl_ensemble": self.ensemble_weight * ramp, "kl_mean": self.mean_weight * ramp}

    def deployables(self, student: nn.Module) -> dict[str, nn.Module]:
        """The other branches, every branch's average, and PCL-E: all branches with the joint classifier."""
        halves = self._split[0]
        branches = [branch for branch in self.branches if isinstance(branch, Branch)]
        networks = [BranchNetwork(halves.trunk, tail) for tail in (halves.tail, *(b.plain() for b in branches))]
        peers: dict[str, nn.Module] = {f"peer{number}": network for number, network in enumerate(networks[1:], 1)}
        means = {name: self._mean_of(network) for name, network in zip(("student", *peers), networks, strict=True)}
        # The student's tail in modules of its own, so that no hook that reads it stays on the student.
        own = Branch(same_tensors(halves.tail), self._tap)
        return {
            **peers,
            **{f"mean_{name}": mean for name, mean in means.items()},
            "ensemble": FeatureEnsemble(halves.trunk, [own, *branches], self.classifier),
        }

    def _mean_of(self, network: nn.Module) -> nn.Module:
        """The same network of the averaged tensors, which are parameters in it."""
        twins: dict[int, Any] = {}
        for live, mean, name in self._averaged:
            twins[id(getattr(live, name))] = nn.Parameter(getattr(mean, name), requires_grad=False)
        for one, other in self._pairs:
            twins.update({id(b): other._buffers[name] for name, b in one._buffers.items() if b is not None})
        return copy.deepcopy(network, twins)


def _buffers_for_parameters(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> Iterator[tuple[nn.Module, nn.Module, str]]:
    """Turn the second modules' parameters into buffers: saved and moved with the method, never trained."""
    for one, other in pairs:
        for name, parameter in list(other._parameters.items()):
            if parameter is not None:
                del other._parameters[name]
                other.register_buffer(name, parameter.detach().clone())
                yield one, other, name


class FeatureEnsemble(nn.Module):
    """PCL-E: trunk, all branches and the classifier on their embeddings, images [N, C, H, W] -> logits [N, K]."""

    def __init__(self, trunk: nn.Module, branches: Sequence[Branch], classifier: nn.Linear) -> None:
        super().__init__()
        self.trunk, self.branches, self.classifier = trunk, nn.ModuleList(branches), classifier

    def forward(self, images: Tensor) -> Tensor:
        """Return what the joint classifier makes of all branches' embeddings."""
        carried = self.trunk(images)
        logits: Tensor = self.classifier(torch.cat([branch(*carried).embedding for branch in self.branches], dim=1))
        return logits
