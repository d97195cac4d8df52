"""A split as the network will see it: photographs decoded once, by `images.decode` and nothing else."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from tasks.images import CURRENT, UnreadableImage, decode

IN_MEMORY_BYTES: Final = 2 * 2**30  # above this a split that no cache holds lives in a memory-mapped temporary file


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
    """Arrow batches with the columns image, label and sha256 -> decoded samples, in their order. Errors: `decode_rows`."""
    images = _uint8_array((count, size, size, 3))
    return Samples(images, *decode_rows(batches, images, classes, implementation))


def decode_rows(
    batches: Iterable[Any], images: NDArray[np.uint8], classes: Sequence[str], implementation: str = CURRENT
) -> tuple[NDArray[np.int64], NDArray[np.str_]]:
    """Decodes into `images` uint8 [N, S, S, 3], on every processor; returns the labels [N] and the sha256 [N].

    Raises ValueError naming the photograph when one cannot be decoded or carries an unknown label (ingest lets neither in), or
    when there are more or fewer than N.
    """
    count, size = images.shape[:2]
    index = {name: number for number, name in enumerate(classes)}
    labels: list[int] = []
    digests: list[str] = []
    cv2.setNumThreads(1)  # each photograph has a thread already

    def decode_into(position: int, digest: str, data: bytes) -> None:
        try:
            images[position] = decode(data, size, implementation)
        except UnreadableImage as error:
            raise ValueError(f"photograph {digest} of the dataset cannot be decoded: {error}") from error

    with ThreadPoolExecutor(processors(), thread_name_prefix="decode") as pool:
        running: Iterator[None] = iter(())
        for batch in batches:
            names = batch.column("label").to_pylist()
            unknown = sorted(set(names) - set(index))
            if unknown:
                raise ValueError(f"the dataset holds labels {unknown} that are not among its classes {list(classes)}")
            first, found = len(digests), batch.column("sha256").to_pylist()
            if first + len(found) > count:
                raise ValueError(f"the split holds more rows than the {count} its version names: read it again")
            digests += found
            labels += [index[name] for name in names]
            encoded = [value.as_py() for value in batch.column("image")]
            upcoming = pool.map(decode_into, range(first, len(digests)), found, encoded)
            list(running)  # of the batch before: at most two of them are in memory
            running = upcoming
        list(running)
    if len(digests) != count:
        raise ValueError(f"the split holds {len(digests)} rows, its version names {count}: read it again")
    return np.array(labels, dtype=np.int64), np.array(digests, dtype=np.str_)


def _uint8_array(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if int(np.prod(shape)) <= IN_MEMORY_BYTES:
        return np.empty(shape, dtype=np.uint8)
    with tempfile.NamedTemporaryFile(prefix="tirewatch-samples-", delete=False) as file:
        mapped = np.memmap(file.name, dtype=np.uint8, mode="w+", shape=shape)
    Path(file.name).unlink()  # the mapping keeps the space until the array is gone
    return mapped
