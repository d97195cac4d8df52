"""What steers a training run: the optimizer, its rate over the run, and when to stop."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from tasks.model import Classifier
from tasks.recipe import TrainConfig

WARM_UP: Final = 0.25  # share of a one-cycle run in which the rate rises


@dataclass
class EarlyStopping:
    """Watches validation. best_loss never rises: it is overwritten by smaller losses only, whatever accuracy does."""

    patience: int
    min_delta: float
    stop_at_accuracy: float | None = None
    stop_at_loss: float | None = None
    best_loss: float = field(default=math.inf, init=False)
    _anchor: float = field(default=math.inf, init=False)
    _waited: int = field(default=0, init=False)

    def is_best(self, loss: float) -> bool:
        """Takes the next validation loss; true when it is the lowest so far."""
        if loss < self._anchor - self.min_delta:
            self._anchor, self._waited = loss, 0
        else:
            self._waited += 1
        if loss < self.best_loss:
            self.best_loss = loss
            return True
        return False

    def reason(self, loss: float, accuracy: float) -> str | None:
        """Why training should stop after this epoch, or None."""
        asked = self.stop_at_accuracy is not None or self.stop_at_loss is not None
        right_enough = self.stop_at_accuracy is None or accuracy >= self.stop_at_accuracy
        low_enough = self.stop_at_loss is None or loss <= self.stop_at_loss
        if asked and right_enough and low_enough:
            return f"quality reached: accuracy {accuracy:.4f}, loss {loss:.4f}"
        if self._waited >= self.patience:
            return f"no better validation loss for {self.patience} epochs"
        return None

    def state(self) -> dict[str, float]:
        return {"best_loss": self.best_loss, "anchor": self._anchor, "waited": self._waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.best_loss, self._anchor, self._waited = state["best_loss"], state["anchor"], int(state["waited"])


@dataclass
class RateSchedule:
    """The learning rate over the run, as a share of its peak. one_cycle, cosine and constant go by the share of the run that
    is done, step by epochs, plateau by what validation says.
    """

    schedule: str
    factor: float = 0.1
    epochs: int = 3
    _falls: int = field(default=0, init=False)
    _best: float = field(default=math.inf, init=False)
    _waited: int = field(default=0, init=False)

    def at(self, epoch: int, progress: float) -> float:
        """The share in this epoch (from 1), `progress` (0..1) through the run."""
        if self.schedule == "step":
            return self.factor ** ((epoch - 1) // self.epochs)
        if self.schedule == "plateau":
            return self.factor**self._falls
        return learning_rate_factor(self.schedule, progress)

    def epoch_ended(self, validation_loss: float) -> None:
        """What plateau goes by; a fall starts the count of epochs anew."""
        if validation_loss < self._best:
            self._best, self._waited = validation_loss, 0
            return
        self._waited += 1
        if self._waited >= self.epochs:
            self._falls, self._waited = self._falls + 1, 0

    def state(self) -> dict[str, float]:
        return {"falls": self._falls, "best": self._best, "waited": self._waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._falls, self._best, self._waited = int(state["falls"]), state["best"], int(state["waited"])


def learning_rate_factor(schedule: str, progress: float) -> float:
    """Share of the peak rate at `progress` (0..1) through the run; one_cycle as in Smith and Topin 2018, with cosines."""
    if schedule == "constant":
        return 1.0
    if schedule == "one_cycle" and progress < WARM_UP:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * progress / WARM_UP)) / 2
    if schedule == "one_cycle":
        progress = (progress - WARM_UP) / (1 - WARM_UP)
    return 0.001 + 0.999 * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def make_optimizer(classifier: Classifier, config: TrainConfig) -> torch.optim.Optimizer:
    """Four groups: head or not, decayed or not (biases and norms are not); each remembers its peak rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in classifier.named_parameters():
        if parameter.requires_grad:
            rate = config.learning_rate * (config.head_rate if name.startswith("head.") else 1.0)
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    parameters = [{"params": p, "lr": r, "peak": r, "weight_decay": d} for (r, d), p in groups.items()]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, nesterov=True)
    return (torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam)(parameters)
