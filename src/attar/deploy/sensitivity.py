"""Which layers int8 hurts, and an int8 file that leaves as few of them in float32 as a bound on the drop allows."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from attar.deploy.artefact import Images
from attar.deploy.onnx_session import load_onnx
from attar.deploy.quantize import Calibrated, calibrate

__all__ = ["MOST_LEFT", "quantize_within", "sensitivities"]

# With more of its layers in float32 a network is no int8 network: what it needs is quantisation-aware distillation.
MOST_LEFT = 0.5
_ASKED = 64  # images that rank the layers


def quantize_within(
    source: Path,
    target: Path,
    calibration: Images,
    accuracy: Callable[[Path], float],
    most_drop: float,
    *,
    per_channel: bool = True,
    method: str = "minmax",
    weight_bits: int = 7,
) -> dict[str, Any]:
    """Write an int8 file that loses at most `most_drop` of the accuracy, with as few layers in float32 as that takes.

    First everything is quantised. Where that loses too much, layers are ranked by `sensitivities`, and the worst 1, 2,
    4, ... stay in float32 until the bound holds (at most half of all), then bisection looks for fewer. Every number of
    layers is judged by its own file, for accuracy need not rise with each of them.

    Args:
        source: float32 ONNX network.
        target: the int8 file; replaced when it exists, and left as it was if anything is refused.
        calibration: training images [N, 3, H, W]; they rank the layers too.
        accuracy: of a file, in 0..1, measured on hold-out images: it chooses layers, and test images choose nothing.
        most_drop: of accuracy(source) - accuracy(target), in 0..1.
        per_channel: as of `quantize_onnx`.
        method: as of `quantize_onnx`.
        weight_bits: as of `quantize_onnx`.

    Returns:
        For JSON: `holds` (whether the bound does; if not, the file is the most accurate one that was tried), `layers`
        (how many there are), `left_in_float32` (nodes), `holdout_float32` and `holdout_int8` (accuracies), `attempts`
        (`left` and `accuracy` of each file that was judged, in order) and `sensitivity` (`layer` and `error` of each,
        the worst first; empty when nothing had to be left).

    Raises:
        AttarError: as `quantize_onnx`.
    """
    calibrated = calibrate(source, calibration, per_channel=per_channel, method=method, weight_bits=weight_bits)
    reference = accuracy(source)
    ranking: list[tuple[tuple[str, ...], float]] = []
    judged: dict[int, float] = {}
    attempt = target.with_name(f".attempt.{target.name}")

    def holds(left: int) -> bool:
        if left not in judged:
            calibrated.write(attempt, excluded=_nodes(ranking[:left]))
            judged[left] = accuracy(attempt)
        return reference - judged[left] <= most_drop

    try:
        if not holds(0):
            ranking = sensitivities(calibrated, source, calibration)
            _search(holds, int(len(ranking) * MOST_LEFT))
    finally:
        with contextlib.suppress(OSError):
            attempt.unlink()
    within = [left for left in judged if holds(left)]
    left = min(within) if within else max(judged, key=lambda count: (judged[count], -count))
    calibrated.write(target, excluded=_nodes(ranking[:left]))
    return {
        "holds": bool(within),
        "layers": len(calibrated.layers),
        "left_in_float32": _nodes(ranking[:left]),
        "holdout_float32": reference,
        "holdout_int8": judged[left],
        "attempts": [{"left": count, "accuracy": value} for count, value in judged.items()],
        "sensitivity": [{"layer": layer[0], "error": error} for layer, error in ranking],
    }


def _search(holds: Callable[[int], bool], most: int) -> None:
    """Ask for 1, 2, 4, ..., `most` layers until the bound holds, then between the last two answers."""
    fails, left = 0, 1
    while left <= most and not holds(left):
        fails, left = left, max(left + 1, min(2 * left, most))
    while left <= most and left - fails > 1:
        middle = (fails + left) // 2
        fails, left = (fails, middle) if holds(middle) else (middle, left)


def _nodes(layers: list[tuple[tuple[str, ...], float]]) -> list[str]:
    return [name for layer, _ in layers for name in layer]


def sensitivities(calibrated: Calibrated, source: Path, images: Images) -> list[tuple[tuple[str, ...], float]]:
    """Rank layers by what int8 does to the logits when they alone are quantised: the worst first.

    Definition: `e_l = ||z_l - z|| / ||z - mean(z)||` over at most 64 images, where z are the logits in float32 and z_l
    those with layer l alone in int8, its input, weights and output; the mean is over images, per class.

    One small file, one session and 64 answers per layer: a ResNet-50 takes a few minutes on two cores, which looking
    at the accuracy without each layer would take per layer. An activation with one large channel shows at the layer
    that writes it and at those that read it, and it needs all of them in float32: they rank next to one another.

    Args:
        calibrated: the network with its ranges.
        source: its float32 file.
        images: [N, 3, H, W].
    """
    some = images[np.linspace(0, len(images) - 1, min(_ASKED, len(images))).round().astype(np.int64)]
    logits = load_onnx(source)(some)
    scale = float(np.linalg.norm(logits - logits.mean(axis=0))) or 1.0
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        for layer in calibrated.layers:
            calibrated.write(path, only=layer)
            errors.append(float(np.linalg.norm(load_onnx(path)(some) - logits)) / scale)
    order = sorted(range(len(errors)), key=lambda place: -errors[place])
    return [(calibrated.layers[place], errors[place]) for place in order]
