import numpy as np
import pytest
import torch

from tasks.inference import open_network
from tasks.model import build_model, image_network
from tasks.onnx_export import export_onnx
from tasks.recipe import ARCHITECTURES

BIG = {"vgg16", "resnet50", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2"}  # 10 to 40 s to export here
EVERY = [pytest.param(name, marks=pytest.mark.slow) if name in BIG else name for name in ARCHITECTURES]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet_v3_small", "vit_b_32")]
SIDES = {"vit_b_32": 224, "mlp": 40}  # the one side it takes; one that the grid of the MLP does not divide


@pytest.fixture(scope="module", params=[*EVERY, *OTHERS])
def exported(request, tmp_path_factory):
    """Each architecture with lively weights and batch statistics, its ONNX file, and its side."""
    side = SIDES.get(request.param, 64)
    torch.manual_seed(5)
    network = image_network(request.param, build_model(request.param, 3, pretrained=False)).train()
    with torch.no_grad():
        for _ in range(3):  # running statistics that are not 0 and 1
            network(torch.randint(0, 256, (8, side, side, 3), dtype=torch.uint8))
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    export_onnx(network.eval(), side, path)
    return network, path, side


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_architecture_exports_and_answers_like_pytorch(exported, batch):
    network, path, side = exported
    images = np.random.default_rng(batch).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    with torch.inference_mode():
        probabilities, embedding = (out.numpy() for out in network(torch.from_numpy(images)))
    served = open_network(path, "onnxruntime")(images, outputs=("probabilities", "embedding"))
    np.testing.assert_allclose(served["probabilities"], probabilities, atol=1e-5)
    np.testing.assert_allclose(served["embedding"], embedding, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("architecture", ["mlp", "tinyvgg", "cnn", "vgg11", "resnet18", "efficientnet_lite0"])
def test_the_served_graph_is_the_classifier_on_normalised_pixels(architecture):
    network = image_network(architecture, build_model(architecture, 2, pretrained=False)).eval()
    image = torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8)
    mean, std = network.mean.view(3) / 255, network.std.view(3) / 255
    by_hand = ((image.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        probabilities, embedding = network(image)
        torch.testing.assert_close(network.classifier(by_hand).softmax(1), probabilities, atol=1e-5, rtol=1e-4)
    assert embedding.shape == (2, network.classifier.head.in_features)


def test_one_class_is_not_a_classifier():
    with pytest.raises(ValueError, match="at least two classes, not 1"):
        build_model("cnn", 1, pretrained=False)
