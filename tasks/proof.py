"""What is known about a candidate before it may answer: every rung of the parity ladder, the served test split, the
champion on the same photographs. Measures; `gates` judges.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.dataset import DatasetVersion, read_rows
from tasks.decision import DecisionRule, decide
from tasks.images import decode
from tasks.storage import Store

if TYPE_CHECKING:
    from tasks.model import ImageNetwork

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class Photographs:
    """Encoded photographs of one split in their fixed order (by sha256), with their labels."""

    encoded: Sequence[bytes]
    labels: Sequence[str]


def photographs(store: Store, version: DatasetVersion, split: str, limit: int | None = None) -> Photographs:
    """The split, or its first `limit` photographs. Raises LookupError for an empty split."""
    encoded: list[bytes] = []
    labels: list[str] = []
    for batch in read_rows(store, version, [split], ["image", "label"]):
        encoded += batch.column("image").to_pylist()
        labels += batch.column("label").to_pylist()
        if limit is not None and len(encoded) >= limit:
            break
    if not encoded:
        raise LookupError(f"{version.name} v{version.version} has no photographs in its {split} split")
    return Photographs(encoded[:limit], labels[:limit])


def truth_of(labels: Sequence[str], rule: DecisionRule) -> NDArray[np.int64]:
    """[N] label indices. Raises ValueError naming labels the rule does not know."""
    unknown = sorted(set(labels) - set(rule.labels))
    if unknown:
        raise ValueError(f"the photographs are labelled {unknown}, which the model ({list(rule.labels)}) does not know")
    index = {label: position for position, label in enumerate(rule.labels)}
    return np.array([index[label] for label in labels], dtype=np.int64)


def run_all(
    networks: Sequence[Run], encoded: Sequence[bytes], size: int, preprocessing: str
) -> list[NDArray[np.float32]]:
    """Probabilities [N, C] of every network on the same decoded pixels, decoded once and in batches of 32."""
    parts: list[list[NDArray[np.float32]]] = [[] for _ in networks]
    for pixels in _decoded(encoded, size, preprocessing):
        for part, network in zip(parts, networks, strict=True):
            part.append(network(pixels))
    return [np.concatenate(part) for part in parts]


def _decoded(encoded: Sequence[bytes], size: int, preprocessing: str, batch: int = 32) -> Iterator[NDArray[np.uint8]]:
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


def in_label_order(decisions: NDArray[np.int64], theirs: DecisionRule, ours: DecisionRule) -> NDArray[np.int64]:
    """Decisions of another version in our label indices; -1 for a label we do not have (it cannot be right here)."""
    index = {label: position for position, label in enumerate(ours.labels)}
    table = np.array([index.get(label, -1) for label in theirs.labels], dtype=np.int64)
    translated: NDArray[np.int64] = table[decisions]
    return translated


def decisions_of(probabilities: NDArray[Any], rule: DecisionRule, answered: Iterable[bool]) -> NDArray[np.int64]:
    """[N] label indices, -1 where the server gave no answer."""
    return np.where(np.fromiter(answered, dtype=bool, count=len(probabilities)), decide(probabilities, rule), -1)
