"""Draws: one of several things per training step, chosen on the host, alike on all ranks, also in compiled steps."""

from __future__ import annotations

import hashlib
import itertools
import weakref

import torch
from torch import Tensor

__all__ = ["Draws", "drawn"]

_LIVE: weakref.WeakValueDictionary[int, Draws] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def drawn(seed: int, step: int, count: int) -> int:
    """Return a number in 0..count-1, uniform over steps: a pure function, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count


class Draws:
    """Which of `count` networks runs in this training step.

    Definition: `current = drawn(seed, step, count)`, where step counts the calls of `advance`. Only the count is state;
    no random generator is touched, and processes that take as many steps draw alike.

    Which network runs must be known on the host, and a compiled step is one graph that the host does not look into.
    So `current` is an ordinary attribute: a compiler keeps one graph for each of its values (torch allows eight) and
    chooses among them as it does among shapes. The next value is set while the graph runs, by an operator that the
    compiler cannot look into. Nothing waits for the device. CUDA graphs (mode="reduce-overhead") would replay a step
    without its operator and draw no more.
    """

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.seed = count, seed
        self._number = next(_NUMBERS)
        _LIVE[self._number] = self
        self.go_to(0)

    def go_to(self, step: int) -> None:
        """Stand before the given step."""
        self.step = step
        self.current = drawn(self.seed, step, self.count)

    def advance(self, answer: Tensor) -> Tensor:
        """Return a copy of what the drawn network answered, and draw for the next step.

        The answer has no gradient, and the copy must be used: a compiler leaves out what nobody reads.
        """
        copied: Tensor = _advance(answer, self._number)
        return copied


@torch.library.custom_op("attar::advance", mutates_args=())
def _advance(answer: Tensor, number: int) -> Tensor:
    draws = _LIVE[number]
    draws.go_to(draws.step + 1)
    return answer.clone()


@_advance.register_fake
def _(answer: Tensor, number: int) -> Tensor:
    return torch.empty_like(answer)
