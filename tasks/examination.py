"""Reads and decodes each photograph of a batch once: what is unreadable is a finding, the rest is described and spooled."""

import hashlib
import os
import threading
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray

from monitoring.features import STATISTICS, image_statistics, luma_of, perceptual_hash
from tasks.batch import Batch, BatchItem, Finding
from tasks.images import MAX_BYTES, UnreadableImage, decode_with_format
from tasks.storage import Content, Store, StoredObject, read_many


@dataclass(frozen=True, slots=True)
class Photograph:
    """One readable photograph of the batch. `offset` and `size` find its bytes in the examination's spool.

    statistics: those of `monitoring.features.STATISTICS`, in their order. Small, because a batch may hold a million of these.
    """

    item: BatchItem
    sha256: str
    phash: int
    format: str
    width: int
    height: int
    statistics: "array[float]"
    source_version: str | None
    offset: int
    size: int
    twin_group: str | None = None

    @property
    def group(self) -> str:
        """Photographs of one group never stand in two splits; an image without twins or a given group is its own."""
        return self.twin_group or self.item.group or self.sha256


class Examination:
    """The readable photographs of a batch, their bytes in a spool file on local disk, and what was found on the way.

    The bytes that were checked are thereby the bytes that are stored, whatever happens to the objects meanwhile.
    """

    def __init__(self, spool: Path) -> None:
        self.photographs: list[Photograph] = []
        self.findings: list[Finding] = []
        self._file = spool.open("w+b", buffering=0)
        self._lock = threading.Lock()
        self._end = 0

    def __enter__(self) -> "Examination":
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
        """The encoded photograph, as it came from S3."""
        return os.pread(self._file.fileno(), photograph.size, photograph.offset)


def examine(store: Store, batch: Batch, spool: Path) -> Examination:
    """Reads and decodes every photograph of the batch once, a few at a time (`read_many`)."""
    cv2.setNumThreads(1)  # each photograph has a thread already: OpenCV's own would only wait for one another
    items = {each.object.key: each for each in batch.items}
    examination = Examination(spool)

    def work(stored: StoredObject, content: Content) -> Photograph | Finding:
        return _examined(items[stored.key], content, examination)

    try:
        for result in read_many(store, (each.object for each in batch.items if each.object.size <= MAX_BYTES), work):
            if isinstance(result, Finding):
                examination.findings.append(result)
            else:
                examination.photographs.append(result)
    except BaseException:
        examination.__exit__(None, None, None)
        raise
    for each in batch.items:
        if each.object.size > MAX_BYTES:  # not even read
            too_big = f"{each.object.size} bytes are more than the limit of {MAX_BYTES}"
            examination.findings.append(Finding("too_many_bytes", each.name, too_big))
    return examination


def _examined(item: BatchItem, content: Content, examination: Examination) -> Photograph | Finding:
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
        statistics=array("f", image_statistics(pixels, luma).values()),
        source_version=content.version,
        offset=examination.keep(data),
        size=len(data),
    )


def columns_of(photographs: Iterable[Photograph]) -> dict[str, NDArray[np.float32]]:
    """Each of STATISTICS -> its values, [N]."""
    values = np.array([each.statistics for each in photographs], np.float32).reshape(-1, len(STATISTICS))
    return dict(zip(STATISTICS, values.T, strict=True))
