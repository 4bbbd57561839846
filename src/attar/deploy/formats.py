"""The formats that attar exports to."""

from __future__ import annotations

from attar.deploy.artefact import Format
from attar.deploy.executorch import ExecuTorch
from attar.deploy.onnx import ONNX
from attar.deploy.openvino import OpenVINO
from attar.deploy.torch_folder import Torch
from attar.errors import unknown_name

__all__ = ["FORMATS", "find_format"]

# Adding one is a class that fulfils `Format`, and its place here; its packages are imported inside its methods.
FORMATS: tuple[type[Format], ...] = (ONNX, ExecuTorch, OpenVINO, Torch)


def find_format(name: str) -> Format:
    """Return the format of a name.

    Raises:
        AttarError: there is none; the sentence has the nearest.
    """
    for kind in FORMATS:
        if kind.name == name.casefold():
            return kind()
    raise unknown_name("format", name, [kind.name for kind in FORMATS])
