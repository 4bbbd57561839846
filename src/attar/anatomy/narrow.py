"""Narrower replicas of a network's tail: the same layers with a share of their channels, found by torch-pruning."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from attar.anatomy.groups import Member
from attar.anatomy.split import redraw_
from attar.errors import AttarError

__all__ = ["narrow_replicas", "narrowed"]


def narrowed(channels: int, share: Fraction, divisor: int = 1) -> int:
    """Return how many channels are left: `floor(share channels / divisor) divisor`, one divisor at least.

    Args:
        channels: of the whole layer.
        share: in (0, 1].
        divisor: the number of groups of a grouped convolution or norm; where it does not divide the channels, all stay.
    """
    if channels % divisor:
        return channels
    return max(int(channels * share) // divisor, 1) * divisor


def narrow_replicas(
    tail: nn.Module, carried: Sequence[Tensor], shares: Sequence[Fraction], *, last: Sequence[bool], where: str
) -> list[nn.Module]:
    """Return a freshly drawn, narrower replica of a tail for every share of its channels.

    Every layer keeps `narrowed` of its channels; the tail's inputs and its logits keep their widths, and so do channels
    that are added to those of an input. A residual block right behind the cut whose shortcut is the identity would tie
    a whole stage to the input in this way: where it has a place for one (`downsample`), it gets a projection, a 1x1
    convolution with batch norm. Weights are drawn as `redraw_` does; those of layers with fewer inputs are scaled by
    sqrt(inputs before / inputs now), so that sums over fewer inputs keep their variance.

    Args:
        tail: the values at the cut -> logits.
        carried: example values at the cut.
        shares: in (0, 1].
        last: for every carried value, whether its channels are the last axis (tokens, NHWC) instead of the second.
        where: what the sentence of an error calls the tail ("ResNet behind 'layer1'").

    Raises:
        AttarError: attention, channels that torch-pruning cannot follow, or a tail that does not run without them.
    """
    carried = [value.detach() for value in carried]
    base = copy.deepcopy(tail).eval().requires_grad_(True)
    _refuse_attention(base, carried, where)
    try:
        plan = _plan(base, carried, last)
        if plan.tied is not None:
            freed = copy.deepcopy(tail)
            if _project_first_shortcut(freed, plan.tied) and (second := _plan(freed, carried, last)).tied is None:
                base, plan = freed, second
        with torch.no_grad():
            shape = base.eval()(*carried).shape
        replicas = [_narrow(copy.deepcopy(base), plan.groups, share) for share in shares]
        with torch.no_grad():
            shapes = {twin.eval()(*carried).shape for twin in replicas}
    except Exception as error:  # torch-pruning, and layers whose shapes do not fit any more, raise many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise AttarError(
            f"{where} cannot be made narrower, since its channels cannot be followed or it does not run with fewer "
            f"({reason[0]}): choose another cut or another network."
        ) from error
    if shapes - {shape}:
        raise AttarError(f"{where} gives other logits when it is narrower: choose another cut or another network.")
    return replicas


def _refuse_attention(tail: nn.Module, carried: Sequence[Tensor], where: str) -> None:
    """Raise for products and softmaxes of activations: torch-pruning loses itself there, or takes too much away."""
    with torch.enable_grad():
        todo = [tail(*carried).grad_fn]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if any(word in node.name() for word in ("Softmax", "ScaledDotProduct", "Bmm")):
            raise AttarError(f"{where} contains attention and cannot be made narrower: choose a convolutional network.")
        seen.add(node)
        todo += [function for function, _ in node.next_functions]


@dataclass(frozen=True)
class _Group:
    """Channels that are removed together, how many, and what must divide the number of those that are left."""

    channels: int
    divisor: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class _Plan:
    """The groups of a tail, and the width of an input that other layers' outputs are added to (None: there is none)."""

    groups: tuple[_Group, ...]
    tied: int | None


class _Entered(nn.Module):
    """The tail between layers that torch-pruning can name: what belongs to an input or to the logits is then known."""

    def __init__(self, tail: nn.Module, carried: Sequence[Tensor], last: Sequence[bool]) -> None:
        super().__init__()
        self.tail = tail
        self.entries = nn.ModuleList(
            nn.Linear(value.shape[-1], value.shape[-1]) if at_end else nn.Conv2d(value.shape[1], value.shape[1], 1)
            for value, at_end in zip(carried, last, strict=True)
        )

    def forward(self, *carried: Tensor) -> Tensor:
        logits: Tensor = self.tail(*(entry(value) for entry, value in zip(self.entries, carried, strict=True)))
        return logits * 1.0


def _plan(tail: nn.Module, carried: Sequence[Tensor], last: Sequence[bool]) -> _Plan:
    from torch_pruning import DependencyGraph
    from torch_pruning.ops import OPTYPE
    from torch_pruning.pruner.function import PrunerBox

    traced = _Entered(tail, carried, last).to(carried[0]).eval().requires_grad_(True)
    paths: dict[Any, str] = {module: path for path, module in traced.tail.named_modules()}
    paths |= {parameter: path for path, parameter in traced.tail.named_parameters()}
    entries = {id(entry) for entry in traced.entries}
    groups, tied = [], None
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = DependencyGraph().build_dependency(
            traced, tuple(carried), forward_fn=lambda network, values: network(*values), verbose=False
        )
        candidates = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
    for candidate in candidates:
        targets = [item.dep.target for item in candidate]
        entry = next((target.module for target in targets if id(target.module) in entries), None)
        if entry is not None and any(
            target.type in (OPTYPE.CONV, OPTYPE.LINEAR)
            and target.module is not entry
            and graph.is_out_channel_pruning_fn(item.dep.handler)
            for item, target in zip(candidate, targets, strict=True)
        ):
            tied = entry.weight.shape[0]
        if entry is not None or any(target.type == OPTYPE.OUTPUT for target in targets):
            continue
        channels, divisor, members = len(candidate[0].idxs), 1, []
        for item, target in zip(candidate, targets, strict=True):
            if target.type not in PrunerBox:
                continue
            side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            indices: list[list[int]] = [[] for _ in range(channels)]
            for place, channel in zip(item.idxs, item.root_idxs, strict=True):
                indices[channel].append(place)
            members.append(Member(paths[target.module], side, tuple(map(tuple, indices))))
            if target.type == OPTYPE.CONV:
                divisor = math.lcm(divisor, target.module.groups)
            if target.type == OPTYPE.GN:
                divisor = math.lcm(divisor, target.module.num_groups)
        groups.append(_Group(channels, divisor, tuple(members)))
    return _Plan(tuple(groups), tied)


def _project_first_shortcut(tail: nn.Module, width: int) -> bool:
    """Give the first residual block a projection shortcut, if it has none and a place for it; return whether it has."""
    for block in tail.modules():
        if hasattr(block, "downsample"):
            if block.downsample is not None and not isinstance(block.downsample, nn.Identity):
                return False
            projection = nn.Conv2d(width, width, 1, bias=False)
            nn.init.kaiming_normal_(projection.weight, mode="fan_out", nonlinearity="relu")
            block.downsample = nn.Sequential(projection, nn.BatchNorm2d(width))
            return True
    return False


def _narrow(tail: nn.Module, groups: Sequence[_Group], share: Fraction) -> nn.Module:
    """Remove the last channels of every group, in place, and draw the weights afresh."""
    from torch_pruning.ops import OPTYPE, module2type
    from torch_pruning.pruner.function import PrunerBox

    gone: dict[tuple[str, str], set[int]] = {}
    for group in groups:
        leaving = range(narrowed(group.channels, share, group.divisor), group.channels)
        for member in group.members:
            places = gone.setdefault((member.module, member.side), set())
            places.update(place for channel in leaving for place in member.indices[channel])
    # Known before the first cut: a grouped convolution may be as narrow as a depth-wise one after it.
    layers = {path: _at(tail, path) for path, _ in gone}
    kinds = {path: module2type(layer) for path, layer in layers.items()}
    for (path, side), places in gone.items():
        layer, kind = layers[path], kinds[path]
        if not places:
            continue
        if isinstance(layer, nn.Parameter):
            # torch-pruning takes a parameter outside of layers by its last axis that is longer than one.
            axis = max(axis for axis, size in enumerate(layer.shape) if size > 1)
            stays = torch.tensor([i for i in range(layer.shape[axis]) if i not in places], device=layer.device)
            owner, _, name = path.rpartition(".")
            setattr(tail.get_submodule(owner), name, nn.Parameter(layer.detach().index_select(axis, stays)))
        elif side == "out":
            PrunerBox[kind].prune_out_channels(layer, sorted(places))
        else:
            before = PrunerBox[kind].get_in_channels(layer)
            PrunerBox[kind].prune_in_channels(layer, sorted(places))
            if kind in (OPTYPE.CONV, OPTYPE.LINEAR):
                with torch.no_grad():
                    layer.weight *= math.sqrt(before / PrunerBox[kind].get_in_channels(layer))
    return redraw_(tail.requires_grad_(True))


def _at(network: nn.Module, path: str) -> Any:
    """Return the module or the parameter of that path."""
    owner, _, name = path.rpartition(".")
    return getattr(network.get_submodule(owner), name)
