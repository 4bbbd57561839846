"""Quantisation-aware distillation: the float32 student teaches its own int8 self, through torchao's PT2E.

What comes back is the student itself, the same class and keys in float32, with weights that int8 hurts less: it is
exported, quantised and gated like any other. PT2E's converted module is not handed on: it would be a second int8, with
ranges and roundings of its own beside those of `quantize_onnx` and of ExecuTorch.

Batch norm is folded into the convolutions before the first step: its statistics are frozen, and the network that trains
is the one that will run. PT2E's own way of training with batch norm would make another network of many students, since
it puts an epsilon of 1e-5 and a momentum of 0.1 into every layer, whatever it has (timm's EfficientNet: 1e-3).
Afterwards the folded weights are unfolded, and that is proved.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, fx, nn

from attar.data import Loader, Normalization, augmentation, make_sampler
from attar.deploy.artefact import Candidate
from attar.deploy.program import export_program, refusal, require, silence
from attar.errors import AttarError
from attar.functional import kl_divergence
from attar.spec import TrainSpec

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["LikeOnnxruntime", "prepare", "quantization_aware"]

_NAME = "Quantisation-aware distillation"
_SMALLEST = 1e-6  # of batch norm's factor, below which it is no number to divide by
_EXACT = 1e-3  # of the logits' deviation: rounding of float32 through a whole network

_aten = torch.ops.aten
_CONVOLUTIONS = (_aten.conv2d.default, _aten.conv2d.padding)
_LINEAR = (_aten.linear.default,)
_POINTWISE = (
    *(_aten.add.Tensor, _aten.add_.Tensor, _aten.mul.Tensor, _aten.mul_.Tensor, _aten.cat.default),
    *(_aten.avg_pool2d.default, _aten.adaptive_avg_pool2d.default),
)
_ACTIVATIONS = (
    *(_aten.relu.default, _aten.relu_.default, _aten.hardtanh.default, _aten.hardtanh_.default),
    *(_aten.clamp.default, _aten.clamp_.default),
)


def quantization_aware(
    candidate: Candidate,
    *,
    epochs: int = 3,
    lr: float = 5e-5,
    batch: int = 128,
    temperature: float = 4.0,
    seed: int = 0,
    label_weight: float = 0.0,
    weight_bits: int = 7,
    progress: Progress | None = None,
    console: Console | None = None,
) -> nn.Module:
    """Train a copy of a student so that int8 costs it less; only the run's training images are seen.

    Definition: with z the float32 student's logits and q those of the copy, whose weights and activations are rounded
    as in int8 while gradients pass (straight through), Adam minimises `KL(softmax(z / T) || softmax(q / T)) T^2`, plus
    `label_weight` times the cross-entropy of q, at a learning rate that falls to zero along a half cosine. Images are
    augmented as in the run. A function of its arguments, on the CPU.

    Args:
        candidate: the student; it stays as it is.
        epochs: passes over the training images.
        lr: of the first step. A student whose int8 is nearly as good as itself is led astray by larger ones: of a
            ResNet-20 on CIFAR-10, int8 answered 2.2 % of the hold-out images otherwise than float32, after 117 steps
            from 5e-5 0.6 %, and more than before after as many from 3e-4. Where int8 hurts much, 1e-3 learns faster.
        batch: images a step.
        temperature: T > 0.
        seed: of order and augmentation.
        label_weight: of the cross-entropy; 0 follows the float32 student alone.
        weight_bits: as of `quantize_onnx`; 7 serves ExecuTorch's 8 too.
        progress: where it is shown.
        console: where it is shown without `progress`, if it is a terminal.

    Returns:
        A network of the same class and keys in float32, in evaluation mode: for `quantize_onnx` after export, or any
        other format's int8, in place of `candidate.network`.

    Raises:
        AttarError: torchao is missing, PT2E has not the network, a number that makes no sense, or a loss that is none.
    """
    require(("torchao.quantization.pt2e",), _NAME, "executorch")
    for name, value in (("epochs", epochs), ("lr", lr), ("batch", batch), ("temperature", temperature)):
        if not (value > 0 and math.isfinite(value)):
            raise AttarError(f"{_NAME} needs {name} above 0, not {value}.")
    loader = _loader(candidate, batch, seed)
    images = torch.zeros(loader.sampler.batch, 3, *candidate.source.image_size)
    teacher = candidate.network
    student = prepare(teacher, images, LikeOnnxruntime(weight_bits))
    optimizer = torch.optim.Adam(student.parameters(), lr)
    total = epochs * loader.steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / total)) / 2)
    with _shown(progress, console) as shown:
        task = shown.add_task("quantisation-aware distillation", total=total)
        for epoch in range(epochs):
            for sample in loader.epoch(epoch):
                shot = sample.images.contiguous()
                with torch.no_grad():
                    target = teacher(shot)
                logits = _answered(student, shot, lr)
                loss = kl_divergence(logits, target, temperature)
                if label_weight:
                    loss = loss + label_weight * F.cross_entropy(logits, sample.targets)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                shown.advance(task)
        shown.remove_task(task)
    return _taken_back(student, teacher, shot)


def _answered(student: nn.Module, images: Tensor, lr: float) -> Tensor:
    try:
        logits: Tensor = student(images)
        lost = not bool(logits.isfinite().all())
    except RuntimeError as error:  # fake quantisers have no zero point for a range that is not finite
        if "zero_point" not in str(error):
            raise
        lost = True
    if lost:
        raise AttarError(f"{_NAME} has lost its way: choose a learning rate below {lr:g}.")
    return logits


def prepare(network: nn.Module, images: Tensor, quantizer: Any) -> fx.GraphModule:
    """Return a copy of a network, exported, batch norm folded, with PT2E's observers or fake quantisers in it.

    For `LikeOnnxruntime`, ExecuTorch's `XNNPACKQuantizer` and any other; `convert_pt2e` takes what comes back. Its
    parameters can be trained and keep their names, a convolution's new bias being its weight's name and `_bias`.

    Args:
        network: in evaluation mode.
        images: example [N, 3, H, W]; N is fixed.
        quantizer: of PT2E.

    Raises:
        AttarError: torch.export or PT2E refuses the network.
    """
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    own = copy.deepcopy(network).eval().requires_grad_()
    program = export_program(own, images, None, "PT2E")
    with silence():
        try:
            return prepare_pt2e(program.module(), quantizer)  # type: ignore[no-any-return]
        except Exception as error:  # PT2E raises many kinds
            raise refusal(network, error, "PT2E") from error


class LikeOnnxruntime:
    """A PT2E quantiser that rounds, in training, what `quantize_onnx` rounds: the same places, ranges and steps.

    Convolutions and linear layers: input, and weight per output channel, symmetric. Additions, products, concatenations
    and poolings: inputs. The outputs of all but linear layers, after ReLU or Clip. ExecuTorch's `XNNPACKQuantizer`
    rounds before ReLU6, in steps that are made for what ReLU6 then cuts off.

    Args:
        weight_bits: 7 or 8.
    """

    def __init__(self, weight_bits: int = 7) -> None:
        from torchao.quantization.pt2e import (
            FakeQuantize,
            FusedMovingAvgObsFakeQuantize,
            MovingAverageMinMaxObserver,
            MovingAveragePerChannelMinMaxObserver,
        )
        from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec

        most = 64 if weight_bits == 7 else 127
        self._annotation = QuantizationAnnotation
        self._activation = QuantizationSpec(
            dtype=torch.int8,
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_tensor_affine,
            observer_or_fake_quant_ctr=FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver),
        )
        self._weight = QuantizationSpec(
            dtype=torch.int8,
            quant_min=-most,
            quant_max=most,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            # A weight's range is what it is now; averaged over steps it would lag behind. Not the fused form, whose
            # steps are larger by one part in 2 x `most`.
            observer_or_fake_quant_ctr=FakeQuantize.with_args(
                observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0
            ),
        )

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        """Leave the graph as it is."""
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Have nothing to add."""

    def prepare_obs_or_fq_callback(self, model: fx.GraphModule, edges: Any) -> None:
        """Take the quantisers as they come."""

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Say at every node what of its inputs and output is rounded."""
        for node in model.graph.nodes:
            if node.target in (*_CONVOLUTIONS, *_LINEAR):
                self._mark(node, {node.args[0]: self._activation, node.args[1]: self._weight})
            elif node.target in _POINTWISE:
                read = [argument for argument in node.all_input_nodes if _is_map(argument)]
                self._mark(node, dict.fromkeys(read, self._activation))
            else:
                continue
            if node.target not in _LINEAR:
                self._mark(_activated(node), output=self._activation)
        return model

    def _mark(self, node: fx.Node, inputs: dict[fx.Node, Any] | None = None, output: Any = None) -> None:
        known = node.meta.get("quantization_annotation")
        inputs = inputs or (known.input_qspec_map if known else {})
        node.meta["quantization_annotation"] = self._annotation(
            input_qspec_map=inputs, output_qspec=output, _annotated=True
        )


def _is_map(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op != "get_attr" and isinstance(value, Tensor) and value.dtype == torch.float32 and value.ndim > 1


def _activated(node: fx.Node) -> fx.Node:
    """Return the ReLU or Clip that a node alone feeds, else the node."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in _ACTIVATIONS else node


@dataclass(frozen=True)
class _Folded:
    """Names of the parameters and buffers of a convolution and of the batch norm that PT2E folds into it."""

    weight: str
    bias: str | None
    scale: str | None
    shift: str | None
    mean: str | None
    variance: str | None
    epsilon: float


def _foldings(network: nn.Module, images: Tensor) -> list[_Folded]:
    """Find them as PT2E does, in the exported graph."""
    nodes: list[Any] = list(export_program(network, images, None, "PT2E").module().graph.nodes)
    found = []
    for node in nodes:
        before: Any = node.args[0] if node.target is _aten.batch_norm.default else None
        if before is not None and before.target in _CONVOLUTIONS:
            weight, bias = before.args[1], before.args[2] if len(before.args) > 2 else None
            names = [None if argument is None else str(argument.target) for argument in (bias, *node.args[1:5])]
            found.append(_Folded(str(weight.target), names[0], names[1], names[2], names[3], names[4], node.args[7]))
    return found


def _taken_back(trained: fx.GraphModule, original: nn.Module, images: Tensor) -> nn.Module:
    """Return the original network with the trained weights, batch norm unfolded.

    With s = scale / sqrt(variance + eps), folding made W' = W s and b' = (b - mean) s + shift: so W = W' / s and
    shift = b' - (b - mean) s. Where s is zero, as pruning leaves it, it becomes 1.
    """
    from torchao.quantization.pt2e import disable_fake_quant, disable_observer

    network = copy.deepcopy(original)
    with torch.no_grad():
        learnt = dict(trained.named_parameters())
        for name, value in network.named_parameters():
            value.copy_(learnt.get(name, value))
        for folded in _foldings(original, images):
            _unfold(folded, network, original, trained)
        trained.apply(disable_fake_quant)
        trained.apply(disable_observer)
        wanted, got = trained(images), network(images)
    if not bool((wanted - got).abs().max() <= _EXACT * wanted.std() + 1e-6):
        raise AttarError(
            f"What {type(original).__name__} has learnt under PT2E cannot be put back into it: export it without "
            "quantisation-aware distillation."
        )
    return network.requires_grad_(False)


def _unfold(folded: _Folded, network: nn.Module, original: nn.Module, trained: fx.GraphModule) -> None:
    # Batch norm's own parameters take no part in the training: those of the original are those that were folded.
    if folded.mean is None or folded.variance is None or folded.shift is None or folded.scale is None:
        raise AttarError(f"The batch norm behind '{folded.weight}' has no scale and shift: it cannot learn for int8.")
    get = attrgetter(folded.weight)
    weight, bias = get(trained), attrgetter(folded.bias or f"{folded.weight}_bias")(trained)
    deviation = (attrgetter(folded.variance)(original) + folded.epsilon).sqrt()
    mean = attrgetter(folded.mean)(original)
    scale = attrgetter(folded.scale)(original)
    factor = scale / deviation
    lost = factor.abs() < _SMALLEST
    factor = torch.where(lost, torch.ones_like(factor), factor)
    attrgetter(folded.scale)(network).copy_(torch.where(lost, deviation, scale))
    get(network).copy_(weight / factor.reshape(-1, *[1] * (weight.ndim - 1)))
    before = attrgetter(folded.bias)(original) if folded.bias is not None else torch.zeros_like(mean)
    if folded.bias is not None:
        attrgetter(folded.bias)(network).copy_(before)
    attrgetter(folded.shift)(network).copy_(bias - (before - mean) * factor)


def _loader(candidate: Candidate, batch: int, seed: int) -> Loader:
    """Return the run's training images, augmented as in the run."""
    source, path = candidate.source, candidate.folder / "spec.json"
    chosen = TrainSpec.load(path).augment if path.is_file() else None
    return Loader(
        source.train,
        make_sampler(None, source.train.targets, batch, seed),
        augmentation(chosen or source.default_augmentation),
        Normalization(candidate.student.mean, candidate.student.std),
        seed=seed,
    )


def _shown(progress: Progress | None, console: Console | None) -> Any:
    if progress is not None:
        return _Given(progress)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = console is not None and console.is_terminal and not console.quiet
    return Progress(*columns, console=console, transient=True, disable=not shown)


class _Given:
    """A progress that somebody else opens and closes."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __enter__(self) -> Progress:
        return self._progress

    def __exit__(self, *_: object) -> None:
        """Leave it open."""
