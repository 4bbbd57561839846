"""Preprocessing inside the graph: an ONNX file that takes pixels and gives probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attar.data import Normalization
from attar.errors import AttarError

__all__ = ["package"]


def package(path: Path, normalization: Normalization) -> None:
    """Let an ONNX file take uint8 RGB images [N, H, W, 3] and give probabilities [N, K].

    Definition: `softmax(f(x * scale + bias))` with the channels brought forward, `scale = 1 / (255 std)` and
    `bias = -mean / std` in float32, exactly the numbers of training. It is done behind quantisation, so that pixels are
    not rounded twice.

    Args:
        path: of a file with the input `images` [N, 3, H, W] and the output `logits`; rewritten.
        normalization: of the network's images.

    Raises:
        AttarError: it is no such file.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    if len(graph.input) != 1 or len(graph.output) != 1:
        raise AttarError(f"'{path}' has not one input and one output: export it without --packaged.")
    images, logits = graph.input[0], graph.output[0]
    batch, channels, height, width = (_copied(dim) for dim in images.type.tensor_type.shape.dim)
    taken = [value.name for value in (images, logits)]
    constants = [
        numpy_helper.from_array(value.reshape(1, 1, 1, -1), f"preprocess.{name}")
        for name, value in (("scale", normalization.scale), ("bias", normalization.bias))
    ]
    before = [
        helper.make_node("Cast", ["pixels"], ["preprocess.float"], "preprocess.cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["preprocess.float", "preprocess.scale"], ["preprocess.scaled"], "preprocess.mul"),
        helper.make_node("Add", ["preprocess.scaled", "preprocess.bias"], ["preprocess.normal"], "preprocess.add"),
        helper.make_node("Transpose", ["preprocess.normal"], [taken[0]], "preprocess.nchw", perm=[0, 3, 1, 2]),
    ]
    after = helper.make_node("Softmax", [taken[1]], ["probabilities"], "postprocess.softmax", axis=1)
    classes = [_copied(dim) for dim in logits.type.tensor_type.shape.dim]
    nodes = [*before, *graph.node, after]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
    graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.UINT8, [batch, height, width, channels]))
    graph.output.append(helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, classes))
    onnx.save(model, str(path))


def _copied(dimension: Any) -> int | str:
    return int(dimension.dim_value) if dimension.HasField("dim_value") else str(dimension.dim_param)
