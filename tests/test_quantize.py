"""INT8 and half precision of a network that was really trained, in both runtimes of the server."""

import hashlib

import numpy as np
import onnx
import pytest

from tasks.export import Export, export_network, require_runnable
from tasks.half_precision import BFLOAT16_OPSET, to_half
from tasks.inference import open_network
from tasks.onnx_export import parts_of
from tasks.parity import compare
from tasks.quantize import Calibration, choose, quantize_int8


@pytest.fixture(scope="module")
def exported(prints, tmp_path_factory):
    """The trained network as float32 ONNX."""
    folder = tmp_path_factory.mktemp("float32")
    return export_network(prints.network, 16, folder, Export(), calibrate=pytest.fail).file


@pytest.fixture(scope="module")
def int8(prints, exported, tmp_path_factory):
    made = tmp_path_factory.mktemp("int8") / "model.onnx"
    quantize_int8(exported, made, Calibration(prints.pixels["train"][:128]))
    return made


@pytest.mark.parametrize("accelerator", ["openvino", "onnxruntime"])
def test_an_int8_network_decides_like_the_float32_one_in_both_runtimes(prints, exported, int8, accelerator):
    pixels = prints.pixels["test"]
    before, after = (open_network(file, accelerator)(pixels)["probabilities"] for file in (exported, int8))
    rung = compare("int8", before, after, prints.rule)
    assert rung.flip_share <= 0.02 and 0 < rung.mean_difference < 0.01
    assert int8.stat().st_size < 0.35 * exported.stat().st_size


def test_only_the_backbone_behind_the_stem_is_quantised_and_weights_are_per_channel(int8):
    model = onnx.load(int8)
    parts = parts_of(onnx.load(int8))
    by_output = {name: node for node in model.graph.node for name in node.output}
    quantised = {
        node.name: [
            by_output[name] for name in node.input if name in by_output and "Dequantize" in by_output[name].op_type
        ]
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm")
    }
    assert quantised.pop(parts.stem) == [] and quantised.pop(parts.head) == []
    assert len(quantised) == 3 and all(inputs for inputs in quantised.values())
    scales = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    channels = [scales[inputs[1].input[1]].shape for inputs in quantised.values()]
    assert channels == [(64,), (128,), (256,)]


def test_calibration_takes_the_same_number_of_each_label_whatever_the_order_of_the_rows():
    labels = ["good"] * 90 + ["worn"] * 10
    digests = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(100)]
    chosen = choose(labels, digests, 16)
    assert [sum(labels[i] == name for i in chosen) for name in ("good", "worn")] == [8, 8]
    order = np.random.default_rng(1).permutation(100)
    again = choose([labels[i] for i in order], [digests[i] for i in order], 16)
    assert {digests[i] for i in chosen} == {digests[order[i]] for i in again}
    assert len(choose(labels, digests, 60)) == 60, "a rare label is taken whole, the others fill up"


def test_the_calibration_digest_changes_with_a_single_pixel(prints):
    pixels = prints.pixels["train"][:16].copy()
    before = Calibration(pixels).digest
    pixels[3, 2, 1, 0] ^= 1
    assert Calibration(pixels).digest != before


def test_a_network_with_nothing_between_stem_and_head_is_not_quantised(small_network, tmp_path):
    model = onnx.load(small_network(0))
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    for node in model.graph.node:  # all but the stem become something that INT8 does not know
        if node.name in convolutions[1:]:
            node.op_type = "ConvTranspose"
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(ValueError, match="no layer between stem and head"):
        quantize_int8(tmp_path / "odd.onnx", tmp_path / "int8.onnx", Calibration(np.zeros((2, 32, 32, 3), np.uint8)))


@pytest.mark.parametrize(
    ("kind", "accelerator", "moved"),
    [("float16", "openvino", 2e-3), ("float16", "onnxruntime", 2e-3), ("bfloat16", "openvino", 2e-2)],
)
def test_a_half_precision_network_decides_like_the_float32_one(prints, exported, tmp_path, kind, accelerator, moved):
    to_half(exported, tmp_path / "half.onnx", kind)
    pixels = prints.pixels["test"]
    before, after = (open_network(f, accelerator)(pixels) for f in (exported, tmp_path / "half.onnx"))
    rung = compare(kind, before["probabilities"], after["probabilities"], prints.rule)
    assert 0 < rung.largest_difference < moved and rung.flips == 0
    assert (tmp_path / "half.onnx").stat().st_size < 0.55 * exported.stat().st_size


def test_normalisation_head_and_softmax_stay_float32(exported, tmp_path):
    to_half(exported, tmp_path / "half.onnx", "float16")
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "half.onnx"))
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    single, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    for node in model.graph.node:
        if node.op_type in ("Sub", "Div", "Gemm", "Softmax"):
            assert {types[name] for name in (*node.input, *node.output)} == {single}, node.name
        if node.op_type == "Conv":
            assert {types[name] for name in (*node.input, *node.output)} == {half}, node.name
    assert types["probabilities"] == types["embedding"] == single


def test_a_weight_that_float16_cannot_hold_is_refused_and_bfloat16_holds_it(exported, tmp_path):
    model = onnx.load(exported)
    stem = next(node for node in model.graph.node if node.name == parts_of(model).stem)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == stem.input[1])
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] = 1e5
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "large.onnx")
    with pytest.raises(ValueError, match=r"holds 1e\+05, more than float16 can"):
        to_half(tmp_path / "large.onnx", tmp_path / "half.onnx", "float16")
    to_half(tmp_path / "large.onnx", tmp_path / "half.onnx", "bfloat16")
    assert {entry.domain: entry.version for entry in onnx.load(tmp_path / "half.onnx").opset_import}[
        ""
    ] == BFLOAT16_OPSET


def test_a_precision_that_the_runtime_cannot_run_is_refused_before_anything_is_made():
    with pytest.raises(ValueError, match="onnxruntime has no bfloat16"):
        require_runnable(Export(precision="bfloat16"), "onnxruntime")
    require_runnable(Export(precision="bfloat16"), "openvino")


def test_what_was_measured_and_what_it_was_made_from_goes_into_the_passport(prints, tmp_path):
    calibration = Calibration(prints.pixels["train"][:32])
    made = export_network(prints.network, 16, tmp_path, Export(precision="int8"), lambda: calibration)
    assert made.passport["calibration_digest"] == calibration.digest and made.passport["calibration_images"] == "32"
    (reference,) = made.beside.values()
    assert made.passport["float32_sha256"] == hashlib.sha256(reference.read_bytes()).hexdigest()
    again = tmp_path / "again"
    again.mkdir()
    second = export_network(prints.network, 16, again, Export(precision="int8"), lambda: calibration)
    assert second.file.read_bytes() == made.file.read_bytes(), "a killed promotion must be able to finish"
