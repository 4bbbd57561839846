from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attar.data import Sampler, Shuffled, rank_slice
from attar.errors import AttarError


@given(
    n=st.integers(4, 300),
    share=st.integers(1, 40),
    world=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 1000),
    drop_last=st.booleans(),
)
def test_an_epoch_is_a_stateless_permutation(
    n: int, share: int, world: int, seed: int, epoch: int, drop_last: bool
) -> None:
    sampler: Sampler = Shuffled(n, share * world, seed, drop_last=drop_last, world=world)
    batches = sampler.epoch(epoch)
    assert len(batches) == sampler.steps_per_epoch > 0
    seen = np.concatenate(batches)
    assert len(np.unique(seen)) == len(seen)
    assert seen.min() >= 0
    assert seen.max() < n
    size = min(share * world, n - n % world)
    lengths = [len(batch) for batch in batches]
    assert all(length == size for length in lengths[:-1])
    assert all(length % world == 0 for length in lengths)
    assert lengths[-1] == size if drop_last else n - len(seen) == n % world
    # Another object, other epochs in between: the same order.
    other = Shuffled(n, share * world, seed, drop_last=drop_last, world=world)
    other.epoch(epoch + 1)
    for one, two in zip(batches, other.epoch(epoch), strict=True):
        np.testing.assert_array_equal(one, two)
        pieces = [rank_slice(one, rank, world) for rank in range(world)]
        assert len({len(piece) for piece in pieces}) == 1
        np.testing.assert_array_equal(np.concatenate(pieces), one)


def test_order_differs_by_seed_and_epoch() -> None:
    orders = [tuple(Shuffled(100, 100, seed).epoch(epoch)[0]) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_every_position_is_equally_likely() -> None:
    sampler = Shuffled(10, 10, 0)
    counts = np.zeros((10, 10))
    for epoch in range(2000):
        counts[np.arange(10), sampler.epoch(epoch)[0]] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 150  # chi squared with 81 degrees of freedom; 150 is p < 1e-5


@pytest.mark.parametrize(("n", "batch", "world"), [(100, 7, 2), (100, 0, 1), (1, 2, 2)])
def test_uneven_sharing_is_refused(n: int, batch: int, world: int) -> None:
    with pytest.raises(AttarError, match="shared"):
        Shuffled(n, batch, 0, world=world)


def test_a_batch_not_divisible_by_the_ranks_is_refused() -> None:
    with pytest.raises(AttarError, match="batch of 5 cannot be shared evenly by 2 ranks"):
        rank_slice(np.arange(5), 0, 2)
