"""Groups of channels that live or die together, found by torch-pruning and proved, and what each of them costs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attar.anatomy.surgery import is_depthwise, slice_
from attar.errors import AttarError

__all__ = ["Gate", "Group", "Layer", "Member", "Resource", "Structure", "channel_groups"]

Resource = Literal["macs", "params"]


@dataclass(frozen=True)
class Member:
    """One axis of one module that loses what its group loses.

    Attributes:
        module: path.
        side: "in" or "out"; of batch norms and depth-wise convolutions "out".
        indices: for every channel of the group, where it stands on that axis (several places behind a flattened map).
    """

    module: str
    side: str
    indices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Gate:
    """A batch norm that scales a group's channels: its path, and where each channel stands in it."""

    module: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Channels that must be removed from several modules together.

    Attributes:
        name: path of the convolution that stands first in torch-pruning's group.
        channels: how many.
        members: every axis that shrinks.
        gates: the batch norms among them; a channel whose scales and shifts are all zero is no longer heard anywhere.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    gates: tuple[Gate, ...]


@dataclass(frozen=True)
class Layer:
    """What a layer costs, as a function of the channels that are left.

    Definition, with a_in and a_out channels left, k weights per pair and P positions of the output: a dense layer has
    a_in a_out k weights (k a_out a depth-wise one), P times as many multiply-adds, and a_out more parameters with a
    bias; a batch norm has 2 a_out parameters and no multiply-adds.
    """

    module: str
    kind: Literal["dense", "depthwise", "norm"]
    inputs: int
    outputs: int
    kernel: int
    positions: int
    bias: bool
    from_groups: tuple[tuple[int, int], ...]  # (number of a group, places that each of its channels has): inputs
    to_groups: tuple[tuple[int, int], ...]  # the same of outputs

    def cost(self, gone: Sequence[int], resource: Resource) -> int:
        """Return the cost when so many channels of every group are gone."""
        outputs = self.outputs - sum(places * gone[group] for group, places in self.to_groups)
        if self.kind == "norm":
            return 2 * outputs if resource == "params" else 0
        inputs = 1
        if self.kind == "dense":
            inputs = self.inputs - sum(places * gone[group] for group, places in self.from_groups)
        weights = inputs * outputs * self.kernel
        return weights * self.positions if resource == "macs" else weights + self.bias * outputs


@dataclass(frozen=True)
class Structure:
    """The widths of a network: groups of channels and the layers that they are paid in.

    Attributes:
        groups: those that may lose channels, in the order of the pass.
        layers: every convolution, linear layer and batch norm, in the order of the pass.
        rest: what everything else costs, by resource; it never changes.
        followers: the batch norm that alone reads a layer's output, by path.
    """

    groups: tuple[Group, ...]
    layers: tuple[Layer, ...]
    rest: dict[Resource, int]
    followers: dict[str, str]

    def cost(self, left: Sequence[int], resource: Resource, layers: Collection[str] | None = None) -> int:
        """Return the cost with so many channels left in every group.

        Args:
            left: for every group.
            resource: multiply-adds of one image, or parameters.
            layers: paths of the layers that count; default: the whole network.
        """
        gone = [group.channels - count for group, count in zip(self.groups, left, strict=True)]
        counted = sum(layer.cost(gone, resource) for layer in self.layers if layers is None or layer.module in layers)
        return counted + (self.rest[resource] if layers is None else 0)

    def marginal(self, left: Sequence[int], group: int, resource: Resource) -> int:
        """Return what one channel of a group costs while so many are left in every group."""
        gone = [known.channels - count for known, count in zip(self.groups, left, strict=True)]
        touched = [layer for layer in self.layers if group in dict(layer.from_groups + layer.to_groups)]
        now = sum(layer.cost(gone, resource) for layer in touched)
        gone[group] += 1
        return now - sum(layer.cost(gone, resource) for layer in touched)

    def kept(self, channels: Sequence[Collection[int]]) -> dict[str, dict[str, list[int]]]:
        """Return what is left of every module when these channels of every group stay, as `slice_` takes it."""
        sizes = {layer.module: {"in": layer.inputs, "out": layer.outputs} for layer in self.layers}
        gone: dict[tuple[str, str], set[int]] = {}
        for group, staying in zip(self.groups, channels, strict=True):
            leaving = [channel for channel in range(group.channels) if channel not in set(staying)]
            for member in group.members:
                places = gone.setdefault((member.module, member.side), set())
                places.update(place for channel in leaving for place in member.indices[channel])
        found: dict[str, dict[str, list[int]]] = {}
        for (path, side), places in gone.items():
            if places:
                stays = [place for place in range(sizes[path][side]) if place not in places]
                found.setdefault(path, {})[side] = stays
        return found

    def mask_(self, network: nn.Module, channels: Sequence[Collection[int]], *, shifts: bool = True) -> nn.Module:
        """Set the batch norms' scales (and shifts) of every channel but these to zero, in place; return the network."""
        with torch.no_grad():
            for group, staying in zip(self.groups, channels, strict=True):
                for gate in group.gates:
                    norm = network.get_submodule(gate.module)
                    places = [place for channel, place in enumerate(gate.indices) if channel not in set(staying)]
                    norm.weight[places] = 0.0  # type: ignore[operator]
                    if shifts:
                        norm.bias[places] = 0.0  # type: ignore[operator]
        return network


def channel_groups(network: nn.Module, images: Tensor) -> Structure:
    """Find the groups of channels of a network that batch norms can switch off, and what its layers cost.

    torch-pruning follows the channels through one pass; the first convolution's inputs and the network's outputs stay
    out. Then it is proved on a copy in float64, with random batch norms, that zeroing a group's scales and shifts gives
    the same output as removing its channels; groups of which that is not true (a convolution without batch norm writes
    into the same sum) are left out. The network itself is only read.

    Args:
        network: takes [N, C, H, W].
        images: an example batch.

    Raises:
        AttarError: no batch norm, grouped convolutions that are not depth-wise, channels that torch-pruning cannot
            follow, or no group that can be switched off.
    """
    _refuse(network)
    images = images[:1].detach().double()
    copied = _stirred(copy.deepcopy(network).double().eval().requires_grad_(True))
    graph = _graph(copied, images)
    layers, rest = _layers(copied, images)
    order = {layer.module: position for position, layer in enumerate(layers)}
    structure = _structure(groups := _groups(graph, copied, order), layers, rest, _followers(graph, copied))
    if not _proved(structure, copied, images):
        groups = [group for group in structure.groups if _proved(_structure([group], layers, rest, {}), copied, images)]
        structure = _structure(groups, layers, rest, structure.followers)
        if groups and not _proved(structure, copied, images):
            groups = []
    if not groups:
        raise AttarError(
            f"No channels of {type(network).__name__} can be taken away, since nowhere a batch norm alone decides "
            "whether they are heard: choose another network."
        )
    return structure


def _refuse(network: nn.Module) -> None:
    if not any(isinstance(module, nn.BatchNorm2d) and module.affine for module in network.modules()):
        raise AttarError(
            f"{type(network).__name__} has no batch norm, whose scales would tell which channels matter: "
            "choose a network with batch norm."
        )
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not is_depthwise(module):
            raise AttarError(
                f"Convolution '{path}' has {module.groups} groups without being depth-wise, and no rule says which of "
                "its channels belong together: choose a network without grouped convolutions."
            )


def _stirred(network: nn.Module) -> nn.Module:
    """Give every batch norm random scales, shifts and statistics: freshly made ones would hide what they decide."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                for value, low in (
                    (module.weight, 0.5),
                    (module.bias, 0.1),
                    (module.running_mean, -0.5),
                    (module.running_var, 0.5),
                ):
                    if value is not None:
                        value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64) + low)
    return network


def _graph(network: nn.Module, images: Tensor) -> Any:
    from torch_pruning import DependencyGraph

    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return DependencyGraph().build_dependency(network, images, verbose=False)
    except Exception as error:  # it raises many kinds
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise AttarError(
            f"torch-pruning cannot follow the channels of {type(network).__name__} ({said[0]}): choose another network."
        ) from error


def _groups(graph: Any, network: nn.Module, order: dict[str, int]) -> list[Group]:
    """Read torch-pruning's groups: those that end in no output and touch only modules that can be sliced."""
    from torch_pruning.ops import OPTYPE

    paths = {module: path for path, module in network.named_modules()}
    sliced = {OPTYPE.CONV, OPTYPE.DEPTHWISE_CONV, OPTYPE.BN, OPTYPE.LINEAR}
    passing = {OPTYPE.CONCAT, OPTYPE.SPLIT, OPTYPE.ELEMENTWISE, OPTYPE.RESHAPE, OPTYPE.EXPAND, OPTYPE.SLICE}
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        candidates = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
    for candidate in candidates:
        kinds = {dependency.target.type for dependency, _ in candidate}
        if not kinds <= sliced | passing:
            continue
        channels = len(candidate[0].idxs)
        members, whole = [], True
        for item in candidate:
            module = item.dep.target.module
            if item.dep.target.type not in sliced:
                continue
            out = graph.is_out_channel_pruning_fn(item.dep.handler)
            indices: list[list[int]] = [[] for _ in range(channels)]
            for place, channel in zip(item.idxs, item.root_idxs, strict=True):
                indices[channel].append(place)
            whole = whole and module in paths and paths[module] in order and len({len(at) for at in indices}) == 1
            if whole:
                members.append(Member(paths[module], "out" if out else "in", tuple(map(tuple, indices))))
        gates = [
            Gate(member.module, tuple(place for (place,) in member.indices))
            for member in members
            if isinstance(norm := network.get_submodule(member.module), nn.BatchNorm2d)
            and norm.affine
            and all(len(at) == 1 for at in member.indices)
        ]
        if whole and gates and channels > 1:
            gates.sort(key=lambda gate: order[gate.module])
            found.append(Group(members[0].module, channels, tuple(members), tuple(gates)))
    return sorted(found, key=lambda group: order[group.gates[0].module])


def _layers(network: nn.Module, images: Tensor) -> tuple[list[Layer], dict[Resource, int]]:
    """Read every layer's size in one pass that also counts all multiply-adds."""
    positions: dict[str, int] = {}
    handles = []
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.BatchNorm1d):

            def hook(module: nn.Module, args: Any, output: Tensor, path: str = path) -> None:
                width = getattr(module, "out_channels", None) or getattr(module, "out_features", None) or 1
                positions[path] = positions.get(path, 0) + output.numel() // len(output) // width

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images)
    for handle in handles:
        handle.remove()
    layers = [_layer(path, network.get_submodule(path), count) for path, count in positions.items()]
    counted = {"macs": counter.get_total_flops() // 2, "params": sum(p.numel() for p in network.parameters())}
    resources: tuple[Resource, Resource] = ("macs", "params")
    return layers, {name: counted[name] - sum(layer.cost((), name) for layer in layers) for name in resources}


def _layer(path: str, module: nn.Module, positions: int) -> Layer:
    if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
        channels = module.num_features if module.affine else 0
        return Layer(path, "norm", channels, channels, 1, positions, False, (), ())
    bias = module.bias is not None
    if isinstance(module, nn.Linear):
        return Layer(path, "dense", module.in_features, module.out_features, 1, positions, bias, (), ())
    assert isinstance(module, nn.Conv2d)
    kernel = module.kernel_size[0] * module.kernel_size[1]
    kind: Literal["dense", "depthwise"] = "depthwise" if is_depthwise(module) else "dense"
    return Layer(path, kind, module.in_channels, module.out_channels, kernel, positions, bias, (), ())


def _structure(
    groups: Sequence[Group], layers: Sequence[Layer], rest: dict[Resource, int], followers: dict[str, str]
) -> Structure:
    """Tell every layer which groups it is paid in."""
    places: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for number, group in enumerate(groups):
        for member in group.members:
            places.setdefault((member.module, member.side), []).append((number, len(member.indices[0])))
    tied = tuple(
        Layer(
            **{
                **layer.__dict__,
                "from_groups": tuple(places.get((layer.module, "in"), ())),
                "to_groups": tuple(places.get((layer.module, "out"), ())),
            }
        )
        for layer in layers
    )
    return Structure(tuple(groups), tied, rest, followers)


def _followers(graph: Any, network: nn.Module) -> dict[str, str]:
    """Find the batch norms that alone read what a layer returns."""
    paths = {module: path for path, module in network.named_modules()}
    found = {}
    for module, node in graph.module2node.items():
        reader = node.outputs[0] if len(node.outputs) == 1 else None
        # A norm with a built-in activation appears as the operation and then the module.
        if reader is not None and "BatchNorm" in str(reader.module) and reader.module not in paths:
            reader = reader.outputs[0] if len(reader.outputs) == 1 else None
        if module in paths and reader is not None and isinstance(reader.module, nn.BatchNorm2d):
            found[paths[module]] = paths[reader.module]
    return found


def _proved(structure: Structure, network: nn.Module, images: Tensor) -> bool:
    """Whether switching off every second channel gives what removing it gives."""
    staying = [range(0, group.channels, 2) for group in structure.groups]
    try:
        masked = structure.mask_(copy.deepcopy(network), staying)
        removed = slice_(copy.deepcopy(network), structure.kept(staying))
        with torch.no_grad():
            expected, found = masked(images), removed(images)
    except Exception:  # places and shapes that do not fit fail in many ways
        return False
    return bool(torch.allclose(found, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max())))
