"""ONNX files run by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attar.deploy.artefact import Runtime
from attar.deploy.candidate import first_line
from attar.deploy.program import in_batches, require
from attar.errors import AttarError

__all__ = ["PACKAGES", "load_onnx"]

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def load_onnx(path: Path, threads: int = 1) -> Runtime:
    """Load an ONNX file in onnxruntime, on the CPU; a packaged one takes uint8 images and gives probabilities.

    Raises:
        AttarError: the file is missing, no ONNX model, or one that onnxruntime cannot run.
    """
    require(PACKAGES, "ONNX", "export")
    import onnxruntime

    if not path.is_file():
        raise AttarError(f"There is no file '{path}': give an exported ONNX model.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds, which have no common base
        raise AttarError(f"'{path}' is no ONNX model that onnxruntime can run ({first_line(error)}).") from error
    return _Session(session)


class _Session:
    """Answers any number of images, however many the file takes at a time."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._input = session.get_inputs()[0]
        first = self._input.shape[0]
        self._batch = first if isinstance(first, int) else None

    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]:
        if self._batch is None:
            return self._run(np.ascontiguousarray(images))
        return in_batches(self._run, images, self._batch, pad=True)

    def _run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        answer: NDArray[np.float32] = self._session.run(None, {self._input.name: images})[0]
        return answer
