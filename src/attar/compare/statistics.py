"""Statistics of a comparison: few seeds, paired, corrected for many methods."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Contrast", "Summary"]


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
