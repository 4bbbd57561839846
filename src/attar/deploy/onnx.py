"""ONNX: written through torch.export, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attar.deploy.artefact import Images, Runtime, Settings
from attar.deploy.candidate import first_line
from attar.deploy.onnx_session import PACKAGES, load_onnx
from attar.deploy.program import export_program, refusal, require, silence
from attar.deploy.quantize import quantize_onnx
from attar.deploy.sensitivity import quantize_within
from attar.errors import AttarError

__all__ = ["ONNX", "OPSET", "annotate"]

# What torch's exporter writes without converting; later ones are converted from it.
OPSET = 18
_NAME = "ONNX"
_ANY_NUMBER = 1 << 16  # of images at a time: what torch.export is told; the file knows no bound


class ONNX:
    """ONNX for onnxruntime, on whatever it runs.

    The graph has one input `images` and one output `logits`, float32 [N, 3, H, W] -> [N, K]. `Settings.options` knows
    `opset` and `float32`, the path of the same network's float32 artefact where there is one to quantise.
    """

    name = "onnx"
    file = "model.onnx"
    extra = "export"

    def write(self, network: nn.Module, settings: Settings, path: Path, calibration: Images | None) -> dict[str, Any]:
        """Write the artefact.

        Raises:
            AttarError: an operator that ONNX has not (named), an unknown opset, a package that is missing.
        """
        require(PACKAGES, _NAME, self.extra)
        opset = settings.options.get("opset", OPSET)
        if not settings.int8:
            _write_float32(network, settings, path, opset)
            return {"opset": opset}
        assert calibration is not None
        source, own = settings.options.get("float32"), path.with_name(f".{path.name}.float32")
        try:
            if source is None:
                _write_float32(network, settings, own, opset)
                source = own
            if settings.accuracy is None:
                quantize_onnx(source, path, calibration)
                return {"opset": opset, "left_in_float32": []}
            found = quantize_within(source, path, calibration, settings.accuracy, settings.most_drop)
            return {"opset": opset, **found}
        finally:
            own.unlink(missing_ok=True)

    def load(self, path: Path, threads: int = 1) -> Runtime:
        """Load an artefact as `load_onnx` does."""
        return load_onnx(path, threads)


def annotate(path: Path, told: Mapping[str, str]) -> None:
    """Write into an ONNX file what must travel with it, and check the file.

    What the exporter remembers of the source code that each node came from (paths of this machine among it) goes.

    Raises:
        AttarError: the file is no valid ONNX.
    """
    import onnx

    # Weights in a file of their own stay there.
    model = onnx.load(str(path), load_external_data=False)
    for graph in (model.graph, *model.functions):
        values = [] if graph is not model.graph else [*graph.input, *graph.output, *graph.initializer]
        for part in (*graph.node, *graph.value_info, *values):
            if hasattr(part, "metadata_props"):
                del part.metadata_props[:]
            if hasattr(part, "doc_string"):
                part.doc_string = ""
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    for key, text in told.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, text
    onnx.save(model, str(path))
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # checker and shape inference have kinds of their own
        raise AttarError(f"The exported graph is no valid ONNX ({first_line(error)}): try another --opset.") from error


def _write_float32(network: nn.Module, settings: Settings, path: Path, opset: int) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not OPSET <= opset <= newest:
        raise AttarError(f"ONNX opset {opset} cannot be written: choose one from {OPSET} to {newest}.")
    # Two images where any number may come, since torch.export takes a dimension of one for a constant.
    images = torch.zeros(settings.batch or 2, 3, *settings.image_size)
    program = export_program(network, images, _ANY_NUMBER if settings.batch is None else None, _NAME)
    with silence():
        try:
            written = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=["images"],
                output_names=["logits"],
                verbose=False,
            )
        except Exception as error:  # the exporter raises many kinds
            raise refusal(network, error, _NAME) from error
        assert written is not None
        written.save(str(path))
    model = onnx.load(str(path), load_external_data=False)
    got = {entry.domain: entry.version for entry in model.opset_import}.get("")
    if got != opset:
        raise AttarError(f"This network cannot be written in ONNX opset {opset}: leave out --opset ({got} is written).")
    if settings.batch is None:
        _name_batch(model, path)


def _name_batch(model: Any, path: Path) -> None:
    """Call the free dimension what it is."""
    import onnx

    old = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if old and dimension.dim_param == old:
                dimension.dim_param = "batch"
    onnx.save(model, str(path))
