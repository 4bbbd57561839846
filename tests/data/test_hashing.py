from __future__ import annotations

import numpy as np
from scipy import stats

from attar.data.hashing import hash_counters, uniform


def splitmix64(x: int) -> int:
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_the_mixer_is_splitmix64() -> None:
    # The published generator seeded with 1234567 yields these first: state advances by the golden gamma each time.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    gamma, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    assert [splitmix64((1234567 + step * gamma) & mask) for step in range(3)] == published


def test_hash_is_the_fold_of_the_mixer_over_its_counters() -> None:
    expected = 0
    for counter in (3, 0, 2**40):
        expected = splitmix64(expected ^ splitmix64(counter))
    assert int(hash_counters(3, 0, 2**40)[0]) == expected


def test_hash_broadcasts_and_depends_on_order() -> None:
    assert hash_counters(1, np.arange(5)).shape == (5,)
    assert hash_counters(1, 2) != hash_counters(2, 1)
    np.testing.assert_array_equal(hash_counters(7, np.arange(9))[4:6], hash_counters(7, np.array([4, 5])))


def test_uniform_is_uniform_along_each_counter() -> None:
    for draws in (uniform(0, 1, np.arange(20_000)), uniform(0, np.arange(20_000), 1), uniform(np.arange(20_000), 0, 1)):
        assert draws.min() >= 0
        assert draws.max() < 1
        assert stats.kstest(draws, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03
