"""Codistillation: replicas of one network learn from each other's older copies."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attar.anatomy import Anatomy, Tap
from attar.errors import AttarError
from attar.functional import Psi, codistillation_loss, ensemble_log_probs, rank_and_world
from attar.method import Batch, Method, Outputs, Probe
from attar.peers import Peers

__all__ = ["Codistillation"]


class Codistillation(Method):
    """Codistillation: replicas of one network learn from each other's older copies.

    Idea: where more machines no longer speed up one training, groups of them train a replica each. Once the replicas
    know something, each also learns what the others predict on average. Predictions change slowly, so copies of the
    others' weights that are many steps old will do, and little has to be sent.

    Definition, with replicas 1 (the student) to n, logits z_k, and z'_k from the copies of the last exchange:
        L_i = CE(z_i, y) + w psi((1/(n-1)) sum_{k != i} softmax(z'_k), softmax(z_i)),    total = sum_i L_i
    where psi is a divergence from the constant first argument to the second, and w is 0 until the burn-in is over. From
    then on copies are renewed every `interval` steps, with the weights from before the step; they are in evaluation
    mode and have the replicas' batch statistics.
    Terms: `task` is CE(z_1, y) and `kl` the student's divergence; `ce_peers` and `kl_peers` are the others' summed.

    Shapes: logits [N, K]. Unit: nats. Data: one view, labels, any sampler.

    Cost: in one process n networks forward and backward, and after the burn-in a forward of n copies more. Over
    processes each trains one network, as without the method, with a forward of the n - 1 others' copies; every
    `interval` steps all weights travel once, and no gradient ever does. Deployed: nothing; in one process every
    replica can be kept ("peer1"), or the mean of all probabilities ("ensemble").

    When it helps: many idle processors (reported for very large batches), or predictions that should not change from
    one training to the next: see `attar.functional.prediction_churn`. Replicas on the same images gain less
    (reported); in one process all see the same batch.

    Args:
        replicas: n, the student included; 1 is plain training. "ranks": every process of the run (`torchrun`) trains a
            replica of its own, from other first weights, on its own part of every batch, so that each sees batches of
            `batch` / n. The student that is kept is that of the first process.
        interval: steps between two exchanges.
        burn_in: share of the run without divergence.
        weight: w.
        mode: "original" learns from the copies; "synchronous" from the answers of the same step, without copies, for
            replicas of one process.
        psi: "kl", "cross_entropy" (the same gradient) or "reverse_kl" (of the prediction from the target, the default
            of third-party code).

    Raises:
        AttarError: a value out of range, or "ranks" in a single process.

    Source: Anil, Pereyra, Passos, Ormandi, Dahl, Hinton, "Large scale distributed neural network training through
    online distillation", ICLR 2018 (arXiv 1804.03235). There is no official code and the paper's text was not at hand:
    that psi is the cross-entropy with the mean distribution at temperature 1 and that exchanges were about 50 steps
    apart is from memory. Burn-in and interval follow the third-party pfnet-research/sc20-online-codistillation, which
    exchanges weights without batch statistics and keeps the copies in training mode; here they have both right.
    """

    not_dense = "its replicas exchange one answer per image (DML, which is near to it, serves dense tasks)"

    def __init__(
        self,
        *,
        replicas: int | Literal["ranks"] = 2,
        interval: int = 50,
        burn_in: float = 0.4,
        weight: float = 1.0,
        mode: Literal["original", "synchronous"] = "original",
        psi: Psi = "kl",
    ) -> None:
        super().__init__()
        if replicas != "ranks" and (not isinstance(replicas, int) or replicas < 1):
            raise AttarError(f"Codistillation's replicas are a number from 1 on, or 'ranks', not {replicas!r}.")
        if interval < 1:
            raise AttarError(f"Codistillation's interval is a number of steps from 1 on, not {interval}.")
        if not 0.0 <= burn_in < 1.0:
            raise AttarError(f"Codistillation's burn_in is a share of the run from 0 to below 1, not {burn_in}.")
        if weight < 0:
            raise AttarError(f"Codistillation's weight must not be negative, not {weight}.")
        if mode not in ("original", "synchronous"):
            raise AttarError(f"Codistillation's mode is 'original' or 'synchronous', not '{mode}'.")
        if psi not in ("kl", "cross_entropy", "reverse_kl"):
            raise AttarError(f"Codistillation's psi is 'kl', 'cross_entropy' or 'reverse_kl', not '{psi}'.")
        if replicas == "ranks" and mode == "synchronous":
            raise AttarError(
                "Codistillation's synchronous mode needs replicas that see the same batch, and those of 'ranks' do "
                "not: give a number of replicas or leave the mode."
            )
        self.replicas = replicas
        self.own_replica = replicas == "ranks"
        self.interval = interval
        self.burn_in = burn_in
        self.weight = weight
        self.mode: Literal["original", "synchronous"] = mode
        self.psi: Psi = psi
        # Steps since the burn-in: a tensor where the device must know them, a number where the host sends weights.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._steps = 0
        self._resting = False
        self._live: tuple[nn.Module, ...] = ()

    def build(self, probe: Probe) -> None:
        """Draw the other replicas and make room for copies."""
        rank, world = rank_and_world()
        if self.replicas == "ranks":
            if world == 1:
                raise AttarError(
                    "Codistillation's replicas 'ranks' are one per process and this is the only one: start several "
                    "with torchrun, or give a number of replicas."
                )
            self.peers = Peers(0, "Codistillation")
            self.copies = _Copies([probe.student] * (world - 1))
        else:
            self.peers = Peers(self.replicas - 1, "Codistillation")
            self.peers.build(probe)
            networks = [probe.student, *self.peers.networks] if self.mode == "original" and len(self.peers) else []
            self.copies = _Copies(networks)
        self._rank = rank
        # The weights that are copied or sent: a tuple, since the student is no child of its method.
        self._live = (probe.student, *self.peers.networks)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """None: replicas exchange predictions."""
        return ()

    def epoch_start(self, epoch: int, epochs: int) -> None:
        """Ask no copies in epochs that end before the burn-in does."""
        self._resting = (epoch + 1) / epochs <= self.burn_in

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `kl`, and `ce_peers` and `kl_peers` of the other replicas in this process."""
        logits = [outputs.logits, *self.peers(outputs.images)]
        teaching = self._teaching(logits, outputs.images, progress)
        own, *others = [
            codistillation_loss(z, ensemble_log_probs(teachers), self.psi) if teachers else 0.0 * z.float().sum()
            for z, teachers in zip(logits, teaching, strict=True)
        ]
        if not others:
            return {"kl": own}
        ce = [outputs.task_loss(z, batch.targets) for z in logits[1:]]
        return {"kl": own, "ce_peers": torch.stack(ce).sum(), "kl_peers": torch.stack(others).sum()}

    @torch.no_grad()
    def _teaching(self, logits: list[Tensor], images: Tensor, progress: Tensor) -> list[list[Tensor]]:
        """The logits that each replica of this process is to learn from."""
        if self._resting:
            return [[] for _ in logits]
        if self.mode == "synchronous":
            answers = [z.detach() for z in logits]
        elif self.replicas == "ranks":
            self._send()
            return [self.copies(images)]
        else:
            on = progress >= self.burn_in
            self.copies.renew(self._live, on & (self.steps % self.interval == 0))
            self.steps += on
            answers = self.copies(images)
        return [[z for k, z in enumerate(answers) if k != own] for own in range(len(logits))]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _send(self) -> None:
        """Give every process the weights of all others when it is time; all processes count alike."""
        if self._steps % self.interval == 0:
            others = list(self.copies.networks)
            for source in range(len(others) + 1):
                network = self._live[0] if source == self._rank else others[source - (source > self._rank)]
                for _, tensor in sorted(_tensors(network).items()):
                    dist.broadcast(tensor.detach(), src=source)
        self._steps += 1

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Nothing before the burn-in is over, constant after it."""
        weight = self.weight * (progress >= self.burn_in).to(progress.dtype)
        return {"kl": weight, "kl_peers": weight} if len(self.peers) else {"kl": weight}

    def deployables(self, student: nn.Module) -> dict[str, nn.Module]:
        """Every other replica of this process, and the mean of all probabilities."""
        return self.peers.deployables(student)

    def get_extra_state(self) -> dict[str, int]:
        """The host's count of steps belongs to a checkpoint."""
        return {"steps": self._steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Go on counting."""
        self._steps = state["steps"]


class _Copies(nn.Module):
    """Older copies of networks, all of buffers: saved with the method, never trained, always in evaluation mode."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(copy.deepcopy(network) for network in networks)
        for module in self.networks.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    del module._parameters[name]
                    module.register_buffer(name, parameter.detach())
        self.eval()

    def train(self, mode: bool = True) -> _Copies:
        """Stay in evaluation mode."""
        return super().train(False)

    def renew(self, live: Sequence[nn.Module], due: Tensor) -> None:
        """Take over weights and buffers where `due`, a scalar on the device, says so; the host need not know."""
        for old, new in zip(self.networks, live if len(self.networks) else (), strict=True):
            mine = _tensors(old)
            for name, tensor in _tensors(new).items():
                mine[name].copy_(torch.where(due, tensor.detach(), mine[name]))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the logits [N, K] of every copy."""
        return [network(images) for network in self.networks]


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    parameters = network.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(network.named_buffers(remove_duplicate=False))}
