"""Half precision for the backbone of an exported network: float16 or bfloat16, by rewriting its ONNX graph.

Normalisation, head and softmax stay float32, and so do both outputs: 0..255 squared does not fit into float16, and the
decision is made on what the softmax says. The graph is then strongly typed: TensorRT 11 takes precision from nowhere else.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from tasks.onnx_export import IR_VERSION, parts_of

if TYPE_CHECKING:
    import onnx

Half = Literal["float16", "bfloat16"]
BFLOAT16_OPSET: Final = 22  # the first in which Conv, Gemm and pooling are defined for bfloat16
ALWAYS_FLOAT32: Final = {("Resize", 1), ("Resize", 2)}  # (operator, input): the standard knows no other type there


def to_half(source: Path, target: Path, kind: Half) -> None:
    """Writes the network `source` with its backbone in half precision to `target`.

    Raises ValueError when a weight is too large for the type: such a network has no float16 version.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(source), strict_mode=True)
    rewriter = _Rewriter(model, kind)
    nodes = [made for node in model.graph.node for made in rewriter.rewritten(node)]
    model.graph.initializer.extend(rewriter.halved)
    _replace(model.graph, nodes)
    if kind == "bfloat16":
        model = onnx.version_converter.convert_version(model, BFLOAT16_OPSET)
    model.ir_version = min(model.ir_version, IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, str(target))


class _Rewriter:
    """Node by node: half weights inside the backbone, a cast where a float32 tensor enters or leaves it."""

    def __init__(self, model: "onnx.ModelProto", kind: Half) -> None:
        from onnx import TensorProto

        graph = model.graph
        self._kind = kind
        self._half = TensorProto.FLOAT16 if kind == "float16" else TensorProto.BFLOAT16
        self._inside = set(parts_of(model).backbone)
        self._weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
        typed = (*graph.value_info, *graph.output)
        self._single = {value.name for value in typed if value.type.tensor_type.elem_type == TensorProto.FLOAT}
        made = {name for node in graph.node if node.name in self._inside for name in node.output}
        self._made = made & self._single
        outside = {name for node in graph.node if node.name not in self._inside for name in node.input}
        self._leaving = self._made & (outside | {value.name for value in graph.output})
        self._entered: set[str] = set()
        self.halved: list[onnx.TensorProto] = []

    def rewritten(self, node: "onnx.NodeProto") -> "list[onnx.NodeProto]":
        """The node as it is in the new graph, with the casts that go before and after it."""
        from onnx import TensorProto, helper

        if node.name not in self._inside:
            return [node]
        before = [cast for place in range(len(node.input)) for cast in self._enter(node, place)]
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = self._half
        after = []
        for place, name in enumerate(node.output):
            if name in self._leaving:
                node.output[place] = self._named(name)
                after.append(
                    helper.make_node("Cast", [self._named(name)], [name], f"{name}_to_float32", to=TensorProto.FLOAT)
                )
        return [*before, node, *after]

    def _enter(self, node: "onnx.NodeProto", place: int) -> "list[onnx.NodeProto]":
        """Makes one input half; the cast that this needs, the first time."""
        from onnx import helper

        name = node.input[place]
        is_weight = name in self._weights
        if (node.op_type, place) in ALWAYS_FLOAT32 or not (is_weight or name in self._single):
            return []
        if name in self._made and name not in self._leaving:
            return []
        node.input[place] = self._named(name)
        if name in self._entered or name in self._leaving:
            return []
        self._entered.add(name)
        if is_weight:
            self.halved.append(_halved(self._weights[name], self._named(name), self._kind))
            return []
        return [helper.make_node("Cast", [name], [self._named(name)], f"{name}_to_{self._kind}", to=self._half)]

    def _named(self, name: str) -> str:
        return f"{name}_{self._kind}"


def _replace(graph: "onnx.GraphProto", nodes: "list[onnx.NodeProto]") -> None:
    """The nodes as the graph's own; weights nobody uses any more leave it, and so do the types that were inferred before."""
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
    used = {name for node in kept for name in node.input}
    weights = [tensor for tensor in graph.initializer if tensor.name in used]
    copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in weights]
    for field, values in (("node", kept), ("initializer", copies), ("value_info", [])):
        graph.ClearField(field)
        getattr(graph, field).extend(values)


def _halved(tensor: "onnx.TensorProto", name: str, kind: Half) -> "onnx.TensorProto":
    import ml_dtypes
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float16 if kind == "float16" else ml_dtypes.bfloat16)
    if not np.isfinite(narrow.astype(np.float32)).all():
        raise ValueError(
            f"{tensor.name} holds {np.abs(values).max():.3g}, more than {kind} can: promote this version in float32 or int8"
        )
    halved: onnx.TensorProto = numpy_helper.from_array(narrow, name)
    return halved
