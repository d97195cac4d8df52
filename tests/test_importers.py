"""tasks/importers.py: published sets in their own file formats, whole, damaged and misnamed."""

import gzip
import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.dataset import read_rows
from tasks.importers import NotASet, recognised
from tasks.sources import upload_set
from tasks.storage import Store

Made = Callable[..., bytes]
CLASSES = ("airplane", "automobile", "bird")


def idx(magic: int, *numbers: int, body: bytes) -> bytes:
    return struct.pack(f">{len(numbers) + 1}I", magic, *numbers) + body


def digits(count: int, seed: int = 0, side: int = 12) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, side, side), np.uint8), random.integers(0, 10, count).astype(np.uint8)


def mnist(folder: Path, packed: bool = False, count: int = 30) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both pairs of IDX files, as they are published; what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {}
    for part, split in (("train", "train"), ("t10k", "test")):
        images, labels = told[split] = digits(count, seed=len(told))
        files = {
            f"{part}-images-idx3-ubyte": idx(0x803, *images.shape, body=images.tobytes()),
            f"{part}-labels-idx1-ubyte": idx(0x801, len(labels), body=labels.tobytes()),
        }
        for name, data in files.items():
            (folder / f"{name}.gz").write_bytes(gzip.compress(data)) if packed else (folder / name).write_bytes(data)
    return told


def cifar(folder: Path, counts: dict[str, int]) -> dict[str, np.ndarray]:
    """Binary batches: a label, then red, green and blue planes; the records of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")
    told = {}
    for seed, (name, count) in enumerate(counts.items()):
        random = np.random.default_rng(seed)
        told[name] = random.integers(0, 256, (count, 3073), np.uint8)
        told[name][:, 0] = random.integers(0, len(CLASSES), count)
        (folder / name).write_bytes(told[name].tobytes())
    return told


def written(folder: Path, destination: Path) -> dict[str, np.ndarray]:
    """What the import of the folder writes: path -> pixels."""
    found = recognised(folder)
    assert found.write is not None
    count = found.write(destination)
    files = {
        path.relative_to(destination).as_posix(): np.asarray(Image.open(path)) for path in destination.rglob("*.png")
    }
    assert len(files) == count
    return files


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_become_class_folders_below_their_splits_without_loss(tmp_path: Path, packed: bool) -> None:
    told = mnist(tmp_path / "set", packed)
    assert recognised(tmp_path / "set").text == (
        "IDX files as of MNIST: 30 for train of 12x12 pixels, 30 for test of 12x12 pixels"
    )
    files = written(tmp_path / "set", tmp_path / "out")
    for split, (images, labels) in told.items():
        for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            assert np.array_equal(files[f"{split}/{label}/{number:06d}.png"], pixels)
    assert len(files) == 60


def test_the_spellings_of_idx_names_in_use_are_known(tmp_path: Path) -> None:
    mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").rename(tmp_path / "train-images.idx3-ubyte")
    (tmp_path / "train-labels-idx1-ubyte").rename(tmp_path / "train-labels.idx1-ubyte")
    for path in tmp_path.glob("t10k*"):
        path.unlink()
    assert recognised(tmp_path).text == "IDX files as of MNIST: 30 for train of 12x12 pixels"


def broken_idx(folder: Path, how: str) -> None:
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    data = images.read_bytes()
    match how:
        case "swapped":
            images.write_bytes(labels.read_bytes())
        case "page":
            images.write_bytes(b"<html>404 not found</html>")
        case "fewer labels":
            labels.write_bytes(idx(0x801, 29, body=bytes(29)))
        case "truncated":
            images.write_bytes(data[:-100])
        case "labels truncated":
            labels.write_bytes(labels.read_bytes()[:-1])
        case "longer":
            images.write_bytes(data + b"more")
        case "packed and truncated":
            images.write_bytes(gzip.compress(data)[:-200])
        case "packed and damaged":
            packed = bytearray(gzip.compress(data))
            packed[len(packed) // 2] ^= 0xFF
            images.write_bytes(bytes(packed))
        case "empty":
            images.write_bytes(b"")
        case "giant":
            images.write_bytes(idx(0x803, 30, 1_000_000, 1_000_000, body=b""))
        case "without labels":
            labels.unlink()
        case "twice":
            (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(data))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("swapped", r"begins with 0x00000801 instead of 0x00000803"),
        ("page", r"begins with 0x3c68746d instead of 0x00000803"),
        ("fewer labels", r"train-images-idx3-ubyte holds 30 photographs, train-labels-idx1-ubyte 29 labels"),
        ("truncated", r"ends within photograph 29 of 30: it is truncated"),
        ("labels truncated", r"ends within label 29 of 30: it is truncated"),
        ("longer", r"goes on after the 30 that its header says"),
        ("packed and truncated", r"damaged or truncated gzip file"),
        ("packed and damaged", r"damaged or truncated gzip file"),
        ("empty", r"ends within its header"),
        ("giant", r"1000000x1000000 pixels: the file is damaged"),
        ("without labels", r"has train-images-idx3-ubyte without the labels"),
        ("twice", r"are the same part twice: remove one"),
    ],
)
def test_a_damaged_idx_set_is_refused_by_name(tmp_path: Path, how: str, message: str) -> None:
    mnist(tmp_path / "set")
    broken_idx(tmp_path / "set", how)
    with pytest.raises(NotASet, match=message):
        written(tmp_path / "set", tmp_path / "out")


def test_binary_cifar_becomes_class_folders_below_its_splits_without_loss(tmp_path: Path) -> None:
    told = cifar(tmp_path / "set", {"data_batch_1.bin": 20, "data_batch_2.bin": 10, "test_batch.bin": 15})
    expected = "CIFAR-10 in binary form: 30 for train, 15 for test; classes airplane, automobile, bird"
    assert recognised(tmp_path / "set").text == expected
    files = written(tmp_path / "set", tmp_path / "out")
    for name, records in told.items():
        for number, record in enumerate(records):
            split, stem = ("test" if name.startswith("test") else "train"), name.removesuffix(".bin")
            pixels = files[f"{split}/{CLASSES[record[0]]}/{stem}-{number:05d}.png"]
            for channel in range(3):
                assert np.array_equal(pixels[:, :, channel].ravel(), record[1 + 1024 * channel : 1025 + 1024 * channel])
    assert len(files) == 45


def test_a_damaged_cifar_set_is_refused_by_name(tmp_path: Path) -> None:
    cifar(tmp_path, {"data_batch_1.bin": 5, "test_batch.bin": 5})
    path = tmp_path / "data_batch_1.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(NotASet, match="15,364 bytes, no multiple of 3073"):
        recognised(tmp_path)
    path.write_bytes(b"\x07" + whole[1:])
    with pytest.raises(NotASet, match=r"record 0 of .*data_batch_1.bin has label 7, but batches.meta.txt names 3"):
        written(tmp_path, tmp_path / "out")
    path.write_bytes(whole)
    (tmp_path / "batches.meta.txt").write_text("../../etc\n")
    with pytest.raises(NotASet, match=r"names the class '../../etc', which cannot be a folder"):
        recognised(tmp_path)
    (tmp_path / "batches.meta.txt").unlink()
    with pytest.raises(NotASet, match=r"no batches.meta.txt, which names the classes"):
        recognised(tmp_path)


def test_the_python_form_of_cifar_is_refused_with_the_form_to_download(tmp_path: Path) -> None:
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(NotASet, match=r"a pickle: .* Download the binary version \(cifar-10-binary.tar.gz\)"):
        recognised(tmp_path)


def test_class_folders_and_annotations_are_told_apart_and_counted(tmp_path: Path, photograph: Made) -> None:
    for path in ("train/good/1.jpg", "train/bad/2.jpg", "val/good/3.jpg", "train/good/notes.txt", "train/.hid/4.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(photograph(1))
    found = recognised(tmp_path)
    assert found.text == "class folders: 3 files in 2 classes (bad 1, good 2); train 2, val 1"
    assert found.write is None
    (tmp_path / "annotations.json").write_text("{}")
    assert recognised(tmp_path).text == "images with annotations.json: 5 files beside it"


def test_what_is_no_set_is_named_with_what_would_be_one(tmp_path: Path) -> None:
    (tmp_path / "loose.jpg").write_bytes(b"1")
    with pytest.raises(NotASet, match=r"holds no class folders with images, no annotations.json, no IDX files"):
        recognised(tmp_path)
    with pytest.raises(NotASet, match="is a file: unpack it and name the folder"):
        recognised(tmp_path / "loose.jpg")
    with pytest.raises(NotASet, match="does not exist"):
        recognised(tmp_path / "nowhere")


def test_an_imported_set_keeps_its_test_split_and_gets_a_validation_split(
    store: Store, tmp_path: Path, ingested: Callable[..., object]
) -> None:
    told = mnist(tmp_path / "set", packed=True, count=60)
    upload_set(store, tmp_path / "set", "idx", "mnist", recognised(tmp_path / "set"))
    version = ingested(store, "idx", "mnist", {}).version  # type: ignore[attr-defined]
    assert version.splits["test"] == 60
    assert version.splits["train"] + version.splits["val"] == 60
    assert version.splits["val"] > 0
    images, labels = told["test"]
    expected = sorted((int(label), pixels.tobytes()) for pixels, label in zip(images, labels, strict=True))
    stored = [
        (int(row["label"]), np.asarray(Image.open(io.BytesIO(row["image"]))).tobytes())
        for rows in read_rows(store, version, ["test"], ["label", "image"])
        for row in rows.to_pylist()
    ]
    assert sorted(stored) == expected


@pytest.mark.shared_data
def test_the_published_mnist_files_hold_what_their_authors_say(shared_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    text = recognised(shared_data / "mnist" / "raw").text
    assert text == "IDX files as of MNIST: 60,000 for train of 28x28 pixels, 10,000 for test of 28x28 pixels"
    for path in (shared_data / "mnist" / "raw").glob("t10k-*"):
        (folder / path.name).symlink_to(path)
    files = written(folder, tmp_path / "out")
    counts = [sum(name.startswith(f"test/{digit}/") for name in files) for digit in range(10)]
    assert counts == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    published = sorted((shared_data / "mnist" / "png" / "test").rglob("*.png"))[::50]
    assert published
    for path in published:  # named by their index in both original files together
        mine = files[f"test/{path.parent.name}/{int(path.stem) - 60_000:06d}.png"]
        assert np.array_equal(mine, np.asarray(Image.open(path).convert("L")))


@pytest.mark.shared_data
def test_cifar_as_class_folders_is_taken_in_with_its_splits(
    store: Store, shared_data: Path, tmp_path: Path, ingested: Callable[..., object]
) -> None:
    for path in sorted((shared_data / "cifar10-jpg").rglob("*.jpg")):
        if int(path.stem) % 50 == 0:
            link = tmp_path / "set" / path.relative_to(shared_data / "cifar10-jpg")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    found = recognised(tmp_path / "set")
    assert found.text.startswith("class folders: 300 files in 10 classes (airplane 30, automobile 30")
    upload_set(store, tmp_path / "set", "cifar", "jpg", found)
    version = ingested(store, "cifar", "jpg", {}).version  # type: ignore[attr-defined]
    assert version.splits["test"] == 100
    assert version.splits["train"] + version.splits["val"] == 200
    assert len(version.classes) == 10
