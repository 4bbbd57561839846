"""Branches: replicas of a network's tail that also tell the embedding their classifier reads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attar.anatomy.split import Split, replica, split
from attar.anatomy.stages import Anatomy
from attar.anatomy.taps import Recorder, Tap
from attar.errors import AttarError
from attar.functional import average_pool

__all__ = [
    "Branch",
    "BranchEnsemble",
    "BranchNetwork",
    "BranchOutput",
    "Spread",
    "embedding_taps",
    "make_branches",
    "same_tensors",
]


class BranchOutput(NamedTuple):
    """What a branch makes of the values at the cut: embedding [N, D] and logits [N, K]."""

    embedding: Tensor
    logits: Tensor


class Branch(nn.Module):
    """A tail that also tells the embedding that its classifier reads.

    Args:
        tail: the values at the cut -> logits.
        tap: where the embedding is read in it; a map is averaged over its positions.
    """

    def __init__(self, tail: nn.Module, tap: Tap) -> None:
        super().__init__()
        self.tail = tail
        self._tap = tap
        self._inside = replace(tap, module=f"tail.{tap.module}")
        # A map may be overwritten behind the tap; what a linear layer reads never is.
        cloned = [self._inside] if tap.side == "output" else []
        self._recorder = Recorder(Spread(tail), [self._inside], cloned)

    def forward(self, *carried: Tensor) -> BranchOutput:
        """Return embedding and logits."""
        logits, values = self._recorder.run(carried)  # type: ignore[arg-type]
        read: Tensor = values[self._inside]
        return BranchOutput(read if read.ndim == 2 else average_pool(read), logits)

    def plain(self) -> nn.Module:
        """Return the tail without the hook that reads it: the same tensors in modules of their own."""
        copied = same_tensors(self.tail)
        self._recorder.remove_from_copy(copied)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Branch:
        tail = copy.deepcopy(self.tail, memo)
        self._recorder.remove_from_copy(tail)
        copied = Branch(tail, self._tap)
        copied.training = self.training
        memo[id(self)] = copied
        return copied


def same_tensors(network: nn.Module) -> nn.Module:
    """Return the same tensors in modules of their own: a hook on either is not on the other."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)


class Spread(nn.Module):
    """A tail that takes the values at the cut as one argument, as a `Recorder` gives it."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.tail = tail

    def forward(self, carried: Sequence[Tensor]) -> Any:
        """Return what the tail returns."""
        return self.tail(*carried)


class BranchNetwork(nn.Module):
    """The trunk with one branch, a network of its own: images [N, C, H, W] -> logits [N, K]."""

    def __init__(self, trunk: nn.Module, tail: nn.Module) -> None:
        super().__init__()
        self.trunk, self.tail = trunk, tail

    def forward(self, images: Tensor) -> Tensor:
        """Return the branch's logits."""
        logits: Tensor = self.tail(*self.trunk(images))
        return logits


class BranchEnsemble(nn.Module):
    """The trunk with all branches: images [N, C, H, W] -> the mean of their logits [N, K]."""

    def __init__(self, trunk: nn.Module, tails: Sequence[nn.Module]) -> None:
        super().__init__()
        self.trunk, self.tails = trunk, nn.ModuleList(tails)

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean logits."""
        carried = self.trunk(images)
        return torch.stack([tail(*carried) for tail in self.tails]).mean(dim=0)


def make_branches(
    student: nn.Module,
    anatomy: Anatomy,
    images: Tensor,
    count: int,
    *,
    cut: str | None = None,
    tail: nn.Module | None = None,
    method: str,
) -> tuple[Split, Tap, list[Branch]]:
    """Cut a student: its halves, where its tail's embedding is read, and freshly drawn replicas of the tail.

    Args:
        student: the network.
        anatomy: its own.
        images: an example batch for the proof of the cut.
        count: how many replicas.
        cut: stage or module after whose output it is cut; None: before the last stage.
        tail: as for `split`.
        method: who asks, for the sentences.

    Raises:
        AttarError: an unknown stage, a cut that is not exact, or one with no embedding behind it.
    """
    if cut is None:
        if len(anatomy.stages) < 2:
            raise AttarError(
                f"{method} finds only one stage, so it cannot cut before the last: name a module with cut=."
            )
        cut = anatomy.stages[-2].name
    halves = split(student, anatomy.find(cut).name, images, tail)
    tap = _embedding_tap(student, anatomy, halves, method)
    return halves, tap, [Branch(replica(halves.tail), tap).train(student.training) for _ in range(count)]


def embedding_taps(anatomy: Anatomy) -> list[Tap]:
    """Return what must be recorded for the student's embedding: where it is read, or all stages where there is none."""
    return [stage.tap for stage in anatomy.stages] if anatomy.embedding is None else [anatomy.embedding]


def _embedding_tap(student: nn.Module, anatomy: Anatomy, halves: Split, method: str) -> Tap:
    """Where the student's embedding is read, by the tail's own names."""
    source = anatomy.embedding if anatomy.embedding is not None else anatomy.stages[-1].tap
    module = student.get_submodule(source.module)
    for path, part in halves.tail.named_modules():
        if part is module:
            return replace(source, module=path)
    raise AttarError(
        f"{method} needs the embedding of every branch, but '{source.module}' does not lie behind '{halves.cut}': "
        "cut at an earlier stage."
    )
