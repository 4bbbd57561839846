from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attar.data import Sampler, Shuffled, make_sampler, rank_slice
from attar.errors import AttarError
from attar.sampling import Balanced, ClassPairs, Overlapping


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


LABELS = st.lists(st.integers(0, 5), min_size=16, max_size=200).map(np.array)


@given(targets=LABELS, half=st.integers(1, 8), world=st.integers(1, 2), epoch=st.integers(0, 50))
def test_pairs_share_their_class_and_their_rank(targets: np.ndarray, half: int, world: int, epoch: int) -> None:
    sampler: Sampler = make_sampler(ClassPairs(), targets, half * world, 3, world=world)
    alone = Shuffled(len(targets), half * world, 3, world=world)
    for batch, images in zip(sampler.epoch(epoch), alone.epoch(epoch), strict=True):
        first, partners = np.split(batch, 2)
        np.testing.assert_array_equal(first, images, err_msg="the images are those of plain shuffling")
        np.testing.assert_array_equal(targets[first], targets[partners])
        for rank in range(world):
            mine = rank_slice(batch, rank, world, sampler.groups)
            np.testing.assert_array_equal(
                mine, np.concatenate([np.split(first, world)[rank], np.split(partners, world)[rank]])
            )


def test_every_image_of_the_class_is_an_equally_likely_partner() -> None:
    targets = np.array([0] * 6 + [1] * 4)
    sampler = make_sampler(ClassPairs(), targets, 10, 0)
    counts = np.zeros((10, 10))
    for epoch in range(3000):
        first, partners = np.split(sampler.epoch(epoch)[0], 2)
        counts[first, partners] += 1
    assert not counts[:6, 6:].any()
    assert not counts[6:, :6].any()
    assert ((counts[:6, :6] - 500) ** 2 / 500).sum() < 75  # chi squared, 30 degrees of freedom, p < 1e-5
    assert ((counts[6:, 6:] - 750) ** 2 / 750).sum() < 45  # 12 degrees


@given(
    per_class=st.lists(st.integers(4, 30), min_size=2, max_size=12),
    instances=st.integers(2, 4),
    classes=st.integers(2, 12),
    epoch=st.integers(0, 20),
)
def test_balanced_batches(per_class: list[int], instances: int, classes: int, epoch: int) -> None:
    targets = np.repeat(np.arange(len(per_class)), per_class)
    sampler = make_sampler(Balanced(instances), targets, classes * instances, 1)
    batches = sampler.epoch(epoch)
    assert len(batches) == sampler.steps_per_epoch > 0
    seen = np.concatenate(batches)
    assert len(np.unique(seen)) == len(seen), "no image twice in an epoch"
    for batch in batches:
        labels, counts = np.unique(targets[batch], return_counts=True)
        assert len(labels) == min(classes, len(per_class))
        assert len(set(counts)) == 1
        assert counts[0] >= instances
    again = make_sampler(Balanced(instances), targets, classes * instances, 1)
    again.epoch(epoch + 1)
    for one, two in zip(batches, again.epoch(epoch), strict=True):
        np.testing.assert_array_equal(one, two)


def test_balanced_batches_cover_a_balanced_set() -> None:
    targets = np.repeat(np.arange(20), 16)
    sampler = make_sampler(Balanced(8), targets, 64, 0)
    assert sampler.steps_per_epoch == 5
    assert sorted(np.concatenate(sampler.epoch(0))) == list(range(320))
    # 10 classes and a batch for 16: all classes, with more images of each.
    few = make_sampler(Balanced(8), np.repeat(np.arange(10), 100), 128, 0)
    assert [len(batch) for batch in few.epoch(0)] == [120] * 8


@pytest.mark.parametrize(
    ("counts", "batch", "sentence"),
    [
        ([9, 9], 8, "does not hold 2 classes of 8 images"),
        ([9, 3], 16, "A class has 3 training images, fewer than the 8"),
    ],
)
def test_impossible_balance_is_refused(counts: list[int], batch: int, sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        make_sampler(Balanced(8), np.repeat(np.arange(len(counts)), counts), batch, 0)


@given(n=st.integers(8, 100), quarter=st.integers(1, 4), world=st.integers(1, 2), epoch=st.integers(0, 20))
def test_each_batch_repeats_the_one_before(n: int, quarter: int, world: int, epoch: int) -> None:
    sampler = make_sampler(Overlapping(), np.zeros(n, dtype=np.int64), 2 * quarter * world, 5, world=world)
    before = sampler.epoch(epoch - 1)[-1] if epoch else None
    for batch in sampler.epoch(epoch):
        new, repeated = np.split(batch, 2)
        if before is not None:
            for rank in range(world):
                then, now = (rank_slice(each, rank, world, sampler.groups) for each in (before, batch))
                np.testing.assert_array_equal(np.split(now, 2)[1], np.split(then, 2)[0])
        else:
            assert set(repeated) <= set(range(n))
        before = batch
    new = np.concatenate([np.split(batch, 2)[0] for batch in sampler.epoch(epoch)])
    assert len(np.unique(new)) == len(new)
    with pytest.raises(AttarError, match="has no two halves"):
        make_sampler(Overlapping(), np.zeros(n, dtype=np.int64), 2 * quarter * world + 1, 5, world=world)
