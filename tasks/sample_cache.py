"""Decoded photographs on the local disk, mapped into memory: a split is decoded once, for every run and process here.

    <folder>/<digest>-<split>-<size>-<preprocessing>/
        images.u8      uint8 [N, S, S, 3]: what `images.decode` gave
        rows.npz       labels int64 [N], sha256 [N]
        entry.json     what the entry holds, with checksums of both; its time is that of the last use
    <folder>/<the same>.making/    one that is being written
    <folder>/<the same>.lock       held by its writer

An entry is named by its content, so it is never wrong, only missing. It is made aside and renamed when it is whole: of a
killed writer nothing is ever read. Whoever reads an entry holds a shared lock on `images.u8` for as long as the mapping lives,
and only what nobody has open makes room for others. Every lock is a `flock`: the kernel drops it with the process, however that
ends.
"""

import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from tasks.images import CURRENT, self_check
from tasks.samples import Samples, decode_rows, processors, read_samples

if TYPE_CHECKING:
    from tasks.dataset import DatasetVersion
    from tasks.storage import Store

log = logging.getLogger(__name__)

BLOCK: Final = 8 * 2**20  # bytes for each checksum
IMAGES, ROWS, ENTRY = "images.u8", "rows.npz", "entry.json"


@dataclass(frozen=True)
class Key:
    """What an entry holds: a split of the dataset version with this digest, at a side in pixels, by a preprocessing."""

    digest: str
    split: str
    size: int
    preprocessing: str = CURRENT

    @property
    def name(self) -> str:
        readable = re.sub(r"[^a-z0-9]+", "-", f"{self.split}-{self.size}-{self.preprocessing}".lower())
        return f"{hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:32]}-{readable}"


@dataclass(frozen=True)
class Cache:
    """Where entries lie, and how many bytes they may take together. 0: nothing is kept."""

    folder: Path
    limit: int


def load_samples(
    store: "Store", version: "DatasetVersion", split: str, size: int, cache: Cache, preprocessing: str = CURRENT
) -> Samples:
    """A split of a dataset version as the network will see it; read and decoded only where the cache does not hold it.

    Raises LookupError for a retired version, and ValueError as `decode_rows` does.
    """
    from tasks.dataset import read_rows

    def rows() -> Iterable[Any]:
        return read_rows(store, version, [split], ["image", "label", "sha256"])

    key = Key(version.digest, split, size, preprocessing)
    return cached_samples(cache, key, version.splits.get(split, 0), version.classes, rows)


def cached_samples(
    cache: Cache, key: Key, count: int, classes: Sequence[str], rows: Callable[[], Iterable[Any]]
) -> Samples:
    """The samples of this key: mapped from the cache, or made from `rows()`, Arrow batches of image, label and sha256.

    `images` is a private mapping: nothing that is written to it reaches the file. Where the cache cannot take the entry (it is
    full of open ones, or the disk is), the samples are decoded for this process alone, and a warning says so.
    """
    needed = count * key.size**2 * 3
    if needed == 0 or cache.limit <= 0:
        return read_samples(rows(), count, classes, key.size, key.preprocessing)
    directory = cache.folder / key.name
    found = open_entry(directory, key, classes)
    if found is not None:
        return found
    cache.folder.mkdir(parents=True, exist_ok=True)
    with _held(cache.folder / f"{key.name}.lock") as lock:
        found = open_entry(directory, key, classes)  # another process may have made it while this one waited
        if found is None:
            file = _reserve(cache, key.name, needed)
            if file is None:
                return read_samples(rows(), count, classes, key.size, key.preprocessing)
            with file:
                found = _make(directory, file, key, count, classes, rows)
        Path(lock.name).unlink()
    return found


def open_entry(directory: Path, key: Key, classes: Sequence[str]) -> Samples | None:
    """The samples of a whole and undamaged entry; None where there is none, with a warning where there is a damaged one."""
    try:
        described = (directory / ENTRY).read_bytes()
        file = (directory / IMAGES).open("rb")
    except FileNotFoundError:
        return None
    with file:
        fcntl.flock(file, fcntl.LOCK_SH)
        if not _is_at(file, directory / IMAGES):  # removed between opening and locking
            return None
        try:
            samples = _checked(directory, file, json.loads(described), key, classes)
        except (ValueError, KeyError, TypeError, OSError) as error:
            log.warning("the decoded photographs in %s are damaged (%s): they are decoded again", directory, error)
            return None
    with suppress(PermissionError):  # somebody else's entry
        os.utime(directory / ENTRY)
    return samples


def _checked(directory: Path, file: IO[bytes], told: dict[str, Any], key: Key, classes: Sequence[str]) -> Samples:
    """The entry as samples. ValueError says in which way it is not what it should be."""
    if (told["key"], told["classes"]) != (asdict(key), list(classes)):
        raise ValueError(f"it holds {told['key']}")
    shape = (told["count"], key.size, key.size, 3)
    if (size := os.fstat(file.fileno()).st_size) != (expected := int(np.prod(shape))):
        raise ValueError(f"{IMAGES} has {size} bytes and not {expected}")
    images = _mapped(file, shape, "c")
    rows = (directory / ROWS).read_bytes()
    if _checksums(images) != told["images"] or zlib.crc32(rows) != told["rows"]:
        raise ValueError("a checksum differs")
    with np.load(io.BytesIO(rows)) as stored:
        return Samples(images, stored["labels"], stored["sha256"])


def _mapped(file: IO[bytes], shape: tuple[int, ...], mode: Any) -> NDArray[np.uint8]:
    """The file as an array. The mapping duplicates the descriptor, and with it keeps the file's lock until it is gone."""
    return np.memmap(file, dtype=np.uint8, mode=mode, shape=shape)


def _checksums(images: NDArray[np.uint8]) -> list[int]:
    """CRC-32 of every BLOCK bytes: finds what a crash or a disk did. Who could forge it could as well edit the code."""
    flat = images.reshape(-1)
    blocks = [flat[start : start + BLOCK] for start in range(0, len(flat), BLOCK)]
    with ThreadPoolExecutor(processors(), thread_name_prefix="checksum") as pool:
        return list(pool.map(zlib.crc32, blocks))


def _make(
    directory: Path,
    file: IO[bytes],
    key: Key,
    count: int,
    classes: Sequence[str],
    rows: Callable[[], Iterable[Any]],
) -> Samples:
    """Decodes into the reserved file, describes it, and reveals the entry. The caller holds its writer's lock."""
    making, shape = Path(file.name).parent, (count, key.size, key.size, 3)
    try:
        self_check(key.preprocessing)  # others will read what is made here
        images = _mapped(file, shape, "r+")
        labels, sha256 = decode_rows(rows(), images, classes, key.preprocessing)
        np.savez(making / ROWS, labels=labels, sha256=sha256)
        told = {
            "key": asdict(key),
            "classes": list(classes),
            "count": count,
            "images": _checksums(images),
            "rows": zlib.crc32((making / ROWS).read_bytes()),
        }
        # No fsync: after a power failure the checksums tell, and the photographs are decoded again.
        (making / ENTRY).write_text(json.dumps(told))
        with _held(directory.parent / ".lock"):
            making.rename(directory)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    with (directory / IMAGES).open("rb") as revealed:  # by its final name; `file` keeps everybody from removing it
        fcntl.flock(revealed, fcntl.LOCK_SH)
        return Samples(_mapped(revealed, shape, "c"), labels, sha256)


def _reserve(cache: Cache, name: str, needed: int) -> IO[bytes] | None:
    """The file to decode into, open and locked, its space taken; None, with a warning, where there is no room.

    Space is taken before the mapping is written: a disk that fills up under a mapping kills the process (SIGBUS).
    """
    making = cache.folder / f"{name}.making"
    with _held(cache.folder / ".lock"):
        for left in (making, cache.folder / name):  # of a killed writer; damaged. Who has it open keeps his pages
            shutil.rmtree(left, ignore_errors=True)
        if not _make_room(cache, needed):
            log.warning(
                "%.1f GB of decoded photographs do not fit into the cache %s of %.1f GB beside what is in use: this run "
                "decodes them for itself. Raise TIREWATCH_CACHE_GB",
                *(needed / 1e9, cache.folder, cache.limit / 1e9),
            )
            return None
        making.mkdir()
        file = (making / IMAGES).open("w+b")
        fcntl.flock(file, fcntl.LOCK_SH)
        try:
            os.posix_fallocate(file.fileno(), 0, needed)
        except OSError as error:
            file.close()
            shutil.rmtree(making)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            log.warning("the disk of %s has no %.1f GB left: this run decodes for itself", cache.folder, needed / 1e9)
            return None
        return file


def _make_room(cache: Cache, needed: int) -> bool:
    """Removes entries, least recently used first, until `needed` more bytes fit; False, and nothing removed, if they cannot."""
    with ExitStack() as locks:
        total, idle = 0, []
        for directory in (path for path in cache.folder.iterdir() if path.is_dir()):
            size = sum(_bytes(directory / name) for name in (IMAGES, ROWS, ENTRY))
            total += size
            if _is_idle(directory, locks):
                idle.append((_last_used(directory), size, directory))
        if total - sum(size for _, size, _ in idle) + needed > cache.limit:
            return False
        for _, size, directory in sorted(idle):
            if total + needed <= cache.limit:
                break
            log.info("%s makes room in the cache of decoded photographs", directory.name)
            shutil.rmtree(directory, ignore_errors=True)
            total -= size
    return True


def _is_idle(directory: Path, locks: ExitStack) -> bool:
    """Whether nobody has the entry open; nobody can open it then until `locks` are released."""
    try:
        file = locks.enter_context((directory / IMAGES).open("rb"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True  # half removed
    except BlockingIOError:
        return False
    return True


def _bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # a writer that failed cleans up meanwhile
        return 0


def _last_used(directory: Path) -> float:
    """When the entry was opened last; what never was finished comes first."""
    described = directory / ENTRY
    return described.stat().st_mtime if described.exists() else 0.0


@contextmanager
def _held(path: Path) -> Iterator[IO[bytes]]:
    """The exclusive lock of this file, which may be removed by whoever holds it; waits for it."""
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):
                yield file
                return


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
