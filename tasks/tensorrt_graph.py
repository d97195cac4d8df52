"""An exported network as TensorRT's parser takes it: the same arithmetic, two things said otherwise."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.onnx_export import INPUT

if TYPE_CHECKING:
    import onnx


def for_tensorrt(source: Path) -> bytes:
    """The serialised graph. TensorRT knows uint8 only as what a cast turns into something else, and no INT32 behind a
    DequantizeLinear: so the image is cast before it is transposed, and quantised biases become the numbers they stand for.
    """
    import onnx

    model = onnx.load(source)
    model.graph.ClearField("value_info")
    _cast_first(model)
    _plain_biases(model)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


def _cast_first(model: "onnx.ModelProto") -> None:
    """image -> Transpose -> Cast becomes image -> Cast -> Transpose."""
    nodes = model.graph.node
    for transpose in nodes:
        if transpose.op_type != "Transpose" or transpose.input[0] != INPUT:
            continue
        follower = next((n for n, node in enumerate(nodes) if node.input[:1] == transpose.output[:1]), None)
        if follower is None or nodes[follower].op_type != "Cast":
            raise ValueError(f"{transpose.name} hands uint8 to something else than a cast: TensorRT cannot take that")
        cast, turned = type(transpose)(), type(transpose)()
        cast.CopyFrom(nodes[follower])
        turned.CopyFrom(transpose)
        between = f"{INPUT}_float"
        cast.input[0], cast.output[0] = INPUT, between
        turned.input[0], turned.output[0] = between, nodes[follower].output[0]
        transpose.CopyFrom(cast)
        nodes[follower].CopyFrom(turned)
        return


def _plain_biases(model: "onnx.ModelProto") -> None:
    """DequantizeLinear of an INT32 weight -> the float32 weight: the very number that every runtime computes."""
    import onnx

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        stored = weights.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if stored is None or stored.data_type != onnx.TensorProto.INT32:
            kept.append(type(node).FromString(node.SerializeToString()))
            continue
        values, scale = (onnx.numpy_helper.to_array(weights[name]) for name in node.input[:2])
        plain = (values.astype(np.float32) * scale.astype(np.float32)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(plain, node.output[0]))
    model.graph.ClearField("node")
    model.graph.node.extend(kept)
