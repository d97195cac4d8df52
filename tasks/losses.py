"""What training minimises: cross entropy or the focal loss, weighted by class.

A loss is a sum over photographs and the weight of that sum, which are divided by the caller: so the mean over a batch does
not depend on how the batch is shared by processes, nor that over a split on how it is cut into batches.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tasks.recipe import TrainConfig


@dataclass(frozen=True)
class Loss:
    """The loss of a recipe. weight float32 [C]: what each photograph of a class counts; None: all the same."""

    kind: str
    weight: Tensor | None
    smoothing: float
    gamma: float

    def total(self, logits: Tensor, labels: Tensor, training: bool) -> Tensor:
        """Summed over the photographs: logits [N, C], labels int64 [N] -> a scalar. Smoothing is for training only."""
        weight = None if self.weight is None else self.weight.to(logits.device)
        if self.kind == "focal":
            return self._focal(logits, labels, weight)
        smoothing = self.smoothing if training else 0.0
        return functional.cross_entropy(logits, labels, weight, reduction="sum", label_smoothing=smoothing)

    def _focal(self, logits: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
        """-(1 - p)^gamma log p of the true class (Lin et al. 2017, equation 5); without smoothing, which asks the contrary."""
        logarithm = functional.log_softmax(logits, dim=1).gather(1, labels[:, None])[:, 0]
        each = -((1 - logarithm.exp()).clamp_min(1e-6) ** self.gamma) * logarithm
        return (each if weight is None else each * weight[labels]).sum()

    def weight_of(self, labels: NDArray[np.int64]) -> float:
        """What the photographs of these labels count together: the divisor of `total` for their mean."""
        return float(len(labels)) if self.weight is None else float(self.weight[torch.from_numpy(labels)].sum())


def make_loss(labels: NDArray[np.int64], classes: int, config: TrainConfig) -> Loss:
    """The loss of the recipe for a training split with these labels."""
    weight = class_weights(labels, classes) if config.class_weights else None
    return Loss(config.loss, weight, config.label_smoothing, config.focal_gamma)


def class_weights(labels: NDArray[np.int64], classes: int) -> Tensor:
    """Inverse frequency, mean 1 over the photographs."""
    counts = np.bincount(labels, minlength=classes)
    return torch.tensor(len(labels) / (classes * counts), dtype=torch.float32)
