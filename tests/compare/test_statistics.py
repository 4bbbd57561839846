"""The statistics against worked numbers, scipy's own tests, their properties, and worlds without any effect."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from attar.compare.statistics import Contrast, contrast, contrasts, detectable, holm, summary, verdict
from attar.errors import AttarError


def test_summary_is_students_interval() -> None:
    # n = 3, mean 2, s = 1, t_{0.975, 2} = 4.302653
    found = summary([1, 2, 3])
    assert found.values == (1.0, 2.0, 3.0)
    assert math.isclose(found.mean, 2.0)
    assert math.isclose(found.high - 2.0, 4.302653 / math.sqrt(3), rel_tol=1e-6)
    assert math.isclose(2.0 - found.low, 4.302653 / math.sqrt(3), rel_tol=1e-6)


@pytest.mark.parametrize("values", [[0.7], [0.1, 0.1, 0.1]])
def test_summary_without_spread_is_a_point(values: list[float]) -> None:
    found = summary(values)
    assert found.low == found.mean == found.high == values[0]


def test_contrast_uses_the_pairs() -> None:
    """Seeds that differ much from each other do not hide a steady gain."""
    found = contrast([0.52, 0.71, 0.93], [0.50, 0.70, 0.90])
    # differences 0.02, 0.01, 0.03: mean 0.02, s 0.01, t = 0.02 / (0.01 / sqrt 3) = 3.4641; p = 0.0742 for 2 degrees
    assert found.differences == (0.02, 0.01, 0.03)
    assert math.isclose(found.mean, 0.02)
    assert math.isclose(found.p, 0.0741799, rel_tol=1e-5)
    assert math.isclose(found.high - found.mean, 4.302653 * 0.01 / math.sqrt(3), rel_tol=1e-6)
    assert found.p_corrected == found.p


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)), min_size=2, max_size=8).filter(
        lambda pairs: len({a - b for a, b in pairs}) > 1
    )
)
def test_contrast_agrees_with_scipy(pairs: list[tuple[int, int]]) -> None:
    values, baseline = (np.array(side) / 10_000 for side in zip(*pairs, strict=True))
    found, expected = contrast(values.tolist(), baseline.tolist()), stats.ttest_rel(values, baseline)
    low, high = expected.confidence_interval(0.95)
    np.testing.assert_allclose(found.p, expected.pvalue, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-6, atol=1e-11)


def test_contrast_without_spread() -> None:
    same = contrast([0.9, 0.8], [0.9, 0.8])
    assert (same.mean, same.p, same.low, same.high, same.detectable) == (0.0, 1.0, 0.0, 0.0, 0.0)
    # 0.3 - 0.2 and 0.2 - 0.1 differ in the last bit only: no spread.
    assert contrast([0.3, 0.2, 0.9], [0.2, 0.1, 0.8]).p == 0.0


def test_three_equal_differences_of_one_image_are_no_certainty() -> None:
    image = 1 / 360
    found = contrast([0.9, 0.8, 0.7], [0.9 - image, 0.8 - image, 0.7 - image], resolution=image)
    # s = image / sqrt 6, t = sqrt(3) image / s = sqrt 18, 2 degrees of freedom
    assert math.isclose(found.p, 2 * stats.t.sf(math.sqrt(18), 2), rel_tol=1e-9)
    assert math.isclose(found.p, 0.0513, rel_tol=1e-3)
    assert math.isclose(found.high - found.mean, 4.302653 * image / math.sqrt(18), rel_tol=1e-6)
    none = contrast([0.9, 0.8], [0.9, 0.8], resolution=image)
    assert none.p == 1.0
    assert none.detectable > image


def test_the_floor_is_what_rounding_two_counts_gives() -> None:
    rng = np.random.default_rng(0)
    exact = rng.uniform(0, 1000, (2, 200_000))
    errors = (np.round(exact) - exact)[0] - (np.round(exact) - exact)[1]
    assert math.isclose(errors.std(), 1 / math.sqrt(6), rel_tol=0.01)


def test_resolution_never_narrows() -> None:
    values, baseline = [0.52, 0.71, 0.93], [0.50, 0.70, 0.90]
    assert contrast(values, baseline, resolution=0.001) == contrast(values, baseline)
    assert contrast(values, baseline, resolution=0.1).p > contrast(values, baseline).p


@pytest.mark.parametrize(("values", "baseline"), [([0.5], [0.4]), ([0.5, 0.6], [0.4]), ([], [])])
def test_contrast_refuses_what_is_not_paired(values: list[float], baseline: list[float]) -> None:
    with pytest.raises(AttarError, match="same two or more seeds"):
        contrast(values, baseline)


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04 -> monotone 0.04, 0.06, 0.06, 0.06
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([0.03]) == [0.03]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_properties(ps: list[float]) -> None:
    adjusted, m = holm(ps), len(ps)
    assert all(p <= q <= 1.0 for p, q in zip(ps, adjusted, strict=True))
    order = np.argsort(ps, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)
    assert adjusted[order[0]] == min(1.0, m * min(ps))
    # The step-down procedure itself: reject in order while p_(i) <= alpha / (m - i + 1).
    for alpha in (0.01, 0.05, 0.3):
        rejected = 0
        while rejected < m and (m - rejected) * ps[order[rejected]] <= alpha:
            rejected += 1
        assert sum(q <= alpha for q in adjusted) == rejected


@pytest.mark.parametrize(("n", "family"), [(2, 1), (3, 1), (3, 6), (5, 8), (10, 3)])
def test_power_at_the_detectable_difference(n: int, family: int) -> None:
    """Simulated with numpy and scipy alone: four times out of five."""
    alpha, trials = 0.05 / family, 40_000
    effect = detectable(1.0, n, alpha=alpha)
    draws = np.random.default_rng(n).normal(effect, 1.0, (trials, n))
    share = float((stats.ttest_1samp(draws, 0.0, axis=1).pvalue < alpha).mean())
    assert abs(share - 0.8) < 4 * math.sqrt(0.8 * 0.2 / trials)


def test_detectable_by_a_second_way() -> None:
    """The power as an integral over the spread that is seen: P(|T| > c) = E[Phi(d - c V) + Phi(-d - c V)]."""
    for n, alpha in ((2, 0.05), (3, 0.01), (6, 0.05 / 8)):
        effect, bound = detectable(1.0, n, alpha=alpha) * math.sqrt(n), stats.t.ppf(1 - alpha / 2, n - 1)
        spread = np.sqrt(stats.chi2.ppf((np.arange(200_000) + 0.5) / 200_000, n - 1) / (n - 1))
        power = np.mean(stats.norm.cdf(effect - bound * spread) + stats.norm.cdf(-effect - bound * spread))
        assert math.isclose(power, 0.8, abs_tol=1e-5)


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(1, 20), st.floats(1e-4, 1.0))
def test_detectable_properties(n: int, family: int, sd: float) -> None:
    effect = detectable(sd, n, alpha=0.05 / family)
    assert detectable(sd, n + 1, alpha=0.05 / family) < effect
    assert detectable(sd, n, alpha=0.05 / (family + 1)) > effect
    assert detectable(sd, n, alpha=0.05 / family, power=0.9) > effect
    assert math.isclose(detectable(2 * sd, n, alpha=0.05 / family), 2 * effect)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), min_size=4, max_size=4), min_size=2, max_size=7))
def test_what_is_seen_beyond_the_detectable_difference_is_a_finding(counts: list[list[int]]) -> None:
    """So that no verdict says that a difference could not have been seen below the one that was not."""
    first, *others = ({seed: count / 100 for seed, count in enumerate(row)} for row in counts)
    for found in contrasts({str(i): row for i, row in enumerate(others)}, first, 0.01).values():
        assert abs(found.mean) < found.detectable or found.p_corrected < 0.05


def test_contrasts_pair_by_common_seeds_and_correct_together() -> None:
    baseline = {0: 0.80, 1: 0.82, 2: 0.81, 3: 0.83}
    entries = {
        "some": {1: 0.85, 3: 0.84, 2: 0.86, 7: 0.99},
        "all": {0: 0.81, 1: 0.82, 2: 0.83, 3: 0.83},
        "alone": {0: 0.9, 8: 0.9},
    }
    found = contrasts(entries, baseline, 0.01)
    assert list(found) == ["some", "all"]
    assert found["some"].differences == (0.03, 0.05, 0.01)
    raw = [
        stats.ttest_rel([0.85, 0.86, 0.84], [0.82, 0.81, 0.83]).pvalue,
        stats.ttest_1samp([0.01, 0, 0.02, 0], 0).pvalue,
    ]
    np.testing.assert_allclose([one.p for one in found.values()], raw)
    np.testing.assert_allclose(
        found["some"].p_corrected, min(raw[0] * 2, 1) if raw[0] < raw[1] else max(raw[0], 2 * raw[1])
    )
    np.testing.assert_allclose(found["all"].detectable, detectable(np.std([0.01, 0, 0.02, 0], ddof=1), 4, alpha=0.025))
    assert contrasts({}, baseline, 0.01) == {}


def made(mean: float, p: float, n: int = 5) -> Contrast:
    return Contrast((mean,) * n, mean, mean - 0.004, mean + 0.005, p / 2, p, 0.0062)


@pytest.mark.parametrize(
    ("plain", "smoothing", "words"),
    [
        (
            made(0.0123, 0.004),
            made(0.004, 0.2),
            "ONE helps: +1.23 points of test top-1 over plain training (95 % interval +0.83 to +1.73, p = 0.004 after "
            "Holm's correction, 5 seeds). Against tuned label smoothing: +0.40 points (95 % interval +0.00 to +0.90, "
            "p = 0.2 after Holm's correction), no evidence of a difference; a difference below 0.62 points could not "
            "have been seen with 80 % power.",
        ),
        (
            made(0.001, 0.4),
            made(-0.01, 0.01),
            "No evidence that ONE helps at 5 seeds: +0.10 points of test top-1 over plain training (95 % interval "
            "-0.30 to +0.60, p = 0.4 after Holm's correction); a difference below 0.62 points could not have been seen "
            "with 80 % power. Against tuned label smoothing: -1.00 points (95 % interval -1.40 to -0.50, p = 0.01 "
            "after Holm's correction), worse.",
        ),
        (made(-0.02, 0.00001), made(0.02, 0.049), "ONE hurts: -2.00 points"),
        (None, None, "Nothing can be said about ONE yet: it and plain training need at least two finished seeds"),
        # Just above the level: however large, no claim; below it only after correction.
        (made(0.2, 0.0501, n=3), None, "No evidence that ONE helps at 3 seeds: +20.00 points"),
    ],
)
def test_verdicts(plain: Contrast | None, smoothing: Contrast | None, words: str) -> None:
    said = verdict("ONE", plain, smoothing)
    assert said.startswith(words)
    if smoothing is None:
        assert said.endswith(
            "Nothing can be said against tuned label smoothing: two finished seeds in common are needed."
        )
    if smoothing is not None and smoothing.p_corrected < 0.05:
        assert said.endswith("better." if smoothing.mean > 0 else "worse.")


def test_a_tiny_negative_difference_is_written_as_such() -> None:
    assert "p < 0.0001" in verdict("ONE", made(-0.02, 0.0), None)
    assert "+0.00 points" in verdict("ONE", made(-0.0, 1.0), None)


# Worlds without any effect. Every comparison: plain, label smoothing and 5 to 8 methods, [entries, seeds] counts of
# right answers. The same seed shifts all entries alike (same images, order and, by and large, initialisation).


def ordinary(rng: np.random.Generator, entries: int, seeds: int) -> tuple[NDArray[np.int64], int]:
    """Runs spread by half a point around seeds that spread by one, 2,000 test images."""
    share = 0.85 + rng.normal(0, 0.01, (1, seeds)) + rng.normal(0, 0.003, (entries, seeds))
    return rng.binomial(2000, share), 2000


def saturated(rng: np.random.Generator, entries: int, seeds: int) -> tuple[NDArray[np.int64], int]:
    """Each run misses one of 360 images, or none."""
    return 360 - rng.binomial(1, 0.5, (entries, seeds)), 360


def nearly_saturated(rng: np.random.Generator, entries: int, seeds: int) -> tuple[NDArray[np.int64], int]:
    """Some seeds are luckier than others: 0 to about 6 misses."""
    return 360 - rng.poisson(rng.choice([0.5, 2.0], (1, seeds)), (entries, seeds)), 360


def rejections(
    world: Callable[[np.random.Generator, int, int], tuple[NDArray[np.int64], int]],
    seeds: int,
    comparisons: int = 2000,
    effect: float = 0.0,
) -> tuple[float, float, float, float]:
    """Return the shares of comparisons with any finding: against plain, uncorrected too, and smoothing; and of
    those that find the method that gained `effect`."""
    rng = np.random.default_rng(seeds)
    corrected, raw, rival, true = [], [], [], []
    for _ in range(comparisons):
        counts, images = world(rng, int(rng.integers(7, 11)), seeds)
        values = counts / images
        values[2] += effect
        rows = [dict(enumerate(row.tolist())) for row in values]
        names = [str(i) for i in range(1, len(rows))]
        plain = contrasts(dict(zip(names, rows[1:], strict=True)), rows[0], 1 / images)
        other = contrasts(dict(zip(names[1:], rows[2:], strict=True)), rows[1], 1 / images)
        corrected.append(any(one.p_corrected < 0.05 for one in plain.values()))
        raw.append(any(one.p < 0.05 for one in plain.values()))
        rival.append(any(one.p_corrected < 0.05 for one in other.values()))
        true.append(plain["2"].p_corrected < 0.05 and plain["2"].mean > 0)
    return tuple(float(np.mean(hits)) for hits in (corrected, raw, rival, true))  # type: ignore[return-value]


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("world", [ordinary, saturated, nearly_saturated])
def test_without_any_effect_at_most_one_comparison_in_twenty_is_wrong(
    world: Callable[[np.random.Generator, int, int], tuple[NDArray[np.int64], int]], seeds: int
) -> None:
    corrected, raw, rival, _ = rejections(world, seeds)
    # What a true 5 % exceeds in one of 1,000 simulations.
    allowed = stats.binom.ppf(0.999, 2000, 0.05) / 2000
    assert corrected <= allowed
    assert rival <= allowed
    if world is ordinary:
        assert raw > 3 * allowed, "uncorrected tests are wrong much more often: the simulation is not vacuous"


def test_with_an_effect_it_is_found() -> None:
    _, _, _, found = rejections(ordinary, 5, comparisons=200, effect=0.05)
    assert found > 0.8
