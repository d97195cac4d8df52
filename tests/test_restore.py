"""A serving root that is gone: made again from S3 under a real Triton, as it was, with nothing new in the ledger."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from deploy import dataset as commands
from deploy.cli import app
from tasks import restore as restoring
from tasks import storage
from tasks.inference import open_network
from tasks.ledger import Entry, append, read_ledger
from tasks.model_repository import (
    FrontDoor,
    Runtime,
    network_name,
    published_versions,
    repository,
    stage_version,
    version_directory,
)
from tasks.proof import Golden
from tasks.registry import champion_version
from tasks.restore import Server, last_known, restorable, restore, standing
from tasks.rollback import NothingToRollBack, roll_back
from tasks.routing import Route, RoutingTable, read_routing, replace_routing
from tasks.sealed import read_sealed
from tasks.serving import NotServed, infer_front_door, unload_model
from tasks.storage import delete, list_objects
from tasks.swap import swap
from tasks.transaction import PROMOTED, ROLLED_BACK, UNDONE, Place, complete, intend, newest_intention, settle
from tasks.version_store import folder_of, upload_version

MODEL = "restored"
NETWORK = network_name(MODEL, 32)


class Killed(BaseException):
    """What a SIGKILL is to the code: nothing catches it."""


def entry(number, action, version, previous=None):
    return Entry("tire", number, action, version, previous, f"2026-03-0{number}T00:00:00.000+00:00", "me", "why")


@pytest.mark.parametrize(
    ("entries", "stands"),
    [
        ([(PROMOTED, 1, None)], (1, None)),
        ([(PROMOTED, 1, None), (PROMOTED, 2, 1)], (2, 1)),
        ([(PROMOTED, 1, None), (PROMOTED, 2, 1), (ROLLED_BACK, 1, 2)], (1, None)),
        ([(PROMOTED, 1, None), (PROMOTED, 2, 1), (PROMOTED, 3, 2), (UNDONE, 2, 3)], (2, 1)),
        ([(PROMOTED, 1, None), (PROMOTED, 2, 1), (ROLLED_BACK, 1, 2), (PROMOTED, 3, 1)], (3, 1)),
        ([("found", 4, None)], (4, None)),
    ],
)
def test_the_ledger_tells_champion_and_what_a_rollback_goes_back_to(entries, stands):
    assert standing([entry(number, *each) for number, each in enumerate(entries, 1)]) == stands


# --- what S3 holds -------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(store, tmp_path, small_network, describe):
    """`kept(model, version)`: a sealed version on S3 and an entry about it."""

    def made(model, version, entered=True):
        upload_version(store, stage_version(tmp_path / "made", small_network(), describe(model, version)))
        if entered:
            append(store, model, PROMOTED, version, "test", "all gates held", {})

    return made


def test_a_model_that_never_had_a_champion_or_whose_version_is_not_on_s3_is_named(store, tmp_path, kept):
    kept("remembered", 1)
    place = Place(tmp_path, store, "", "unknown")
    with pytest.raises(LookupError, match=r"unknown never had a champion.*remembered"):
        last_known(place, [])
    append(store, "forgotten", PROMOTED, 1, "test", "before versions were kept", {})
    with pytest.raises(LookupError, match="forgotten v1 is not on S3"):
        last_known(replace(place, model="forgotten"), [])
    assert {"remembered", "forgotten"} <= set(restorable(store))


def test_a_missing_previous_version_is_said_and_its_place_stays_empty(store, tmp_path, kept):
    append(store, "half", PROMOTED, 1, "test", "before versions were kept", {})
    kept("half", 2)
    notes: list[str] = []
    table = last_known(Place(tmp_path, store, "", "half"), notes)
    assert (table.champion, table.previous) == (Route("half_onnx_32", 2), None)
    assert notes == [
        "a rollback has nothing to go back to: half v1 is not on S3: it was promoted before versions were kept there; "
        "promote it again"
    ]


def test_no_switch_that_was_announced_before_the_loss_can_be_made_after_it(store, tmp_path, kept):
    kept("announced", 1)
    place = Place(tmp_path / "new", store, "", "announced")
    intention = intend(replace(place, root=tmp_path / "lost"), PROMOTED, 2, "sleeper", "all gates held", {})
    table = restoring._reveal(place.root, last_known(place, []))
    assert table.revision == intention.revision + 1 and not intention.was_committed(table)
    with pytest.raises(RuntimeError, match="another promotion or rollback came first"):
        replace_routing(
            place.root, RoutingTable("announced", Route("announced_onnx_32", 2), revision=intention.revision)
        )


def test_a_promotion_that_came_first_keeps_its_table(tmp_path):
    first = replace_routing(tmp_path, RoutingTable("quick", Route("quick_onnx_32", 3)))
    assert restoring._reveal(tmp_path, RoutingTable("quick", Route("quick_onnx_32", 2), revision=9)) == first
    assert list((tmp_path / "staging").iterdir()) == []


# --- under a live server -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(photograph):
    return [photograph(seed) for seed in range(8)]


@pytest.fixture(scope="module")
def promoted(store, mlflow_uri, prefect_server, serve, small_network, describe, photographs, tmp_path_factory):
    """Two versions that took over one after the other, as flows/promote.py does it; what they answered; and then the disk was
    lost. (place on an empty root, answers of the champion, ledger).
    """
    client = MlflowClient(mlflow_uri)
    client.create_registered_model(MODEL)
    run = client.create_run(client.create_experiment(MODEL))
    root = tmp_path_factory.mktemp("lost")
    place, serving = Place(root, store, mlflow_uri, MODEL), serve(root)
    try:
        for version in (1, 2):
            client.create_model_version(MODEL, f"{run.info.artifact_uri}/model", run.info.run_id)
            network = small_network(version)
            pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
            golden = Golden(pixels, open_network(network)(pixels)["probabilities"])
            staged = stage_version(root, network, describe(MODEL, version))
            assert upload_version(store, staged, golden)
            intention = intend(place, PROMOTED, version, "test", "all gates held", {})
            done = swap(
                *(root, serving.address, staged, golden, photographs, "openvino"),
                late_ms=5000,
                capture_share=0.0,
                revision=intention.revision,
            )
            assert not done.undone
            complete(place, intention, done.written, done.figures)
        answers = [infer_front_door(serving.address, MODEL, each) for each in photographs]
    finally:
        serving.running.stop()
    shutil.rmtree(root)
    return replace(place, root=tmp_path_factory.mktemp("new")), answers, read_ledger(store, MODEL)


@pytest.fixture(scope="module")
def server(promoted, serve):
    """A new server on an empty root."""
    serving = serve(promoted[0].root)
    yield Server(serving.address, Runtime(), FrontDoor(capture_share=0.0))
    serving.running.stop()


def lose(place: Place, server: Server) -> None:
    """The disk is empty and the server has nothing loaded."""
    for model in (MODEL, NETWORK):
        unload_model(server.address, model)
    for name in ("model_repository", "routing", "staging"):
        shutil.rmtree(place.root / name, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_server_answers_as_before_and_can_be_rolled_back(promoted, server, photographs):
    place, before, ledger = promoted
    with pytest.raises(NotServed):
        infer_front_door(server.address, MODEL, photographs[0])
    done = restore(place, server)
    assert done.routed and done.fetched == (Route(NETWORK, 2), Route(NETWORK, 1)) and done.golden == 16
    for photograph, expected in zip(photographs, before, strict=True):
        answer = infer_front_door(server.address, MODEL, photograph)
        assert answer.model_version == 2 and answer.lineage == expected.lineage
        assert np.allclose(answer.probabilities, expected.probabilities, atol=1e-5)
    assert settle(place, "test") is None and read_ledger(place.store, MODEL) == ledger
    assert champion_version(place.tracking_uri, MODEL) == 2
    files = {path: path.stat().st_mtime_ns for path in sorted(place.root.rglob("*.json"))}
    again = restore(place, server)
    assert not again.changed and again.table == done.table
    assert {path: path.stat().st_mtime_ns for path in sorted(place.root.rglob("*.json"))} == files
    (version_directory(place.root, NETWORK, 1) / "model.onnx").write_bytes(b"half of it")
    assert restore(place, server).fetched == (Route(NETWORK, 1),), "what rotted on the disk is fetched anew"
    assert restorable(place.store).count(MODEL) == 1
    lose(place, server)
    walk(place, server, photographs)
    back = roll_back(place.root, server.address, place.store, place.tracking_uri, MODEL, "test", "it was wrong")
    assert back.version == 1 and infer_front_door(server.address, MODEL, photographs[0]).model_version == 1
    lose(place, server)
    restored = restore(place, server).table
    assert (restored.champion.version, restored.previous) == (1, None), "as the rollback left it"
    assert infer_front_door(server.address, MODEL, photographs[0]).model_version == 1
    with pytest.raises(NothingToRollBack):
        roll_back(place.root, server.address, place.store, place.tracking_uri, MODEL, "test", "again")


def walk(place: Place, server: Server, photographs: list[bytes]) -> None:
    """Killed before each of its writes, a restoration has put nothing half-made into service, and the next one completes it."""
    for number in range(40):
        with pytest.MonkeyPatch.context() as patch:
            done = count(patch, number)
            try:
                restore(place, server)
            except Killed:
                table = read_routing(place.root, MODEL)
                assert table is None, f"the table is the last of {done}"
                for directory in (repository(place.root) / NETWORK).glob("[0-9]*"):
                    read_sealed(directory)
            else:
                assert "hardlink_to" in done and number > 8, done
                return
        restore(place, server)
        assert infer_front_door(server.address, MODEL, photographs[0]).model_version == 2
        assert published_versions(place.root, NETWORK) == [1, 2]
        table = read_routing(place.root, MODEL)
        assert table.revision == newest_intention(place).revision + 1 and table.previous == Route(NETWORK, 1)
        lose(place, server)
    pytest.fail("never came to its end")


def count(patch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Dies before the write of this number on the server's disk; returns those that were made."""
    done: list[str] = []
    for name in ("rename", "replace", "hardlink_to"):
        real = getattr(Path, name)

        def write(self, target, name=name, real=real):
            if len(done) == number:
                raise Killed
            done.append(name)
            return real(self, target)

        patch.setattr(Path, name, write)
    return done


@pytest.mark.slow
def test_a_version_that_decides_otherwise_on_the_new_machine_is_not_routed_to(
    store, triton, tmp_path, small_network, describe, photographs
):
    """Its golden images were decided by another network."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    proven = open_network(small_network(0))(pixels)["probabilities"][:, ::-1]
    staged = stage_version(tmp_path, small_network(0), describe("swapped", 1))
    upload_version(store, staged, Golden(pixels, proven))
    append(store, "swapped", PROMOTED, 1, "test", "all gates held", {})
    place = Place(triton.root, store, "", "swapped")
    with pytest.raises(RuntimeError, match="golden images differently"):
        restore(place, Server(triton.address, Runtime(), FrontDoor()))
    assert read_routing(triton.root, "swapped") is None
    delete(store, [each.key for each in list_objects(store, folder_of("swapped_onnx_32", 1))])
    shutil.rmtree(repository(triton.root) / "swapped_onnx_32")


def test_the_command_restores_what_it_can_says_what_it_cannot_and_then_changes_nothing(
    store, triton, tmp_path, small_network, describe, photographs, monkeypatch
):
    there = replace(store, bucket="restored-by-command")
    storage.ensure_bucket(there)
    upload_version(there, stage_version(tmp_path, small_network(), describe("commanded", 6)))
    append(there, "commanded", PROMOTED, 6, "test", "all gates held", {})
    append(there, "absent", PROMOTED, 1, "test", "before versions were kept", {})
    stack = {"S3_BUCKET": there.bucket, "S3_ENDPOINT_URL": there.endpoint_url, "SERVING_ROOT": str(triton.root)}
    stack |= {"S3_ACCESS_KEY_ID": there.access_key_id, "S3_SECRET_ACCESS_KEY": there.secret_access_key}
    stack |= {"TRITON_HTTP": triton.address.http, "TRITON_GRPC": triton.address.grpc}
    stack |= {"TRITON_ADMIN_KEY": triton.address.admin_key, "CAPTURE_SHARE": "0"}
    found = {f"TIREWATCH_{name}": value for name, value in stack.items()}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(commands.console, "width", 400)

    def run(*models):
        result = CliRunner().invoke(app, ["restore", *models])
        return result.exit_code, result.stdout.splitlines()

    assert run() == (
        1,
        [
            "absent is not restored: absent v1 is not on S3: it was promoted before versions were kept there; promote it again",
            "commanded: v6 answers; fetched commanded_onnx_32/6",
        ],
    )
    assert infer_front_door(triton.address, "commanded", photographs[0]).model_version == 6
    assert run("commanded") == (0, ["commanded: v6 answers; everything is there, nothing was changed"])
