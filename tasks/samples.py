"""A split in memory: photographs decoded once, as the network will see them."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tasks.images import CURRENT, UnreadableImage, decode

IN_MEMORY_BYTES: Final = 2 * 2**30  # above this the decoded split lives in a memory-mapped temporary file


@dataclass(frozen=True)
class Samples:
    """images uint8 [N, S, S, 3] (an array, or a memory map), labels int64 [N], sha256 [N] of the encoded bytes."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    sha256: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.labels)


def processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_samples(
    batches: Iterable[Any], count: int, classes: Sequence[str], size: int, implementation: str = CURRENT
) -> Samples:
    """Arrow batches with the columns image, label and sha256 -> decoded samples, in their order.

    Raises ValueError naming the photograph when one cannot be decoded or carries an unknown label: ingest lets neither in.
    """
    images = _uint8_array((count, size, size, 3))
    index = {name: number for number, name in enumerate(classes)}
    labels = np.empty(count, dtype=np.int64)
    digests: list[str] = []

    def decode_into(position: int, digest: str, data: bytes) -> None:
        try:
            images[position] = decode(data, size, implementation)
        except UnreadableImage as error:
            raise ValueError(f"photograph {digest} of the dataset cannot be decoded: {error}") from error

    with ThreadPoolExecutor(processors()) as pool:
        for batch in batches:
            names = batch.column("label").to_pylist()
            unknown = sorted(set(names) - set(index))
            if unknown:
                raise ValueError(f"the dataset holds labels {unknown} that are not among its classes {list(classes)}")
            first, found = len(digests), batch.column("sha256").to_pylist()
            if first + len(found) > count:
                raise ValueError(f"the split holds more rows than the {count} its version names: read it again")
            digests += found
            labels[first : len(digests)] = [index[name] for name in names]
            encoded = (value.as_py() for value in batch.column("image"))
            list(pool.map(decode_into, range(first, len(digests)), found, encoded))
    if len(digests) != count:
        raise ValueError(f"the split holds {len(digests)} rows, its version names {count}: read it again")
    return Samples(images, labels, np.array(digests, dtype=np.str_))


def _uint8_array(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if int(np.prod(shape)) <= IN_MEMORY_BYTES:
        return np.empty(shape, dtype=np.uint8)
    with tempfile.NamedTemporaryFile(prefix="tirewatch-samples-", delete=False) as file:
        mapped = np.memmap(file.name, dtype=np.uint8, mode="w+", shape=shape)
    Path(file.name).unlink()  # the mapping keeps the space until the array is gone
    return mapped
