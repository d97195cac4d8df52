"""The model repository: whatever is killed, whenever, Triton finds whole versions only, and a rerun ends in the same place."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks import serving
from tasks.model_repository import (
    FrontDoor,
    Runtime,
    copy_version,
    front_doors,
    install_front_door,
    list_versions,
    listed_versions,
    network_name,
    publish_version,
    published_versions,
    remove_version,
    repository,
    stage_version,
    version_directory,
)
from tasks.routing import Route, promoted, write_routing
from tasks.sealed import InvalidVersion, read_sealed

NETWORK = "tire_onnx_32"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "network.bin"
    path.write_bytes(b"a network" * 100)
    return path


def publish(root, file, version):
    return publish_version(root, stage_version(root, file, version))


def test_a_published_version_is_sealed_listed_and_nothing_else_lies_about(tmp_path, file, describe):
    sealed = publish(tmp_path, file, describe("tire", 3))
    assert read_sealed(version_directory(tmp_path, NETWORK, 3)) == sealed
    assert (listed_versions(tmp_path, NETWORK), published_versions(tmp_path, NETWORK)) == ([3], [3])
    assert sorted(path.name for path in (repository(tmp_path) / NETWORK).iterdir()) == ["3", "config.pbtxt"]
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_staged_version_is_outside_the_repository_on_the_same_file_system(tmp_path, file, describe):
    staged = stage_version(tmp_path, file, describe("tire", 3))
    assert repository(tmp_path) not in staged.parents
    assert staged.stat().st_dev == tmp_path.stat().st_dev
    assert not repository(tmp_path).exists()


def test_staging_again_removes_what_a_killed_run_of_the_version_left_and_nothing_else(tmp_path, file, describe):
    left, other = (stage_version(tmp_path, file, describe("tire", version)) for version in (1, 11))
    again = stage_version(tmp_path, file, describe("tire", 1))
    assert not left.exists() and other.exists() and again.exists()


def test_publishing_again_changes_nothing(tmp_path, file, describe):
    publish(tmp_path, file, describe("tire", 3))
    config = repository(tmp_path) / NETWORK / "config.pbtxt"
    before = config.stat().st_mtime_ns, version_directory(tmp_path, NETWORK, 3).stat().st_ino
    publish(tmp_path, file, describe("tire", 3))
    assert (config.stat().st_mtime_ns, version_directory(tmp_path, NETWORK, 3).stat().st_ino) == before
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_version_number_is_never_given_to_another_network(tmp_path, file, describe):
    publish(tmp_path, file, describe("tire", 3))
    other = tmp_path / "other.bin"
    other.write_bytes(b"another network")
    with pytest.raises(FileExistsError, match="tire_onnx_32/3 already holds another network: register a new version"):
        publish(tmp_path, other, describe("tire", 3))
    assert (version_directory(tmp_path, NETWORK, 3) / "model.onnx").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("damaged", ["model.onnx", "version.json"])
def test_a_damaged_version_is_mended_by_publishing_it_again(tmp_path, file, describe, damaged):
    publish(tmp_path, file, describe("tire", 3))
    target = version_directory(tmp_path, NETWORK, 3)
    (target / damaged).write_bytes(b"damage")
    with pytest.raises(InvalidVersion):
        read_sealed(target)
    publish(tmp_path, file, describe("tire", 3))
    assert read_sealed(target).version == 3
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_staged_version_that_was_changed_is_not_published(tmp_path, file, describe):
    staged = stage_version(tmp_path, file, describe("tire", 3))
    (staged / "model.onnx").write_bytes(b"changed")
    with pytest.raises(InvalidVersion, match=r"model.onnx has sha256"):
        publish_version(tmp_path, staged)
    assert published_versions(tmp_path, NETWORK) == []


def test_only_what_is_routed_and_what_is_new_takes_the_servers_memory(tmp_path, file, describe):
    """Else every promotion adds a network to the server for ever."""
    table = None
    for version in range(1, 6):
        publish(tmp_path, file, describe("tire", version))
        table = write_routing(tmp_path, promoted(table, "tire", Route(NETWORK, version)))
    assert listed_versions(tmp_path, NETWORK) == [3, 4, 5]
    assert published_versions(tmp_path, NETWORK) == [1, 2, 3, 4, 5]


def test_what_a_routing_table_names_cannot_be_removed(tmp_path, file, describe):
    table = None
    for version in (1, 2, 3):
        publish(tmp_path, file, describe("tire", version))
        table = write_routing(tmp_path, promoted(table, "tire", Route(NETWORK, version)))
    for version in (2, 3):
        with pytest.raises(ValueError, match=f"tire_onnx_32 version {version} is named by a routing table"):
            remove_version(tmp_path, NETWORK, version)
    remove_version(tmp_path, NETWORK, 1)
    remove_version(tmp_path, NETWORK, 1)
    assert published_versions(tmp_path, NETWORK) == listed_versions(tmp_path, NETWORK) == [2, 3]


def test_listing_other_versions_keeps_the_runtime_in_force(tmp_path, file, describe):
    staged = stage_version(tmp_path, file, describe("tire", 1))
    publish_version(tmp_path, staged, Runtime("onnxruntime", threads=3, max_batch_size=5))
    config = repository(tmp_path) / NETWORK / "config.pbtxt"
    before = config.read_text()
    list_versions(tmp_path, NETWORK, {1, 2})
    assert config.read_text() == before.replace("versions: [1]", "versions: [1, 2]")


def test_directories_that_triton_would_take_for_versions_are_not_ours(tmp_path, file, describe):
    publish(tmp_path, file, describe("tire", 3))
    model = repository(tmp_path) / NETWORK
    (model / "4").mkdir()
    shutil.copytree(model / "3", model / "5_tmp")
    shutil.copytree(model / "3", model / "6")
    assert published_versions(tmp_path, NETWORK) == [3]


@pytest.mark.parametrize("name", ["Tire", "../tire", "tire-1", "", "1tire", "tire onnx"])
def test_names_that_triton_or_the_disk_would_misread_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot name a Triton model"):
        network_name(name, 32)
    with pytest.raises(ValueError, match="cannot name a Triton model"):
        install_front_door(tmp_path, name)


def test_version_zero_is_refused(tmp_path, file, describe):
    with pytest.raises(ValueError, match="versions start at 1"):
        stage_version(tmp_path, file, describe("tire", 0))


def test_a_copy_in_another_root_is_the_same_version(tmp_path, file, describe):
    sealed = publish(tmp_path / "live", file, describe("tire", 3))
    assert copy_version(version_directory(tmp_path / "live", NETWORK, 3), tmp_path / "scratch") == sealed
    assert read_sealed(version_directory(tmp_path / "scratch", NETWORK, 3)) == sealed


def test_installing_a_front_door_again_touches_only_what_differs(tmp_path):
    directory = install_front_door(tmp_path, "tire", FrontDoor(instances=2))
    files = [directory / "config.pbtxt", directory / "1" / "model.py"]
    before = [path.stat().st_mtime_ns for path in files]
    install_front_door(tmp_path, "tire", FrontDoor(instances=2))
    assert [path.stat().st_mtime_ns for path in files] == before
    install_front_door(tmp_path, "tire", FrontDoor(instances=3))
    assert files[1].stat().st_mtime_ns == before[1] and "count: 3" in files[0].read_text()
    assert front_doors(tmp_path) == ["tire"]


# One child for every file-system call of a publication; the n-th is killed in front of its n-th call.
KILLED = """
import os, signal, sys
from pathlib import Path
from tasks.decision import DecisionRule
from tasks.model_repository import publish_version, remove_version, stage_version
from tasks.sealed import SealedVersion

CALLS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile")

def version(number):
    rule = DecisionRule(("good", "worn"), ("worn",), 0.5)
    return SealedVersion("tire", number, "tire_onnx_32", rule, "resize-area-v1", 32, "tire", 1, "sha256:0", "r", "c", "float32")

def publish(root, number):
    publish_version(root, stage_version(root, Path(sys.argv[2]), version(number)))

def work(root):
    publish(root, 2)
    remove_version(root, "tire_onnx_32", 1)

def main():
    for at in range(200):
        root = Path(sys.argv[1]) / str(at)
        publish(root, 1)
        child = os.fork()
        if child == 0:
            left = at
            def hook(event, args):
                nonlocal left
                if event in CALLS or (event == "open" and isinstance(args[1], str) and "w" in args[1]):
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1
            sys.addaudithook(hook)
            work(root)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return print(at)

main()
"""


def test_killed_at_any_step_a_publication_leaves_whole_versions_and_a_rerun_converges(tmp_path, file, describe):
    roots = tmp_path / "roots"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, roots, file], capture_output=True, text=True, check=True, timeout=120
    )
    steps = int(done.stdout)
    assert steps > 12
    for step in range(steps + 1):
        root = roots / str(step)
        on_disk = sorted(int(path.name) for path in (repository(root) / NETWORK).glob("[0-9]*"))
        assert on_disk == published_versions(root, NETWORK), f"killed at step {step}"
        for version in on_disk:
            read_sealed(version_directory(root, NETWORK, version))
        assert set(listed_versions(root, NETWORK)) <= set(on_disk), f"killed at step {step}"
        publish(root, file, describe("tire", 2))
        remove_version(root, NETWORK, 1)
        assert listed_versions(root, NETWORK) == published_versions(root, NETWORK) == [2]
        assert list((root / "staging").iterdir()) == [], f"killed at step {step}"


# --- on a live server -------------------------------------------------------------------------------------------


def test_half_written_directories_are_never_loaded(triton, small_network, describe):
    network = network_name("half", 32)
    publish(triton.root, small_network(), describe("half", 1))
    model = repository(triton.root) / network
    for name in ("2", "3_tmp", "4"):
        (model / name).mkdir()
        shutil.copy(small_network(), model / name / "model.onnx")
    (model / "4" / "version.json").write_text((model / "1" / "version.json").read_text()[:100])
    serving.load_model(triton.address, network, 1)
    ready = [serving.is_version_ready(triton.address, network, version) for version in (1, 2, 3, 4)]
    assert ready == [True, False, False, False]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "version.json").unlink(), "it was never sealed"),
        (lambda d: flip(d / "model.onnx"), "model.onnx has sha256"),
        (lambda d: (d / "version.json").write_text("{}"), "was changed after it was sealed"),
    ],
)
def test_a_damaged_version_is_refused_by_the_server_and_the_former_one_goes_on(
    triton, small_network, describe, damage, said, request
):
    model = f"damaged{re.sub('[^0-9]', '', request.node.callspec.id)}"
    network = network_name(model, 32)
    publish(triton.root, small_network(), describe(model, 1))
    write_routing(triton.root, promoted(None, model, Route(network, 1)))
    serving.load_model(triton.address, network, 1)
    try:
        publish(triton.root, small_network(1), describe(model, 2))
        damage(version_directory(triton.root, network, 2))
        with pytest.raises(serving.NotServed, match=said):
            serving.load_model(triton.address, network, 2)
        assert serving.is_version_ready(triton.address, network, 1)
        assert not serving.is_version_ready(triton.address, network, 2)
    finally:
        (triton.root / "routing" / f"{model}.json").unlink()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
