"""Many processes: who this one is, and the few things they must agree on (`torchrun` starts them)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attar.errors import AttarError

__all__ = ["Ranks", "join"]

T = TypeVar("T")

# Decoding a large data set for the first time is done by one process while the others wait.
_PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; with `world` 1 every method is free and nothing is communicated.

    Attributes:
        rank: number of this process; 0 is the only one that writes.
        world: how many there are.
        device: where this process computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def on_first(self, work: Callable[[], T]) -> T:
        """Let the first process work and give its (picklable) result to all; its error is raised by all."""
        if self.world == 1:
            return work()
        answer: list[tuple[T | None, str | None]] = [(None, None)]
        failure: BaseException | None = None
        if self.first:
            try:
                answer = [(work(), None)]
            except Exception as error:  # whatever it is: the others must not wait for an answer that never comes
                failure, answer = error, [(None, str(error))]
        dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        if failure is not None:
            raise failure
        result, message = answer[0]
        if message is not None:
            raise AttarError(message)
        return cast(T, result)

    def first_then_others(self, work: Callable[[], T]) -> T:
        """Let the first process do what leaves files (a cache), then all others, who find them."""
        if self.world == 1:
            return work()
        mine: list[T] = []

        def attempt() -> None:
            mine.append(work())

        self.on_first(attempt)
        return mine[0] if mine else work()

    def gather(self, value: T) -> list[T]:
        """Return every process's (picklable) value, in the order of ranks."""
        if self.world == 1:
            return [value]
        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value)
        return cast(list[T], values)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Return for every flag whether it is raised in any process."""
        if self.world == 1:
            return list(flags)
        raised = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over processes, element by element."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over processes."""
        return self.sum(values) / self.world

    def minimum(self, values: Tensor) -> Tensor:
        """Return the smallest over processes, element by element."""
        return self._reduced(values, dist.ReduceOp.MIN)

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values, op=operation)
        return values

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give the first process's values to all, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def wrap(self, module: nn.Module, *, phased: bool = False, apart: bool = False) -> nn.Module:
        """Let gradients be averaged over processes; the first one's weights and batch statistics hold for all.

        Buffers are broadcast before every forward (the default of DDP): running statistics are those of process 0.

        Args:
            module: what a step calls.
            phased: whether parts of the run train parts of the network only. Then, and only then, every step looks for
                the parameters that take no part in it, which costs a walk over the graph.
            apart: every process trains for itself, and nothing is averaged.
        """
        if self.world == 1 or apart:
            return module
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=device_ids, find_unused_parameters=phased)


@contextmanager
def join() -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, or be alone; leave the group again at the end.

    A group that the caller has set up already is used and left as it is.

    Raises:
        AttarError: more processes on this machine than it has GPUs.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(int(os.environ.get("LOCAL_RANK", "0")), world)
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        return
    if world == 1:
        yield Ranks(0, 1, device)
        return
    # gloo beside NCCL carries what lives on the CPU: flags and messages, which must not wait for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(rank, world, device)
    except RuntimeError as error:
        if "Connection closed by peer" in str(error) or "Connection reset" in str(error):
            raise AttarError("Another process of this run has failed: its own message says why.") from error
        raise
    finally:
        dist.destroy_process_group()


def _device(local_rank: int, world: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise AttarError(
            f"Process {local_rank} of this machine has no GPU, since there are {torch.cuda.device_count()}: "
            "start at most as many processes as GPUs."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
