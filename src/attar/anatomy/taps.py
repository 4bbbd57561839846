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
        # What a partial pass still waits for: how many values of each (module, side). Empty in a whole pass.
        self._awaited: dict[tuple[str, str], int] = {}
        self._calls: dict[tuple[str, str], int] = {}
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
        values, recording, awaited = self._values, self._recording, self._awaited

        def record(module: nn.Module, args: Any, output: Any) -> None:
            if recording[0]:
                values.setdefault(key, []).append(output.clone() if clone else output)
                if awaited:
                    _stop_when_read(awaited, values)

        return record

    def _input_hook(self, key: tuple[str, str], clone: bool) -> Callable[[nn.Module, Any], None]:
        values, recording, awaited = self._values, self._recording, self._awaited

        def record(module: nn.Module, args: Any) -> None:
            if recording[0]:
                values.setdefault(key, []).append(args[0].clone() if clone else args[0])
                if awaited:
                    _stop_when_read(awaited, values)

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

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run_until(self, images: Tensor, until: Collection[Tap]) -> dict[Tap, Any]:
        """Call the network only as far as needed to read these of its taps; return what was read, maps as [N, C, H, W].

        The pass is left by an exception out of a hook, so nothing behind the last tap is computed. Not compiled.
        """
        if not until:
            return {}
        keys = {(tap.module, tap.side) for tap in until}
        if not keys <= self._calls.keys():
            self._count_calls(images)
        self._values.clear()
        self._awaited.update({key: self._calls[key] for key in keys})
        self._recording[0] = True
        try:
            self.network(images)
        except _AllRead:
            pass
        finally:
            self._recording[0] = False
            self._awaited.clear()
        read = [tap for tap in self.taps if len(self._values.get((tap.module, tap.side), ())) > max(tap.call, 0)]
        recorded = {tap: to_nchw(self._values[(tap.module, tap.side)][tap.call], tap) for tap in read}
        self._values.clear()
        return recorded

    def _count_calls(self, images: Tensor) -> None:
        """Learn how often every tapped module runs in one pass, so that "the last call" is known in a partial one."""
        modes = {module: module.training for module in self.network.modules()}
        self.network.eval()
        self._values.clear()
        self._recording[0] = True
        with torch.no_grad():
            self.network(images[:1])
        self._recording[0] = False
        for module, mode in modes.items():
            module.training = mode
        self._calls.update({key: len(values) for key, values in self._values.items()})
        self._values.clear()

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


class _AllRead(Exception):  # noqa: N818 (no error)
    """Leaves a forward pass whose rest nobody needs."""


def _stop_when_read(awaited: dict[tuple[str, str], int], values: dict[tuple[str, str], list[Any]]) -> None:
    if all(len(values.get(key, ())) >= count for key, count in awaited.items()):
        raise _AllRead


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
