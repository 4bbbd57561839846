"""Heads: classifiers behind shallow stages of any network, and the networks that end at them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attar.anatomy.split import split
from attar.anatomy.stages import Stage
from attar.anatomy.taps import Tap, to_nchw
from attar.errors import AttarError
from attar.functional import average_pool

__all__ = ["AttentionGate", "EarlyExit", "Exit", "ExitEnsemble", "ExitOutput", "early_exits", "separable"]

# A kernel as wide as the whole reduction grows with its square: beyond this the map is averaged first.
_LARGEST_KERNEL = 8


class ExitOutput(NamedTuple):
    """What a head makes of a stage's map: a map [N, D, h, w], its mean over positions [N, D], logits [N, K] (dense:
    [N, K, H, W]).
    """

    map: Tensor
    features: Tensor
    logits: Tensor


class Exit(nn.Module):
    """A neck that brings a shallow stage's map to the width of the deepest features, and a linear classifier.

    Shapes: [N, C_i, H_i, W_i] -> map [N, features, h, w], features [N, features], logits [N, classes]; h, w are those
    of the last stage, or near them where the resolutions do not divide evenly. A dense head classifies every position
    of its map and brings the logits bilinearly to the images' size: [N, classes, H, W].

    Args:
        stage: where the head stands.
        last: the deepest stage.
        features: width of the deepest features.
        classes: K.
        kind: "bottleneck" is 1x1 to C_L / 4, k x k with stride k = ceil(H_i / H_L), 1x1 to `features`, each with
            batch norm and ReLU; above k = 8 the map is first averaged down to 8 times the last one. "attention" is an
            `AttentionGate`, then one `separable` convolution for every halving of the resolution (one of stride 1
            where there is none), the channels doubling up to `features`.
        norm: batch norm in the neck.
        dense: one answer per pixel instead of one per image.

    Source: Zhang et al., "Be Your Own Teacher", ICCV 2019. "attention" is the released journal version; the conference
    paper does not print its layers, and "bottleneck" is luanyunteng/pytorch-be-your-own-teacher's reading of it.
    """

    def __init__(
        self,
        stage: Stage,
        last: Stage,
        features: int,
        classes: int,
        kind: Literal["bottleneck", "attention"] = "bottleneck",
        norm: bool = True,
        *,
        dense: bool = False,
    ) -> None:
        super().__init__()
        make = _bottleneck if kind == "bottleneck" else _attention
        self.neck = make(stage, last, features, norm)
        self.classifier = nn.Conv2d(features, classes, 1) if dense else nn.Linear(features, classes)
        self.dense = dense

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> ExitOutput:
        """Return map, features and logits; a dense head must be told the images' size (height, width)."""
        deep = self.neck(x)
        features = average_pool(deep)
        if not self.dense:
            return ExitOutput(deep, features, self.classifier(features))
        logits = F.interpolate(self.classifier(deep), size=size, mode="bilinear", align_corners=False)
        return ExitOutput(deep, features, logits)


def _bottleneck(stage: Stage, last: Stage, features: int, norm: bool) -> nn.Sequential:
    inner = max(1, last.channels // 4)
    (shrink_h, kernel_h), (shrink_w, kernel_w) = _steps(stage.height, last.height), _steps(stage.width, last.width)
    kernel = (kernel_h, kernel_w)
    return nn.Sequential(
        nn.AvgPool2d((shrink_h, shrink_w)) if max(shrink_h, shrink_w) > 1 else nn.Identity(),
        nn.Conv2d(stage.channels, inner, 1),
        _norm(inner, norm),
        nn.ReLU(),
        nn.Conv2d(inner, inner, kernel, stride=kernel),
        _norm(inner, norm),
        nn.ReLU(),
        nn.Conv2d(inner, features, 1),
        _norm(features, norm),
        nn.ReLU(),
    )


def _steps(size: int, least: int) -> tuple[int, int]:
    """Return by how much a side is first averaged down, and the kernel that then brings it to `least` or near it."""
    shrink = math.ceil(max(1, math.ceil(size / least)) / _LARGEST_KERNEL)
    return shrink, max(1, math.ceil(size // shrink / least))


def _attention(stage: Stage, last: Stage, features: int, norm: bool) -> nn.Sequential:
    halvings = max(0, math.ceil(math.log2(max(stage.height / last.height, stage.width / last.width))))
    steps, channels = max(1, halvings), stage.channels
    neck = nn.Sequential(AttentionGate(channels, norm))
    for step in range(steps):
        outputs = features if step == steps - 1 else min(2 * channels, features)
        neck.append(separable(channels, outputs, 2 if halvings else 1, norm))
        channels = outputs
    return neck


def _norm(channels: int, norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm else nn.Identity()


def separable(inputs: int, outputs: int, stride: int = 2, norm: bool = True) -> nn.Sequential:
    """Two depthwise separable 3x3 convolutions, the first with the stride, the second with the new width.

    Shapes: [N, inputs, H, W] -> [N, outputs, ceil(H / stride), ceil(W / stride)].
    """

    def depthwise(stride: int) -> nn.Conv2d:
        return nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)

    return nn.Sequential(
        depthwise(stride),
        nn.Conv2d(inputs, inputs, 1, bias=False),
        _norm(inputs, norm),
        nn.ReLU(),
        depthwise(1),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        _norm(outputs, norm),
        nn.ReLU(),
    )


class AttentionGate(nn.Module):
    """Weigh every position and channel of a map by what lies around it: `x * sigmoid(up(relu(bn(separable(x)))))`.

    The gate is computed at half the resolution and enlarged bilinearly. Shapes: [N, C, H, W] -> the same.
    """

    def __init__(self, channels: int, norm: bool = True) -> None:
        super().__init__()
        self.gate = nn.Sequential(separable(channels, channels, 2, norm), _norm(channels, norm), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighed map."""
        gate = F.interpolate(self.gate(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return x * torch.sigmoid(gate)


class EarlyExit(nn.Module):
    """A network that ends at one head: images -> that head's logits; nothing behind the stage is computed."""

    def __init__(self, trunk: nn.Module, position: int, tap: Tap, head: Exit) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head
        self._position, self._tap = position, tap

    def forward(self, images: Tensor) -> Tensor:
        """Return the head's logits."""
        deep = to_nchw(self.trunk(images)[self._position], self._tap)
        logits: Tensor = self.head(deep, (images.shape[2], images.shape[3])).logits
        return logits


class ExitEnsemble(nn.Module):
    """The whole network with all its heads: images [N, C, H, W] -> the mean of all exits' logits."""

    def __init__(self, trunk: nn.Module, tail: nn.Module, taps: Sequence[Tap], heads: Sequence[Exit]) -> None:
        super().__init__()
        self.trunk, self.tail, self.heads = trunk, tail, nn.ModuleList(heads)
        self._taps = tuple(taps)

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean logits, the deepest exit's among them."""
        carried, maps = self.trunk(images)
        exits = zip(self.heads, maps, self._taps, strict=True)
        logits = [head(to_nchw(x, tap), (images.shape[2], images.shape[3])).logits for head, x, tap in exits]
        return torch.stack([*logits, self.tail(*carried)]).mean(dim=0)


def early_exits(
    student: nn.Module,
    stages: Sequence[Stage],
    heads: Sequence[Exit],
    images: Tensor,
    answer: Callable[[Any], Tensor] | None = None,
) -> dict[str, nn.Module]:
    """Return the networks that end at every head ("exit1" the shallowest) and all of them together ("ensemble").

    They share the student's and the heads' parameters. What torch.fx cannot cut exactly is left out.

    Args:
        student: the network that the heads stand on.
        stages: where, shallow to deep.
        heads: as many.
        images: an example batch for the proof of every cut.
        answer: finds the logits among what the student returns (see `split`).
    """
    networks: dict[str, nn.Module] = {}
    for number, (stage, head) in enumerate(zip(stages, heads, strict=True), start=1):
        try:
            halves = split(student, stage.name, images, answer=answer)
        except AttarError:
            continue
        position = next(i for i, tap in enumerate(halves.carried) if tap and tap.module == stage.name)
        networks[f"exit{number}"] = EarlyExit(halves.trunk, position, stage.tap, head)
        if number == len(stages) and isinstance(halves.trunk, fx.GraphModule):
            trunk = _with_maps(halves.trunk, [stage.name for stage in stages])
            if trunk is not None:
                networks["ensemble"] = ExitEnsemble(trunk, halves.tail, [stage.tap for stage in stages], heads)
    return networks


def _with_maps(trunk: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule | None:
    """Let a trunk also return what the named modules return, as (carried, maps); None where they are not traced."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    carried = graph.graph_copy(trunk.graph, copies)
    called = {str(node.target): copies[node] for node in trunk.graph.nodes if node.op == "call_module"}
    if not set(names) <= called.keys():
        return None
    maps = []
    for name in names:
        # Copied where it arises: what follows may overwrite it in place.
        with graph.inserting_after(called[name]):
            maps.append(graph.call_method("clone", (called[name],)))
    graph.output((carried, tuple(maps)))
    return fx.GraphModule(trunk, graph, class_name="Trunk")
