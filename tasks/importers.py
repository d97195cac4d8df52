"""Published sets in their own file formats as folders of class folders, and what a folder holds at all.

CIFAR-10 in its binary form: a byte of label, then 32x32 pixels as planes of red, green and blue, again and again
(https://www.cs.toronto.edu/~kriz/cifar.html). MNIST and its kin: IDX files, a header of big-endian numbers, then bytes
(http://yann.lecun.com/exdb/mnist/). Photographs are read one at a time and become PNG files, which lose nothing.
"""

import gzip
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import numpy as np
from numpy.typing import NDArray

from tasks.batch import ANNOTATIONS, MARKER, SPLIT_FOLDERS, is_no_photograph

_IMAGES_MAGIC, _LABELS_MAGIC = 0x00000803, 0x00000801
_MAX_SIDE: Final = 4096  # pixels: a header that says more is damaged
_CIFAR_SIDE: Final = 32
_CIFAR_PIXELS: Final = 3 * _CIFAR_SIDE**2
_CLASS_NAME: Final = re.compile(r"\w[\w.-]{0,99}")
_CIFAR_NAMES: Final = "batches.meta.txt"
_IDX_PARTS: Final = {"train": "train", "t10k": "test", "test": "test"}


class NotASet(ValueError):
    """The folder holds nothing that can become a batch, or a set that is incomplete or damaged. The message has the remedy."""


@dataclass(frozen=True)
class Found:
    """What lies in a folder. text: for people, with counts. write: makes class folders of it; None where it is one already."""

    text: str
    write: Callable[[Path], int] | None = None


def recognised(folder: Path) -> Found:
    """What the folder holds: IDX files, CIFAR-10 in binary form, images with annotations, or class folders.

    Headers and sizes are checked, photographs are not looked at. Raises NotASet.
    """
    if not folder.is_dir():
        there = "is a file: unpack it and name the folder" if folder.exists() else "does not exist"
        raise NotASet(f"{folder} {there}")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if idx := [name for name in names if _idx_part(name)]:
        return _mnist(folder, idx)
    if binary := [name for name in names if _is_cifar_binary(name)]:
        return _cifar(folder, binary)
    if pickled := [name for name in names if _is_cifar_pickle(name)]:
        raise NotASet(
            f"{folder / pickled[0]} is CIFAR-10 in its Python form, a pickle: opening one can run any program. Download the "
            "binary version (cifar-10-binary.tar.gz) instead"
        )
    if ANNOTATIONS in names:
        others = sum(1 for path in folder.rglob("*") if path.is_file()) - 1
        return Found(f"images with {ANNOTATIONS}: {others:,} files beside it")
    return _class_folders(folder)


def _class_folders(folder: Path) -> Found:
    counts: Counter[str] = Counter()
    splits: Counter[str] = Counter()
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if not path.is_file() or path.name == MARKER or any(part.startswith(".") for part in parts):
            continue
        split = SPLIT_FOLDERS.get(parts[0].lower())
        below = parts[1:] if split else parts
        if len(below) > 1 and not is_no_photograph(path.name):
            counts[below[0]] += 1
            splits[split or "no given split"] += 1
    if not counts:
        raise NotASet(
            f"{folder} holds no class folders with images, no {ANNOTATIONS}, no IDX files (train-images-idx3-ubyte) and no "
            "binary CIFAR-10 (data_batch_1.bin)"
        )
    classes = ", ".join(f"{label} {count:,}" for label, count in sorted(counts.items())[:12])
    more = f", and {len(counts) - 12} more" if len(counts) > 12 else ""
    where = ", ".join(f"{split} {count:,}" for split, count in sorted(splits.items()))
    return Found(f"class folders: {sum(counts.values()):,} files in {len(counts)} classes ({classes}{more}); {where}")


def _idx_part(name: str) -> tuple[str, str] | None:
    """(split, "images" or "labels") for the usual names: train-images-idx3-ubyte, t10k-labels.idx1-ubyte.gz, and so on."""
    plain = name.removesuffix(".gz").replace(".", "-")
    part, _, rest = plain.partition("-")
    kinds = {"images-idx3-ubyte": "images", "labels-idx1-ubyte": "labels"}
    return (_IDX_PARTS[part], kinds[rest]) if part in _IDX_PARTS and rest in kinds else None


def _mnist(folder: Path, names: list[str]) -> Found:
    pairs: dict[str, dict[str, Path]] = {}
    for name in names:
        split, kind = _idx_part(name) or ("", "")
        if other := pairs.setdefault(split, {}).get(kind):
            raise NotASet(f"{other.name} and {name} in {folder} are the same part twice: remove one")
        pairs[split][kind] = folder / name
    told = []
    for split, pair in sorted(pairs.items(), reverse=True):
        if missing := {"images", "labels"} - pair.keys():
            have = next(iter(pair.values())).name
            raise NotASet(f"{folder} has {have} without the {missing.pop()} that belong to it: download both files")
        count, rows, columns = _idx_header(pair["images"], pair["labels"])
        told.append(f"{count:,} for {split} of {columns}x{rows} pixels")

    def write(destination: Path) -> int:
        return sum(_write_idx(pair, destination / split) for split, pair in sorted(pairs.items()))

    return Found(f"IDX files as of MNIST: {', '.join(told)}", write)


def _idx_header(images: Path, labels: Path) -> tuple[int, int, int]:
    """(photographs, rows, columns), after both headers were compared."""
    with _opened(images) as file:
        count, rows, columns = _numbers(file, images, _IMAGES_MAGIC, 3)
    with _opened(labels) as file:
        (labelled,) = _numbers(file, labels, _LABELS_MAGIC, 1)
    if labelled != count:
        raise NotASet(
            f"{images.name} holds {count:,} photographs, {labels.name} {labelled:,} labels: they do not belong together"
        )
    if not (0 < rows <= _MAX_SIDE and 0 < columns <= _MAX_SIDE):
        raise NotASet(
            f"{images} says its photographs have {columns}x{rows} pixels: the file is damaged, download it again"
        )
    return count, rows, columns


def _numbers(file: IO[bytes], path: Path, magic: int, count: int) -> tuple[int, ...]:
    size = 4 * (count + 1)
    header = _exactly(file, size, path, "its header")
    found, *numbers = struct.unpack(f">{count + 1}I", header)
    if found != magic:
        raise NotASet(
            f"{path} begins with 0x{found:08x} instead of 0x{magic:08x}: it is no such IDX file, download it again"
        )
    return tuple(numbers)


def _write_idx(pair: dict[str, Path], destination: Path) -> int:
    count, rows, columns = _idx_header(pair["images"], pair["labels"])
    with _opened(pair["images"]) as images, _opened(pair["labels"]) as labels:
        images.read(16)
        labels.read(8)
        for number in range(count):
            pixels = _exactly(images, rows * columns, pair["images"], f"photograph {number} of {count}")
            label = _exactly(labels, 1, pair["labels"], f"label {number} of {count}")[0]
            picture = np.frombuffer(pixels, np.uint8).reshape(rows, columns)
            _save(picture, destination / str(label) / f"{number:06d}.png")
        for file, path in ((images, pair["images"]), (labels, pair["labels"])):
            if file.read(1):
                raise NotASet(
                    f"{path} goes on after the {count:,} that its header says: it is damaged, download it again"
                )
    return count


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked where it is gzip, whatever it is called."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            yield gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[misc]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise NotASet(f"{path} is a damaged or truncated gzip file ({error}): download it again") from error


def _exactly(file: IO[bytes], size: int, path: Path, what: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise NotASet(f"{path} ends within {what}: it is truncated, download it again")
    return data


def _is_cifar_binary(name: str) -> bool:
    return name.endswith(".bin") and (name.startswith("data_batch_") or name == "test_batch.bin")


def _is_cifar_pickle(name: str) -> bool:
    return name in ("batches.meta", "test_batch") or (name.startswith("data_batch_") and "." not in name)


def _cifar(folder: Path, names: list[str]) -> Found:
    listed = folder / _CIFAR_NAMES
    if not listed.exists():
        raise NotASet(
            f"{folder} has {names[0]} but no {_CIFAR_NAMES}, which names the classes: it lies in the same archive"
        )
    classes = listed.read_text(encoding="utf-8", errors="replace").split()
    if strange := [name for name in classes if not _CLASS_NAME.fullmatch(name)]:
        raise NotASet(
            f"{listed} names the class {strange[0]!r}, which cannot be a folder: the file is damaged, download it again"
        )
    counts: Counter[str] = Counter()
    for name in names:
        size = (folder / name).stat().st_size
        if size == 0 or size % (1 + _CIFAR_PIXELS):
            raise NotASet(
                f"{folder / name} has {size:,} bytes, no multiple of {1 + _CIFAR_PIXELS}: it is truncated or no binary CIFAR-10"
            )
        counts[_cifar_split(name)] += size // (1 + _CIFAR_PIXELS)
    told = ", ".join(f"{count:,} for {split}" for split, count in sorted(counts.items(), reverse=True))

    def write(destination: Path) -> int:
        return sum(_write_cifar(folder / name, classes, destination / _cifar_split(name)) for name in names)

    return Found(f"CIFAR-10 in binary form: {told}; classes {', '.join(classes)}", write)


def _cifar_split(name: str) -> str:
    return "test" if name.startswith("test") else "train"


def _write_cifar(path: Path, classes: list[str], destination: Path) -> int:
    written = 0
    with path.open("rb") as file:
        while record := file.read(1 + _CIFAR_PIXELS):
            label = record[0]
            if label >= len(classes) or len(record) != 1 + _CIFAR_PIXELS:
                raise NotASet(
                    f"record {written} of {path} has label {label}, but {_CIFAR_NAMES} names {len(classes)} classes: the file "
                    "is damaged, or of another set"
                )
            planes = np.frombuffer(record, np.uint8, offset=1).reshape(3, _CIFAR_SIDE, _CIFAR_SIDE)
            _save(planes.transpose(1, 2, 0), destination / classes[label] / f"{path.stem}-{written:05d}.png")
            written += 1
    return written


def _save(pixels: NDArray[np.uint8], path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)
