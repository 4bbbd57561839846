"""The gate: an artefact must answer real images as the network does, or it is not handed out."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from attar.deploy.artefact import Images, Logits
from attar.errors import AttarError
from attar.train.segmentation import PixelPredictions

__all__ = ["Parity", "gate", "refuse_drop", "refuse_miou_drop", "rounding_error"]

# An artefact sums in another order than PyTorch does. What that may change is measured on the network itself: its
# float32 logits against its float64 ones. On a ResNet-20 of CIFAR-10 that is 2e-7, an ONNX artefact is off by 5e-7, and
# 96 of 100 single weights that are 5 % off change some logit by more than 5e-6, but only 56 of them by more than 1e-4.
# On 30 other architectures an ONNX or ExecuTorch artefact is off by 0.8 to 2.8 of their own rounding errors, which are
# 2e-7 to 2e-5 (benchmarks/export.md).
_ROUNDINGS = 20.0
_LEAST, _MOST = 3e-6, 1e-3  # of the largest logit, whatever was measured
_UNKNOWN = 1e-4  # for networks that do not run in float64
_ROUNDED = 8  # images: float64 is slow
_PASS = 64  # images at a time through the network
_TINY = 1e-38
_SMALLEST = 1e-30  # probability whose logarithm is still told apart


@dataclass(frozen=True)
class Parity:
    """How an artefact compares with the network it was made from, on N real images.

    Attributes:
        images: N.
        max_error: largest |z' - z| of any logit (of any log-probability, where the artefact gives probabilities).
        largest_logit: the largest |z|.
        relative_error: `max_error / largest_logit`.
        tolerance: what `relative_error` may be; None where only agreement is asked for.
        rounding: relative difference of the network's own float32 and float64 logits; None where it has no float64.
        agreement: share of images (in dense tasks: of pixels) that both name alike, in 0..1.
        ties: those named otherwise because their two best logits are nearer than rounding can tell.
        batch_sizes: images at a time that were tried.
    """

    images: int
    max_error: float
    largest_logit: float
    relative_error: float
    tolerance: float | None
    rounding: float | None
    agreement: float
    ties: int
    batch_sizes: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return what was found by name, as JSON has it."""
        return {**dataclasses.asdict(self), "batch_sizes": list(self.batch_sizes)}


def gate(
    network: nn.Module,
    runtime: Callable[[NDArray[Any]], Logits],
    images: Images,
    *,
    shown: NDArray[Any] | None = None,
    probabilities: bool = False,
    exact: bool = False,
    least_agreement: float | None = None,
    batch_sizes: Sequence[int] = (1, 5, 64),
    name: str = "artefact",
) -> Parity:
    """Compare an artefact in its own runtime with the network in PyTorch, and refuse it where they differ.

    Definition: with logits z of the network and z' of the artefact, `max |z' - z| / max |z|` must stay within 20 times
    the network's own rounding error, `max |z_float32 - z_float64| / max |z|`, but at least 3e-6 and at most 1e-3 (1e-4
    for networks that float64 does not run): room for another order of summation, and for hardly any fault. Both must
    name the same class for every image (or pixel), except where the network's two best logits are nearer than twice the
    tolerance, which either may then swap.

    An int8 artefact differs from the network by design, so that errors of its logits prove nothing: only agreement is
    bounded here, and accuracy by `refuse_drop`. Its float32 twin passes the gate before it.

    Args:
        network: in evaluation mode on the CPU: images [N, 3, H, W] -> logits [N, K], in dense tasks [N, K, H, W].
        runtime: of the artefact, any number of images at a time.
        images: real images, normalised as in training.
        shown: the same images as the artefact takes them; default: `images`.
        probabilities: the artefact answers with them, not with logits; logarithms are compared.
        exact: demand the same logits to the last bit, of a runtime that is PyTorch.
        least_agreement: for int8: share of images that both must name alike; nothing else is demanded.
        batch_sizes: images at a time; all images go through the last of them, and 8 batches through each of the others.
        name: what the artefact is called in the sentence.

    Raises:
        AttarError: the artefact is not the network; the sentence says by how much.
    """
    expected = _answers(network, images)
    shown = images if shown is None else shown
    if probabilities:
        expected = np.maximum(_log_softmax(expected), np.log(_SMALLEST))
    largest = float(np.abs(expected).max())
    found = np.zeros_like(expected)
    error = 0.0
    for size in batch_sizes:
        count = len(images) if size == batch_sizes[-1] else min(len(images), 8 * size)
        answers = _in_batches(runtime, shown[:count], size)
        if answers.shape != (count, *expected.shape[1:]):
            wanted = [count, *expected.shape[1:]]
            raise _refusal(name, f"it answers {list(answers.shape)} to {count} images, not {wanted}", size)
        if probabilities:
            answers = np.log(np.maximum(answers, _SMALLEST))
        if not np.isfinite(answers).all():
            raise _refusal(name, "some of its answers are not finite", size)
        # PyTorch itself sums otherwise for another number of images: to the last bit only batch by batch.
        asked = _in_batches(partial(_answers, network), images[:count], size) if exact else expected[:count]
        error = max(error, float(np.abs(answers - asked).max()))
        found[:count] = answers
    same = found.argmax(axis=1) == expected.argmax(axis=1)
    rounding = None if exact or least_agreement is not None else rounding_error(network, images[:_ROUNDED])
    if least_agreement is not None:
        tolerance = None
    elif exact:
        tolerance = 0.0
    else:
        tolerance = _UNKNOWN if rounding is None else min(max(_ROUNDINGS * rounding, _LEAST), _MOST)
    best = np.sort(expected, axis=1)[:, -2:]
    ties = ~same & (best[:, 1] - best[:, 0] <= 2 * (tolerance or 0.0) * largest)
    parity = Parity(
        images=len(images),
        max_error=error,
        largest_logit=largest,
        relative_error=error / max(largest, _TINY),
        tolerance=tolerance,
        rounding=rounding,
        agreement=float(same.mean()),
        ties=int(ties.sum()),
        batch_sizes=tuple(batch_sizes),
    )
    what = f"{len(images)} images" if same.ndim == 1 else f"{same.size} pixels"
    _judge(parity, least_agreement, int((~same & ~ties).sum()), what, name)
    return parity


def rounding_error(network: nn.Module, images: Images) -> float | None:
    """Return the relative difference of a network's float32 and float64 logits; None where it has no float64."""
    try:
        with torch.no_grad():
            finer = copy.deepcopy(network).double()(torch.from_numpy(images).double()).numpy()
    except Exception:  # networks that cast inside raise many kinds
        return None
    expected = _answers(network, images)
    return float(np.abs(finer - expected).max() / max(float(np.abs(finer).max()), _TINY))


def refuse_drop(
    right: NDArray[np.bool_], expected: NDArray[np.bool_], most_drop: float, *, name: str = "artefact"
) -> float:
    """Return the accuracy that an artefact loses, and refuse it where that is more than the bound.

    Definition: with b images that only the network names rightly and c that only the artefact does, of N, the drop is
    (b - c) / N with a standard error of at most sqrt(b + c) / N; it is refused when it exceeds the bound by more than
    two of them, so that no artefact fails for the luck of its test images.

    Args:
        right: [N], whether the artefact names each image rightly.
        expected: [N], whether the network does.
        most_drop: the bound, in 0..1.
        name: what the artefact is called in the sentence.

    Raises:
        AttarError: it loses more.
    """
    lost, won = int((expected & ~right).sum()), int((~expected & right).sum())
    drop = (lost - won) / len(right)
    if drop - 2 * (lost + won) ** 0.5 / len(right) > most_drop:
        raise AttarError(
            f"The {name} loses {100 * drop:.1f} points of accuracy, and {100 * most_drop:.1f} are allowed: train "
            "for int8 with --qat, allow more with --most-drop, or export it in float32."
        )
    return drop


def refuse_miou_drop(
    answers: PixelPredictions, expected: PixelPredictions, most_drop: float, *, name: str = "artefact"
) -> float:
    """Return the mean IoU that an artefact loses, and refuse it where that is more than the bound.

    Definition: the drop D is the network's mean IoU less the artefact's over all N images; its standard error is the
    jackknife's, `sqrt((N - 1) / N sum_n (D_n - mean D_n)^2)` with D_n that of all images but the n-th. It is refused
    when D exceeds the bound by more than two of them.

    Args:
        answers: of the artefact.
        expected: of the network, for the same images.
        most_drop: the bound, in 0..1.
        name: what the artefact is called in the sentence.

    Raises:
        AttarError: it loses more.
    """
    drop = float(_miou(expected, None) - _miou(answers, None))
    images = len(answers.common)
    without = np.array([_miou(expected, n) - _miou(answers, n) for n in range(images)])
    error = float(np.sqrt((images - 1) / images * ((without - without.mean()) ** 2).sum()))
    if drop - 2 * error > most_drop:
        raise AttarError(
            f"The {name} loses {100 * drop:.1f} points of mean IoU, and {100 * most_drop:.1f} are allowed: allow more "
            "with --most-drop, or export it in float32."
        )
    return drop


def _miou(answers: PixelPredictions, left_out: int | None) -> float:
    common, labelled, found = (
        counts.sum(axis=0) - (counts[left_out] if left_out is not None else 0)
        for counts in (answers.common, answers.labelled, answers.found)
    )
    union = labelled + found - common
    return float((common[union > 0] / union[union > 0]).mean()) if union.any() else 0.0


def _judge(parity: Parity, least_agreement: float | None, differ: int, what: str, name: str) -> None:
    if least_agreement is not None:
        if parity.agreement < least_agreement:
            raise _refusal(
                name,
                f"it agrees with the float32 network on {parity.agreement:.1%} of {what}, "
                f"and {least_agreement:.0%} are asked for",
            )
        return
    assert parity.tolerance is not None
    if parity.relative_error > parity.tolerance:
        raise _refusal(
            name,
            f"its logits are off by {parity.relative_error:.1e} of the largest one, and {parity.tolerance:.1e} can be "
            "rounding",
        )
    if differ:
        raise _refusal(name, f"it names {differ} of {what} otherwise")


def _refusal(name: str, reason: str, size: int | None = None) -> AttarError:
    where = f" in batches of {size}" if size is not None else ""
    return AttarError(
        f"The {name} is not the network it was made from: {reason}{where}; nothing was written, so try another format "
        "and report the model's name."
    )


def _answers(network: nn.Module, images: Images) -> Logits:
    with torch.no_grad():
        parts = [network(torch.from_numpy(images[i : i + _PASS])).numpy() for i in range(0, len(images), _PASS)]
    return np.concatenate(parts)


def _in_batches(runtime: Callable[[NDArray[Any]], Logits], images: NDArray[Any], size: int) -> Logits:
    return np.concatenate([np.asarray(runtime(images[i : i + size])) for i in range(0, len(images), size)])


def _log_softmax(logits: Logits) -> Logits:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_probs: Logits = (shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))).astype(np.float32)
    return log_probs
