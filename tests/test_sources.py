"""tasks/sources.py: a folder as a sealed batch on S3."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tasks import storage
from tasks.importers import Found, recognised
from tasks.sources import digit_folders, upload_folder, upload_set
from tasks.storage import Store

Made = Callable[..., bytes]


def folder_of(photograph: Made, folder: Path, count: int = 6) -> Path:
    for number in range(count):
        path = folder / ("good" if number % 2 else "bad") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph(number))
    return folder


def test_a_folder_is_uploaded_as_it_is_and_sealed(store: Store, photograph: Made, tmp_path: Path) -> None:
    prefix = upload_folder(store, folder_of(photograph, tmp_path), "sent", "b1")
    assert prefix == "incoming/sent/b1/"
    keys = [each.key.removeprefix(prefix) for each in storage.list_objects(store, prefix)]
    assert sorted(keys) == ["_SUCCESS", *(f"bad/{n}.jpg" for n in (0, 2, 4)), *(f"good/{n}.jpg" for n in (1, 3, 5))]
    assert storage.read(store, prefix + "good/3.jpg") == photograph(3)


def test_the_seal_is_written_after_every_photograph(
    store: Store, photograph: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(photograph, tmp_path)
    (folder / "annotations.json").write_text("{}")
    written: list[str] = []
    put = storage.write

    def watched(where: Store, key: str, data: bytes) -> None:
        put(where, key, data)
        written.append(key)

    monkeypatch.setattr(storage, "write", watched)
    monkeypatch.setattr("tasks.sources.write", watched)
    upload_folder(store, folder, "sent-last", "b1")
    assert len(written) == 7
    assert written[-1] == "incoming/sent-last/b1/annotations.json"


def test_an_upload_again_completes_the_batch_and_another_folder_cannot_mix_into_it(
    store: Store, photograph: Made, tmp_path: Path
) -> None:
    folder = folder_of(photograph, tmp_path / "first")
    storage.write(store, "incoming/sent-twice/b1/bad/0.jpg", photograph(0))  # as far as a killed upload came
    upload_folder(store, folder, "sent-twice", "b1")
    upload_folder(store, folder, "sent-twice", "b1")
    assert len(storage.list_objects(store, "incoming/sent-twice/b1")) == 7
    other = folder_of(photograph, tmp_path / "second", 4)
    with pytest.raises(
        ValueError, match=r"incoming/sent-twice/b1/ holds 2 files that .*second lacks, such as .*: choose"
    ):
        upload_folder(store, other, "sent-twice", "b1")


def test_an_empty_folder_and_a_wrong_name_are_refused(store: Store, photograph: Made, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no files: nothing to upload"):
        upload_folder(store, tmp_path, "sent-none", "b1")

    def never(_: Path) -> int:
        raise AssertionError("converted for nothing")

    with pytest.raises(ValueError, match="a-z 0-9"):
        upload_set(store, tmp_path, "Not A Name", "b1", Found("a set", never))


def test_digits_are_scans_enlarged_without_invention(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digit_folders(tmp_path, side=16)
    assert recognised(tmp_path).text.startswith("class folders: 1,797 files in 10 classes")
    scans = load_digits()
    path = tmp_path / str(scans.target[7]) / "0007.png"
    small = np.asarray(Image.open(path))[::2, ::2]
    assert np.array_equal(small, np.round(scans.images[7] * 255 / 16).astype(np.uint8))
    with pytest.raises(ValueError, match="multiple of 8"):
        digit_folders(tmp_path, side=20)
