"""Taps: named intermediate tensors of a network, recorded inside one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Layout", "Recorder", "Tap", "to_nchw"]

Layout = Literal["raw", "nchw", "nhwc", "nld"]


@dataclass(frozen=True)
class Tap:
    """Where one intermediate value of the student is read, and how it becomes a map [N, C, H, W].

    Args:
        module: path of the module, as in `student.get_submodule`.
        side: read what the module returns ("output") or its first argument ("input").
        layout: "raw" leaves the value as it is (any type); "nchw", "nhwc" and "nld" (tokens) become [N, C, H, W].
        prefix_tokens: for "nld": class and register tokens in front of the grid, which are dropped.
        grid: for "nld": (H, W) of the token grid.
        call: which call of a module that runs several times in one pass (-1: the last).
    """

    module: str
    side: Literal["output", "input"] = "output"
    layout: Layout = "raw"
    prefix_tokens: int = 0
    grid: tuple[int, int] = (0, 0)
    call: int = -1


def to_nchw(value: Any, tap: Tap) -> Any:
    """Bring a recorded value to the map layout [N, C, H, W] that every method sees (a view, never a copy)."""
    if tap.layout == "nhwc":
        return value.permute(0, 3, 1, 2)
    if tap.layout == "nld":
        tokens = value[:, tap.prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, tap.grid)
    return value


class Recorder:
    """Runs a network and returns its output together with the values at some taps, all from the same forward.

    The hooks are registered once, before any compilation, and write into a dictionary that lives for one forward only:
    a dictionary filled by hooks of an earlier graph would be read by nobody (pytorch #173452).
    Outside `run` the hooks do nothing, so the network may also be called on its own.

    Args:
        network: what runs.
        taps: what is recorded.
        cloned: taps whose value is copied when it is read, because the network later overwrites it in place.
    """

    def __init__(self, network: nn.Module, taps: Iterable[Tap], cloned: Collection[Tap] = ()) -> None:
        self.network = network
        self.taps = tuple(dict.fromkeys(taps))
        self._values: dict[tuple[str, str], list[Any]] = {}
        self._recording = [False]
        self._handles: list[RemovableHandle] = []
        for path, side in dict.fromkeys((tap.module, tap.side) for tap in self.taps):
            clone = any((tap.module, tap.side) == (path, side) for tap in cloned)
            module = network.get_submodule(path)
            # Plain closures: copy.deepcopy of the network then shares them instead of copying this recorder.
            if side == "output":
                self._handles.append(module.register_forward_hook(self._output_hook((path, side), clone)))
            else:
                self._handles.append(module.register_forward_pre_hook(self._input_hook((path, side), clone)))

    def _output_hook(self, key: tuple[str, str], clone: bool) -> Callable[[nn.Module, Any, Any], None]:
        values, recording = self._values, self._recording

        def record(module: nn.Module, args: Any, output: Any) -> None:
            if recording[0]:
                values.setdefault(key, []).append(output.clone() if clone else output)

        return record

    def _input_hook(self, key: tuple[str, str], clone: bool) -> Callable[[nn.Module, Any], None]:
        values, recording = self._values, self._recording

        def record(module: nn.Module, args: Any) -> None:
            if recording[0]:
                values.setdefault(key, []).append(args[0].clone() if clone else args[0])

        return record

    def run(self, images: Tensor) -> tuple[Any, dict[Tap, Any]]:
        """Call the network once on `images`; return its output and the value of every tap, maps as [N, C, H, W]."""
        self._values.clear()
        self._recording[0] = True
        output = self.network(images)
        self._recording[0] = False
        recorded = {tap: to_nchw(self._values[(tap.module, tap.side)][tap.call], tap) for tap in self.taps}
        self._values.clear()
        return output, recorded

    def remove(self) -> None:
        """Take every hook off the network again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def remove_from_copy(self, copied: nn.Module) -> None:
        """Take the hooks off a deep copy of the network, which inherited them."""
        ids = {handle.id for handle in self._handles}
        for module in copied.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for hook_id in ids & hooks.keys():
                    del hooks[hook_id]


def overwritten(network: nn.Module, taps: Iterable[Tap], images: Tensor) -> tuple[set[Tap], list[str]]:
    """Find taps whose tensors the network overwrites in place after they were read.

    Returns the affected taps and the paths of the modules with `inplace=True` that wrote to any of them (functional
    in-place operations have no path). One evaluation pass, without gradient.
    """
    taps = tuple(taps)
    seen: dict[Tap, tuple[Tensor, int]] = {}
    writers: list[str] = []
    handles: list[RemovableHandle] = []

    def remember(tap: Tap, value: Any) -> None:
        if isinstance(value, Tensor):
            seen[tap] = (value, value._version)

    def watch(path: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], Tensor):
                pointer = args[0].untyped_storage().data_ptr()
                if any(value.untyped_storage().data_ptr() == pointer for value, _ in seen.values()):
                    writers.append(path)

        return hook

    for path, module in network.named_modules():
        # Prepended, so that a module that is itself tapped at its input is first watched, then remembered.
        if getattr(module, "inplace", False) is True:
            handles.append(module.register_forward_pre_hook(watch(path)))
    for tap in taps:
        module = network.get_submodule(tap.module)
        if tap.side == "output":
            handles.append(module.register_forward_hook(lambda m, a, out, tap=tap: remember(tap, out)))
        else:
            handles.append(module.register_forward_pre_hook(lambda m, a, tap=tap: remember(tap, a[0])))
    try:
        # no_grad rather than inference_mode: inference tensors carry no version counter.
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    touched = {tap for tap, (value, version) in seen.items() if value._version != version}
    return touched, sorted(set(writers)) if touched else []
