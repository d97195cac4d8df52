"""PyTorch -> ONNX, with normalisation and softmax inside the graph and a dynamic batch."""

import hashlib
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import onnx

    from tasks.model import ImageNetwork

INPUT: Final = "image"
OUTPUTS: Final = ("probabilities", "embedding")
OPSET: Final = 18
# The newest intermediate representation that every server we name accepts: onnxruntime 1.18 and later, and so the
# official Triton containers (a newer one is refused there: triton-inference-server/server#8001).
IR_VERSION: Final = 10
WEIGHTED: Final = ("Conv", "Gemm", "MatMul")


def export_onnx(network: "ImageNetwork", size: int, path: Path) -> str:
    """Writes `path` and returns its sha256. The graph: `image` uint8 [N, size, size, 3] -> `probabilities` float32
    [N, C], `embedding` float32 [N, D]. Raises ValueError when the exporter produced anything else.
    """
    import onnx
    import torch

    network = network.cpu().eval()
    # Two images: an example batch of one would be baked into the graph (pytorch#157621).
    example = torch.zeros((2, size, size, 3), dtype=torch.uint8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.ir_version = min(model.ir_version, IR_VERSION)
    check_graph(model, size)
    onnx.save_model(model, str(path))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_graph(model: "onnx.ModelProto", size: int) -> None:
    """Raises ValueError unless the graph keeps the served contract: names, types, a symbolic batch, a known opset."""
    import onnx

    images = {value.name: value.type.tensor_type for value in model.graph.input}
    results = {value.name: value.type.tensor_type for value in model.graph.output}
    if set(images) != {INPUT} or not set(OUTPUTS) <= set(results):
        raise ValueError(
            f"the exported graph takes {sorted(images)} and gives {sorted(results)}; expected {INPUT} -> {OUTPUTS}"
        )
    if images[INPUT].elem_type != onnx.TensorProto.UINT8:
        raise ValueError(f"the exported graph takes {INPUT} as type {images[INPUT].elem_type}, not uint8")
    dims = images[INPUT].shape.dim
    if not dims[0].dim_param or [d.dim_value for d in dims[1:]] != [size, size, 3]:
        raise ValueError(
            f"{INPUT} is {[d.dim_param or d.dim_value for d in dims]}; expected [batch, {size}, {size}, 3]"
        )
    for name in OUTPUTS:
        if not results[name].shape.dim[0].dim_param:
            raise ValueError(
                f"{name} has a fixed batch of {results[name].shape.dim[0].dim_value}: Triton could not batch"
            )
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if opsets.get("ai.onnx") != OPSET:
        raise ValueError(f"the exported graph uses opsets {opsets}; expected ai.onnx {OPSET}")
    onnx.checker.check_model(model, full_check=True)


@dataclass(frozen=True)
class Parts:
    """Names of nodes of an exported graph. stem: the first with weights; head: the one that makes logits of the embedding;
    backbone: everything from the stem up to the embedding. What lies before the stem is the normalisation.
    """

    stem: str
    head: str
    backbone: tuple[str, ...]


def parts_of(model: "onnx.ModelProto") -> Parts:
    """Where the normalisation ends and the head begins. Raises ValueError for a graph without weights or without a head."""
    weights = {tensor.name for tensor in model.graph.initializer}
    weighted, later, reached = [], set[str](), set[str]()
    for node in model.graph.node:  # in the order of computation, which ONNX demands
        has_weights = node.op_type in WEIGHTED and any(name in weights for name in node.input)
        weighted += [node] if has_weights else []
        if has_weights or reached & set(node.input):
            later.add(node.name)
            reached |= set(node.output)
    needed, wanted = set[str](), {OUTPUTS[1]}
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            needed.add(node.name)
            wanted |= set(node.input)
    backbone = tuple(node.name for node in model.graph.node if node.name in needed & later)
    heads = [node.name for node in weighted if node.name not in needed]
    if not backbone or not heads:
        raise ValueError(
            f"the graph has {len(weighted)} layers with weights and {len(heads)} after {OUTPUTS[1]!r}: no classifier"
        )
    return Parts(weighted[0].name, heads[0], backbone)
