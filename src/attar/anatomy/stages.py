"""Stages: where a network changes resolution, found for any network in one probe pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attar.anatomy.taps import Layout, Tap
from attar.errors import AttarError, unknown_name

__all__ = ["Anatomy", "Stage", "survey"]


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Stage:
    """A maximal run of layers at one resolution; `tap` reads its output as a map [N, channels, height, width]."""

    name: str
    channels: int
    height: int
    width: int
    reduction: float
    tap: Tap


@dataclass(frozen=True)
class Call:
    """One call of one module during the probe pass, with the shapes of its first argument and its output."""

    module: str
    shape: tuple[int, ...] | None
    input_shape: tuple[int, ...] | None
    leaf: bool
    layers: int  # weights with two axes or more, in the module and below it
    container: bool = False  # it only calls its children


@dataclass(frozen=True)
class Anatomy:
    """What is known of a network after one probe pass.

    Args:
        stages: its stages, shallow to deep; the stem is not one. Networks of constant resolution (plain vision
            transformers) are cut into quarters of equal depth.
        classifier: path of the last linear layer, or None.
        embedding: where the classifier's input [N, D] is read, or None (see `Outputs.embedding`).
        embedding_dim: D.
        input_shape: (C, H, W) of the probe images.
        calls: every module call of the pass in order of completion.
    """

    stages: tuple[Stage, ...]
    classifier: str | None
    embedding: Tap | None
    embedding_dim: int
    input_shape: tuple[int, int, int]
    calls: tuple[Call, ...] = field(repr=False)
    prefix_tokens: int | None = None

    def find(self, name: str) -> Stage:
        """Return the stage of that name, or describe the output of any other module as if it were one.

        Raises:
            AttarError: there is no such stage or module (with the nearest name), or its output is no feature map.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        shapes = {call.module: call.shape for call in self.calls}
        if name not in shapes:
            raise unknown_name("stage or module", name, [n for n in shapes if n])
        described = _as_stage(name, shapes[name], self.input_shape, None, self.prefix_tokens)
        if described is None:
            raise AttarError(f"Module '{name}' returns {shapes[name]}, which is no feature map: choose another stage.")
        return described


def survey(
    network: nn.Module,
    images: Tensor,
    stages: Sequence[str] | None = None,
    num_classes: int | None = None,
    *,
    dense: bool = False,
) -> tuple[Anatomy, Any]:
    """Find the stages of any network in one evaluation pass; return them with the network's output.

    Stages come from timm's `feature_info` where its names exist as modules, else from where the resolution of module
    outputs drops along the pass; `stages` (module paths) overrides both.

    Args:
        network: takes [N, C, H, W].
        images: an example batch, [N, C, H, W].
        stages: module paths to use as stages instead.
        num_classes: width of the output, to recognise the classifier.
        dense: the network answers for every pixel: its stages are those of its encoder, before resolution grows again.

    Raises:
        AttarError: the network refuses the images, a named stage does not exist, or no stage could be found.
    """
    calls, output = _record_calls(network, images)
    input_shape = (images.shape[1], images.shape[2], images.shape[3])
    prefix = getattr(network, "num_prefix_tokens", None)
    prefix = prefix if isinstance(prefix, int) else None
    classes = num_classes if num_classes is not None else (output.shape[-1] if isinstance(output, Tensor) else None)
    classifier = _find_classifier(calls, classes)
    bare = Anatomy(
        stages=(),
        classifier=classifier.module if classifier else None,
        embedding=Tap(classifier.module, side="input") if classifier else None,
        embedding_dim=classifier.input_shape[1] if classifier and classifier.input_shape else 0,
        input_shape=input_shape,
        calls=tuple(calls),
        prefix_tokens=prefix,
    )
    if stages is not None:
        found = [bare.find(name) for name in stages]
    else:
        found = _from_feature_info(network, calls, input_shape, prefix) or _from_shapes(
            _encoder(calls, input_shape, prefix) if dense else calls, input_shape, prefix, classes
        )
    if not found:
        raise AttarError(
            f"No stage was found in {type(network).__name__}: name the modules whose outputs are feature maps "
            "with stages=[...]."
        )
    embedding_dim = bare.embedding_dim or found[-1].channels
    return Anatomy(
        **{**bare.__dict__, "stages": tuple(found), "embedding_dim": embedding_dim},
    ), output


def _record_calls(network: nn.Module, images: Tensor) -> tuple[list[Call], Any]:
    calls: list[Call] = []
    handles = []

    def hook_for(name: str, leaf: bool, layers: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            container = isinstance(module, _CONTAINERS)
            shape = tuple(output.shape) if isinstance(output, Tensor) else None
            into = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else None
            calls.append(Call(name, shape, into, leaf, layers, container))

        return hook

    for name, module in network.named_modules():
        if name:
            leaf = next(module.children(), None) is None
            layers = sum(parameter.ndim > 1 for parameter in module.parameters())
            handles.append(module.register_forward_hook(hook_for(name, leaf, layers)))
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            output = network(images)
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AttarError(
            f"{type(network).__name__} refuses images of shape {list(images.shape[1:])} ({reason}): "
            "choose an image size and channel count it accepts."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return calls, output


def _find_classifier(calls: Sequence[Call], classes: int | None) -> Call | None:
    for call in reversed(calls):
        into = call.input_shape
        if (
            call.leaf
            and into
            and call.shape
            and len(into) == 2
            and call.shape == (into[0], classes)
            and into[1] != classes
        ):
            return call
    return None


def _as_stage(
    name: str,
    shape: tuple[int, ...] | None,
    input_shape: tuple[int, int, int],
    channels: int | None,
    prefix: int | None,
) -> Stage | None:
    """Read a tensor shape as a feature map, or return None when it is none."""
    if shape is None:
        return None
    layout: Layout
    tokens, grid = 0, (0, 0)
    if len(shape) == 4:
        layout = _layout_4d(shape, input_shape, channels)
        c, h, w = (shape[3], shape[1], shape[2]) if layout == "nhwc" else (shape[1], shape[2], shape[3])
        if h > input_shape[1] or w > input_shape[2] or not _aspect_fits(h, w, input_shape):
            return None
    elif len(shape) == 3:
        found = _grid(shape[1], input_shape, prefix)
        if found is None:
            return None
        layout, (tokens, grid) = "nld", found
        c, (h, w) = shape[2], grid
    else:
        return None
    if channels is not None and c != channels:
        return None
    return Stage(name, c, h, w, input_shape[1] / h, Tap(name, layout=layout, prefix_tokens=tokens, grid=grid))


def _aspect_fits(height: int, width: int, input_shape: tuple[int, int, int]) -> bool:
    """Whether a map could be the image at a lower resolution: each side rounded by at most one cell and a half."""
    return abs(height - width * input_shape[1] / input_shape[2]) <= 1.5


def _layout_4d(shape: tuple[int, ...], input_shape: tuple[int, int, int], channels: int | None) -> Layout:
    first, last = shape[1], shape[3]
    if channels is not None and (first == channels) != (last == channels):
        return "nhwc" if last == channels else "nchw"
    aspect = input_shape[1] / input_shape[2]
    as_nchw = abs(math.log(shape[2] / shape[3] / aspect))
    as_nhwc = abs(math.log(shape[1] / shape[2] / aspect))
    return "nhwc" if as_nhwc < as_nchw - 1e-6 else "nchw"


def _grid(length: int, input_shape: tuple[int, int, int], prefix: int | None) -> tuple[int, tuple[int, int]] | None:
    """Find how many prefix tokens stand before a grid of the input's aspect ratio, and the grid."""
    aspect = input_shape[1] / input_shape[2]
    for tokens in (0, 1, 2, 5) if prefix is None else dict.fromkeys((prefix, 0)):
        cells = length - tokens
        height = round(math.sqrt(cells * aspect)) if cells > 0 else 0
        if height and cells % height == 0 and math.isclose(height / (cells // height), aspect, rel_tol=0.2):
            return tokens, (height, cells // height)
    return None


def _from_feature_info(
    network: nn.Module, calls: Sequence[Call], input_shape: tuple[int, int, int], prefix: int | None
) -> list[Stage]:
    info = getattr(network, "feature_info", None)
    if info is None:
        return []
    entries = info if isinstance(info, list) else getattr(info, "info", [])
    shapes = {call.module: call for call in calls}
    found: list[Stage] = []
    for entry in entries:
        call = shapes.get(entry.get("module", ""))
        stage = call and _as_stage(call.module, call.shape, input_shape, entry.get("num_chs"), prefix)
        if not stage:
            # Names that only exist in timm's feature extractors: the shapes of the probe pass tell more.
            return []
        found.append(stage)
    return _without_stem(_one_per_resolution(found), calls)


def _encoder(calls: Sequence[Call], input_shape: tuple[int, int, int], prefix: int | None) -> list[Call]:
    """Return the calls of a dense network before it goes back to higher resolutions.

    Most keep the encoder in their first child. In the others it ends with the last map of the lowest resolution before
    a larger one; a decoder may pool further down (pyramid pooling), and the first such valley is the encoder's.
    """
    areas = []
    for call in calls:
        stage = _as_stage(call.module, call.shape, input_shape, None, prefix)
        areas.append(stage.height * stage.width if stage is not None and stage.height * stage.width > 1 else None)
    children = [call.module.partition(".")[0] for call in calls]
    first = [i for i, child in enumerate(children) if child == children[0]]
    if len({areas[i] for i in first} - {None}) > 1 and len(set(children)) > 1:
        return [calls[i] for i in first]
    lowest: int | None = None
    end = len(calls)
    for i, area in enumerate(areas):
        if area is None:
            continue
        if lowest is not None and area > lowest and any(later is not None and later > area for later in areas[i:]):
            end = i
            break
        lowest = area if lowest is None else min(lowest, area)
    return list(calls[:end])


def _from_shapes(
    calls: Sequence[Call], input_shape: tuple[int, int, int], prefix: int | None, classes: int | None
) -> list[Stage]:
    """Follow the main path: outputs whose resolution never grows again later in the pass."""
    maps = [(call, _as_stage(call.module, call.shape, input_shape, None, prefix)) for call in calls]
    main: list[tuple[Call, Stage]] = []
    largest = 2  # a pooled vector is no map
    for call, stage in reversed(maps):
        if stage is not None and stage.height * stage.width >= largest:
            main.append((call, stage))
            largest = stage.height * stage.width
    while len(main) > 1 and main[0][1].channels == classes:
        main.pop(0)  # a convolution as classifier: class maps are the head's
    main.reverse()
    found = _without_stem(_one_per_resolution([stage for _, stage in _outermost(main, calls)]), calls)
    return found if len(found) > 1 else _quarters(main) or found


def _outermost(main: Sequence[tuple[Call, Stage]], calls: Sequence[Call]) -> list[tuple[Call, Stage]]:
    """Of every resolution leave the maps inside the fewest blocks that go on to a lower one.

    The first convolution of a block that strides later is the last map of the higher resolution, but belongs to the
    lower one: the stage ends before that block.
    """
    ends = {call.module: call.shape for call in calls if not call.container}

    def inside(stage: Stage) -> int:
        parts = stage.name.split(".")
        blocks = (ends.get(".".join(parts[:depth])) for depth in range(1, len(parts)))
        return sum(1 for shape in blocks if shape and len(shape) == 4 and _lower(shape, stage))

    depths = [inside(stage) for _, stage in main]
    fewest: dict[tuple[int, int], int] = {}
    for (_, stage), depth in zip(main, depths, strict=True):
        key = (stage.height, stage.width)
        fewest[key] = min(depth, fewest.get(key, depth))
    return [pair for pair, depth in zip(main, depths, strict=True) if depth == fewest[(pair[1].height, pair[1].width)]]


def _lower(shape: tuple[int, ...], stage: Stage) -> bool:
    """Whether a map's shape, in either layout, is of lower resolution than a stage."""
    return min(shape[2] * shape[3], shape[1] * shape[2]) < stage.height * stage.width and (
        (shape[2] <= stage.height and shape[3] <= stage.width) or (shape[1] <= stage.height and shape[2] <= stage.width)
    )


def _without_stem(stages: list[Stage], calls: Sequence[Call]) -> list[Stage]:
    """Leave out the stem and runs without a layer of their own (a pooling)."""
    position = {call.module: i for i, call in enumerate(calls)}
    layers = {call.module: call.layers for call in calls}
    kept: list[Stage] = []
    start = 0
    for stage in stages:
        end = position[stage.name] + 1
        if any(call.leaf and call.layers for call in calls[start:end]):
            kept.append(stage)
        start = end
    if len(kept) > 1:
        single = [layers[stage.name] <= 1 for stage in kept]
        if "stem" in kept[0].name or (single[0] and not all(single)):
            kept = kept[1:]
    return kept


def _one_per_resolution(stages: Sequence[Stage]) -> list[Stage]:
    last = {(stage.height, stage.width): stage for stage in stages}
    distinct = list(last.values())
    if len(distinct) == 1 and len(stages) >= 4:
        return [stages[math.ceil(len(stages) * quarter / 4) - 1] for quarter in (1, 2, 3, 4)]
    return distinct


def _quarters(main: Sequence[tuple[Call, Stage]]) -> list[Stage]:
    """Cut a network of constant resolution into quarters of the largest family of sibling blocks."""
    families: dict[tuple[str, tuple[int, ...] | None], list[Stage]] = {}
    for call, stage in main:
        parent, _, position = call.module.rpartition(".")
        if not call.leaf and any(ch.isdigit() for ch in position):
            families.setdefault((parent, call.shape), []).append(stage)
    blocks = max(families.values(), key=len, default=[])
    if len(blocks) < 4:
        return []
    return [blocks[math.ceil(len(blocks) * quarter / 4) - 1] for quarter in (1, 2, 3, 4)]
