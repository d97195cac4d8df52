"""Every damage to a sealed version is refused, and named."""

import json
from pathlib import Path

import pytest

from tasks.sealed import SEAL, InvalidVersion, read_sealed, seal


@pytest.fixture
def sealed(tmp_path, describe):
    """A sealed directory with two files, under its own number."""
    directory = tmp_path / "7"
    directory.mkdir()
    (directory / "model.onnx").write_bytes(bytes(range(256)) * 40)
    (directory / "notes.txt").write_text("made by a test")
    seal(directory, describe("tire", 7))
    return directory


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_sealed_is_read_back(sealed, describe):
    found = read_sealed(sealed)
    assert sorted(found.files) == ["model.onnx", "notes.txt"]
    assert found == describe("tire", 7, files=found.files)
    assert found.lineage()["dataset_digest"] == describe("tire", 7).dataset_digest


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda d: flip_a_bit(d / "model.onnx"), r"7/model.onnx has sha256 \w{12}, sealed with \w{12}"),
        (lambda d: (d / "model.onnx").write_bytes((d / "model.onnx").read_bytes()[:-1]), "7/model.onnx has sha256"),
        (lambda d: (d / "model.onnx").unlink(), r"\['model.onnx'\] are not as sealed"),
        (lambda d: (d / "extra.bin").write_bytes(b"x"), r"\['extra.bin'\] are not as sealed"),
        (lambda d: (d / SEAL).unlink(), "7 has no version.json: it was never sealed"),
        (lambda d: (d / SEAL).write_text(""), "version.json is damaged"),
        (lambda d: (d / SEAL).write_bytes(b"\xff\xfe{"), "version.json is damaged"),
        (lambda d: (d / SEAL).write_text("[]"), "version.json was changed after it was sealed"),
        (lambda d: (d / SEAL).write_text((d / SEAL).read_text()[:-40]), "version.json is damaged"),
        (lambda d: edit(d / SEAL, dataset_version=99), "version.json was changed after it was sealed"),
        (lambda d: edit(d / SEAL, seal="0" * 64), "version.json was changed after it was sealed"),
    ],
)
def test_damage_is_refused_and_named(sealed, damage, named):
    damage(sealed)
    with pytest.raises(InvalidVersion, match=named):
        read_sealed(sealed)


def test_a_version_under_another_number_is_refused(sealed):
    moved = sealed.rename(sealed.with_name("8"))
    with pytest.raises(InvalidVersion, match="8 holds version 7"):
        read_sealed(moved)


def test_a_reader_who_comes_after_the_one_who_verified_may_skip_the_files_but_not_the_seal(sealed):
    flip_a_bit(sealed / "model.onnx")
    assert read_sealed(sealed, verify_files=False).version == 7
    edit(sealed / SEAL, commit="other")
    with pytest.raises(InvalidVersion, match="changed after it was sealed"):
        read_sealed(sealed, verify_files=False)


def test_a_seal_of_a_later_build_says_that_it_cannot_be_read(sealed, describe):
    import hashlib

    body = json.loads((sealed / SEAL).read_text())
    del body["seal"]
    body["accelerator"] = "a field of a later build"
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (sealed / SEAL).write_text(json.dumps(body | {"seal": digest}))
    with pytest.raises(InvalidVersion, match=r"does not describe a version this build can read.*accelerator"):
        read_sealed(sealed)


def test_nothing_and_links_are_not_sealed(tmp_path, describe):
    with pytest.raises(InvalidVersion, match="holds no file to seal"):
        seal(tmp_path, describe("tire"))
    (tmp_path / "model.onnx").symlink_to("/etc/hostname")
    with pytest.raises(InvalidVersion, match=r"model.onnx is not a plain file"):
        seal(tmp_path, describe("tire"))
    assert not (tmp_path / SEAL).exists()


def test_the_seal_appears_whole_and_last(tmp_path, describe, monkeypatch):
    """Killed before the rename, the directory is no version yet."""
    (tmp_path / "model.onnx").write_bytes(b"network")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        seal(tmp_path, describe("tire"))
    monkeypatch.undo()
    assert not (tmp_path / SEAL).exists()
    with pytest.raises(InvalidVersion, match="never sealed"):
        read_sealed(tmp_path)
