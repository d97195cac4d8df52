"""PyTorch -> ONNX, with normalisation and softmax inside the graph and a dynamic batch."""

import hashlib
import logging
import warnings
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
