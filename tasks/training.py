"""The training loop: seeded, in the faster precision, stopped early, within a time budget, best weights back."""

import copy
import ctypes
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tasks.augmentation import augment
from tasks.evaluation import Figures, figures
from tasks.model import ImageNetwork, build_model, image_network, require_size
from tasks.optimization import EarlyStopping, learning_rate_factor, make_optimizer
from tasks.recipe import TrainConfig
from tasks.samples import Samples, processors

MEASURED_STEPS: Final = 3  # per precision, after one that warms up
CLEAR_GAIN: Final = 0.9  # bfloat16 is taken when its step takes less than this share of the time


@dataclass(frozen=True)
class Epoch:
    """One pass: figures on both splits with the decision at 0.5, the last learning rate, seconds since the start."""

    number: int
    learning_rate: float
    train_loss: float
    train: Figures
    validation_loss: float
    validation: Figures
    seconds: float


@dataclass(frozen=True)
class Trained:
    """The network with its best weights, on the CPU and in evaluation mode, and how it came about."""

    network: ImageNetwork
    epochs: tuple[Epoch, ...]
    best_epoch: int
    stopped: str
    precision: str
    device: str
    seconds: float
    cpu_seconds: float


def check_samples(training: Samples, validation: Samples, classes: tuple[str, ...], config: TrainConfig) -> None:
    """ValueError, before any work, for data that cannot be trained on; it says what is missing."""
    require_size(config.architecture, config.image_size)
    unknown = sorted(set(config.defect_labels) - set(classes))
    if unknown:
        raise ValueError(f"defect_labels {unknown} are not among the classes {list(classes)} of the dataset")
    if len(training) < config.batch_size:
        raise ValueError(
            f"the training split holds {len(training)} photographs, fewer than one batch of {config.batch_size}: "
            "add photographs or lower batch_size"
        )
    if len(validation) == 0:
        raise ValueError("the validation split is empty: add photographs until some fall into it")
    missing = sorted(set(range(len(classes))) - set(training.labels.tolist()))
    if len(classes) < 2 or missing:
        raise ValueError(
            f"the training split has no photograph of {[classes[i] for i in missing]}"
            if missing
            else f"the only class is {list(classes)}: telling apart needs at least two"
        )


def train(
    training: Samples,
    validation: Samples,
    classes: tuple[str, ...],
    config: TrainConfig,
    on_epoch: Callable[[Epoch], None] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Trained:
    """Train as the recipe says, from `weights` where given. The test split is no argument: it cannot be looked at here.

    Raises ValueError for unfit data (check_samples) and RuntimeError when the loss stops being a number.
    """
    check_samples(training, validation, classes, config)
    started, cpu_started = time.monotonic(), time.process_time()
    device = accelerator()
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    repeatable = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with _threads(processors()), _memory_kept(), torch.random.fork_rng(devices), repeatable:
        torch.manual_seed(config.seed)
        network = _start(classes, config, weights).to(device).to(memory_format=torch.channels_last)
        run = _Run(network, training, validation, classes, config, device, started)
        run.choose_precision()
        stopped, best = run.fit(on_epoch)
        network.load_state_dict(best)
    return Trained(
        network=network.to("cpu").to(memory_format=torch.contiguous_format).eval(),
        epochs=tuple(run.epochs),
        best_epoch=min(run.epochs, key=lambda epoch: epoch.validation_loss).number,
        stopped=stopped,
        precision=run.precision,
        device=str(device),
        seconds=time.monotonic() - started,
        cpu_seconds=time.process_time() - cpu_started,
    )


def predict(network: ImageNetwork, images: NDArray[np.uint8], batch_size: int = 64) -> dict[str, NDArray[np.float32]]:
    """`probabilities` [N, C] and `embedding` [N, D] of uint8 [N, S, S, 3], in float32; the network ends on the CPU."""
    device = accelerator()
    parts: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    network.eval().to(device)
    with _threads(processors()), torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.ascontiguousarray(images[start : start + batch_size])).to(device)
            probabilities, embedding = network(batch)
            parts.append((probabilities.cpu().numpy(), embedding.cpu().numpy()))
    network.to("cpu")
    return {
        "probabilities": np.concatenate([part[0] for part in parts]),
        "embedding": np.concatenate([part[1] for part in parts]),
    }


def accelerator() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch's threads set for a while: a worker's other runs keep theirs."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _memory_kept() -> Iterator[None]:
    """glibc told to keep freed memory for a while instead of returning it to the system after every large tensor.

    Without it each activation map is new memory that the kernel has to zero: 4.4 million page faults and 7.6 s of system
    time where it takes 0.3 million and 0.7 s with it (EfficientNet-Lite0, 160 px, 1,500 photographs, 2 cores).
    """
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    known = hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
    if known:
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)
    try:
        yield
    finally:
        if known:
            libc.mallopt(trim_threshold, 128 * 1024)  # glibc's defaults
            libc.mallopt(mmap_max, 65536)
            libc.malloc_trim(0)


def _start(classes: tuple[str, ...], config: TrainConfig, weights: Mapping[str, Tensor] | None) -> ImageNetwork:
    classifier = build_model(config.architecture, len(classes), config.pretrained and weights is None)
    if weights is not None:
        classifier.load_state_dict(dict(weights))
    for stage in classifier.stages[: config.frozen_stages]:
        stage.requires_grad_(False)
    return image_network(config.architecture, classifier)


class _Run:
    """The state of one training run: what the epochs change."""

    def __init__(
        self,
        network: ImageNetwork,
        training: Samples,
        validation: Samples,
        classes: tuple[str, ...],
        config: TrainConfig,
        device: torch.device,
        started: float,
    ) -> None:
        self.network, self.training, self.validation, self.config = network, training, validation, config
        self.device, self.started = device, started
        self.defects = np.array([label in config.defect_labels for label in classes], dtype=bool)
        weight = _class_weights(training.labels, len(classes)) if config.class_weights else None
        self.weight = None if weight is None else weight.to(device)
        self.optimizer = make_optimizer(network.classifier, config)
        self.order = np.random.default_rng(config.seed)
        self.variation = torch.Generator().manual_seed(config.seed)
        self.steps = math.ceil(len(training) / config.batch_size)
        self.planned = config.epochs
        self.precision = "float32"
        self.epochs: list[Epoch] = []

    def fit(self, on_epoch: Callable[[Epoch], None] | None) -> tuple[str, dict[str, Tensor]]:
        """Why the run stopped, and the weights of the epoch with the lowest validation loss."""
        config = self.config
        watch = EarlyStopping(config.patience, config.min_delta, config.stop_at_accuracy, config.stop_at_loss)
        best: dict[str, Tensor] = {}
        reason: str | None = None
        while reason is None and len(self.epochs) < self.planned:
            began = time.monotonic()
            epoch = self._epoch(len(self.epochs) + 1)
            self.epochs.append(epoch)
            if watch.is_best(epoch.validation_loss):
                best = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
            if on_epoch is not None:
                on_epoch(epoch)
            reason = watch.reason(epoch.validation_loss, epoch.validation.accuracy)
            self._plan(time.monotonic() - began)
        if reason is None:
            full = self.planned == config.epochs
            reason = (
                f"all {config.epochs} epochs done" if full else f"the time of {config.max_minutes:g} minutes is used up"
            )
        return reason, best

    def choose_precision(self) -> None:
        """bfloat16 autocast is up to twice as fast or half as fast, by architecture, size and processor: time both.

        In turns, so that a busy machine slows both, and float32 unless the gain is clear.
        """
        asked = self.config.precision
        long_enough = self.steps * self.config.epochs >= 50  # else the timing costs more than it can win
        self.precision = asked if asked != "auto" else "float32"
        if asked == "auto" and long_enough:
            rounds = [
                (self._step_seconds("float32"), self._step_seconds("bfloat16")) for _ in range(1 + MEASURED_STEPS)
            ]
            full, half = (min(seconds) for seconds in zip(*rounds[1:], strict=True))
            self.precision = "bfloat16" if half < CLEAR_GAIN * full else "float32"

    def _step_seconds(self, precision: str) -> float:
        """Seconds of one step, on a copy of the network and of the random state, so that measuring leaves no trace."""
        copied = copy.deepcopy(self.network).train()
        images = torch.from_numpy(self.training.images[: self.config.batch_size]).to(self.device)
        labels = torch.from_numpy(self.training.labels[: self.config.batch_size]).to(self.device)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            began = time.monotonic()
            self._loss(copied, images, labels, precision)[0].backward()  # type: ignore[no-untyped-call]
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return time.monotonic() - began

    def _loss(self, network: ImageNetwork, images: Tensor, labels: Tensor, precision: str) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = network.classifier(network.normalise(images)).float()
        smoothing = self.config.label_smoothing if network.training else 0.0
        return nn.functional.cross_entropy(logits, labels, self.weight, label_smoothing=smoothing), logits

    def _plan(self, epoch_seconds: float) -> None:
        """Drop the epochs that do not fit into the time left, so that the schedule still ends at its end."""
        left = self.config.max_minutes * 60 - (time.monotonic() - self.started)
        self.planned = min(self.planned, len(self.epochs) + max(0, int(left / epoch_seconds)))

    def _epoch(self, number: int) -> Epoch:
        train_loss, decided, truth = self._pass_over_training(number)
        validation_loss, validation = self._validate()
        return Epoch(
            number=number,
            learning_rate=max(float(group["lr"]) for group in self.optimizer.param_groups),
            train_loss=train_loss,
            train=figures(truth, decided, self.defects),
            validation_loss=validation_loss,
            validation=validation,
            seconds=time.monotonic() - self.started,
        )

    def _pass_over_training(self, number: int) -> tuple[float, NDArray[np.int64], NDArray[np.int64]]:
        """Mean loss, decided and true labels; stops in the middle when the time is used up."""
        self.network.train()
        self.network.classifier.stages[: self.config.frozen_stages].eval()
        losses, decided, truth = [], [], []
        # Batches of nearly equal size: no last one of two photographs, whose batch statistics would be noise.
        for step, chosen in enumerate(np.array_split(self.order.permutation(len(self.training)), self.steps)):
            self._set_rate(((number - 1) * self.steps + step) / (self.planned * self.steps))
            images = torch.from_numpy(self.training.images[chosen]).to(self.device)
            labels = torch.from_numpy(self.training.labels[chosen]).to(self.device)
            varied = augment(images, self.config.augmentation, self.variation)
            loss, logits = self._loss(self.network, varied, labels, self.precision)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            losses.append(float(loss.detach()) * len(chosen))
            if not math.isfinite(losses[-1]):
                rate = self.config.learning_rate
                raise RuntimeError(
                    f"the loss is {losses[-1]} in epoch {number}, step {step}: lower learning_rate {rate:g}"
                )
            decided.append(logits.detach().argmax(1).cpu().numpy())
            truth.append(self.training.labels[chosen])
            if time.monotonic() - self.started > self.config.max_minutes * 60:
                self.planned = number
                break
        seen = np.concatenate(truth)
        return sum(losses) / len(seen), np.concatenate(decided), seen

    def _set_rate(self, progress: float) -> None:
        factor = learning_rate_factor(self.config.schedule, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def _validate(self) -> tuple[float, Figures]:
        self.network.eval()
        size = 2 * self.config.batch_size
        total, decided = 0.0, []
        with torch.inference_mode():
            for start in range(0, len(self.validation), size):
                images = torch.from_numpy(self.validation.images[start : start + size]).to(self.device)
                labels = torch.from_numpy(self.validation.labels[start : start + size]).to(self.device)
                loss, logits = self._loss(self.network, images, labels, self.precision)
                total += float(loss) * len(labels)
                decided.append(logits.argmax(1).cpu().numpy())
        found = figures(self.validation.labels, np.concatenate(decided), self.defects)
        return total / len(self.validation), found


def _class_weights(labels: NDArray[np.int64], classes: int) -> Tensor:
    """Inverse frequency, mean 1 over the photographs."""
    counts = np.bincount(labels, minlength=classes)
    return torch.tensor(len(labels) / (classes * counts), dtype=torch.float32)
