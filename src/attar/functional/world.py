"""Batches that several processes share, seen whole by every one of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gathered", "rank_and_world"]


def rank_and_world() -> tuple[int, int]:
    """Return the number of this process and how many share the batch: (0, 1) alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(tensor: Tensor) -> Tensor:
    """Return the tensors of all processes, concatenated in the order of ranks; gradients flow back to each.

    Definition: [N, ...] on each of R ranks -> [R N, ...] on every rank. With a loss L of the gathered batch on every
    rank, the backward pass gives each rank R dL/dx of its own part, and the mean over ranks that
    `DistributedDataParallel` takes makes that dL/dx: the gradient of one process on the whole batch.

    Alone, or outside `torch.distributed`, it is the tensor itself. All ranks must hold equally many samples.
    """
    _, world = rank_and_world()
    if world == 1:
        return tensor
    if not tensor.requires_grad:
        parts = [torch.empty_like(tensor) for _ in range(world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(tensor.contiguous()))  # type: ignore[no-untyped-call]
