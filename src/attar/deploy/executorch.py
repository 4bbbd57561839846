"""ExecuTorch: lowered to XNNPACK, with portable kernels for what that has not, run by ExecuTorch's own runtime."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from attar.deploy.artefact import Images, Logits, Runtime, Settings
from attar.deploy.candidate import first_line
from attar.deploy.program import export_program, in_batches, refusal, require, silence
from attar.errors import AttarError
from attar.train.files import write_atomically

__all__ = ["MOST_IMAGES", "ExecuTorch", "lower", "quantize_program"]

# ExecuTorch plans its memory ahead, so that "any number of images" needs a bound; its runtime here splits larger ones.
MOST_IMAGES = 32
_PACKAGES = ("executorch.runtime", "torchao.quantization.pt2e")
# A method of the file without inputs, as ExecuTorch's files tell about themselves: how many images it takes at most.
_BOUND = "get_max_batch_size"
_NAME = "ExecuTorch"


class ExecuTorch:
    """ExecuTorch's `.pte` for phones and boards, lowered to XNNPACK.

    The file has one method `forward`: float32 [N, 3, H, W] -> [N, K], int8 inside where asked. `Settings.options` knows
    `float32_modules`, the paths of modules that stay in float32 when the others become int8.
    """

    name = "executorch"
    file = "model.pte"
    extra = "executorch"

    def write(self, network: nn.Module, settings: Settings, path: Path, calibration: Images | None) -> dict[str, Any]:
        """Write the artefact.

        Raises:
            AttarError: an operator that ExecuTorch has not (named), a network that takes a fixed number of images where
                any number is asked for, or a package that is missing.
        """
        require(_PACKAGES, _NAME, self.extra)
        most = MOST_IMAGES if settings.batch is None else None
        # As many as the bound: torch's convolutions tell 16 images from fewer, and the bound would follow the example.
        images = torch.zeros(most or settings.batch or 1, 3, *settings.image_size)
        program = export_program(network, images, most, _NAME)
        told: dict[str, Any] = {}
        if settings.int8:
            assert calibration is not None
            kept = settings.options.get("float32_modules", ())
            program = quantize_program(network, program, images, most, calibration, kept)
            told["left_in_float32"] = sorted(kept)
        content, outside = lower(network, program, most)
        write_atomically(path, content)
        return {**told, "outside_xnnpack": outside}

    def load(self, path: Path, threads: int = 1) -> Runtime:
        """Load an artefact in ExecuTorch's runtime, whose threads all of a process's artefacts share.

        Raises:
            AttarError: the file is missing, no ExecuTorch program, or a damaged one.
        """
        require(_PACKAGES[:1], _NAME, self.extra)
        if not path.is_file():
            raise AttarError(f"There is no file '{path}': give an exported ExecuTorch program.")
        return _Program(path, threads)


def quantize_program(
    network: nn.Module,
    program: Any,
    images: torch.Tensor,
    most: int | None,
    calibration: Images,
    float32_modules: Collection[str] = (),
) -> Any:
    """Quantise an exported program for XNNPACK: int8 weights per channel, int8 activations per tensor.

    Args:
        network: that was exported, for the sentence.
        program: of `torch.export.export`.
        images: the example it was exported with.
        most: images at a time it takes at most; None: as many as the example has.
        calibration: training images [N, 3, H, W], normalised; they fix the activations' ranges.
        float32_modules: paths of modules that are left as they are, with all that is inside them.

    Returns:
        The program with quantising and dequantising operators, exported again.
    """
    with silence():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        if float32_modules:
            quantizer.set_filter_function(lambda node: not _inside(node, float32_modules))
        try:
            observed = prepare_pt2e(program.module(), quantizer)
            with torch.no_grad():
                in_batches(
                    lambda part: observed(torch.from_numpy(part)).numpy(), calibration, len(images), pad=most is None
                )
            quantised = convert_pt2e(observed)
        except Exception as error:  # PT2E raises many kinds
            raise refusal(network, error, "ExecuTorch's int8") from error
    return export_program(quantised, images, most, _NAME)


def _inside(node: torch.fx.Node, modules: Collection[str]) -> bool:
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return any(path == module or path.startswith(f"{module}.") for path in paths for module in modules)


def lower(network: nn.Module, program: Any, most: int | None = None) -> tuple[bytes, list[str]]:
    """Lower an exported program, float32 or quantised, to XNNPACK and portable kernels.

    Args:
        network: that was exported, for the sentence.
        program: of `torch.export.export`.
        most: images at a time it takes at most; None: as many as its example.

    Returns:
        The content of a `.pte` file, and the operators that run outside XNNPACK.

    Raises:
        AttarError: an operator without a kernel, named.
    """
    with silence(native=True):
        import executorch.kernels.quantized  # noqa: F401 - registers the quantising operators that stand outside XNNPACK
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime as Engine

        try:
            edge = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                constant_methods=None if most is None else {_BOUND: most},
            )
            lowered = edge.to_executorch()
        except Exception as error:  # executorch raises many kinds
            raise refusal(network, error, _NAME) from error
        outside = sorted(
            {
                f"{operator.name}.{operator.overload}" if operator.overload else operator.name
                for plan in lowered.executorch_program.execution_plan
                for operator in plan.operators
            }
        )
        missing = sorted(set(outside) - Engine.get().operator_registry.operator_names)
    if missing:
        raise refusal(network, LookupError(", ".join(missing)), _NAME)
    return bytes(lowered.buffer), outside


# Every resizing of XNNPACK's one pool of threads leaves the methods that were loaded before it with a pool that is no
# more: they are loaded anew.
_resized = 0


def _set_threads(threads: int) -> int:
    """Give the process's pool so many threads; return how often it has been resized."""
    global _resized  # noqa: PLW0603 - as there is one pool in a process
    from executorch.extension.pybindings import portable_lib

    if portable_lib._threadpool_get_thread_count() != threads:
        with silence(native=True):
            portable_lib._unsafe_reset_threadpool(threads)
        _resized += 1
    return _resized


class _Program:
    """Answers any number of images, however many the file takes at a time."""

    def __init__(self, path: Path, threads: int) -> None:
        self._path, self._threads = path, threads
        self._load()

    def _load(self) -> None:
        from executorch.runtime import Runtime as Engine

        try:
            with silence(native=True):
                self._resized = _set_threads(self._threads)
                self._program = Engine.get().load_program(self._path)
                self._method = self._program.load_method("forward")
                assert self._method is not None
                bound = self._program.load_method(_BOUND) if _BOUND in self._program.method_names else None
                self._pad = bound is None
                self._batch = (
                    self._method.metadata.input_tensor_meta(0).sizes()[0] if bound is None else bound.execute([])[0]
                )
        except (RuntimeError, KeyError, MemoryError) as error:
            raise AttarError(
                f"'{self._path}' is no ExecuTorch program that can be run here, or is damaged ({first_line(error)}): "
                "export it again."
            ) from error

    def __call__(self, images: Images) -> Logits:
        if _set_threads(self._threads) != self._resized:
            self._load()
        return in_batches(self._answer, images, self._batch, pad=self._pad)

    def _answer(self, images: Images) -> Logits:
        assert self._method is not None
        logits: Logits = self._method.execute([torch.from_numpy(images)])[0].numpy().astype(np.float32)
        return logits
