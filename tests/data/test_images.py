from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from attar.data.images import BadImageError, decode, fit, native_size


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_png_mode_becomes_rgb(mode: str) -> None:
    grey = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (4, 3)))
    image = decode(encoded(grey.convert(mode)), "x")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(grey.convert("RGB")))


def test_cmyk_jpeg_becomes_rgb() -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 30))
    pixels = np.asarray(decode(encoded(red.convert("CMYK"), "JPEG", quality=95), "x")).astype(int)
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels - [200, 30, 30]).max() <= 6


def test_transparent_palette_keeps_its_colours() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    pixels = np.asarray(decode(encoded(image, transparency=0), "x"))
    assert (pixels == [10, 20, 30]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    deep = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    pixels = np.asarray(decode(encoded(Image.fromarray(deep), kind), "x"))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 1, 128, 255])


def test_32_bit_float_is_refused() -> None:
    with pytest.raises(BadImageError, match="32-bit"):
        decode(encoded(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF"), "x.tif")


def test_orientation_is_applied() -> None:
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, "JPEG", exif=exif)
    assert decode(data, "x").size == (4, 6)
    assert native_size(data) == (6, 4)


@pytest.mark.parametrize(
    ("damage", "reason"), [(lambda _: b"", "empty"), (lambda _: b"plain text", "not an image"), (None, "truncated")]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_image_is_named_with_its_reason(damage: object, reason: str, kind: str) -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    data = damage(whole) if callable(damage) else whole[: len(whole) // 2]
    with pytest.raises(BadImageError) as caught:
        decode(data, "'cat/1.png'")
    message = str(caught.value)
    assert message.startswith("Cannot read image 'cat/1.png' (")
    assert reason in message
    assert "--skip-bad-images" in message
    assert "\n" not in message


def test_reduced_decoding_keeps_the_picture_and_notices_truncation() -> None:
    ramp = np.tile(np.linspace(0, 255, 800).astype(np.uint8), (640, 1))
    whole = encoded(Image.fromarray(ramp), "JPEG")
    image = decode(whole, "x", draft=150)
    assert image.size == (200, 160)
    assert native_size(whole) == (640, 800)
    assert np.abs(np.asarray(image).astype(float).mean((0, 2)) - ramp[0].reshape(200, 4).mean(1)).max() < 3
    with pytest.raises(BadImageError, match="truncated"):
        decode(whole[: len(whole) // 2], "x", draft=150)


def test_bad_image_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadImageError("'a.png'", "it is empty")))
    assert (error.name, error.reason) == ("'a.png'", "it is empty")
    assert "a.png" in str(error)


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (30, 10), (17, 16), (40, 64)])
def test_fit_covers_and_crops_the_centre(size: tuple[int, int]) -> None:
    ramp = np.zeros((17, 16, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 16), np.linspace(0, 255, 17)[:, None]
    fitted = np.asarray(fit(Image.fromarray(ramp), size)).astype(float)
    assert fitted.shape == (*size, 3)
    # The ramps are odd about the centre, so a crop centred to half a pixel keeps their mean at half range.
    half_pixel = 255 / min(size) / 2 + 2
    assert abs(fitted[..., 0].mean() - 127.5) < half_pixel
    assert abs(fitted[..., 1].mean() - 127.5) < half_pixel


def test_fit_leaves_the_asked_size_alone() -> None:
    image = Image.new("RGB", (16, 20))
    assert fit(image, (20, 16)) is image
