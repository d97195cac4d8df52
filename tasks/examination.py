"""Reads and decodes each photograph of a batch once: what is unreadable is a finding, the rest is described and spooled."""

import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray

from monitoring.features import STATISTICS, image_statistics, luma_of, perceptual_hash
from tasks.batch import Batch, BatchItem, Finding
from tasks.images import MAX_BYTES, UnreadableImage, decode_with_format
from tasks.memory import give_back
from tasks.storage import Content, Store, read, read_many


@dataclass(frozen=True, slots=True)
class Photograph:
    """One readable photograph of the batch. `offset` and `size` find its bytes in the spool.

    statistics: those of `monitoring.features.STATISTICS` in their order, float32. Small, because a batch may hold a million
    of these.
    """

    item: BatchItem
    sha256: str
    phash: int
    format: str
    width: int
    height: int
    statistics: bytes
    source_version: str | None
    offset: int
    size: int
    twin_group: str | None = None

    @property
    def group(self) -> str:
        """Photographs of one group never stand in two splits; an image without twins or a given group is its own."""
        return self.twin_group or self.item.group or self.sha256


class Examination(ABC):
    """The readable photographs of a batch, what was found on the way, and where the bytes that were checked are."""

    def __init__(self) -> None:
        self.photographs: list[Photograph] = []
        self.findings: list[Finding] = []

    @abstractmethod
    def bytes_of(self, photograph: Photograph) -> bytes:
        """The encoded photograph as it was examined."""

    def take(self, result: Photograph | Finding) -> None:
        """What became of one more file of the batch."""
        if isinstance(result, Finding):
            self.findings.append(result)
        else:
            self.photographs.append(result)


class Spooled(Examination):
    """With the bytes in a spool file on local disk: what was checked is what is stored, whatever happens to the objects."""

    def __init__(self, spool: Path) -> None:
        super().__init__()
        self._file = spool.open("w+b", buffering=0)
        self._lock = threading.Lock()
        self._end = 0

    def __enter__(self) -> "Spooled":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def keep(self, data: bytes) -> int:
        """Appends to the spool; the offset."""
        with self._lock:
            offset = self._end
            self._end += len(data)
        written = os.pwrite(self._file.fileno(), data, offset)
        if written != len(data):
            raise OSError(f"only {written} of {len(data)} bytes fit in {self._file.name}: make room on this disk")
        return offset

    def bytes_of(self, photograph: Photograph) -> bytes:
        return os.pread(self._file.fileno(), photograph.size, photograph.offset)


class Reread(Examination):
    """With the bytes still on S3 only: read again where they are needed, and compared with what was examined."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def bytes_of(self, photograph: Photograph) -> bytes:
        """Raises ValueError when the object was replaced since it was examined."""
        return _unchanged(photograph, read(self._store, photograph.item.key))


def read_again(store: Store, photographs: Iterable[Photograph]) -> Iterator[bytes]:
    """The bytes of each, some at a time. Raises ValueError for one that was replaced since it was examined."""
    examined, objects = tee(photographs)
    contents = read_many(store, (each.item for each in objects), lambda _, content: content.data)
    yield from map(_unchanged, examined, contents)


def _unchanged(photograph: Photograph, data: bytes) -> bytes:
    if hashlib.sha256(data).hexdigest() != photograph.sha256:
        key = photograph.item.key
        raise ValueError(f"{key} was replaced while its batch was ingested: run the batch again")
    return data


def examine(store: Store, batch: Batch, spool: Path) -> Spooled:
    """Reads and decodes every photograph of the batch once; what was read is in the spool."""
    examination = Spooled(spool)
    try:
        for result in examined(store, batch.items, examination.keep):
            examination.take(result)
    except BaseException:
        examination.__exit__(None, None, None)
        raise
    give_back()
    return examination


def examined(store: Store, items: Sequence[BatchItem], keep: Callable[[bytes], int]) -> Iterator[Photograph | Finding]:
    """What is in each file, some at a time (`read_many`). `keep` stores the bytes of a readable one; it returns the offset."""
    cv2.setNumThreads(1)  # each photograph has a thread already: OpenCV's own would only wait for one another
    readable = (each for each in items if each.size <= MAX_BYTES)
    yield from read_many(store, readable, lambda item, content: _examined(item, content, keep))
    for each in items:
        if each.size > MAX_BYTES:  # not even read
            too_big = f"{each.size} bytes are more than the limit of {MAX_BYTES}"
            yield Finding("too_many_bytes", each.name, too_big)


def _examined(item: BatchItem, content: Content, keep: Callable[[bytes], int]) -> Photograph | Finding:
    data = content.data
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        kind, pixels = decode_with_format(data)
    except UnreadableImage as error:
        return Finding(error.reason, item.name, str(error), sha256)
    height, width = pixels.shape[:2]
    luma = luma_of(pixels)
    return Photograph(
        item=item,
        sha256=sha256,
        phash=perceptual_hash(pixels, luma),
        format=kind,
        width=width,
        height=height,
        statistics=np.fromiter(image_statistics(pixels, luma).values(), np.float32).tobytes(),
        source_version=content.version,
        offset=keep(data),
        size=len(data),
    )


def columns_of(photographs: Iterable[Photograph]) -> dict[str, NDArray[np.float32]]:
    """Each of STATISTICS -> its values, [N]."""
    values = np.frombuffer(b"".join(each.statistics for each in photographs), np.float32).reshape(-1, len(STATISTICS))
    return dict(zip(STATISTICS, values.T, strict=True))
