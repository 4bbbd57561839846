from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.data import AUGMENTATIONS, Augmentation, Normalization, augmentation
from attar.data.augment import crop_flip, crop_flip_torch, finish
from attar.errors import AttarError

IDENTITY = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
NORMALIZATION = Normalization((0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


def images(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (n, height, width, 3), dtype=np.uint8)


@settings(deadline=None)
@given(
    n=st.integers(1, 9),
    height=st.integers(1, 33),
    width=st.integers(1, 33),
    crop=st.booleans(),
    flip=st.booleans(),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 500),
)
def test_crop_flip_is_the_slow_per_image_recipe(
    n: int, height: int, width: int, crop: bool, flip: bool, seed: int, epoch: int
) -> None:
    policy, pixels = Augmentation("any", crop=crop, flip=flip), images(n, height, width)
    draws = policy.draw((height, width), seed, epoch, np.arange(n) * 7, view=0)
    (pad_y, pad_x), result = draws.pad, crop_flip(pixels, draws)
    assert (pad_y, pad_x) == ((max(1, height // 8), max(1, width // 8)) if crop else (0, 0))
    for image, out, top, left, mirrored in zip(pixels, result, draws.top, draws.left, draws.flip, strict=True):
        assert 0 <= top <= 2 * pad_y
        assert 0 <= left <= 2 * pad_x
        padded = np.pad(image, ((pad_y, pad_y), (pad_x, pad_x), (0, 0)))
        expected = padded[top : top + height, left : left + width]
        np.testing.assert_array_equal(out, expected[:, ::-1] if mirrored else expected)
    on_device = crop_flip_torch(torch.from_numpy(pixels), draws)
    np.testing.assert_array_equal(on_device.numpy(), result)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_image_looks_the_same_in_any_batch(name: str) -> None:
    policy, pixels, index = augmentation(name), images(32, 16, 16), np.arange(100, 132)

    def run(rows: np.ndarray, view: int = 0) -> torch.Tensor:
        draws = policy.draw((16, 16), 5, 3, index[rows], view)
        return finish(crop_flip(pixels[rows], draws), draws, NORMALIZATION)

    everything = run(np.arange(32))
    for rows in (np.array([31, 2, 9]), np.arange(8, 16), np.array([4])):
        assert torch.equal(run(rows), everything[rows])
    if name != "none":
        assert not torch.equal(run(np.arange(32), view=1), everything)


def test_views_seeds_and_epochs_draw_independently() -> None:
    policy, index = augmentation("strong"), np.arange(4000)
    one, *others = (
        policy.draw((64, 64), seed, epoch, index, view)
        for seed, epoch, view in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    )
    for other in others:
        for quantity in ("top", "left", "flip"):
            pair = getattr(one, quantity), getattr(other, quantity)
            assert abs(np.corrcoef(*pair)[0, 1]) < 0.06
    assert abs(np.corrcoef(one.top, one.left)[0, 1]) < 0.06
    assert abs(np.corrcoef(one.top, one.flip)[0, 1]) < 0.06


def test_draws_have_the_stated_distributions() -> None:
    policy = augmentation("strong")
    draws = policy.draw((32, 32), 0, 0, np.arange(20_000), view=0)
    np.testing.assert_allclose(np.bincount(draws.top, minlength=9) / 20_000, 1 / 9, atol=0.01)
    np.testing.assert_allclose(np.bincount(draws.left, minlength=9) / 20_000, 1 / 9, atol=0.01)
    assert abs(draws.flip.mean() - 0.5) < 0.02
    assert draws.factors is not None
    assert draws.boxes is not None
    for factor in draws.factors[:3]:
        assert 0.6 <= factor.min() < 0.61
        assert 1.39 < factor.max() <= 1.4
        assert abs(factor.mean() - 1) < 0.01
    assert abs(draws.factors[3]).max() <= 0.1 * np.pi
    y0, y1, x0, x1 = draws.boxes
    assert (y0 >= 0).all()
    assert (y1 <= 32).all()
    assert (x0 >= 0).all()
    assert (x1 <= 32).all()
    area = ((y1 - y0) * (x1 - x0)) / 1024
    assert abs((area > 0).mean() - 0.25) < 0.02
    assert area[area > 0].min() > 0.01
    assert area.max() < 0.23


@pytest.mark.parametrize("as_tensor", [False, True])
def test_normalisation_is_per_channel_and_channels_last(as_tensor: bool) -> None:
    pixels = images(4, 5, 7)
    result = NORMALIZATION(torch.from_numpy(pixels) if as_tensor else pixels)
    expected = (pixels / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.25, 0.2, 0.3])
    assert result.shape == (4, 3, 5, 7)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(result.permute(0, 2, 3, 1).numpy(), expected, atol=2e-6)


def test_strong_changes_colour_and_erases_to_the_mean() -> None:
    policy = Augmentation("erase", erase=1.0)
    draws = policy.draw((16, 16), 0, 0, np.arange(8), view=0)
    pixels = images(8, 16, 16)
    result = finish(crop_flip(pixels, draws), draws, NORMALIZATION)
    plain = NORMALIZATION(pixels)
    assert draws.boxes is not None
    for image, untouched, (y0, y1, x0, x1) in zip(result, plain, draws.boxes.T, strict=True):
        assert (image[:, y0:y1, x0:x1] == 0).all()
        assert y1 > y0
        untouched[:, y0:y1, x0:x1] = 0
        assert torch.equal(image, untouched)
    color = Augmentation("color", color=0.4)
    draws = color.draw((16, 16), 0, 0, np.arange(8), view=0)
    jittered = finish(pixels, draws, IDENTITY)
    assert jittered.is_contiguous(memory_format=torch.channels_last)
    assert jittered.min() >= 0
    assert jittered.max() <= 1
    assert (jittered - IDENTITY(pixels)).abs().mean() > 0.02


def test_colour_without_strength_changes_nothing() -> None:
    draws = Augmentation("color", color=1e-9).draw((8, 8), 0, 0, np.arange(3), view=0)
    pixels = images(3, 8, 8)
    torch.testing.assert_close(finish(pixels, draws, NORMALIZATION), NORMALIZATION(pixels), atol=1e-4, rtol=1e-4)


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(AttarError, match="did you mean 'crop-flip'"):
        augmentation("cropflip")
