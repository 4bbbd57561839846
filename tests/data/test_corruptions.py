"""Corruptions: what each does to images whose corruption is known, functions of the image alone, worse by severity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from attar.data.corruptions import KINDS, SEVERITIES, corrupt
from attar.errors import AttarError

RANDOM = {"gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "elastic"}


def natural(count: int, side: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth images with edges: random colours on a coarse grid, enlarged, beside a bright half."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 160, (count, 5, 5, 3), dtype=np.uint8)
    large = [np.array(Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC)) for each in coarse]
    images = np.stack(large)
    images[:, :, side // 3 : 2 * side // 3] += 60
    return images


def damage(images: NDArray[np.uint8], kind: str, severity: int) -> float:
    return float(np.abs(corrupt(images, kind, severity).astype(float) - images).mean())


@pytest.mark.parametrize("side", [8, 32, 224])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_grows_with_severity_at_every_size(kind: str, side: int) -> None:
    images = natural(2 if side == 224 else 24, side)
    found = [damage(images, kind, severity) for severity in SEVERITIES]
    assert all(np.diff(found) >= 0)
    assert found[0] > 0
    assert 1.3 * found[0] < found[-1] < 128


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_corrupted_alike_in_any_company(kind: str) -> None:
    images, index = natural(140, 16), np.arange(1000, 1140)
    whole = corrupt(images, kind, 3, index=index)
    assert whole.shape == images.shape
    assert whole.dtype == np.uint8
    chosen = np.array([139, 4, 57])
    np.testing.assert_array_equal(corrupt(images[chosen], kind, 3, index=index[chosen]), whole[chosen])
    np.testing.assert_array_equal(images, natural(140, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_draws_come_from_seed_and_index(kind: str) -> None:
    image = np.repeat(natural(1, 16), 2, axis=0)
    first, second = corrupt(image, kind, 4)
    other = corrupt(image, kind, 4, seed=1)[0]
    assert (first != second).any() == (first != other).any() == (kind in RANDOM)


def test_flat_images_show_what_is_added() -> None:
    flat = np.full((4, 64, 64, 3), 128, dtype=np.uint8)
    for kind in ("gaussian_blur", "motion_blur", "zoom_blur", "contrast", "elastic", "pixelate"):
        np.testing.assert_array_equal(corrupt(flat, kind, 5), flat)
    np.testing.assert_array_equal(corrupt(flat, "brightness", 1), np.full_like(flat, round(128 + 25.5)))
    noisy = corrupt(flat, "gaussian_noise", 2).astype(float) - 128
    assert abs(noisy.mean()) < 0.5
    assert noisy.std() == pytest.approx(0.09 * 255, rel=0.02)
    # Photons: the variance is the mean over the photons that white has, 1 / 0.033.
    shot = corrupt(flat, "shot_noise", 3) / 255
    assert shot.mean() == pytest.approx(128 / 255, abs=0.005)
    assert shot.std() == pytest.approx(np.sqrt(128 / 255 * 0.033), rel=0.03)
    impulses = corrupt(flat, "impulse_noise", 5)
    assert set(np.unique(impulses)) == {0, 128, 255}
    assert np.mean(impulses == 0) == pytest.approx(0.1, rel=0.05)
    assert np.mean(impulses == 255) == pytest.approx(0.1, rel=0.05)


def test_contrast_shrinks_the_distance_from_the_mean() -> None:
    images = natural(3, 32)
    mean = images.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(corrupt(images, "contrast", 2), mean + 0.45 * (images - mean), atol=0.51)


def test_blurs_keep_the_light_and_spread_it() -> None:
    point = np.zeros((8, 33, 33, 3), dtype=np.uint8)
    point[:, 16, 16] = 255
    for kind in ("gaussian_blur", "motion_blur"):
        blurred = corrupt(point, kind, 3)
        assert blurred.max() < 200
        assert blurred[0, 10:23, 10:23].sum() == pytest.approx(point[0].sum(), rel=0.2)
        assert blurred[0, :5].sum() == 0
    moved = corrupt(point, "motion_blur", 5)
    y, x = np.nonzero(moved[0, ..., 0])
    # A line: thin in one direction, long in the other.
    spread = np.linalg.eigvalsh(np.cov(y, x))
    assert spread[1] > 4 * spread[0]


def test_zooming_keeps_the_middle() -> None:
    image = np.zeros((1, 33, 33, 3), dtype=np.uint8)
    image[:, 16, 16] = 255
    zoomed = corrupt(image, "zoom_blur", 3)
    assert np.unravel_index(zoomed[0, ..., 0].argmax(), (33, 33)) == (16, 16)
    ring = np.zeros((1, 33, 33, 3), dtype=np.uint8)
    ring[:, :, 24] = 255
    light = corrupt(ring, "zoom_blur", 5)[0, 16, :, 0].astype(float)
    assert (light * np.arange(33)).sum() / light.sum() > 24.5  # outward


def test_pixelation_has_fewer_pixels() -> None:
    images = natural(2, 32)
    half = corrupt(images, "pixelate", 3)
    blocks = images.reshape(2, 16, 2, 16, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(half, blocks.repeat(2, axis=1).repeat(2, axis=2), atol=0.51)


def test_jpeg_is_pillows() -> None:
    """Two encoders of the same format at the same quality differ by little."""
    import io

    image = natural(1, 64)
    file = io.BytesIO()
    Image.fromarray(image[0]).save(file, "jpeg", quality=18)
    np.testing.assert_allclose(corrupt(image, "jpeg", 3)[0].astype(float), np.array(Image.open(file)), atol=6)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(KINDS), st.integers(1, 5), st.integers(4, 19), st.integers(4, 19), st.integers(0, 3))
def test_any_size_and_number(kind: str, severity: int, height: int, width: int, count: int) -> None:
    images = np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    assert corrupt(images, kind, severity).shape == images.shape


@pytest.mark.parametrize(
    ("images", "kind", "severity", "message"),
    [
        (natural(1, 8), "gausian_noise", 1, "did you mean 'gaussian_noise'"),
        (natural(1, 8), "jpeg", 6, "severity is 1, 2, 3, 4 or 5, not 6"),
        (natural(1, 8).astype(np.float32), "jpeg", 1, r"uint8 images \[N, H, W, 3\], not float32"),
        (natural(1, 8)[0], "jpeg", 1, r"not uint8 \[8, 8, 3\]"),
    ],
)
def test_refusals(images: NDArray[np.uint8], kind: str, severity: int, message: str) -> None:
    with pytest.raises(AttarError, match=message):
        corrupt(images, kind, severity)
