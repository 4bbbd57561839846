"""Which convolution makes the channels of a stage, and which layers stand between it and the stage's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attar.anatomy.stages import Anatomy, Stage
from attar.anatomy.taps import Recorder

__all__ = ["last_convolution", "layers_behind"]


def last_convolution(network: nn.Module, anatomy: Anatomy, stage: Stage) -> str | None:
    """Return the path of the convolution whose filters are the stage's channels; None where there is none.

    Of the `nn.Conv2d` inside the stage with as many output channels and no lower resolution, it is the last one on the
    deepest way to the stage's output: in a residual block the last of the residual, not the shortcut's; no gate's
    either, unless the stage's map is a single position.

    Args:
        network: in evaluation mode.
        anatomy: its own.
        stage: one of its stages, or any module that `anatomy.find` describes.
    """
    order = {call.module: position for position, call in enumerate(anatomy.calls)}
    earlier = (order[other.tap.module] for other in anatomy.stages)
    begin = max((position for position in earlier if position < order[stage.tap.module]), default=-1)
    made: dict[Any, str | None] = {}
    handles = []

    def remember(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            own = order[path] > begin and output.shape[1] == stage.channels
            whole = output.shape[2] >= stage.height and output.shape[3] >= stage.width
            made[output.grad_fn] = path if own and whole else None

        return hook

    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and path in order:
            handles.append(module.register_forward_hook(remember(path)))
    recorder = Recorder(network, [stage.tap])
    reference = next(network.parameters())
    try:
        with torch.enable_grad():
            images = reference.new_zeros(2, *anatomy.input_shape).requires_grad_()
            _, values = recorder.run(images)
    finally:
        recorder.remove()
        for handle in handles:
            handle.remove()
    return _nearest_on_the_deepest_way(values[stage.tap].grad_fn, made)


def _nearest_on_the_deepest_way(node: Any, made: dict[Any, str | None]) -> str | None:
    depth = _depths(node, made) if node is not None else {}
    while node is not None:
        if made.get(node) is not None:
            return made[node]
        node = max((n for n, _ in node.next_functions if n is not None), key=depth.__getitem__, default=None)
    return None


def _depths(root: Any, made: dict[Any, str | None]) -> dict[Any, int]:
    """How many convolutions lie on the deepest way from the images to every node below `root`."""
    depth: dict[Any, int] = {}
    waiting = [root]
    while waiting:
        node = waiting[-1]
        below = [n for n, _ in node.next_functions if n is not None]
        missing = [n for n in below if n not in depth]
        if missing:
            waiting += missing
            continue
        depth[node] = max((depth[n] for n in below), default=0) + (node in made)
        waiting.pop()
    return depth


def layers_behind(anatomy: Anatomy, convolution: str, stage: Stage) -> tuple[str, ...]:
    """Return the paths of the layers that ran after a convolution, up to the stage's output, in order."""
    names = [call.module for call in anatomy.calls]
    first, last = names.index(convolution), len(names) - 1 - names[::-1].index(stage.tap.module)
    return tuple(call.module for call in anatomy.calls[first + 1 : last + 1] if call.leaf)
