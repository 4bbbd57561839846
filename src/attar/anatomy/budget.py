"""Which channels stay when a network must cost no more than it may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from attar.anatomy.groups import Resource, Structure
from attar.errors import AttarError

__all__ = ["Limit", "Widths", "refuse_impossible_limits", "within_budget"]


@dataclass(frozen=True)
class Limit:
    """An upper bound on the cost of some layers.

    Attributes:
        most: what they may cost, in the resource's unit.
        groups: numbers of the groups that may be narrowed for it.
        layers: paths of the layers that count; None: the whole network.
    """

    most: float
    groups: tuple[int, ...]
    layers: frozenset[str] | None = None


@dataclass(frozen=True)
class Widths:
    """How narrow groups may become, and in which steps.

    Attributes:
        least: channels that every group keeps; of a group with fewer than twice as many, half stay.
        divisor: groups are narrowed and widened to multiples of it (of `least`, if that is smaller).
    """

    least: int = 8
    divisor: int = 8

    def floor(self, channels: int) -> int:
        """Return how many of so many channels always stay."""
        return max(1, min(self.least, channels // 2))

    def below(self, count: int, channels: int) -> int:
        """Return the next width below one."""
        step = min(self.divisor, self.floor(channels))
        return max(self.floor(channels), (count - 1) // step * step)

    def above(self, count: int, channels: int) -> int:
        """Return the next width above one."""
        step = min(self.divisor, self.floor(channels))
        return min(channels, (count // step + 1) * step)


def within_budget(
    structure: Structure,
    scores: Sequence[Sequence[float]],
    limits: Sequence[Limit],
    resource: Resource,
    *,
    widths: Widths | None = None,
    threshold: float = 1e-2,
) -> list[list[int]]:
    """Return which channels of every group stay.

    Channels whose score exceeds `threshold` times the largest of their group stay at first, their number rounded up to
    the divisor. While a limit is exceeded, its group with the smallest score per marginal cost is narrowed by one step.
    Then what still fits is taken back: whole steps, the largest score per cost first, and at last single channels,
    which no longer care for the divisor, filling up one group after another. Every choice depends on the scores and
    on what is chosen already, so that a smaller budget never ends with a larger network.

    Args:
        structure: the network's.
        scores: for every group, how much each of its channels matters (|gamma|).
        limits: what may not be exceeded.
        resource: what is counted.
        widths: how narrow groups may become.
        threshold: relative to the group's largest score.

    Raises:
        AttarError: a limit that is exceeded even at the smallest widths.
    """
    widths = widths or Widths()
    refuse_impossible_limits(structure, limits, resource, widths)
    state = _State(structure, scores, limits, resource, widths, threshold)
    while (limit := state.exceeded()) is not None:
        # Where a limit's own groups are not enough, the others share in its layers.
        narrower = [group for group in limit.groups if state.narrows(group)]
        narrower = narrower or [group for group in range(len(state.left)) if state.narrows(group)]
        group = min(narrower, key=lambda group: state.worth(group, state.below(group), state.left[group]))
        state.set(group, state.below(group))
    state.fill(state.above)
    state.fill(lambda group: min(state.left[group] + 1, structure.groups[group].channels), one_after_another=True)
    return [state.best(group) for group in range(len(structure.groups))]


def refuse_impossible_limits(structure: Structure, limits: Sequence[Limit], resource: Resource, widths: Widths) -> None:
    """Raise an AttarError for a limit that is exceeded even at the smallest widths."""
    least = [widths.floor(group.channels) for group in structure.groups]
    for limit in limits:
        cost = structure.cost(least, resource, limit.layers)
        if cost > limit.most:
            whole = structure.cost([group.channels for group in structure.groups], resource, limit.layers)
            raise AttarError(
                f"A budget of {limit.most / whole:.2f} of the {resource} cannot be met, since {cost / whole:.2f} are "
                "left at the smallest widths: choose a larger budget or fewer min_channels."
            )


class _State:
    """Widths while they are chosen, with the marginal costs that belong to them."""

    def __init__(
        self,
        structure: Structure,
        scores: Sequence[Sequence[float]],
        limits: Sequence[Limit],
        resource: Resource,
        widths: Widths,
        threshold: float,
    ) -> None:
        self.structure, self.limits, self.resource, self.widths = structure, limits, resource, widths
        # By falling score; of equals the first.
        self.ranked = [sorted(range(len(known)), key=lambda channel: (-known[channel], channel)) for known in scores]
        self.sorted = [[known[channel] for channel in order] for known, order in zip(scores, self.ranked, strict=True)]
        self.left = [self._alive(known, threshold) for known in self.sorted]
        self._marginals: dict[int, int] = {}
        self._neighbours = self._shared()

    def _alive(self, scores: Sequence[float], threshold: float) -> int:
        channels, alive = len(scores), sum(score > threshold * scores[0] for score in scores)
        return self.widths.above(max(alive, self.widths.floor(channels)) - 1, channels)

    def _shared(self) -> list[set[int]]:
        shared: list[set[int]] = [{group} for group in range(len(self.left))]
        for layer in self.structure.layers:
            paid = {group for group, _ in layer.from_groups + layer.to_groups}
            for group in paid:
                shared[group] |= paid
        return shared

    def exceeded(self) -> Limit | None:
        """Return the first limit that the widths exceed."""
        for limit in self.limits:
            if self.structure.cost(self.left, self.resource, limit.layers) > limit.most:
                return limit
        return None

    def narrows(self, group: int) -> bool:
        return self.below(group) < self.left[group]

    def below(self, group: int) -> int:
        return self.widths.below(self.left[group], self.structure.groups[group].channels)

    def above(self, group: int) -> int:
        return self.widths.above(self.left[group], self.structure.groups[group].channels)

    def worth(self, group: int, low: int, high: int) -> float:
        """Return the mean score per marginal cost of the channels between two widths."""
        if group not in self._marginals:
            self._marginals[group] = self.structure.marginal(self.left, group, self.resource)
        # What costs nothing of this resource is worth keeping whatever its score.
        marginal = self._marginals[group]
        return fmean(self.sorted[group][low:high]) / marginal if marginal else float("inf")

    def set(self, group: int, count: int) -> None:
        self.left[group] = count
        for neighbour in self._neighbours[group]:
            self._marginals.pop(neighbour, None)

    def fill(self, above: Callable[[int], int], *, one_after_another: bool = False) -> None:
        """Widen what is worth most as long as no limit is exceeded."""
        growing = {group for group in range(len(self.left)) if above(group) > self.left[group]}
        while growing:
            group = max(sorted(growing), key=lambda group: self.worth(group, self.left[group], above(group)))
            while True:
                before = self.left[group]
                self.set(group, above(group))
                if self.exceeded() is not None:
                    self.set(group, before)
                    growing.discard(group)
                    break
                if above(group) == self.left[group]:
                    growing.discard(group)
                    break
                if not one_after_another:
                    break

    def best(self, group: int) -> list[int]:
        """Return the channels of a group that stay."""
        return sorted(self.ranked[group][: self.left[group]])
