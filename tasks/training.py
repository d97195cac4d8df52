"""Training from samples to a network: checked, seeded, in one process or several, best weights back."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.decision import DecisionRule
from tasks.evaluation import require_both_sides
from tasks.loop import Epoch, Loop, State
from tasks.losses import make_loss
from tasks.machine import accelerator, memory_kept, repeatable, threads
from tasks.model import ImageNetwork, build_model, image_network, require_size
from tasks.process_group import ProcessGroup
from tasks.recipe import TrainConfig
from tasks.samples import Samples, processors

__all__ = ["Epoch", "Trained", "accelerator", "check_labels", "check_samples", "predict", "train", "train_here"]


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
    check_labels(training.labels, validation.labels, classes, config)


def check_labels(
    training: NDArray[np.int64], validation: NDArray[np.int64], classes: tuple[str, ...], config: TrainConfig
) -> None:
    """The same from the labels of both splits [N], without a picture; that the trained network can be judged, too."""
    require_size(config.architecture, config.image_size)
    if len(training) < config.batch_size:
        raise ValueError(
            f"the training split holds {len(training)} photographs, fewer than one batch of {config.batch_size}: "
            "add photographs or lower batch_size"
        )
    if len(validation) == 0:
        raise ValueError("the validation split is empty: add photographs until some fall into it")
    missing = sorted(set(range(len(classes))) - set(training.tolist()))
    if len(classes) < 2 or missing:
        raise ValueError(
            f"the training split has no photograph of {[classes[i] for i in missing]}"
            if missing
            else f"the only class is {list(classes)}: telling apart needs at least two"
        )
    if config.defect_labels:
        is_defect = DecisionRule(classes, config.defect_labels, 0.5).defect_mask[validation]
        require_both_sides(is_defect)
    if config.processes > 1:
        from tasks.distributed import require_launchable

        require_launchable(config.processes)


def train(
    training: Samples,
    validation: Samples,
    classes: tuple[str, ...],
    config: TrainConfig,
    on_epoch: Callable[[Epoch], None] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    state: State | None = None,
    save: Callable[[State], None] | None = None,
) -> Trained:
    """Train as the recipe says, from `weights` where given. The test split is no argument: it cannot be looked at here.

    save: gets a state after every epoch and every `checkpoint_minutes`, before the epoch is told to `on_epoch`, and puts it
    into a form of its own before it returns. state: one of those, to go on from: then only epochs after it are told.
    Raises ValueError for unfit data (check_samples) and RuntimeError when the loss stops being a number or a process dies.
    """
    check_samples(training, validation, classes, config)
    if config.processes == 1:
        group = ProcessGroup(device=accelerator())
        return train_here(group, training, validation, classes, config, on_epoch, weights, state, save)
    from tasks.distributed import Job, train_in_processes

    return train_in_processes(Job(training, validation, classes, config, weights, state), on_epoch, save)


def train_here(
    group: ProcessGroup,
    training: Samples,
    validation: Samples,
    classes: tuple[str, ...],
    config: TrainConfig,
    on_epoch: Callable[[Epoch], None] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    state: State | None = None,
    save: Callable[[State], None] | None = None,
) -> Trained:
    """Train in this process, which is one of a group; the first one's network is the trained one."""
    began, cpu_began = time.monotonic(), time.process_time()
    device = group.device
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    mine = threads(max(1, processors() // group.here))
    with mine, memory_kept(), torch.random.fork_rng(devices), repeatable(config.deterministic):
        torch.manual_seed(config.seed)
        pretrained = config.pretrained and weights is None and state is None
        network = _start(classes, config, pretrained, weights).to(device).to(memory_format=torch.channels_last)
        if not group.first:
            torch.manual_seed(config.seed + group.rank)  # the same weights for all, but a dropout of its own
        defects = np.array([label in config.defect_labels for label in classes], dtype=bool)
        loop = Loop(
            network, training, validation, defects, make_loss(training.labels, len(classes), config), config, group
        )
        if state is None:
            loop.choose_precision()
        else:
            loop.restore(state)
        loop.fit(on_epoch, save)
        if group.first:
            network.load_state_dict(loop.best)
    assert loop.stopped is not None
    return Trained(
        network=network.to("cpu").to(memory_format=torch.contiguous_format).eval(),
        epochs=tuple(loop.epochs),
        best_epoch=min(loop.epochs, key=lambda epoch: epoch.refined_loss).number,
        stopped=loop.stopped,
        precision=loop.precision,
        device=str(device),
        seconds=loop.before[0] + time.monotonic() - began,
        cpu_seconds=loop.before[1] + time.process_time() - cpu_began,
    )


def predict(network: ImageNetwork, images: NDArray[np.uint8], batch_size: int = 64) -> dict[str, NDArray[np.float32]]:
    """`probabilities` [N, C] and `embedding` [N, D] of uint8 [N, S, S, 3], in float32; the network ends on the CPU."""
    device = accelerator()
    parts: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    network.eval().to(device)
    with threads(processors()), torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.array(images[start : start + batch_size])).to(device)
            probabilities, embedding = network(batch)
            parts.append((probabilities.cpu().numpy(), embedding.cpu().numpy()))
    network.to("cpu")
    return {
        "probabilities": np.concatenate([part[0] for part in parts]),
        "embedding": np.concatenate([part[1] for part in parts]),
    }


def _start(
    classes: tuple[str, ...], config: TrainConfig, pretrained: bool, weights: Mapping[str, Tensor] | None
) -> ImageNetwork:
    classifier = build_model(config.architecture, len(classes), pretrained)
    if weights is not None:
        classifier.load_state_dict(dict(weights))
    for stage in classifier.stages[: config.frozen_stages]:
        stage.requires_grad_(False)
    return image_network(config.architecture, classifier)
