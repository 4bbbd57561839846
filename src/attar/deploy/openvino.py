"""OpenVINO, for Intel's processors: converted from ONNX, run by OpenVINO's own runtime."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from attar.deploy.artefact import Images, Logits, Runtime, Settings
from attar.deploy.candidate import first_line
from attar.deploy.onnx import ONNX
from attar.deploy.program import in_batches, require, silence
from attar.errors import AttarError
from attar.train.files import storage_errors

__all__ = ["OpenVINO"]

_ANY_NUMBER = 64  # images at a time, where the file takes any number


class OpenVINO:
    """OpenVINO's `model.xml` with its weights in `model.bin` beside it.

    Both come from the ONNX artefact of the same settings: int8 is the quantised ONNX graph, whose operators OpenVINO
    runs in int8, so that no other quantisation is needed. `Settings.options` are those of ONNX.
    """

    name = "openvino"
    file = "model.xml"
    extra = "openvino"

    def write(self, network: nn.Module, settings: Settings, path: Path, calibration: Images | None) -> dict[str, Any]:
        """Write the artefact: `path` and the weights beside it, with the ending `.bin`.

        Raises:
            AttarError: an operator that ONNX or OpenVINO has not, or a package that is missing.
        """
        require(("openvino",), "OpenVINO", self.extra)
        import openvino

        between = path.with_name(f".{path.name}.onnx")
        try:
            told = ONNX().write(network, settings, between, calibration)
            with silence(native=True):
                try:
                    model = openvino.convert_model(str(between))
                except Exception as error:  # openvino's kinds have no common base
                    raise AttarError(
                        f"{type(network).__name__} cannot be converted to OpenVINO ({first_line(error)}): export it "
                        "with --format onnx."
                    ) from error
                with storage_errors(path):
                    openvino.save_model(model, str(path), compress_to_fp16=False)
            return told
        finally:
            for left in path.parent.glob(f"{between.name}*"):
                left.unlink()

    def load(self, path: Path, threads: int = 1) -> Runtime:
        """Load an artefact, or an ONNX file, in OpenVINO on the CPU.

        Raises:
            AttarError: the file is missing, no OpenVINO model, or a damaged one.
        """
        require(("openvino",), "OpenVINO", self.extra)
        if not path.is_file():
            raise AttarError(f"There is no file '{path}': give an exported OpenVINO model.")

        # Reduced precision, which OpenVINO chooses by itself where the processor has it, is not what was exported.
        wanted = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            with silence(native=True):
                compiled = _core().compile_model(str(path), "CPU", wanted)
        except Exception as error:  # openvino's kinds have no common base
            raise AttarError(
                f"'{path}' is no OpenVINO model that can be run here, or is damaged ({first_line(error)}): export it "
                "again."
            ) from error
        return _Compiled(compiled)


@functools.cache
def _core() -> Any:
    """Return the process's one engine.

    Every further one replaces the stack on which the process's signals are handled, and gives it back when it goes: of
    two that overlap, the second gives back the first's, which is no more, and the next signal kills without a word.
    """
    import openvino

    return openvino.Core()


class _Compiled:
    """Answers any number of images, however many the file takes at a time."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        first = compiled.input(0).partial_shape[0]
        self._pad = not first.is_dynamic
        self._batch = _ANY_NUMBER if first.is_dynamic else first.get_length()

    def __call__(self, images: Images) -> Logits:
        return in_batches(self._answer, images, self._batch, pad=self._pad)

    def _answer(self, images: Images) -> Logits:
        logits: Logits = np.array(self._compiled([images])[0], dtype=np.float32)
        return logits
