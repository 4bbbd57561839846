from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attar.data import (
    JOINT_AUGMENTATIONS,
    VOID,
    EvalLoader,
    JointAugmentation,
    Loader,
    Normalization,
    Sample,
    Shuffled,
    Source,
    augmentation,
    open_source,
)
from attar.data.joint import finish_joint, place
from attar.errors import AttarError

PIXELS = Normalization((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # leaves 0..255 as they are
SCALED = JointAugmentation("scaled", scale=(0.5, 2.0), flip=True)


def make(source: Source, name: str = "scale-crop-flip", batch: int = 4, **options: Any) -> Loader:
    world = options.get("world", 1)
    sampler = Shuffled(len(source.train), batch, seed=3, world=world, drop_last=options.pop("drop_last", True))
    normalization = Normalization(source.mean, source.std)
    return Loader(source.train, sampler, augmentation(name, "segmentation"), normalization, seed=3, **options)


def equal(one: Sample, two: Sample) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture
def small(make_pairs: Any) -> Source:
    """Images and masks that are kept."""
    source = open_source(make_pairs(count=24), task="segmentation")
    assert source.train.masks is not None
    return source


@pytest.fixture
def large(make_pairs: Any) -> Source:
    """Images and masks above the cached size, of another size than the student sees."""
    source = open_source(make_pairs(count=16, size=(280, 320)), task="segmentation", image_size=(260, 256))
    assert source.train.masks is None
    return source


@pytest.fixture(params=["small", "large"])
def source(request: pytest.FixtureRequest) -> Source:
    found: Source = request.getfixturevalue(request.param)
    return found


# Geometry


def ramps(n: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose red is the row and green the column, and masks that number the columns."""
    images = torch.full((n, height, width, 3), 9, dtype=torch.uint8)
    images[..., 0] = torch.arange(height, dtype=torch.uint8)[:, None]
    images[..., 1] = torch.arange(width, dtype=torch.uint8)
    return images, images[..., 1].clone()


@pytest.mark.parametrize("columns", [True, False])
def test_image_and_mask_go_to_the_same_place(columns: bool) -> None:
    images, masks = ramps(200, 60, 90)
    if not columns:
        masks = images[..., 0].clone()
    draws = SCALED.draw(0, 0, np.arange(200), 0)
    assert draws.scale is not None
    placed = place(images, masks, draws, (0.0, 0.0, 0.0))
    inside = placed.masks != VOID
    apart = (placed.images[..., 1 if columns else 0].int() - placed.masks.int())[inside]
    # The nearest pixel is at most half of one away, and what is shrunk is rounded once more.
    assert apart.abs().max() <= 2
    assert apart.float().mean().abs() < 0.05
    assert (placed.images[..., 2][inside] == 9).all()
    for n, (y0, y1, x0, x1) in enumerate(placed.boxes.T):
        box = torch.zeros(60, 90, dtype=torch.bool)
        box[y0:y1, x0:x1] = True
        assert torch.equal(inside[n], box)
        assert (placed.images[n][~box] == 0).all()
        height, width = round(60 * draws.scale[n]), round(90 * draws.scale[n])
        assert (y1 - y0, x1 - x0) == (min(60, height), min(90, width))
        # One pixel of what is seen is 1/s pixels of the image, leftwards where it is mirrored.
        row = placed.images[n, y0:y1, x0:x1]
        step = np.polyfit(np.arange(y1 - y0), row[:, 0, 0].numpy().astype(float), 1)[0]
        assert abs(step * draws.scale[n] - 1) < 0.06
        step = np.polyfit(np.arange(x1 - x0), row[0, :, 1].numpy().astype(float), 1)[0]
        assert abs(step * draws.scale[n] - (-1 if draws.flip[n] else 1)) < 0.06


def test_blocks_keep_their_colours(small: Source) -> None:
    # The image of `make_pairs` is a function of its mask: away from borders it still is, wherever both went.
    assert small.train.pixels is not None
    assert small.train.masks is not None
    colors = np.zeros((256, 3), np.uint8)
    colors[small.train.masks.ravel()] = small.train.pixels.reshape(-1, 3)
    seen = 0
    for sample in Loader(small.train, Shuffled(len(small.train), 8, 0), SCALED, PIXELS).epoch(0):
        images = sample.images.permute(0, 2, 3, 1).numpy().round()
        masks = sample.targets.numpy()
        around = np.stack(
            [np.roll(masks, shift, (1, 2)) for shift in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1))]
        )
        within = ((around == masks).all(0) & (masks != VOID))[:, 2:-2, 2:-2]
        apart = abs(images - colors[masks])[:, 2:-2, 2:-2][within]
        assert np.median(apart) <= 1
        seen += within.sum()
    assert seen > 500


def test_no_scale_is_the_image_itself_and_flip_mirrors_both(small: Source) -> None:
    assert small.train.pixels is not None
    assert small.train.masks is not None
    rows = dict(zip(small.train.index.tolist(), small.train.rows.tolist(), strict=True))
    mirrored = []
    for name in ("none", "flip"):
        loader = Loader(small.train, Shuffled(len(small.train), 4, 0), augmentation(name, "segmentation"), PIXELS)
        for sample in loader.epoch(0):
            for image, mask, index in zip(*sample, strict=True):
                pixels, classes = small.train.pixels[rows[int(index)]], small.train.masks[rows[int(index)]]
                same = np.array_equal(mask, classes)
                mirrored.append(not same)
                step = 1 if same else -1
                np.testing.assert_array_equal(mask, classes[:, ::step])
                np.testing.assert_allclose(image.permute(1, 2, 0), pixels[:, ::step], atol=1e-3)
    assert 0 < sum(mirrored) < len(mirrored) // 2


def test_padding_is_the_mean_in_the_image_and_void_in_the_mask(source: Source) -> None:
    for name in ("scale-crop-flip", "strong"):
        found = 0
        for sample in make(source, name, workers=0).epoch(0):
            padded = sample.targets == VOID
            found += int(padded.sum())
            # 0 is the mean once normalised, and what the colour jitter does must not show in it.
            assert (sample.images.permute(0, 2, 3, 1)[padded] == 0).all()
            assert (sample.images.permute(0, 2, 3, 1)[~padded] != 0).float().mean() > 0.9
        assert found > 0


def test_void_of_the_data_stays_void(make_pairs: Any) -> None:
    folder = make_pairs(count=8)
    (folder / "masks" / "000.png").rename(folder / "old.png")
    Image.fromarray(np.full((20, 16), 255, np.uint8)).save(folder / "masks" / "000.png")
    source = open_source(folder, task="segmentation", holdout=0)
    for sample in make(source, batch=1, drop_last=False).epoch(0):
        if sample.index.item() == 0:
            assert (sample.targets == VOID).all()
            assert (sample.images != 0).float().mean() > 0.2


def test_draws_have_the_stated_distributions() -> None:
    draws = JOINT_AUGMENTATIONS["strong"].draw(0, 0, np.arange(20_000), 0)
    assert draws.scale is not None
    assert draws.factors is not None
    assert 0.5 <= draws.scale.min() < 0.501
    assert 1.999 < draws.scale.max() <= 2
    for values, mean in ((draws.scale, 1.25), (draws.top, 0.5), (draws.left, 0.5), (draws.flip, 0.5)):
        assert abs(values.mean() - mean) < 0.01
    assert abs(np.corrcoef([draws.scale, draws.top, draws.left, draws.flip]) - np.eye(4)).max() < 0.03
    assert 0.6 <= draws.factors[:3].min() < draws.factors[:3].max() <= 1.4
    other = JOINT_AUGMENTATIONS["strong"].draw(0, 1, np.arange(20_000), 0)
    assert other.scale is not None
    assert abs(np.corrcoef(draws.scale, other.scale)[0, 1]) < 0.03


def test_every_place_is_drawn() -> None:
    images, masks = ramps(400, 8, 8)
    draws = JointAugmentation("half", scale=(0.5, 0.5)).draw(0, 0, np.arange(400), 0)
    placed = place(images, masks, draws, (0.0, 0.0, 0.0))
    assert {tuple(box) for box in placed.boxes[:2].T} == {(y, y + 4) for y in range(5)}
    draws = JointAugmentation("double", scale=(2.0, 2.0)).draw(0, 0, np.arange(400), 0)
    placed = place(images, masks, draws, (0.0, 0.0, 0.0))
    assert set(placed.masks[:, 0, 0].tolist()) == set(range(5))


def test_colour_leaves_masks_alone(small: Source) -> None:
    plain, strong = (next(make(small, name).epoch(0)) for name in ("scale-crop-flip", "strong"))
    assert torch.equal(plain.targets, strong.targets)
    assert not torch.equal(plain.images, strong.images)
    images, masks = ramps(3, 8, 8)
    draws = JointAugmentation("color", color=1e-9).draw(0, 0, np.arange(3), 0)
    placed, normalization = place(images, masks, draws, (0.5, 0.5, 0.5)), Normalization((0.5,) * 3, (0.2,) * 3)
    torch.testing.assert_close(finish_joint(placed, draws, normalization), normalization(images), atol=1e-4, rtol=1e-4)


# Loaders


def test_samples_have_the_stated_form(source: Source) -> None:
    height, width = source.image_size
    loader = make(source, views=2, workers=0)
    samples = list(loader.epoch(0))
    assert len(samples) == loader.steps_per_epoch == len(source.train) // 4
    for sample in samples:
        assert sample.images.shape == (8, 3, height, width)
        assert sample.images.dtype == torch.float32
        assert sample.images.is_contiguous(memory_format=torch.channels_last)
        assert sample.targets.shape == (8, height, width)
        assert sample.targets.dtype == sample.index.dtype == torch.int64
        assert torch.equal(sample.index[:4], sample.index[4:])
        assert not torch.equal(sample.targets[:4], sample.targets[4:]), "the two views are alike"
        assert ((sample.targets < source.num_classes) | (sample.targets == VOID)).all()


@pytest.mark.parametrize("name", JOINT_AUGMENTATIONS)
def test_resuming_gives_exactly_the_remaining_batches(source: Source, name: str) -> None:
    whole = list(make(source, name, views=2, workers=0).epoch(4))
    rest = list(make(source, name, views=2, workers=0).epoch(4, start_step=1))
    assert len(rest) == len(whole) - 1 > 0
    assert all(equal(one, two) for one, two in zip(whole[1:], rest, strict=True))


@pytest.mark.parametrize("name", ["scale-crop-flip", "strong"])
def test_two_ranks_see_exactly_what_one_sees(source: Source, name: str) -> None:
    one = make(source, name, views=2, workers=0)
    ranks = [make(source, name, views=2, workers=0, rank=rank, world=2).epoch(1) for rank in range(2)]
    for whole, *parts in zip(one.epoch(1), *ranks, strict=True):
        for field in range(3):
            views = [torch.cat([part[field].chunk(2)[view] for part in parts]) for view in range(2)]
            assert torch.equal(torch.cat(views), whole[field])


def test_workers_change_nothing(large: Source) -> None:
    inside, workers = (list(make(large, "strong", views=2, workers=workers).epoch(2)) for workers in (0, 2))
    assert all(equal(one, two) for one, two in zip(inside, workers, strict=True))


def test_epochs_differ_and_cycle(small: Source) -> None:
    def masks(epoch: int, **options: Any) -> torch.Tensor:
        return torch.cat([s.targets[s.index.argsort()] for s in make(small, batch=24, **options).epoch(epoch)])

    assert torch.equal(masks(0), masks(0))
    assert not torch.equal(masks(0), masks(1))
    assert torch.equal(masks(0, cycle=2), masks(2, cycle=2))


def test_nothing_touches_the_global_random_state(source: Source) -> None:
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    list(make(source, "strong", workers=0).epoch(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_unscaled_images_are_the_same_kept_or_decoded_each_time(
    make_pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_pairs(count=12, size=(40, 60))
    kept = open_source(folder, task="segmentation", image_size=(24, 30))
    monkeypatch.setattr("attar.data.masked_sources.CACHED_PIXELS", 10)
    decoded = open_source(folder, task="segmentation", image_size=(24, 30))
    assert kept.train.masks is not None
    assert decoded.train.masks is None
    assert (kept.fingerprint, kept.mean, kept.std) == (decoded.fingerprint, decoded.mean, decoded.std)
    for name in ("none", "flip"):
        one, two = (list(make(each, name, workers=0).epoch(0)) for each in (kept, decoded))
        assert all(equal(a, b) for a, b in zip(one, two, strict=True))
    one, two = (list(EvalLoader(each.test, 2, PIXELS, workers=0)) for each in (kept, decoded))
    assert all(equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("world", [1, 2, 5])
def test_evaluation_sees_every_image_once_whole_and_in_order(source: Source, world: int) -> None:
    ranks = [EvalLoader(source.test, 2, PIXELS, rank=rank, world=world, workers=0) for rank in range(world)]
    samples = [sample for rank in ranks for sample in rank]
    assert torch.cat([sample.index for sample in samples]).tolist() == source.test.index.tolist()
    images, masks = (torch.cat([sample[field] for sample in samples]) for field in range(2))
    reader: Any = source.test.reader
    height, width = source.image_size
    for n, index in enumerate(source.test.index):
        with Image.open(reader.paths[index]) as image, Image.open(reader.masks[index]) as mask:
            scale = max(height / image.height, width / image.width)
            cover = round(image.width * scale), round(image.height * scale)
            left, top = (cover[0] - width) // 2, (cover[1] - height) // 2
            box = (left, top, left + width, top + height)
            pixels = np.asarray(image.resize(cover, Image.Resampling.BILINEAR).crop(box))
            classes = np.asarray(mask.resize(cover, Image.Resampling.NEAREST).crop(box))
        np.testing.assert_array_equal(masks[n], classes)
        np.testing.assert_allclose(images[n].permute(1, 2, 0), pixels, atol=1e-3)


def test_resident_masks_on_a_device_give_the_same_samples(small: Source) -> None:
    # The path of a GPU that holds the whole data set, run on the CPU's tensors.
    host, resident = make(small, "strong", views=2), make(small, "strong", views=2)
    resident._images.resident = torch.from_numpy(np.array(small.train.pixels))
    resident._images.resident_masks = torch.from_numpy(np.array(small.train.masks))
    for one, two in zip(host.epoch(0), resident.epoch(0), strict=True):
        assert equal(one, two)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["mask", "image", "value"])
def test_a_pair_damaged_later_is_named(large: Source, workers: int, damage: str) -> None:
    reader: Any = large.train.reader
    path: Path = (reader.paths if damage == "image" else reader.masks)[int(large.train.index[0])]
    if damage == "value":
        Image.fromarray(np.full((280, 320), 77, np.uint8)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AttarError, match=path.name) as caught:
        list(make(large, workers=workers, drop_last=False).epoch(0))
    assert "\n" not in str(caught.value)
    assert ("the value 77, but the 4 classes" in str(caught.value)) == (damage == "value")


def test_augmentations_are_of_a_task(small: Source) -> None:
    with pytest.raises(AttarError, match="did you mean 'scale-crop-flip'"):
        augmentation("crop-flip", "segmentation")
    with pytest.raises(AttarError, match="There is no augmentation 'scale-crop-flip'"):
        augmentation("scale-crop-flip")
    sampler, normalization = Shuffled(len(small.train), 4, 0), Normalization(small.mean, small.std)
    with pytest.raises(AttarError, match="'flip' is for images without masks, but the train split has images with"):
        Loader(small.train, sampler, augmentation("flip"), normalization)
    digits = open_source("digits").train
    with pytest.raises(AttarError, match="'flip' is for images with masks, but the train split has images without"):
        Loader(digits, sampler, augmentation("flip", "segmentation"), normalization)
    assert [name for name, each in JOINT_AUGMENTATIONS.items() if not each.random] == ["none"]
