"""Split: cut a network into trunk and tail, proved equal to the whole, so that its tail can be replicated."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect

from attar.anatomy.taps import Tap
from attar.errors import AttarError

__all__ = ["Split", "redraw_", "replica", "split"]


@dataclass(frozen=True)
class Split:
    """A network in two halves.

    Args:
        cut: path of the module after whose output the network is cut.
        trunk: images -> the values that cross the cut, as a tuple.
        tail: those values -> logits. Both share the network's modules and parameters, under the same paths.
        carried: where each value is read in the network's own forward, so that a replica of the tail needs no second
            trunk pass; None stands for the images themselves.
    """

    cut: str
    trunk: nn.Module
    tail: nn.Module
    carried: tuple[Tap | None, ...]


class _Rooted(nn.Module):
    """Binds a network's optional inputs to their defaults: it is traced as a function of the images alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return self.network(images)


class _Mode(nn.Module):
    """Tells a traced graph whether it trains: a trace would freeze `F.dropout(x, training=self.training)`."""

    def forward(self) -> bool:
        return self.training


def _unfreeze_mode(module: fx.GraphModule) -> fx.GraphModule:
    frozen = [n for n in module.graph.nodes if n.op == "call_function" and isinstance(n.kwargs.get("training"), bool)]
    if frozen:
        module.add_submodule("mode", _Mode())
        with module.graph.inserting_before(frozen[0]):
            mode = module.graph.call_module("mode")
        for node in frozen:
            node.update_kwarg("training", mode)
        module.recompile()
    return module


class _CutTracer(fx.Tracer):
    """Traces through the containers of the cut only; every other module stays whole.

    What is not traced cannot be traced wrongly: control flow, train/eval switches and shape arithmetic inside the
    blocks stay the network's own Python. Between the blocks, what the forward decides by sizes is decided as for the
    example images, and the graph refuses sizes that would have been decided otherwise.
    """

    def __init__(self, cut: str, notrace_functions: Iterable[Callable[..., Any]], images: Tensor) -> None:
        super().__init__(autowrap_functions=tuple(notrace_functions))
        self._images = images
        self._asking = False
        parts = cut.split(".")
        self._open = {"network", *("network." + ".".join(parts[:i]) for i in range(1, len(parts)))}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._open

    def to_bool(self, obj: fx.Proxy) -> bool:
        if not _about_sizes(obj.node):
            return super().to_bool(obj)  # refuses
        until_here = _trunk(self.root, list(self.graph.nodes), [obj.node])
        modes = {module: module.training for module in self.root.modules()}
        until_here.eval()
        self._asking = True
        try:
            with torch.no_grad():
                (value,) = until_here(self._images)
        finally:
            self._asking = False
            for module, mode in modes.items():
                module.training = mode
        self.create_proxy("call_function", _decided, (obj, bool(value)), {})
        return bool(value)

    # While a forward is traced, every call and every attribute of any module comes by here.

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return forward(*args, **kwargs) if self._asking else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._asking else super().getattr(attr, attr_val, parameter_proxy_cache)


_SIZES = {"size", "dim", "numel", "shape", "ndim"}


def _about_sizes(node: fx.Node) -> bool:
    """Whether a value follows from the sizes of tensors: what they hold differs from batch to batch."""
    asked = node.args[1] if node.op == "call_function" and node.target is getattr else node.target
    if asked in _SIZES:
        return True
    return node.op in ("call_function", "call_method") and all(map(_about_sizes, node.all_input_nodes))


@has_side_effect
def _decided(condition: object, before: bool) -> None:
    if bool(condition) is not before:
        raise AttarError(
            "A network was cut with images of one size and is used with another, for which its forward decides "
            "otherwise: train on images of one size, or choose a size that every stage divides."
        )


def split(
    network: nn.Module,
    cut: str,
    images: Tensor,
    tail: nn.Module | None = None,
    *,
    answer: Callable[[Any], Tensor] | None = None,
) -> Split:
    """Cut a network after the output of the module `cut`.

    Definition: `tail(*trunk(x)) == network(x)` to the last bit, in training and in evaluation mode; a cut for which
    this does not hold on `images` is refused. What the forward decides by sizes is decided as for `images`; halves that
    meet others raise AttarError.

    Args:
        network: any module of images [N, C, H, W] -> logits.
        cut: path of a module, as found by `survey` or `named_modules`.
        images: an example batch for the proof.
        tail: a module from the output of `cut` to the logits, made of the network's own layers, for networks that
            torch.fx cannot trace.
        answer: finds the logits among what the network returns, where it returns more (a dict, auxiliary answers). The
            tail returns them alone and has no layer that only the rest needs.

    Raises:
        AttarError: the cut cannot be traced, nothing lies behind it, or the halves do not equal the whole.
    """
    try:
        network.get_submodule(cut)
    except AttributeError as error:
        raise AttarError(f"There is no module '{cut}' in {type(network).__name__} to cut at.") from error
    if tail is None:
        halves = _traced_halves(network, cut, images)
    else:
        halves = Split(cut, _Prefix(network, cut), tail, (Tap(cut),))
    if answer is not None and isinstance(halves.tail, fx.GraphModule):
        halves = replace(halves, tail=_only_answer(network, halves, images, answer))
    if not any(True for _ in halves.tail.parameters()):
        raise AttarError(f"No layer lies behind '{cut}' in {type(network).__name__}: cut at an earlier stage.")
    _prove(network, halves, images, answer if answer is not None else _itself)
    return halves


def _itself(output: Any) -> Any:
    return output


class _Stop(Exception):  # noqa: N818 - it ends a forward early and is no error
    pass


class _Prefix(nn.Module):
    """The part of a network before the output of one module, run by leaving the forward there."""

    def __init__(self, network: nn.Module, cut: str) -> None:
        super().__init__()
        self.network, self.cut = network, cut

    def forward(self, images: Tensor) -> tuple[Any]:
        caught: list[Any] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            caught.append(output)
            raise _Stop

        handle = self.network.get_submodule(self.cut).register_forward_hook(stop)
        try:
            self.network(images)
        except _Stop:
            pass
        finally:
            handle.remove()
        return (caught[0],)


def _traced_halves(network: nn.Module, cut: str, images: Tensor) -> Split:
    try:
        graph = _trace(network, cut, images)
    except AttarError:
        raise
    except Exception as error:  # torch.fx raises whatever the traced Python raises on a proxy
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AttarError(
            f"{type(network).__name__} cannot be cut at '{cut}' automatically ({reason}): "
            "give the part behind the cut as a module with tail=..."
        ) from error
    nodes = list(graph.nodes)
    calls = [n for n in nodes if n.op == "call_module" and n.target == cut]
    if not calls:
        raise AttarError(f"Module '{cut}' is not called by the forward of {type(network).__name__}: cut elsewhere.")
    end = nodes.index(calls[-1])
    before = set(nodes[: end + 1])
    carried = _carried(nodes[end + 1 :], before)
    trunk = _trunk(network, nodes[: end + 1], carried)
    tail = _tail(network, nodes[end + 1 :], carried, before)
    taps = tuple(None if n.op == "placeholder" else Tap(str(n.target), call=_call_index(n, nodes)) for n in carried)
    return Split(cut, trunk, tail, taps)


def _trace(network: nn.Module, cut: str, images: Tensor) -> fx.Graph:
    from timm.models import get_notrace_functions

    graph = _CutTracer(cut, get_notrace_functions(), images).trace(_Rooted(network))
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = str(node.target).removeprefix("network.")
    return graph


def _call_index(node: fx.Node, nodes: list[fx.Node]) -> int:
    same = [n for n in nodes if n.op == "call_module" and n.target == node.target]
    return same.index(node) if len(same) > 1 else -1


def _recomputed(node: fx.Node) -> bool:
    """Whether the tail computes this value again instead of carrying it: parameters and module-free arithmetic.

    Only what a module returns (or the images) can be read by a hook in the network's own forward; shape arithmetic,
    additions and unpacking in between cost next to nothing to repeat.
    """
    return node.op in ("get_attr", "call_function", "call_method")


def _carried(tail_nodes: list[fx.Node], before: set[fx.Node]) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node not in before:
            return
        if _recomputed(node):
            for source in node.all_input_nodes:
                visit(source)
        else:
            found[node] = None

    for node in tail_nodes:
        for source in node.all_input_nodes:
            visit(source)
    return list(found)


def _trunk(network: nn.Module, nodes: list[fx.Node], carried: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in carried))
    trunk = fx.GraphModule(network, graph, class_name="Trunk")
    trunk.graph.eliminate_dead_code()
    trunk.recompile()
    return _unfreeze_mode(trunk)


def _tail(network: nn.Module, nodes: list[fx.Node], carried: list[fx.Node], before: set[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(f"carried_{i}") for i, node in enumerate(carried)}

    def bring(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node not in before:
                raise KeyError(node)
            for source in node.all_input_nodes:
                bring(source)
            copies[node] = graph.node_copy(node, copies.__getitem__)
        return copies[node]

    for node in nodes:
        for source in node.all_input_nodes:
            bring(source)
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], copies.__getitem__))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return _unfreeze_mode(fx.GraphModule(network, graph, class_name="Tail"))


def _only_answer(network: nn.Module, halves: Split, images: Tensor, answer: Callable[[Any], Tensor]) -> fx.GraphModule:
    """Let a traced tail return the logits alone, without the layers that only its other answers need."""
    tail = halves.tail
    assert isinstance(tail, fx.GraphModule)
    modes = {module: module.training for module in network.modules()}
    for half in (network, halves.trunk, tail):
        half.eval()
    with torch.no_grad():
        whole = tail(*halves.trunk(images))
    for module, mode in modes.items():
        module.training = mode
    logits = answer(whole)
    if whole is logits:
        return tail
    key = next(key for key, value in _entries(whole) if value is logits)
    end = next(node for node in tail.graph.nodes if node.op == "output")
    returned = end.args[0]
    with tail.graph.inserting_before(end):
        # What a single module returns is taken apart by the graph; what the traced forward built, here.
        one = tail.graph.call_function(operator.getitem, (returned, key)) if isinstance(returned, fx.Node) else None
    end.args = (one if one is not None else returned[key],)
    tail.graph.eliminate_dead_code()
    return _unfreeze_mode(fx.GraphModule(tail, tail.graph, class_name="Tail"))


def _entries(output: Any) -> Iterable[tuple[Any, Any]]:
    return output.items() if isinstance(output, Mapping) else enumerate(output)


def _prove(network: nn.Module, halves: Split, images: Tensor, answer: Callable[[Any], Tensor]) -> None:
    """Compare whole and halves in both modes, then make the tail leave its inputs untouched."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    modes = {module: module.training for module in network.modules()}
    devices = [images.device] if images.is_cuda else []
    try:
        for training in (False, True):
            network.train(training)
            halves.tail.train(training)
            halves.trunk.train(training)
            results = []
            ways: tuple[Callable[[Tensor], Any], ...] = (
                lambda x: answer(network(x)),
                lambda x: halves.tail(*halves.trunk(x)),
            )
            for run in ways:
                _restore(network, buffers)
                with torch.random.fork_rng(devices), torch.no_grad():
                    torch.manual_seed(0)
                    try:
                        results.append(run(images))
                    except ValueError as error:
                        if training and "more than 1 value per channel" in str(error):
                            break  # one example image is too few for batch statistics; evaluation mode is proved
                        raise
            if len(results) == 2 and not _same(results[0], results[1]):
                mode = "training" if training else "evaluation"
                raise AttarError(
                    f"The halves of {type(network).__name__} at '{halves.cut}' do not equal the whole in {mode} mode: "
                    "cut at another stage or give the part behind the cut as a module with tail=..."
                )
        network.eval()
        halves.tail.eval()
        with torch.no_grad():
            _guard_inputs(halves, images)
    finally:
        _restore(network, buffers)
        for module, was in modes.items():
            module.training = was


def _restore(network: nn.Module, buffers: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(buffers[name])


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return a is b or bool(operator.eq(a, b))


def _guard_inputs(halves: Split, images: Tensor) -> None:
    """Copy a carried value at the tail's door when the tail would overwrite it: replicas share it."""
    values = halves.trunk(images)
    versions = [v._version if isinstance(v, Tensor) else None for v in values]
    halves.tail(*values)
    changed = [isinstance(v, Tensor) and v._version != version for v, version in zip(values, versions, strict=True)]
    if not any(changed):
        return
    if not isinstance(halves.tail, fx.GraphModule):
        raise AttarError("The given tail overwrites its input in place: let it begin with a copy of it (x.clone()).")
    graph = halves.tail.graph
    doors = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for door, overwritten in zip(doors, changed, strict=True):
        if overwritten:
            with graph.inserting_before(first):
                copied = graph.call_method("clone", (door,))
            door.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)
    halves.tail.recompile()


@torch.no_grad()
def redraw_(module: nn.Module) -> nn.Module:
    """Initialise a copied module afresh, whatever its architecture, and return it.

    Every parameter tensor is replaced by a random permutation of its own entries and running statistics are reset.
    A permutation of independent, identically distributed entries is itself a draw from their distribution, so each
    layer keeps the initialisation its author chose (He, truncated normal, zeros, ones, layer scale) without attar
    knowing it; a pretrained tensor keeps its scale and loses its content.
    """
    for parameter in module.parameters():
        flat = parameter.detach().reshape(-1)
        order = torch.randperm(flat.numel(), device="cpu").to(flat.device)
        parameter.copy_(flat[order].view_as(parameter))
    for part in module.modules():
        reset = getattr(part, "reset_running_stats", None)
        if callable(reset):
            reset()
    return module


def replica(tail: nn.Module) -> nn.Module:
    """Return an independent copy of a tail with fresh weights."""
    twin = copy.deepcopy(tail)
    return redraw_(twin)
