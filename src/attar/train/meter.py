"""What the terms were, summed on the device, so that no training step waits for the host to read a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attar.errors import AttarError
from attar.method import Terms
from attar.train.distributed import Ranks

__all__ = ["Meter", "advice"]

_NEVER = 2**62


class Meter:
    """Means of every term since the last line of the log and since the epoch began, and the first step that went wrong.

    Reading (`window`, `epoch`, `check`) synchronises with the device and takes part in communication: all processes
    call it at the same steps.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.names: tuple[str, ...] = ()
        self._sums = torch.zeros(0)  # [2, T]: since the last line, since the epoch began
        self._bad = torch.zeros(0)  # [T]: first step with a value that is not finite
        self._counts = [0, 0]
        self._weights: dict[str, float | Tensor] = {}

    def add(self, terms: Terms, step: int) -> None:
        """Take in the terms of one step (0-based)."""
        values = torch.stack([loss.detach().float() for loss in terms.losses.values()])
        if self.names != tuple(terms.losses):
            # At the first step, and where a phase begins or ends.
            self._start(tuple(terms.losses))
        self._sums += values
        self._bad = torch.where(values.isfinite(), self._bad, self._bad.clamp(max=step))
        self._counts = [count + 1 for count in self._counts]
        self._weights = terms.weights

    def _start(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._sums = torch.zeros(2, len(names), dtype=torch.float64, device=self.ranks.device)
        self._bad = torch.full((len(names),), _NEVER, dtype=torch.int64, device=self.ranks.device)
        self._counts = [0, 0]

    def window(self) -> dict[str, float]:
        """Return the mean of every term since the last call, over all processes, and begin anew."""
        return self._take(0)

    def epoch(self) -> dict[str, float]:
        """Return the mean of every term since the epoch began, over all processes, and begin anew."""
        return self._take(1)

    def _take(self, row: int) -> dict[str, float]:
        means = self.ranks.mean(self._sums[row] / max(self._counts[row], 1)).tolist()
        self._sums[row] = 0
        self._counts[row] = 0
        return dict(zip(self.names, means, strict=True))

    def weights(self) -> dict[str, float]:
        """Return what multiplied every term in the last step."""
        return {name: float(weight) for name, weight in self._weights.items()}

    def check(self, last_good: int | None) -> None:
        """Refuse to go on once any term was not finite.

        Args:
            last_good: the step of the last checkpoint, if there is one.

        Raises:
            AttarError: naming the first such term and its step.
        """
        if not self.names:
            return
        first = self.ranks.minimum(self._bad).tolist()
        step = min(first)
        if step != _NEVER:
            wrong = " and ".join(name for name, bad in zip(self.names, first, strict=True) if bad == step)
            raise AttarError(f"Term {wrong} became NaN or infinite at step {step}: {advice(last_good)}")

    def state_dict(self) -> dict[str, Any]:
        """Return everything that must survive an interruption."""
        return {"names": list(self.names), "sums": self._sums, "counts": list(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if state["names"]:
            self._start(tuple(state["names"]))
            self._sums.copy_(state["sums"])
            self._counts = list(state["counts"])


def advice(last_good: int | None) -> str:
    """Say what to do about a run that diverged."""
    kept = f"the checkpoint of step {last_good} is kept" if last_good is not None else "no checkpoint was written yet"
    return f"{kept}; train anew with a lower lr, a longer warmup, clip_grad or precision fp32."
