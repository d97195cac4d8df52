"""A network in every form that it exists in here, asked about the same decoded pixels: as trained, as ONNX, as an engine."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.engine_passport import read_passport
from tasks.images import decode
from tasks.inference import Accelerator, open_network
from tasks.model_repository import NETWORK_FILE, PLAN_FILE, REFERENCE_FILE

if TYPE_CHECKING:
    from tasks.model import ImageNetwork

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]  # pixels [N, S, S, 3] -> probabilities [N, C]

log = logging.getLogger(__name__)


def run_all(
    networks: Sequence[Run], encoded: Sequence[bytes], size: int, preprocessing: str
) -> list[NDArray[np.float32]]:
    """Probabilities [N, C] of every network on the same decoded pixels, decoded once and in batches of 32; NaN for an image
    that a network fails on. Raises what it raised where it fails on every one.
    """
    parts: list[list[NDArray[np.float32]]] = [[] for _ in networks]
    for pixels in decoded(encoded, size, preprocessing):
        for part, network in zip(parts, networks, strict=True):
            part.append(each_alone(network, pixels))
    return [np.concatenate(part) for part in parts]


def each_alone(run: Run, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[N, C] of the batch; where it fails, of each image by itself, with NaN for those that are to blame."""
    try:
        return run(pixels)
    except (ValueError, RuntimeError) as error:  # a server's refusal is one too
        failure = error
    rows: list[NDArray[np.float32] | None] = []
    for image in pixels[:, None]:
        try:
            rows.append(run(image))
        except (ValueError, RuntimeError) as error:
            log.warning("one image has no answer: %s", error)
            rows.append(None)
    answered = next((row for row in rows if row is not None), None)
    if answered is None:
        raise failure
    silence = np.full_like(answered, np.nan)
    return np.concatenate([silence if row is None else row for row in rows])


def decoded(encoded: Sequence[bytes], size: int, preprocessing: str, batch: int = 32) -> Iterator[NDArray[np.uint8]]:
    with ThreadPoolExecutor() as pool:  # the codecs release the GIL
        for start in range(0, len(encoded), batch):
            yield np.stack(
                list(pool.map(lambda data: decode(data, size, preprocessing), encoded[start : start + batch]))
            )


def torch_run(network: "ImageNetwork") -> Run:
    """The network as trained, float32, in process."""
    import torch

    network = network.cpu().eval()

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            probabilities: NDArray[np.float32] = network(torch.from_numpy(pixels))[0].numpy()
        return probabilities

    return run


def artifact_runs(directory: Path, precision: str, accelerator: Accelerator) -> dict[str, Run]:
    """Every form of the network that the sealed directory holds, from float32 ONNX to what is served."""
    network = artifact_run(directory, accelerator)
    if (directory / REFERENCE_FILE).exists():
        forms = {"ONNX": onnx_run(directory / REFERENCE_FILE, accelerator), precision: network}
    else:
        forms = {"ONNX": network}
    passport = read_passport(directory)
    if (directory / PLAN_FILE).exists() and passport is not None:
        from tasks.engine_run import OpenedEngine

        forms["TensorRT"] = OpenedEngine(directory / PLAN_FILE, passport.builder, passport.profile[2])
    return forms


def onnx_run(path: Path, accelerator: Accelerator) -> Run:
    network = open_network(path, accelerator, threads=os.cpu_count() or 1)
    return lambda pixels: network(pixels)["probabilities"]


def artifact_run(directory: Path, accelerator: Accelerator) -> Run:
    """The sealed ONNX network in the server's own runtime, in process."""
    return onnx_run(directory / NETWORK_FILE, accelerator)
