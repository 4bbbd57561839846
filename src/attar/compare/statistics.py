"""Statistics of a comparison: few seeds, paired, corrected for many methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean

import numpy as np

from attar.errors import AttarError

__all__ = ["ALPHA", "POWER", "Contrast", "Summary", "contrast", "contrasts", "detectable", "holm", "summary", "verdict"]

# A difference is called a finding when its corrected p lies below the first; `detectable` speaks of the second.
ALPHA, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Summary:
    """One figure over n seeds.

    Attributes:
        values: one per seed.
        mean: of the values.
        low: lower end of the 95 % interval of the mean by Student's t; the mean itself for one value.
        high: upper end.
    """

    values: tuple[float, ...]
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Contrast:
    """What one entry gains over another, paired over n seeds.

    Attributes:
        differences: one per common seed.
        mean: of the differences.
        low: lower end of the 95 % interval of the mean (not corrected for the number of methods).
        high: upper end.
        p: of the two-sided paired t-test.
        p_corrected: p after Holm's correction over the entries that are compared with the same baseline.
        detectable: the true difference that this many seeds, with this spread and this correction, would have found
            four times out of five.
    """

    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    p: float
    p_corrected: float
    detectable: float


def summary(values: Sequence[float]) -> Summary:
    """Return the mean of n >= 1 values with its 95 % interval, `mean -+ t_{0.975, n-1} s / sqrt(n)`."""
    kept = tuple(map(float, values))
    if min(kept) == max(kept):  # one value, or equal ones, whose mean would round
        return Summary(kept, kept[0], kept[0], kept[0])
    mean, half = fmean(kept), _quantile(len(kept) - 1, ALPHA) * float(np.std(kept, ddof=1)) / math.sqrt(len(kept))
    return Summary(kept, mean, mean - half, mean + half)


def contrast(
    values: Sequence[float], baseline: Sequence[float], *, resolution: float = 0.0, family: int = 1
) -> Contrast:
    """Compare two entries seed by seed: two-sided paired t-test and the interval that belongs to it.

    Definition: with differences d, `t = mean(d) / (s / sqrt(n))`, `p = P(|T_{n-1}| > |t|)`,
    `s = max(sd(d), resolution / sqrt(6))`.

    Why s has a floor: accuracies are counts, so that a few differences can be equal by chance alone, and a t-test that
    sees no spread is certain of anything. Each count stands for a share known to +-half an image, an error of variance
    `resolution^2 / 12`; the difference of two has twice that. Less spread than this the test set cannot tell. What of
    that holds for a mean IoU, which counts pixels, `attar.compare.primary.resolution` says.

    Without spread and resolution the test has no answer; p is then 1 for no difference and 0 for any.

    Args:
        values: one number per seed, n >= 2.
        baseline: the same seeds under the other entry.
        resolution: the granularity of the values, 1 / (number of test images) for an accuracy; see above.
        family: number of contrasts with this baseline that are corrected together; `detectable` refers to the first
            step of Holm's correction, ALPHA / family. `p_corrected` stays p: `contrasts` corrects.

    Raises:
        AttarError: fewer than two seeds, or sequences of different lengths.
    """
    if len(values) != len(baseline) or len(values) < 2:
        raise AttarError(
            f"A paired test needs the same two or more seeds on both sides, not {len(values)} and {len(baseline)}."
        )
    # What differs by rounding alone does not differ.
    differences = tuple(round(float(value) - float(base), 12) for value, base in zip(values, baseline, strict=True))
    n, mean = len(differences), round(fmean(differences), 12)
    spread = max(float(np.std(differences, ddof=1)) if len(set(differences)) > 1 else 0.0, resolution / math.sqrt(6.0))
    error = spread / math.sqrt(n)
    if error > 0.0:
        from scipy.special import stdtr

        p = min(1.0, 2.0 * float(stdtr(n - 1, -abs(mean) / error)))
    else:
        p = 1.0 if mean == 0.0 else 0.0
    half = _quantile(n - 1, ALPHA) * error
    found = detectable(spread, n, alpha=ALPHA / family)
    return Contrast(differences, mean, mean - half, mean + half, p, p, found)


def contrasts(
    entries: Mapping[str, Mapping[int, float]], baseline: Mapping[int, float], resolution: float
) -> dict[str, Contrast]:
    """Compare several entries with one baseline over the seeds they share with it, corrected together by Holm.

    Args:
        entries: value by seed, by entry; those with fewer than two seeds in common with the baseline are left out.
        baseline: value by seed.
        resolution: as in `contrast`.
    """
    common = {label: sorted(values.keys() & baseline.keys()) for label, values in entries.items()}
    testable = [label for label, seeds in common.items() if len(seeds) >= 2]
    found = [
        contrast(
            [entries[label][seed] for seed in common[label]],
            [baseline[seed] for seed in common[label]],
            resolution=resolution,
            family=len(testable),
        )
        for label in testable
    ]
    corrected = holm([one.p for one in found])
    return {label: replace(one, p_corrected=p) for label, one, p in zip(testable, found, corrected, strict=True)}


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down procedure, in the order given.

    Definition: of m sorted p-values the i-th becomes `max_{j <= i} min(1, (m - j + 1) p_j)`. Calling those below alpha
    findings is wrong about any of them with probability at most alpha, however the tests depend on each other.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics, 1979.
    """
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def detectable(sd: float, n: int, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """Return the smallest true paired difference that a two-sided t-test finds with this power.

    Definition: `delta sd / sqrt(n)` with delta from `P(|T| > t_{1 - alpha/2, n-1}) = power`, T noncentral t with n - 1
    degrees of freedom and noncentrality delta.

    Args:
        sd: true standard deviation of the differences.
        n: number of pairs, at least 2.
        alpha: level of the test.
        power: probability of finding it, above alpha.
    """
    return _noncentrality(n - 1, alpha, power) * sd / math.sqrt(n)


@cache
def _quantile(freedom: int, alpha: float) -> float:
    """Return t_{1 - alpha/2} with so many degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1.0 - alpha / 2.0))


@cache
def _noncentrality(freedom: int, alpha: float, power: float) -> float:
    from scipy.optimize import brentq
    from scipy.stats import nct

    bound = _quantile(freedom, alpha)

    def excess(delta: float) -> float:
        # scipy answers NaN where the wrong tail is below 1e-10.
        wrong = float(nct.cdf(-bound, freedom, delta))
        return float(nct.sf(bound, freedom, delta)) + (0.0 if math.isnan(wrong) else wrong) - power

    high = bound
    while excess(high) < 0.0:
        high *= 2.0
    return float(brentq(excess, 0.0, high, xtol=1e-10))


def verdict(
    label: str,
    plain: Contrast | None,
    smoothing: Contrast | None,
    *,
    rival: str = "tuned label smoothing",
    metric: str = "top-1",
) -> str:
    """Say in words whether a method helps; it claims no more than the corrected tests.

    Args:
        label: of the method.
        plain: the test metric against plain training, in shares; None when fewer than two seeds are common.
        smoothing: likewise against label smoothing.
        rival: what label smoothing is called.
        metric: what the metric is called.
    """
    if plain is None:
        first = (
            f"Nothing can be said about {label} yet: it and plain training need at least two finished seeds in common."
        )
    else:
        first = _against_plain(label, plain, metric)
    return f"{first} {_against_rival(rival, smoothing)}"


def _against_plain(label: str, found: Contrast, metric: str) -> str:
    gain = f"{_points(found.mean)} points of test {metric} over plain training"
    if found.p_corrected < ALPHA:
        return f"{label} {'helps' if found.mean > 0 else 'hurts'}: {gain} ({_evidence(found)}, {_seeds(found)})."
    return f"No evidence that {label} helps at {_seeds(found)}: {gain} ({_evidence(found)}); {_unseen(found)}."


def _against_rival(rival: str, found: Contrast | None) -> str:
    if found is None:
        return f"Nothing can be said against {rival}: two finished seeds in common are needed."
    gain = f"Against {rival}: {_points(found.mean)} points ({_evidence(found)})"
    if found.p_corrected < ALPHA:
        return f"{gain}, {'better' if found.mean > 0 else 'worse'}."
    return f"{gain}, no evidence of a difference; {_unseen(found)}."


def _points(share: float) -> str:
    return f"{100 * share + 0.0:+.2f}"


def _evidence(found: Contrast) -> str:
    p = f"p = {found.p_corrected:.2g}" if found.p_corrected >= 1e-4 else "p < 0.0001"
    return f"95 % interval {_points(found.low)} to {_points(found.high)}, {p} after Holm's correction"


def _seeds(found: Contrast) -> str:
    return f"{len(found.differences)} seeds"


def _unseen(found: Contrast) -> str:
    if found.detectable >= 1.0:
        return "so few seeds that scatter so much could have shown no difference at all"
    power = f"with {POWER:.0%} power".replace("%", " %")
    return f"a difference below {100 * found.detectable:.2f} points could not have been seen {power}"
