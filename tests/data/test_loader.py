from __future__ import annotations

import dataclasses
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attar.data import (
    AUGMENTATIONS,
    BadImageError,
    EvalLoader,
    Loader,
    Normalization,
    Sample,
    Shuffled,
    Source,
    augmentation,
    open_source,
)
from attar.errors import AttarError


def make(source: Source, name: str = "crop-flip", batch: int = 32, **options: Any) -> Loader:
    world = options.get("world", 1)
    sampler = Shuffled(len(source.train), batch, seed=3, world=world, drop_last=options.pop("drop_last", True))
    normalization = Normalization(source.mean, source.std)
    return Loader(source.train, sampler, augmentation(name), normalization, seed=3, **options)


def equal(one: Sample, two: Sample) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source("digits")


@pytest.fixture
def large(make_folder: Any) -> Source:
    """Images above the cached size, so decoded by workers."""
    source = open_source(make_folder(size=(150, 170), counts={"cat": 12, "dog": 12}), image_size=144)
    assert source.train.pixels is None
    return source


def test_samples_have_the_stated_form_and_match_the_source(digits: Source) -> None:
    loader = make(digits, "none", views=2)
    samples = list(loader.epoch(0))
    assert len(samples) == loader.steps_per_epoch == 1293 // 32
    targets = dict(zip(digits.train.index.tolist(), digits.train.targets.tolist(), strict=True))
    rows = dict(zip(digits.train.index.tolist(), digits.train.rows.tolist(), strict=True))
    for sample in samples:
        assert sample.images.shape == (64, 3, 8, 8)
        assert sample.images.dtype == torch.float32
        assert sample.images.is_contiguous(memory_format=torch.channels_last)
        assert sample.targets.dtype == sample.index.dtype == torch.int64
        assert torch.equal(sample.index[:32], sample.index[32:])
        assert sample.targets.tolist() == [targets[index] for index in sample.index.tolist()]
    pixels = digits.train.pixels[[rows[index] for index in samples[0].index.tolist()]] / 255  # type: ignore[index]
    expected = (pixels - np.array(digits.mean)) / np.array(digits.std)
    np.testing.assert_allclose(samples[0].images.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


def test_normalised_training_images_have_mean_0_and_deviation_1(digits: Source) -> None:
    pixels = torch.cat([sample.images for sample in make(digits, "none", batch=1, drop_last=False).epoch(0)])
    assert pixels.mean().abs() < 1e-4
    assert abs(pixels.std(correction=0) - 1) < 1e-4


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_resuming_gives_exactly_the_remaining_batches(digits: Source, name: str) -> None:
    whole = list(make(digits, name, batch=200, views=2).epoch(4))
    rest = list(make(digits, name, batch=200, views=2).epoch(4, start_step=4))
    assert len(rest) == len(whole) - 4 == 2
    assert all(equal(one, two) for one, two in zip(whole[4:], rest, strict=True))
    assert list(make(digits, name, batch=200).epoch(4, start_step=6)) == []


def test_epochs_differ_in_order_and_in_augmentation(digits: Source) -> None:
    one, two = (torch.cat([s.images[s.index.argsort()] for s in make(digits, batch=1293).epoch(e)]) for e in (0, 1))
    assert one.shape == two.shape
    assert not torch.equal(one, two)


@pytest.mark.parametrize("name", ["crop-flip", "strong"])
def test_two_ranks_see_exactly_what_one_sees(digits: Source, name: str) -> None:
    one = make(digits, name, views=2)
    ranks = [make(digits, name, views=2, rank=rank, world=2).epoch(1) for rank in range(2)]
    for whole, *parts in zip(one.epoch(1), *ranks, strict=True):
        for field in range(3):
            views = [torch.cat([part[field].chunk(2)[view] for part in parts]) for view in range(2)]
            assert torch.equal(torch.cat(views), whole[field])


def test_nothing_touches_the_global_random_state(digits: Source, large: Source) -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index] # noqa: NPY002
    list(make(digits, "strong").epoch(0))
    list(make(large, "strong", batch=8, workers=0).epoch(0))
    list(make(large, "strong", batch=8, workers=1).epoch(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index] # noqa: NPY002
    assert random.getstate() == before[2]


def test_a_batch_larger_than_the_data_is_the_whole_data(digits: Source) -> None:
    (sample,) = make(digits, batch=5000).epoch(0)
    assert sorted(sample.index.tolist()) == digits.train.index.tolist()


def test_leaving_the_loop_ends_the_thread(digits: Source) -> None:
    for step, _ in enumerate(make(digits).epoch(0)):
        if step == 2:
            break
    assert not [thread for thread in threading.enumerate() if thread.name == "attar-prefetch"]


def test_resident_images_on_a_device_give_the_same_samples(digits: Source) -> None:
    # The path of a GPU that holds the whole data set, run on the CPU's tensors.
    host, resident = make(digits, "strong", views=2), make(digits, "strong", views=2)
    resident._images.resident = torch.from_numpy(np.array(digits.train.pixels))
    for one, two in zip(host.epoch(0), resident.epoch(0), strict=True):
        torch.testing.assert_close(one.images, two.images, atol=1e-5, rtol=1e-5)
        assert two.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one.index, two.index)


def test_mean_and_deviation_may_be_given_as_a_pair(digits: Source) -> None:
    pair = (digits.mean, digits.std)
    one, two = (next(iter(EvalLoader(digits.test, 9, given))) for given in (pair, Normalization(*pair)))
    assert torch.equal(one.images, two.images)


def test_uneven_ranks_are_refused(digits: Source) -> None:
    loader = Loader(
        digits.train, Shuffled(1293, 5, 0), augmentation("none"), Normalization(digits.mean, digits.std), world=2
    )
    with pytest.raises(AttarError, match="shared evenly by 2 ranks"):
        loader.epoch(0)


def test_empty_split_is_refused(digits: Source) -> None:
    source = open_source("digits", holdout=0)
    assert len(source.holdout) == 0
    assert len(source.train) == len(digits.train) + len(digits.holdout)
    with pytest.raises(AttarError, match="holdout split is empty"):
        EvalLoader(source.holdout, 10, Normalization(source.mean, source.std))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_evaluation_sees_every_image_once_in_order(digits: Source, world: int) -> None:
    normalization = Normalization(digits.mean, digits.std)
    ranks = [EvalLoader(digits.test, 50, normalization, rank=rank, world=world) for rank in range(world)]
    samples = [sample for rank in ranks for sample in rank]
    assert torch.cat([sample.index for sample in samples]).tolist() == digits.test.index.tolist()
    assert torch.cat([sample.targets for sample in samples]).tolist() == digits.test.targets.tolist()
    assert all(len(list(rank)) == len(rank) for rank in ranks)
    expected = normalization(np.ascontiguousarray(digits.test.pixels[digits.test.rows]))  # type: ignore[index]
    assert torch.equal(torch.cat([sample.images for sample in samples]), expected)


def test_more_ranks_than_images_leaves_some_without(digits: Source) -> None:
    tiny = dataclasses.replace(
        digits.test, rows=digits.test.rows[:2], targets=digits.test.targets[:2], index=digits.test.index[:2]
    )
    normalization = Normalization(digits.mean, digits.std)
    assert [len(list(EvalLoader(tiny, 5, normalization, rank=rank, world=3))) for rank in range(3)] == [1, 1, 0]


@pytest.mark.parametrize("name", ["none", "crop-flip", "strong"])
def test_large_images_do_not_depend_on_workers_or_batch(large: Source, name: str) -> None:
    inside = list(make(large, name, batch=8, views=2, workers=0).epoch(2))
    workers = list(make(large, name, batch=8, views=2, workers=2).epoch(2))
    assert len(inside) == 2
    assert inside[0].images.shape == (16, 3, 144, 144)
    assert inside[0].images.is_contiguous(memory_format=torch.channels_last)
    assert all(equal(one, two) for one, two in zip(inside, workers, strict=True))
    assert equal(next(make(large, name, batch=8, views=2, workers=0).epoch(2, start_step=1)), inside[1])
    ranks = [list(make(large, name, batch=8, rank=rank, world=2, workers=0).epoch(2)) for rank in range(2)]
    assert torch.equal(torch.cat([rank[0].images for rank in ranks]), inside[0].images[:8])
    if name != "none":
        assert not torch.equal(inside[0].images[:8], inside[0].images[8:]), "the two views are alike"
        assert not torch.equal(next(make(large, name, batch=8, workers=0).epoch(3)).images, inside[0].images[:8])


def test_large_images_are_evaluated_on_their_centre(large: Source) -> None:
    normalization = Normalization(large.mean, large.std)
    one, two = (
        [
            sample
            for rank in range(2)
            for sample in EvalLoader(large.test, 3, normalization, rank=rank, world=2, workers=n)
        ]
        for n in (0, 1)
    )
    assert torch.cat([sample.index for sample in one]).tolist() == large.test.index.tolist()
    assert all(equal(a, b) for a, b in zip(one, two, strict=True))
    path = large.test.reader.paths[int(large.test.index[0])]  # type: ignore[attr-defined]
    with Image.open(path) as image:
        covering = image.resize((round(170 * 165 / 150), 165), Image.Resampling.BILINEAR)
    left, top = (covering.width - 144) // 2, (165 - 144) // 2
    centre = np.asarray(covering)[top : top + 144, left : left + 144][None]
    assert torch.equal(one[0].images[:1], normalization(np.ascontiguousarray(centre)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_large_image_damaged_later_is_named(large: Source, workers: int) -> None:
    path: Path = large.train.reader.paths[int(large.train.index[0])]  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(BadImageError, match=path.name) as caught:
        list(make(large, batch=8, workers=workers, drop_last=False).epoch(0))
    assert "Traceback" not in str(caught.value)
