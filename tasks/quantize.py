"""INT8 by static calibration: Q/DQ pairs around the backbone's convolutions, ranges measured on training photographs.

Symmetric signed activations and signed weights per channel: what onnxruntime, OpenVINO and TensorRT all take from one graph.
The stem and the head stay float32. The head, because the decision hangs on it; the stem, because OpenVINO 2026.4.1 answers
wrongly when the first convolution after the normalisation is quantised (70 of 179 decisions flipped; docs/decisions.md).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from tasks.onnx_export import INPUT, IR_VERSION, parts_of

if TYPE_CHECKING:
    from tasks.dataset import DatasetVersion
    from tasks.storage import Store

QUANTIZED: Final = ("Conv", "Gemm", "MatMul", "Relu", "Clip", "MaxPool")
BATCH: Final = 32


@dataclass(frozen=True)
class Calibration:
    """The images that ranges are measured on: decoded pixels uint8 [N, S, S, 3]."""

    pixels: NDArray[np.uint8]

    @property
    def digest(self) -> str:
        """`sha256:<hex>` over the shape and every pixel: whoever has the photographs can compute it again."""
        seen = hashlib.sha256(repr(self.pixels.shape).encode())
        seen.update(np.ascontiguousarray(self.pixels).data)
        return f"sha256:{seen.hexdigest()}"


def choose(labels: Sequence[str], sha256: Sequence[str], count: int) -> list[int]:
    """Which rows to calibrate on: up to `count`, one of each label in turn, those with the smallest digests first. No chance
    in it: the same dataset version gives the same rows, in whatever order they come.
    """
    by_label: dict[str, list[int]] = {}
    for index in sorted(range(len(labels)), key=lambda each: sha256[each]):
        by_label.setdefault(labels[index], []).append(index)
    turns = sorted((turn, label) for label, rows in by_label.items() for turn in range(len(rows)))
    return [by_label[label][turn] for turn, label in turns[:count]]


def calibration_of(store: "Store", version: "DatasetVersion", size: int, preprocessing: str, count: int) -> Calibration:
    """Calibration images out of the train split, decoded as the server decodes. Raises LookupError for an empty split."""
    from tasks.dataset import read_rows
    from tasks.images import decode
    from tasks.label_evidence import photographs_of

    labels: list[str] = []
    digests: list[str] = []
    for batch in read_rows(store, version, ["train"], ["label", "sha256"]):
        labels += batch.column("label").to_pylist()
        digests += batch.column("sha256").to_pylist()
    chosen = [digests[index] for index in choose(labels, digests, count)]
    if not chosen:
        raise LookupError(f"{version.name} v{version.version} has no training photographs to calibrate INT8 on")
    encoded = photographs_of(store, version, chosen)
    return Calibration(np.stack([decode(encoded[digest], size, preprocessing) for digest in chosen]))


def quantize_int8(source: Path, target: Path, calibration: Calibration, reduce_range: bool = True) -> None:
    """Writes the network `source` with an INT8 backbone to `target`; outputs stay float32.

    reduce_range: weights in 7 bits. Processors without VNNI add two products in 16 bits, where 8-bit ones saturate, and a
    sealed version may be served by another processor than the one it was proven on.
    Raises ValueError when nothing of the network can be quantised.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    model = onnx.load(source)
    parts = parts_of(model)
    inside = [
        node.name
        for node in model.graph.node
        if node.name in parts.backbone and node.name != parts.stem and node.op_type in QUANTIZED
    ]
    if not any(node.op_type in ("Conv", "Gemm", "MatMul") for node in model.graph.node if node.name in inside):
        raise ValueError(f"{source.name} has no layer between stem and head to quantise: promote it in float32")
    quantize_static(
        model,
        str(target),
        _Reader(calibration.pixels),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(QUANTIZED),
        nodes_to_quantize=inside,
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    made = onnx.load(target)
    made.ir_version = min(made.ir_version, IR_VERSION)
    onnx.checker.check_model(made, full_check=True)
    onnx.save_model(made, str(target))


class _Reader:
    """Batches for onnxruntime's calibrator, which asks for the next until it gets None."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self._batches = iter(pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}
