"""The training loop and its state: epochs of steps, each resumable from what `Loop.state` gives.

Everything that decides how a training goes on is in the state (weights, optimizer, random states, the place in the epoch with
its figures so far, best weights, early stopping, schedule, time used): restored, the loop computes the same bits on a CPU.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tasks.augmentation import drawn, varied
from tasks.compilation import compiled
from tasks.evaluation import Figures, figures
from tasks.losses import Loss
from tasks.model import ImageNetwork
from tasks.optimization import EarlyStopping, RateSchedule, make_optimizer
from tasks.precision import faster_precision
from tasks.process_group import ProcessGroup, random_state, set_random_state
from tasks.recipe import TrainConfig
from tasks.samples import Samples
from tasks.temperature import fit_temperature

State = dict[
    str, Any
]  # tensors, numbers, strings, lists and dictionaries of them: what `torch.load` reads without code


@dataclass(frozen=True)
class Epoch:
    """One pass: figures on both splits with the decision at 0.5, the last learning rate, seconds since the start.

    refined_loss: the validation loss that calibration will leave, and what the best epoch is chosen by (`Loop._validate`).
    """

    number: int
    learning_rate: float
    train_loss: float
    train: Figures
    validation_loss: float
    refined_loss: float
    validation: Figures
    seconds: float

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> "Epoch":
        """The inverse of `dataclasses.asdict`."""
        splits = {name: Figures(**told[name]) for name in ("train", "validation")}
        return cls(**{**told, **splits})


class Logits(nn.Module):
    """uint8 or float [N, H, W, 3] in 0..255 -> logits [N, C]: the part of the served graph that is trained."""

    def __init__(self, network: ImageNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network.classifier(self.network.normalise(images))
        return logits


class Loop:
    """One training run, from its beginning or from a state. `save` gets a state after each epoch and every so often."""

    def __init__(
        self,
        network: ImageNetwork,
        training: Samples,
        validation: Samples,
        defects: NDArray[np.bool_],
        loss: Loss,
        config: TrainConfig,
        group: ProcessGroup,
    ) -> None:
        self.network, self.training, self.validation, self.config = network, training, validation, config
        self.defects, self.loss, self.group, self.device = defects, loss, group, group.device
        self.optimizer = make_optimizer(network.classifier, config)
        self.trainable = [p for p in network.classifier.parameters() if p.requires_grad]
        self.rate = RateSchedule(config.schedule, config.rate_factor, config.rate_epochs)
        self.watch = EarlyStopping(config.patience, config.min_delta, config.stop_at_accuracy, config.stop_at_loss)
        self.order = np.random.default_rng(config.seed)
        self.variation = torch.Generator().manual_seed(config.seed)
        self.steps = math.ceil(len(training) / config.batch_size)
        self.planned = config.epochs
        self.precision = config.precision if config.precision != "auto" else "float32"
        self.epochs: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.stopped: str | None = None
        self.step = 0  # done in the current epoch, with their losses and decisions (of this process's photographs)
        self.losses = np.zeros(self.steps)
        self.decided = np.zeros(len(training), dtype=np.int64)
        self.order_before = self.order.bit_generator.state
        self.before = (0.0, 0.0, 0.0)  # seconds, processor seconds and seconds of this epoch in earlier processes
        self.began, self.cpu_began, self.epoch_began = time.monotonic(), time.process_time(), time.monotonic()
        self.saved_at = time.monotonic()
        self.logits = group.parallel(compiled(Logits(network), self._some_images, config.compile))

    @property
    def seconds(self) -> float:
        """Used for the training so far, by all processes that worked on it one after the other."""
        return self.before[0] + time.monotonic() - self.began

    @property
    def cpu_seconds(self) -> float:
        return self.before[1] + time.process_time() - self.cpu_began

    def fit(self, on_epoch: Callable[[Epoch], None] | None, save: Callable[[State], None] | None) -> None:
        """Train to the end. Each epoch is kept before it is reported: what has been reported is never computed again."""
        self.epoch_began = time.monotonic()  # what was compiled and measured until now is paid once, not in every epoch
        while self.stopped is None:
            self._pass_over_training(save)
            epoch = self._end_epoch()
            self._save(save)
            if on_epoch is not None and self.group.first:
                on_epoch(epoch)

    def choose_precision(self) -> None:
        """The faster one, where the recipe leaves it open and the run is long enough to win the time of measuring back."""
        if self.config.precision != "auto" or self.steps * self.config.epochs < 50:
            return
        images = self._some_images()
        labels = torch.from_numpy(self.training.labels[: len(images)]).to(self.device)
        faster = faster_precision(self.network, images, labels, self.loss)
        (chosen,) = self.group.agreed([float(faster == "bfloat16")])
        self.precision = "bfloat16" if chosen else "float32"

    def _some_images(self) -> Tensor:
        count = max(1, self.config.batch_size // self.group.count)
        return torch.from_numpy(np.array(self.training.images[:count])).to(self.device)

    def _pass_over_training(self, save: Callable[[State], None] | None) -> None:
        """The rest of the epoch; ends early when the time is used up."""
        self.network.train()
        self.network.classifier.stages[: self.config.frozen_stages].eval()
        self.order_before = self.order.bit_generator.state
        for step, chosen in enumerate(self._batches()):
            if step < self.step:
                continue
            self._learn(step, chosen)
            self.step = step + 1
            late = self.seconds > self.config.max_minutes * 60
            due = time.monotonic() - self.saved_at > self.config.checkpoint_minutes * 60
            late, due = map(bool, self.group.agreed([late, due]))
            if late:
                self.planned = len(self.epochs) + 1
                break
            if due and self.step < self.steps:
                self._save(save)

    def _batches(self) -> list[NDArray[np.int64]]:
        """Positions of each step. Of nearly equal size: the batch statistics of a last one of two would be noise."""
        return np.array_split(self.order.permutation(len(self.training)), self.steps)

    def _learn(self, step: int, chosen: NDArray[np.int64]) -> None:
        """One step on this process's share of the batch. The loss is the mean over the whole batch, whoever has which share."""
        epoch, mine = len(self.epochs) + 1, self.group.share(len(chosen))
        self._set_rate(epoch, step)
        labels = torch.from_numpy(self.training.labels[chosen[mine]]).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits = self.logits(self._varied(chosen, mine)).float()
        # DistributedDataParallel takes the mean over the processes; the sum is wanted here.
        loss = self.loss.total(logits, labels, training=True) / self.loss.weight_of(self.training.labels[chosen])
        self.optimizer.zero_grad(set_to_none=True)
        (loss * self.group.count).backward()  # type: ignore[no-untyped-call]
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trainable, self.config.clip_norm)
        self.optimizer.step()
        self.losses[step] = float(loss.detach()) * len(chosen)
        self._require_finite(self.losses[step], f"the loss in epoch {epoch}, step {step}")
        start = self._offset(step)
        self.decided[start + mine.start : start + mine.stop] = logits.detach().argmax(1).cpu().numpy()

    def _require_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise RuntimeError(f"{what} is {value}: lower learning_rate {self.config.learning_rate:g}")

    def _varied(self, chosen: NDArray[np.int64], mine: slice) -> Tensor:
        """This process's photographs of the batch. Variations are drawn for all of it: they do not depend on who has which."""
        side = self.training.images.shape[1]
        variation = drawn(len(chosen), side, self.config.augmentation, self.variation).of(mine)
        return varied(torch.from_numpy(self.training.images[chosen[mine]]).to(self.device), variation)

    def _offset(self, step: int) -> int:
        """Photographs in the steps before this one (of `numpy.array_split`)."""
        each, longer = divmod(len(self.training), self.steps)
        return step * each + min(step, longer)

    def _set_rate(self, epoch: int, step: int) -> None:
        factor = self.rate.at(epoch, ((epoch - 1) * self.steps + step) / (self.planned * self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def _end_epoch(self) -> Epoch:
        """Figures of the epoch, and what follows from them: best weights, the rate, whether to go on and how long."""
        seen = self._offset(self.step)
        losses, decided = self.group.total(self.losses), self.group.total(self.decided)[:seen]
        self.order.bit_generator.state = self.order_before
        truth = self.training.labels[np.concatenate(self._batches()[: self.step])]
        validation_loss, refined_loss, validation = self._validate()
        seconds, epoch_seconds = self.group.agreed(
            [self.seconds, self.before[2] + time.monotonic() - self.epoch_began],
        )
        epoch = Epoch(
            number=len(self.epochs) + 1,
            learning_rate=max(float(group["lr"]) for group in self.optimizer.param_groups),
            train_loss=float(losses.sum()) / seen,
            train=figures(truth, decided, self.defects),
            validation_loss=validation_loss,
            refined_loss=refined_loss,
            validation=validation,
            seconds=seconds,
        )
        self.epochs.append(epoch)
        if self.watch.is_best(refined_loss) and self.group.first:
            self.best = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self.rate.epoch_ended(refined_loss)
        self._plan(seconds, epoch_seconds)
        self.stopped = self.watch.reason(validation_loss, validation.accuracy) or self._at_the_end()
        self.step, self.losses[:], self.decided[:] = 0, 0, 0
        self.before, self.epoch_began = (*self.before[:2], 0.0), time.monotonic()
        return epoch

    def _plan(self, seconds: float, epoch_seconds: float) -> None:
        """Drop the epochs that do not fit into the time left, so that the schedule still ends at its end. The median of the
        epochs is what one takes: one that was held up costs the others nothing.
        """
        left = self.config.max_minutes * 60 - seconds
        told = [later.seconds - earlier.seconds for earlier, later in pairwise(self.epochs[:-1])]
        usual = statistics.median([*told, epoch_seconds])
        self.planned = min(self.config.epochs, len(self.epochs) + max(0, int(left / usual)))

    def _at_the_end(self) -> str | None:
        if len(self.epochs) < self.planned:
            return None
        if len(self.epochs) == self.config.epochs:
            return f"all {self.config.epochs} epochs done"
        return f"no further epoch fits into the {self.config.max_minutes:g} minutes"

    def _validate(self) -> tuple[float, float, Figures]:
        """Loss, refined loss and figures of the whole validation split, batches in turn to the processes.

        Late in a training a network grows surer than it is right: its loss rises while it still learns to tell the classes
        apart. How sure it is gets mended by the temperature, so epochs are compared by the weighted cross entropy that is left
        at the temperature that suits each best (Berta et al., "Rethinking Early Stopping: Refine, Then Calibrate", 2025).
        """
        self.network.eval()
        self.group.share_buffers(self.network)
        size, count, truth = 2 * self.config.batch_size, len(self.validation), self.validation.labels
        starts = range(0, count, size)
        losses, scores = np.zeros(len(starts)), np.zeros((count, self.network.classifier.head.out_features))
        with torch.inference_mode():
            for number in range(self.group.rank, len(starts), self.group.count):
                part = slice(starts[number], starts[number] + size)
                images = torch.from_numpy(np.array(self.validation.images[part])).to(self.device)
                labels = torch.from_numpy(truth[part]).to(self.device)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                    logits = self.network.classifier(self.network.normalise(images)).float()
                losses[number] = float(self.loss.total(logits, labels, training=False))
                scores[part] = logits.cpu().numpy()
        losses, scores = self.group.total(losses), self.group.total(scores)
        self._require_finite(losses.sum(), f"the validation loss after epoch {len(self.epochs) + 1}")
        weights = None if self.loss.weight is None else self.loss.weight.numpy()[truth]
        refined = fit_temperature(scores, truth, weights).nll_after
        return float(losses.sum()) / self.loss.weight_of(truth), refined, figures(truth, scores.argmax(1), self.defects)

    def _save(self, save: Callable[[State], None] | None) -> None:
        if save is not None:
            state = self.state()
            if self.group.first:
                save(state)
        self.saved_at = time.monotonic()

    def state(self) -> State:
        """What `restore` needs; written down before the loop goes on, because it holds the very tensors. A meeting of the
        processes: the first one's is the one to keep.
        """
        order = self.order_before if self.step else self.order.bit_generator.state
        return {
            "network": {name: value.cpu() for name, value in self.network.state_dict().items()},
            "best": {name: value.cpu() for name, value in self.best.items()},
            "optimizer": self.optimizer.state_dict(),
            "order": json.dumps(order),
            "variation": self.variation.get_state(),
            "random": self.group.everybodys(random_state(self.device)),
            "step": self.step,
            "losses": torch.from_numpy(self.group.total(self.losses)),
            "decided": torch.from_numpy(self.group.total(self.decided)),
            "watch": self.watch.state(),
            "rate": self.rate.state(),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "planned": self.planned,
            "precision": self.precision,
            "stopped": self.stopped,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "epoch_seconds": self.before[2] + time.monotonic() - self.epoch_began,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken. Every process takes its own random state; the first one the figures so far."""
        self.network.load_state_dict(state["network"])
        self.best = {name: value.to(self.device) for name, value in state["best"].items()} if self.group.first else {}
        self.optimizer.load_state_dict(state["optimizer"])
        self.order.bit_generator.state = json.loads(state["order"])
        self.variation.set_state(state["variation"])
        set_random_state(state["random"][self.group.rank], self.device)
        self.step, self.planned = state["step"], state["planned"]
        if self.group.first:
            self.losses, self.decided = state["losses"].numpy().copy(), state["decided"].numpy().copy()
        self.watch.restore(state["watch"])
        self.rate.restore(state["rate"])
        self.epochs = [Epoch.from_dict(told) for told in state["epochs"]]
        self.precision, self.stopped = state["precision"], state["stopped"]
        self.before = (state["seconds"], state["cpu_seconds"], state["epoch_seconds"])
