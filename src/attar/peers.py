"""Peers: whole networks that train beside the student, each a student of the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from attar.anatomy import Anatomy, Recorder, Tap, overwritten, replica, survey
from attar.errors import AttarError
from attar.functional import ensemble_log_probs, full_precision
from attar.method import Batch, Outputs, Probe
from attar.tasks import Task

__all__ = ["Answer", "Ensemble", "PeerBatch", "Peers", "one_view_each"]

Mixture = Literal["probabilities", "logits"]


class Answer(NamedTuple):
    """What a peer returns: logits [N, K] or [N, K, H, W], and auxiliary ones by name (see `Task.auxiliary`)."""

    logits: Tensor
    auxiliary: Mapping[str, Tensor]


class Peers(nn.Module):
    """The networks that a method trains beside the student, in the student's own forward.

    Set as an attribute of the method they are its children: trained with the student, saved with it, gone after
    `strip`. Replicas of the student are drawn afresh when they are built, so that no two networks begin alike: equal
    networks that see the same images stay equal and have nothing to teach.

    Args:
        peers: how many further networks of the student's kind; or one untrained network or several, of any kind.
        method: who asks, for the sentences.

    Raises:
        AttarError: a negative number, or something that is no network.

    Example:
        >>> import torch, attar
        >>> class Mean(attar.Method):
        ...     def __init__(self, peers: int | Sequence[nn.Module] = 1) -> None:
        ...         super().__init__()
        ...         self.peers = Peers(peers, "Mean")
        ...     def build(self, probe):
        ...         self.peers.build(probe)
        ...     def losses(self, outputs, batch, progress):
        ...         logits = self.peers(outputs.images)
        ...         return {"ce_peers": torch.stack([outputs.task_loss(z, batch.targets) for z in logits]).sum()}
        ...     def deployables(self, student):
        ...         return self.peers.deployables(student)
    """

    def __init__(self, peers: int | nn.Module | Sequence[nn.Module], method: str) -> None:
        super().__init__()
        self._method = method
        self._replicas = peers if isinstance(peers, int) else 0
        if self._replicas < 0:
            raise AttarError(f"{method} cannot have {peers} peers: give how many networks train beside the student.")
        given: list[nn.Module] = []
        if not isinstance(peers, int):
            one = isinstance(peers, nn.Module) and not isinstance(peers, nn.ModuleList)
            given = [peers] if one else list(peers)  # type: ignore[list-item, arg-type]
        for network in given:
            if not isinstance(network, nn.Module):
                raise AttarError(f"{method}'s peers are networks or their number, not {network!r}.")
        self.networks = nn.ModuleList(given)
        self._recorders: list[Recorder] = []
        self._anatomies: list[Anatomy] = []
        self._made_out_of_place: list[list[str]] = []
        self._task: Task | None = None

    def __len__(self) -> int:
        """How many they are, known before `build`."""
        return max(self._replicas, len(self.networks))

    def build(self, probe: Probe, *, taps: Callable[[Anatomy], Sequence[Tap]] | None = None) -> None:
        """Make the replicas of the student, or check the networks that were given.

        Args:
            probe: what the method's own `build` was given.
            taps: what `outputs` records of every peer, from its anatomy (a method's own `taps`, mostly). None: the
                peers are asked for logits only and may be networks in which no stage can be found.

        Raises:
            AttarError: a given network that is the student, is given twice, begins exactly as another one, refuses the
                images or does not return [N, num_classes].
        """
        if self._task is not None:
            return  # built again because the student has shrunk, which is nothing to networks of their own
        given = len(self.networks)
        self.networks.extend(replica(probe.student) for _ in range(self._replicas))
        self.to(device=probe.images.device, dtype=probe.images.dtype)
        modes = {module: module.training for module in self.modules()}
        self.eval()
        for number, network in enumerate(self.networks[:given], 1):
            self._check(network, number, probe)
        self._task = probe.task
        if taps is not None:
            for network in self.networks:
                anatomy = probe.anatomy
                if given:
                    dense = probe.task.dense
                    anatomy = survey(network, probe.images, None, probe.task.num_classes, dense=dense)[0]
                self._anatomies.append(anatomy)
                self._record(network, taps(anatomy), probe.images)
        for module, mode in modes.items():
            module.training = mode

    def _check(self, network: nn.Module, number: int, probe: Probe) -> None:
        name = f"{self._method}'s peer {number} ({type(network).__name__})"
        for other in (probe.student, *self.networks[: number - 1]):
            whose = "the student's" if other is probe.student else "another peer's"
            if {id(p) for p in network.parameters()} & {id(p) for p in other.parameters()}:
                raise AttarError(f"{name} has {whose} own weights as its own: give every peer a network of its own.")
            if _begin_alike(network, other):
                raise AttarError(
                    f"{name} begins with a copy of {whose} weights, so they would never differ: draw them afresh."
                )
        try:
            with torch.no_grad():
                output = network(probe.images)
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise AttarError(
                f"{name} refuses images of shape {list(probe.images.shape[1:])} ({reason}): "
                "give a network for the student's images."
            ) from error
        probe.check_logits(output, f"peer {number}")

    def _record(self, network: nn.Module, taps: Sequence[Tap], images: Tensor) -> None:
        touched, writers = overwritten(network, taps, images)
        for path in writers:
            network.get_submodule(path).inplace = False  # type: ignore[assignment]
        if writers:
            touched, _ = overwritten(network, taps, images)
        self._made_out_of_place.append(writers)
        self._recorders.append(Recorder(network, taps, touched))

    def forward(self, images: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Return the logits [N, K] of every peer, for images that all of them see or one batch of images each."""
        return [self._logits(network(x)) for network, x in zip(self.networks, self._each(images), strict=True)]

    def answers(self, images: Tensor | Sequence[Tensor]) -> list[Answer]:
        """Return the logits and auxiliary logits of every peer; the latter are to be trained (see `supervised`)."""
        assert self._task is not None
        whole = [network(x) for network, x in zip(self.networks, self._each(images), strict=True)]
        name = f"peer of {self._method}"
        return [Answer(self._task.logits(output, name), self._task.auxiliary(output)) for output in whole]

    def supervised(self, answer: Answer, targets: Tensor) -> Tensor:
        """Return a peer's own supervised loss, with the auxiliary answers' at the weight that the student's have."""
        assert self._task is not None
        loss = self._task.loss(answer.logits, targets)
        for logits in answer.auxiliary.values():
            loss = loss + self._task.auxiliary_weight * self._task.loss(logits, targets)
        return loss

    def outputs(self, images: Tensor | Sequence[Tensor]) -> list[Outputs]:
        """Return logits and taps of every peer, from one pass each; needs `build(probe, taps=...)`."""
        if len(self._recorders) != len(self.networks):
            raise TypeError("Say beforehand what is read of the peers: Peers.build(probe, taps=...).")
        return [self._pass(number, x) for number, x in enumerate(self._each(images))]

    def _pass(self, number: int, images: Tensor) -> Outputs:
        logits, values = self._recorders[number].run(images)
        assert self._task is not None
        anatomy = self._anatomies[number]
        return Outputs(images, self._logits(logits), values, anatomy, self._task.loss, partial(self._pass, number))

    def _each(self, images: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        return [images] * len(self.networks) if isinstance(images, Tensor) else images

    def _logits(self, output: object) -> Tensor:
        assert self._task is not None
        name = f"peer of {self._method}"
        if self._task.auxiliary(output):  # some networks return them in training only; nothing here would train them
            raise AttarError(f"The {name} has auxiliary outputs: switch them off.")
        return self._task.logits(output, name)

    def deployables(self, student: nn.Module, mixture: Mixture = "probabilities") -> dict[str, nn.Module]:
        """Return every peer ("peer1", ...) and the mean of student and peers ("ensemble"); nothing without peers."""
        plain = [self._plain(number) for number in range(len(self.networks))]
        if not plain:
            return {}
        named: dict[str, nn.Module] = {f"peer{number}": network for number, network in enumerate(plain, 1)}
        answer = self._task.logits if self._task is not None and self._task.dense else None
        return {**named, "ensemble": Ensemble([student, *plain], mixture, answer)}

    def _plain(self, number: int) -> nn.Module:
        """The peer without the hooks that read it: the same tensors in modules of their own."""
        network = self.networks[number]
        if not self._recorders:
            return network
        shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        copied = copy.deepcopy(network, shared)
        self._recorders[number].remove_from_copy(copied)
        for path in self._made_out_of_place[number]:
            copied.get_submodule(path).inplace = True  # type: ignore[assignment]
        return copied


def _begin_alike(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    if ours.keys() != theirs.keys():
        return False
    return all(p.shape == theirs[key].shape and bool((p == theirs[key]).all()) for key, p in ours.items())


class Ensemble(nn.Module):
    """Networks whose mean is the answer, images [N, C, H, W] -> logits [N, K] or [N, K, H, W].

    Definition: `log (1/M) sum_m softmax(z_m)`, or `(1/M) sum_m z_m` for the mixture "logits".

    Args:
        networks: the M networks.
        mixture: what is averaged.
        answer: finds the logits among what a network returns; None: it returns them alone.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        mixture: Mixture = "probabilities",
        answer: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.mixture = mixture
        self._answer = answer

    def forward(self, images: Tensor) -> Tensor:
        """Return the mixture's logits (log-probabilities where probabilities are averaged)."""
        logits = [network(images) for network in self.networks]
        if self._answer is not None:
            logits = [self._answer(output) for output in logits]
        if self.mixture == "probabilities":
            return ensemble_log_probs(logits)
        return torch.stack([full_precision(z) for z in logits]).mean(dim=0)


@dataclass(frozen=True)
class PeerBatch(Batch):
    """A batch of which the student sees the first view alone; the others are for its peers.

    Args:
        peer_images: one [N, C, H, W] for every peer, further views of the same samples.
    """

    peer_images: tuple[Tensor, ...] = ()


def one_view_each(batch: Batch, peers: int) -> PeerBatch:
    """Give the student the first view of every image and each peer one of the next; for a method's `prepare`."""
    first = _first_view(batch)
    partners = _first_view(batch.partners) if batch.partners is not None else None
    others = batch.images.chunk(batch.views)[1 : 1 + peers]
    own = {part.name: getattr(first, part.name) for part in fields(first)}
    return PeerBatch(**{**own, "partners": partners, "peer_images": tuple(others)})


def _first_view(batch: Batch) -> Batch:
    def first(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[: len(batch.images) // batch.views]

    images, targets = (tensor[: len(batch.images) // batch.views] for tensor in (batch.images, batch.targets))
    index, labels, valid = first(batch.index), first(batch.labels), first(batch.valid)
    return replace(batch, images=images, targets=targets, index=index, labels=labels, views=1, valid=valid)
