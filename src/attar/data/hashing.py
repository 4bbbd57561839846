"""Counter-based random numbers: every draw is a pure function of integers, so order and batch never matter."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["hash_counters", "uniform"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection on 64 bits that mixes every bit."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_counters(*counters: ArrayLike) -> NDArray[np.uint64]:
    """Hash integer counters, broadcast against each other, into uniform 64-bit words.

    Definition: `h_0 = 0, h_i = splitmix64(h_{i-1} xor splitmix64(c_i))`. Order matters: (1, 2) and (2, 1) differ.
    """
    # At least one dimension throughout: NumPy warns about wrap-around on scalars, which is what the hash is made of.
    words = [np.atleast_1d(np.asarray(counter)).astype(np.uint64) for counter in counters]
    state: NDArray[np.uint64] = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = _splitmix64(state ^ _splitmix64(word))
    return state


def uniform(*counters: ArrayLike) -> NDArray[np.float64]:
    """Return one number in [0, 1) per (broadcast) tuple of counters, from the top 53 bits of `hash_counters`."""
    return (hash_counters(*counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53
