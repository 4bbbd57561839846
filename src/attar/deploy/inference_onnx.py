"""Say what images show: `python inference.py IMAGE [IMAGE...] [--top K] [--json]`.

This file needs Python 3.9, onnxruntime, numpy and Pillow (`pip install onnxruntime numpy pillow`) and nothing else; it
finds `model.onnx` beside itself. Images are prepared exactly as they were when the model's accuracy was measured.

From Python:
    >>> from inference import Classifier  # doctest: +SKIP
    >>> classifier = Classifier()  # doctest: +SKIP
    >>> classifier("photo.jpg")[0]  # doctest: +SKIP
    ('cat', 0.9312)
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import onnxruntime
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError as missing:
    if __name__ != "__main__":
        raise
    print(f"A package cannot be imported ({missing}): pip install onnxruntime numpy pillow.", file=sys.stderr)
    sys.exit(2)

__all__ = ["Classifier", "InferenceError", "main", "pixels_of"]

_ORIENTATION = 0x0112


class InferenceError(ValueError):
    """What the user can mend, in one sentence."""


class Classifier:
    """The model with all that it must know about images.

    Args:
        folder: that holds `model.onnx`; default: the one this file lies in.
        threads: for one answer; 0: as many as the machine has.

    Raises:
        InferenceError: there is no model, or one that onnxruntime cannot read.
    """

    def __init__(self, folder: str | Path = Path(__file__).parent, threads: int = 0) -> None:
        path = Path(folder) / "model.onnx"
        if not path.is_file():
            raise InferenceError(f"There is no '{path}': keep the model beside this file.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # its warnings help nobody here
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own kinds have no common base
            raise InferenceError(f"'{path}' cannot be read ({_first_line(error)}): copy or export it again.") from error
        told = self._told(path)
        self.classes: list[str] = told["classes"]
        self.size: tuple[int, int] = tuple(told["image_size"])
        self.crop: float = told["crop"]
        self.inside: bool = told["preprocessing_inside"]
        # (x / 255 - mean) / std as one multiply and one add, rounded as in training.
        mean, std = np.asarray(told["mean"]), np.asarray(told["std"])
        self.scale, self.bias = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)

    def __call__(self, image: str | Path | bytes) -> list[tuple[str, float]]:
        """Return (class, probability) of an image, most probable first.

        Args:
            image: its file, or the file's bytes.

        Raises:
            InferenceError: no such file, or no image.
        """
        probabilities = self.probabilities(pixels_of(image, self.size, self.crop))
        order = np.argsort(-probabilities, kind="stable")
        return [(self.classes[k], float(probabilities[k])) for k in order]

    def probabilities(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the probability [K] of every class for prepared pixels, uint8 [H, W, 3]."""
        wanted = self.session.get_inputs()[0]
        image = pixels if self.inside else (pixels.astype(np.float32) * self.scale + self.bias).transpose(2, 0, 1)
        # A model of a fixed batch is shown the image as often as it wants.
        copies = wanted.shape[0] if isinstance(wanted.shape[0], int) else 1
        images = np.ascontiguousarray(np.broadcast_to(image, (copies, *image.shape)))
        answer = self.session.run(None, {wanted.name: images})[0][0].astype(np.float64)
        if self.inside:
            return np.asarray(answer)
        powers = np.exp(answer - answer.max())
        return np.asarray(powers / powers.sum())

    def _told(self, path: Path) -> dict[str, Any]:
        """Read what the model carries, else `export.json` beside it."""
        carried = self.session.get_modelmeta().custom_metadata_map
        beside = path.with_name("export.json")
        try:
            if "classes" in carried:
                return {key: json.loads(carried[key]) for key in _TOLD}
            told = json.loads(beside.read_text(encoding="utf-8"))
            return {key: told[key] for key in _TOLD}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InferenceError(f"'{path}' does not tell its classes: keep export.json beside it.") from error


_TOLD = ("classes", "image_size", "mean", "std", "crop", "preprocessing_inside")


def pixels_of(image: str | Path | bytes, size: tuple[int, int], crop: float) -> np.ndarray[Any, Any]:
    """Return an image as the model sees it, uint8 RGB [H, W, 3].

    It is turned upright as its EXIF orientation says, resized (bilinear, antialiased) so that it just covers
    size / crop, and the centre of size = (height, width) is cut out.

    Raises:
        InferenceError: no such file, or no image.
    """
    data, name = (image, "the image") if isinstance(image, bytes) else (_read(Path(image)), f"'{image}'")
    try:
        decoded = _decode(data)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise almost anything on a damaged file
        reason = "it is not an image" if isinstance(error, UnidentifiedImageError) else _first_line(error)
        raise InferenceError(f"Cannot read {name} ({reason}): give an image file.") from error
    height, width = size
    return np.array(_centre(_cover(decoded, round(height / crop), round(width / crop)), height, width))


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InferenceError(f"There is no file '{path}': check the path.") from error
    except IsADirectoryError as error:
        raise InferenceError(f"'{path}' is a folder: give image files.") from error
    except OSError as error:
        raise InferenceError(f"Cannot read '{path}' ({error.strerror}): check the path and its permissions.") from error
    if not data:
        raise InferenceError(f"'{path}' is empty: give an image file.")
    return data


def _decode(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd palettes and metadata
        image: Image.Image = Image.open(io.BytesIO(data))
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            values = np.asarray(image)
            if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
                raise ValueError("it has 32-bit pixels, not 8 or 16")
            image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
    if (image.height, image.width) != (height, width):
        scale = max(height / image.height, width / image.width)
        covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(covering, Image.Resampling.BILINEAR)
    return _centre(image, height, width)


def _centre(image: Image.Image, height: int, width: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def main() -> int:
    """Answer for the images on the command line; 2 where an image or the model cannot be read."""
    parser = argparse.ArgumentParser(description="Say what images show.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="the K most probable classes (default: 1)")
    parser.add_argument("--json", action="store_true", help="answer in JSON")
    given = parser.parse_args()
    if given.top < 1:
        parser.error(f"--top must be at least 1, not {given.top}")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names a console cannot show
    answers, refused = [], False
    try:
        classifier = Classifier()
    except InferenceError as error:
        print(error, file=sys.stderr)
        return 2
    for image in given.images:
        try:
            best = classifier(image)[: given.top]
        except InferenceError as error:
            print(error, file=sys.stderr)
            refused = True
            continue
        answers.append({"image": image, "answers": [{"class": name, "probability": p} for name, p in best]})
        if not given.json:
            print(f"{image}: " + ", ".join(f"{name} {probability:.6f}" for name, probability in best))
    if given.json:
        print(json.dumps(answers, indent=2, ensure_ascii=False))
    return 2 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
