"""Which precision is faster: bfloat16 autocast takes half or twice the time, by architecture, size and processor."""

import copy
import time
from typing import Final

import torch
from torch import Tensor

from tasks.losses import Loss
from tasks.model import ImageNetwork

MEASURED_STEPS: Final = 3  # per precision, after one that warms up
CLEAR_GAIN: Final = 0.9  # bfloat16 is taken when its step takes less than this share of the time


def logits_of(network: ImageNetwork, images: Tensor, precision: str) -> Tensor:
    """[N, H, W, 3] in 0..255 -> float32 logits [N, C], computed in the precision."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits: Tensor = network.classifier(network.normalise(images))
    return logits.float()


def faster_precision(network: ImageNetwork, images: Tensor, labels: Tensor, loss: Loss) -> str:
    """Times steps on a batch, in turns, so that a busy machine slows both; float32 unless the gain is clear."""
    rounds = [
        tuple(_step_seconds(network, images, labels, loss, precision) for precision in ("float32", "bfloat16"))
        for _ in range(1 + MEASURED_STEPS)
    ]
    full, half = (min(seconds) for seconds in zip(*rounds[1:], strict=True))
    return "bfloat16" if half < CLEAR_GAIN * full else "float32"


def _step_seconds(network: ImageNetwork, images: Tensor, labels: Tensor, loss: Loss, precision: str) -> float:
    """Seconds of one step, on a copy of the network and of the random state, so that measuring leaves no trace."""
    copied = copy.deepcopy(network).train()
    on_gpu = images.device.type == "cuda"
    with torch.random.fork_rng([images.device] if on_gpu else []):
        began = time.monotonic()
        logits = logits_of(copied, images, precision)
        (loss.total(logits, labels, training=True) / len(labels)).backward()  # type: ignore[no-untyped-call]
        if on_gpu:
            torch.cuda.synchronize(images.device)
        return time.monotonic() - began
