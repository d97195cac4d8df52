"""The record of one production input, and the spool it waits in until the drift flow reads it.

The server hands a sample to `Spool.offer`, which never waits: a thread writes, and what does not fit is dropped and
counted. numpy and the codecs only, because the serving environment imports this module too.
"""

import json
import logging
import os
import queue
import random
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

SUFFIX: Final = ".npz"
ROOM_CHECK_SHARE: Final = 0.05  # of max_bytes is written between two looks at the whole directory
UNFINISHED_AFTER: Final = 600.0  # seconds; a hidden file older than this is what a killed process left
_ARRAYS: Final = ("image", "probabilities", "embedding")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptureRecord:
    """One answered request.

    captured_at: Unix seconds. image: the encoded bytes as they came; where the client sent pixels, uint8 [H, W, 3]
    until written, and a PNG of them when read. probabilities: float32 [C]. embedding: float32 [D].
    dropped: how many samples this server process had dropped before this one, never written or removed to make room, so that a
    reader sees the gaps.
    milliseconds: from the server's taking the request up to its answer; 0 in records of before it was kept.
    error: why this version, a challenger, had no answer, so that the champion gave one; label, score and arrays are empty then.
    """

    request_id: str
    captured_at: float
    model: str
    version: int
    label: str
    score: float
    image: bytes | NDArray[np.uint8]
    probabilities: NDArray[np.float32]
    embedding: NDArray[np.float32]
    tire_id: str = ""
    line: str = ""
    dropped: int = 0
    milliseconds: float = 0.0
    error: str = ""


def write_record(directory: Path, record: CaptureRecord, number: int = 0) -> Path:
    """Write the record as one file that appears complete or not at all; names sort by time."""
    facts = {name: value for name, value in vars(record).items() if name not in _ARRAYS}
    name = f"{int(record.captured_at * 1000):013d}-{os.getpid()}-{number:06d}{SUFFIX}"
    unfinished = directory / f".{name}"
    with unfinished.open("wb") as output:
        np.savez(
            output,
            facts=np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8),
            image=np.frombuffer(_encoded(record.image), dtype=np.uint8),
            probabilities=record.probabilities,
            embedding=record.embedding,
        )
    return unfinished.rename(directory / name)


def read_record(path: Path) -> CaptureRecord:
    """Read one file of the spool. Raises ValueError when it is none."""
    with _opened(path) as content:
        return CaptureRecord(
            **json.loads(content["facts"].tobytes()),
            image=content["image"].tobytes(),
            probabilities=content["probabilities"],
            embedding=content["embedding"],
        )


def request_of(path: Path) -> str:
    """The id of its request; the photograph is not read. Raises ValueError when the file is no record."""
    with _opened(path) as content:
        return str(json.loads(content["facts"].tobytes())["request_id"])


@contextmanager
def _opened(path: Path) -> "Iterator[np.lib.npyio.NpzFile]":
    try:
        with np.load(path, allow_pickle=False) as content:
            yield content
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is no capture record: {error}") from error


def captured_models(spools: Path) -> list[str]:
    """Models that have a spool below this directory."""
    return sorted(path.name for path in spools.glob("*") if path.is_dir())


def spooled(directory: Path) -> list[Path]:
    """Files of the spool, oldest first."""
    return sorted(path for path in directory.glob(f"[0-9]*{SUFFIX}"))


def read_spool(directory: Path) -> Iterator[tuple[Path, CaptureRecord]]:
    """Records oldest first, with their files; one that the server removed meanwhile to make room is passed over."""
    for path in spooled(directory):
        try:
            yield path, read_record(path)
        except FileNotFoundError:
            continue


class Spool:
    """A sample of the inputs of one model, on its way to disk.

    share: how much of the traffic is sampled, [0, 1]. max_bytes: bound of the directory; beyond it the oldest go,
    because drift is a question about now; each process may exceed it by 5 % and one record. Several may share a directory.
    """

    def __init__(self, directory: Path, share: float, max_bytes: int = 2**30, queue_size: int = 64) -> None:
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"capture share {share} is outside [0, 1]")
        self.share = share
        self.dropped = 0
        self._directory = directory
        self._max_bytes = max_bytes
        self._written = 0
        self._bytes_since_room = max_bytes  # look before the first write
        self._waiting: queue.Queue[CaptureRecord | None] = queue.Queue(queue_size)
        self._thread: threading.Thread | None = None
        if share > 0:
            directory.mkdir(parents=True, exist_ok=True)
            self._thread = threading.Thread(target=self._drain, name="capture", daemon=True)
            self._thread.start()

    def wants_one(self, always: bool = False) -> bool:
        """Whether the next request is to be sampled; `always` takes each, unless nothing is captured at all."""
        return self.share > 0 and (always or random.random() < self.share)

    def offer(self, record: CaptureRecord) -> bool:
        """Hand over a record without waiting; False when it was dropped because the disk is slower than the traffic."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self.dropped += 1
            return False
        return True

    def close(self) -> None:
        """Write what is waiting, then stop."""
        if self._thread is None:
            return
        try:
            self._waiting.put(None, timeout=10)
        except queue.Full:  # the disk hangs: the thread is a daemon and ends with the process
            log.warning("capture: %d records were not written, the disk does not answer", self._waiting.qsize())
            return
        self._thread.join(timeout=10)

    def _drain(self) -> None:
        while (record := self._waiting.get()) is not None:
            try:
                if self._bytes_since_room >= ROOM_CHECK_SHARE * self._max_bytes:
                    self._make_room()
                    self._bytes_since_room = 0
                path = write_record(self._directory, record, self._written)
                self._bytes_since_room += _size(path) or 0
                self._written += 1
            # A full or vanished disk, or pixels that cannot be encoded, must not end the thread, nor the serving beside it.
            except (OSError, ValueError, cv2.error) as error:
                self.dropped += 1
                log.warning("capture of request %s failed: %s", record.request_id, error)

    def _make_room(self) -> None:
        """What goes unread is as lost as what was never written: counted and told alike."""
        removed = make_room(self._directory, self._max_bytes)
        if removed:
            self.dropped += removed
            log.warning(
                "capture: %d records left %s unread, to keep it within %d MiB: does `sweep/line` run, which moves them to S3?",
                removed,
                self._directory,
                self._max_bytes >> 20,
            )


def make_room(directory: Path, max_bytes: int) -> int:
    """Remove the oldest records until the directory is within max_bytes, and what killed processes left unfinished.
    Returns how many records went.
    """
    for path in directory.glob(f".[0-9]*{SUFFIX}"):
        if (made := _made(path)) is not None and time.time() - made > UNFINISHED_AFTER:
            path.unlink(missing_ok=True)
    sizes = [(path, size) for path in spooled(directory) if (size := _size(path)) is not None]
    excess = sum(size for _, size in sizes) - max_bytes
    removed = 0
    for path, size in sizes:
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= size
        removed += 1
    return removed


def _size(path: Path) -> int | None:
    found = _stat(path)
    return found.st_size if found else None


def _made(path: Path) -> float | None:
    found = _stat(path)
    return found.st_mtime if found else None


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:  # another server process made room at the same moment
        return None


def _encoded(image: bytes | NDArray[np.uint8]) -> bytes:
    if isinstance(image, bytes):
        return image
    done, data = cv2.imencode(".png", image[:, :, ::-1])
    if not done:
        raise OSError(f"pixels {image.shape} could not be encoded as PNG")
    return data.tobytes()
