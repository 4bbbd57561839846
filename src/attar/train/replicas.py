"""What every process has of its own: meters always, and with some methods a whole student (a replica)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from attar.anatomy.split import redraw_
from attar.data.hashing import hash_counters
from attar.distiller import Distiller
from attar.errors import AttarError
from attar.method import Method
from attar.spec import TrainSpec
from attar.train.distributed import Ranks

__all__ = ["draw_apart", "gathered", "of_first", "own_part", "own_replicas"]

_REPLICA = 5  # separates the first weights of the replicas of several processes from other draws of the same seed


def own_replicas(distiller: Distiller) -> bool:
    """Say whether a method wants a student of its own in every process."""
    return any(isinstance(method, Method) and method.own_replica for method in distiller.methods.values())


def draw_apart(distiller: Distiller, spec: TrainSpec, ranks: Ranks) -> None:
    """Let the students of the processes begin with different weights, unless they all are to begin with given ones.

    Raises:
        AttarError: students whose widths change.
    """
    if distiller.may_reshape:
        raise AttarError(
            "Every process trains a student of its own, which cannot change its widths: leave one of the methods out."
        )
    if ranks.rank > 0 and spec.weights is None:
        torch.manual_seed(int(hash_counters(spec.seed, _REPLICA, ranks.rank)[0]) >> 1)
        with torch.no_grad():
            redraw_(distiller.student)


@contextmanager
def of_first(network: nn.Module, ranks: Ranks, apart: bool) -> Iterator[None]:
    """Let all processes have the first one's batch statistics; where each has its own network, that for a while."""
    if not apart:
        ranks.share(network.buffers())
        yield
        return
    own = {name: value.clone() for name, value in network.state_dict().items()}
    ranks.share(network.state_dict().values())
    yield
    network.load_state_dict(own)


def gathered(own: dict[str, Any], ranks: Ranks) -> list[dict[str, Any]]:
    """Return what every process has, on the CPU."""
    buffer = io.BytesIO()
    torch.save(own, buffer)
    return [
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        for content in ranks.gather(buffer.getvalue())
    ]


def own_part(state: dict[str, Any], ranks: Ranks, apart: bool) -> dict[str, Any]:
    """Return the part of a checkpoint that belongs to this process.

    Raises:
        AttarError: students of more or fewer processes than there are.
    """
    replicas: list[dict[str, Any]] = state.get("replicas", [{}])
    if len(replicas) == ranks.world:
        return {**state, **replicas[ranks.rank]}
    if apart:
        raise AttarError(
            f"The run has a student in each of {len(replicas)} processes, and there are {ranks.world} now: "
            "start as many as before."
        )
    # As many steps, spread otherwise: the means of the epoch under way are the first process's.
    return state
