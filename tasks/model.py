"""A classifier, which is a network of the zoo with a head, and the served graph around it."""

import torch
from torch import Tensor, nn

from tasks.zoo import build_backbone, normalisation, require_size

__all__ = ["Classifier", "ImageNetwork", "build_model", "image_network", "normalisation", "require_size"]


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


def build_model(architecture: str, classes: int, pretrained: bool) -> Classifier:
    """A classifier with a fresh head; random weights come from torch's global generator.

    Raises ValueError for an unknown name, fewer than two classes, or weights that nobody published, and RuntimeError naming
    the remedy where weights exist but cannot be loaded.
    """
    if classes < 2:
        raise ValueError(f"a classifier needs at least two classes, not {classes}")
    backbone = build_backbone(architecture, pretrained)
    return Classifier(backbone.stages, backbone.features, classes, backbone.dropout)


def image_network(architecture: str, classifier: Classifier, temperature: float = 1.0) -> ImageNetwork:
    """The classifier inside its served graph."""
    return ImageNetwork(classifier, *normalisation(architecture), temperature)
