import hashlib

import numpy as np
import onnx
import pytest
import torch

from tasks.inference import open_network
from tasks.model import build_model, image_network
from tasks.network_forms import torch_run
from tasks.onnx_export import check_graph, export_onnx


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return image_network("cnn", build_model("cnn", 3, pretrained=False))


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return path, export_onnx(network, 32, path)


@pytest.mark.parametrize("accelerator", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_exported_graph_answers_like_pytorch_at_any_batch(network, exported, accelerator, batch):
    pixels = np.random.default_rng(batch).integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8)
    served = open_network(exported[0], accelerator)(pixels)["probabilities"]
    np.testing.assert_allclose(served, torch_run(network)(pixels), atol=1e-5)
    np.testing.assert_allclose(served.sum(axis=1), 1.0, atol=1e-5)


def test_the_digest_is_that_of_the_file(exported):
    path, digest = exported
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_servers_of_the_last_years_accept_the_graph(exported):
    model = onnx.load(exported[0])
    assert model.ir_version <= 10
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda m: m.graph.input[0].type.tensor_type.shape.dim[0].__setattr__("dim_value", 1),
            r"expected \[batch, 32, 32, 3\]",
        ),
        (lambda m: m.graph.input[0].type.tensor_type.shape.dim[1].__setattr__("dim_value", 64), "64"),
        (lambda m: m.opset_import[0].__setattr__("version", 17), "opset"),
    ],
)
def test_a_graph_that_breaks_the_served_contract_is_refused(exported, damage, message):
    model = onnx.load(exported[0])
    damage(model)
    with pytest.raises((ValueError, onnx.checker.ValidationError), match=message):
        check_graph(model, 32)
