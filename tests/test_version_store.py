"""Sealed versions on S3: a number is one content for ever, and whatever an upload dies at, what has a seal is whole."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from tasks import storage, version_store
from tasks.model_repository import (
    listed_versions,
    publish_version,
    published_versions,
    stage_version,
    version_directory,
)
from tasks.proof import Golden
from tasks.routing import Route, RoutingTable, replace_routing
from tasks.sealed import SEAL, InvalidVersion, file_digest, read_sealed
from tasks.storage import list_objects, read
from tasks.version_store import (
    fetch_version,
    folder_of,
    stored_golden,
    stored_networks,
    stored_version,
    upload_routed,
    upload_version,
)

GOLDEN = Golden(np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3), np.eye(2, 3, dtype=np.float32))


class Killed(BaseException):
    """What a SIGKILL is to the code: nothing catches it."""


@pytest.fixture
def staged(tmp_path, describe):
    """`staged(model, version, seed)`: a sealed directory with two files whose bytes depend on the seed."""

    def made(model, version=1, seed=0, size=70_000, **changes):
        folder = tmp_path / f"made-{seed}"
        folder.mkdir(exist_ok=True)
        random = np.random.default_rng(seed)
        (folder / "model.onnx").write_bytes(random.bytes(size))
        (folder / "float32.onnx").write_bytes(random.bytes(1000))
        told = describe(model, version, **changes)
        beside = {"float32.onnx": folder / "float32.onnx"}
        return stage_version(tmp_path / f"root-{seed}", folder / "model.onnx", told, beside)

    return made


def dies_at(monkeypatch, number, when):
    """The write of this number to S3 is the last one: `before` it is made, or `after`. Returns the list of those made."""
    put, done = storage.obstore.put, []

    def write(client, key, *given, **how):
        if len(done) == number and when == "before":
            raise Killed
        answer = put(client, key, *given, **how)
        done.append(key)
        if len(done) == number and when == "after":
            raise Killed
        return answer

    monkeypatch.setattr(storage.obstore, "put", write)
    return done


def test_a_version_comes_back_from_s3_byte_by_byte_and_says_what_was_proven_of_it(store, tmp_path, staged):
    directory = staged("pressed", size=12_000_000)  # goes in parts
    sealed = read_sealed(directory)
    assert upload_version(store, directory, GOLDEN)
    assert stored_version(store, sealed.network, 1) == sealed
    assert stored_networks(store, "pressed", 1) == [sealed.network] and stored_networks(store, "press", 1) == []
    assert fetch_version(store, tmp_path / "new", sealed.network, 1) == sealed
    there = version_directory(tmp_path / "new", sealed.network, 1)
    assert read_sealed(there) == sealed and (there / SEAL).read_bytes() == (directory / SEAL).read_bytes()
    assert listed_versions(tmp_path / "new", sealed.network) == [1]
    assert list((tmp_path / "new" / "staging").iterdir()) == []
    golden = stored_golden(store, sealed.network, 1)
    assert (golden.pixels == GOLDEN.pixels).all() and (golden.probabilities == GOLDEN.probabilities).all()


def test_the_same_version_again_changes_nothing_even_where_newer_software_made_it(store, staged, monkeypatch):
    directory = staged("again")
    assert upload_version(store, directory)
    before = list_objects(store, folder_of("again_onnx_32", 1))
    made = dies_at(monkeypatch, 0, "before")
    assert not upload_version(store, directory)
    assert not upload_version(store, staged("again", passport={"torch": "9"}))
    assert made == [] and list_objects(store, folder_of("again_onnx_32", 1)) == before
    assert stored_golden(store, "again_onnx_32", 1) is None


@pytest.mark.parametrize("other", [{"seed": 1}, {"run_id": "another run"}])
def test_a_number_that_holds_another_version_is_refused_with_both_digests(store, staged, other):
    model = f"taken_{len(other)}_{next(iter(other))}"
    first = staged(model)
    upload_version(store, first)
    sealed, theirs = read_sealed(first), file_digest(first / SEAL)[:12]
    second = staged(model, **other)
    with pytest.raises(FileExistsError, match="numbers are never reused") as refusal:
        upload_version(store, second)
    assert theirs in str(refusal.value) and file_digest(second / SEAL)[:12] in str(refusal.value)
    assert stored_version(store, f"{model}_onnx_32", 1) == sealed


@pytest.mark.parametrize("rerun", ["the same content", "another content"])
def test_whichever_write_an_upload_dies_at_no_sealed_version_is_incomplete_and_the_rerun_converges(
    store, tmp_path, staged, monkeypatch, rerun
):
    moments = [(number, when) for number in range(5) for when in ("before", "after")]
    finished = 0
    for version, (number, when) in enumerate(moments, start=1):
        network, directory = "walked_" + rerun[0] + "_onnx_32", staged(f"walked_{rerun[0]}", version)
        root = tmp_path / f"fetched-{version}"
        with monkeypatch.context() as patch:
            done = dies_at(patch, number, when)
            try:
                upload_version(store, directory, GOLDEN)
                finished += 1
            except Killed:
                pass
        if stored_version(store, network, version):
            assert done[-1].endswith(SEAL) and len(done) == 4, "two files, golden images, the seal"
            assert fetch_version(store, root, network, version) == read_sealed(directory)
        else:
            with pytest.raises(LookupError, match="holds no sealed version"):
                fetch_version(store, root, network, version)
            assert published_versions(root, network) == []
            if rerun == "another content":
                directory = staged(f"walked_{rerun[0]}", version, seed=7)
        upload_version(store, directory, GOLDEN)
        assert fetch_version(store, root, network, version) == read_sealed(directory)
        assert len(stored_golden(store, network, version).pixels) == 2
        assert len(list_objects(store, folder_of(network, version))) == 4, "nothing of the killed upload is left"
    assert finished == 2, "fewer moments than writes would walk only a part of the upload"


def test_of_two_who_upload_other_networks_under_one_number_one_is_told_and_the_version_is_whole(
    store, tmp_path, staged
):
    directories = [staged("raced", seed=seed) for seed in (0, 1)]
    outcomes = []

    def upload(directory):
        try:
            outcomes.append((upload_version(store, directory), directory))
        except FileExistsError:
            outcomes.append((False, directory))

    threads = [threading.Thread(target=upload, args=(directory,)) for directory in directories]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    (winner,) = [directory for revealed, directory in outcomes if revealed]
    assert fetch_version(store, tmp_path / "new", "raced_onnx_32", 1) == read_sealed(winner)


def test_a_changed_object_is_found_and_nothing_of_it_is_published(store, tmp_path, staged):
    directory = staged("spoiled")
    sealed = read_sealed(directory)
    upload_version(store, directory)
    key = f"{folder_of(sealed.network, 1)}/{sealed.files['model.onnx']}/model.onnx"
    storage.write(store, key, read(store, key)[:-1] + b"!")
    with pytest.raises(InvalidVersion, match=r"model\.onnx has sha256"):
        fetch_version(store, tmp_path / "new", sealed.network, 1)
    storage.delete(store, [key])
    with pytest.raises(FileNotFoundError, match=r"model\.onnx does not exist"):
        fetch_version(store, tmp_path / "new", sealed.network, 1)
    assert published_versions(tmp_path / "new", sealed.network) == []
    assert list((tmp_path / "new" / "staging").iterdir()) == []


def test_a_seal_that_was_edited_or_copied_to_another_number_is_no_version(store, tmp_path, staged):
    upload_version(store, staged("edited"))
    seal = read(store, f"{folder_of('edited_onnx_32', 1)}/{SEAL}")
    storage.write(store, f"{folder_of('edited_onnx_32', 2)}/{SEAL}", seal)
    with pytest.raises(InvalidVersion, match="edited_onnx_32 version 2 on S3 is that of edited_onnx_32 version 1"):
        fetch_version(store, tmp_path, "edited_onnx_32", 2)
    body = json.loads(seal)
    body["rule"]["threshold"] = 0.99
    storage.write(store, f"{folder_of('edited_onnx_32', 1)}/{SEAL}", json.dumps(body).encode())
    with pytest.raises(InvalidVersion, match="was changed after it was sealed"):
        fetch_version(store, tmp_path, "edited_onnx_32", 1)


def test_a_whole_version_stays_and_a_damaged_one_is_put_right(store, tmp_path, staged, monkeypatch):
    directory = staged("kept")
    sealed = read_sealed(directory)
    upload_version(store, directory)
    root = directory.parents[1]
    publish_version(root, directory)
    there = version_directory(root, sealed.network, 1)
    with monkeypatch.context() as patch:
        patch.setattr(version_store, "read_into", lambda *_: pytest.fail("it is there already"))
        assert fetch_version(store, root, sealed.network, 1) == sealed
    (there / "model.onnx").write_bytes(b"half of it")
    assert fetch_version(store, root, sealed.network, 1) == sealed == read_sealed(there)


def test_another_version_under_the_number_here_is_not_replaced(store, staged):
    ours, theirs = staged("mine"), staged("mine", seed=1)
    upload_version(store, theirs)
    root = ours.parents[1]
    publish_version(root, ours)
    with pytest.raises(FileExistsError, match="already holds another network"):
        fetch_version(store, root, "mine_onnx_32", 1)


def test_a_directory_that_is_not_as_sealed_is_not_uploaded(store, staged):
    directory = staged("torn")
    (directory / "model.onnx").write_bytes(b"changed")
    with pytest.raises(InvalidVersion):
        upload_version(store, directory)
    assert list_objects(store, folder_of("torn_onnx_32", 1)) == []


def test_a_file_is_fetched_without_holding_it_and_a_missing_one_is_named(store, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_PART", 1000)
    for size in (0, 1, 1000, 2500):
        (tmp_path / "out").write_bytes(bytes(size))
        storage.write_file(store, "files/one", tmp_path / "out")
        storage.read_into(store, "files/one", tmp_path / "in")
        assert (tmp_path / "in").read_bytes() == bytes(size)
    with pytest.raises(FileNotFoundError, match=r"s3://tirewatch/files/none does not exist"):
        storage.read_into(store, "files/none", tmp_path / "in")


def test_what_answers_and_is_not_on_s3_is_uploaded_once(store, staged):
    directory = staged("before", 3)
    root = directory.parents[1]
    assert upload_routed(store, root, "before") == []
    publish_version(root, directory)
    replace_routing(root, RoutingTable("before", Route("before_onnx_32", 3)))
    assert upload_routed(store, root, "before") == [Route("before_onnx_32", 3)]
    assert stored_networks(store, "before", 3) == ["before_onnx_32"]
    assert upload_routed(store, root, "before") == []


def test_a_passport_is_the_only_thing_that_may_differ(staged):
    sealed = read_sealed(staged("same"))
    assert version_store._same(sealed, replace(sealed, passport={"torch": "9"}))
    assert not version_store._same(sealed, replace(sealed, rehearsal="no card"))
