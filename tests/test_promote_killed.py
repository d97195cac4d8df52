"""The switch of champion, killed with SIGKILL before every single write it makes and after the last: on the server's disk, to
S3, to MLflow and to Prefect, under a live Triton server.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from tasks.inference import open_network
from tasks.ledger import breaks, champion_at, read_ledger
from tasks.model_repository import network_name, repository
from tasks.probe import ProbeLoad
from tasks.proof import Golden
from tasks.registry import champion_version
from tasks.routing import read_routing
from tasks.sealed import read_sealed
from tasks.serving import infer_front_door
from tasks.transaction import Place, newest_intention
from tasks.version_store import fetch_version, stored_version

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[1]
MODEL = "switched_and_killed"
# What flows/promote.py does once the gates held, in its order. Dies at the write of the given number, before or after it;
# prints the writes when it is not reached.
RUN = """
import os, pathlib, pickle, signal, sys
import mlflow, obstore
from tasks import transaction
from tasks.model_repository import stage_version
from tasks.routing import read_routing
from tasks.swap import swap
from tasks.version_store import upload_version

number, after = int(sys.argv[1]), sys.argv[2] == "after"
place, address, network_file, sealed, golden, images = pickle.load(open(sys.argv[3], "rb"))
done = []

def counted(name, function):
    def write(*given, **how):
        done.append(name)
        if len(done) == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = function(*given, **how)
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
    return write

obstore.put = counted("s3", obstore.put)
pathlib.Path.rename = counted("rename", pathlib.Path.rename)
pathlib.Path.replace = counted("replace", pathlib.Path.replace)
mlflow.MlflowClient.set_registered_model_alias = counted("alias", mlflow.MlflowClient.set_registered_model_alias)
transaction.emit = counted("event", transaction.emit)

transaction.settle(place, "test")
table = read_routing(place.root, place.model)
if table is None or table.champion.version != sealed.version:
    staged = stage_version(place.root, network_file, sealed)
    upload_version(place.store, staged, golden)
    intention = transaction.intend(place, "promoted", sealed.version, "test", "all gates held", {"accuracy": 1.0})
    swapped = swap(
        place.root, address, staged, golden, images, "openvino", late_ms=5000, capture_share=0.0, revision=intention.revision
    )
    assert not swapped.undone, swapped.proof
    transaction.complete(place, intention, swapped.written, swapped.figures)
print("writes", *done)
"""


@pytest.fixture(scope="module")
def place(store, mlflow_uri, triton):
    """The model is registered with as many versions as the walk can need."""
    client = MlflowClient(mlflow_uri)
    client.create_registered_model(MODEL)
    run = client.create_run(client.create_experiment("switched-and-killed"))
    for _ in range(30):
        client.create_model_version(MODEL, f"{run.info.artifact_uri}/model", run.info.run_id)
    return Place(triton.root, store, mlflow_uri, MODEL)


@pytest.fixture(scope="module")
def job(place, triton, small_network, describe, photograph, tmp_path_factory):
    """`job(version)`: a file with everything the switch to that version needs."""
    folder = tmp_path_factory.mktemp("jobs")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    golden = Golden(pixels, open_network(small_network(1))(pixels)["probabilities"])
    images = [photograph(seed) for seed in range(16)]

    def made(version: int) -> Path:
        file = folder / f"{version}"
        file.write_bytes(
            pickle.dumps((place, triton.address, small_network(1), describe(MODEL, version), golden, images))
        )
        return file

    return made


def run(job: Path, number: int = 0, when: str = "before") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, str(number), when, str(job)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def announced() -> set[int]:
    """Versions that an event said were promoted."""
    body = {"filter": {"resource": {"id": [f"tirewatch.model.{MODEL}"]}}, "limit": 50}
    with get_client(sync_client=True) as client:
        events = client.request("POST", "/events/filter", json=body).json()["events"]
    return {event["payload"]["version"] for event in events if event["event"] == "tirewatch.model.promoted"}


def is_on_s3(place: Place, network: str, version: int, folder: Path) -> bool:
    """Whether S3 has a seal of the version; if so, every byte of it is there. Without its version, no switch was announced."""
    if stored_version(place.store, network, version) is None:
        last = newest_intention(place)
        assert last is not None and last.version != version
        return False
    fetch_version(place.store, folder / f"{uuid.uuid4()}", network, version)
    return True


@pytest.mark.usefixtures("prefect_server")
def test_whichever_write_a_switch_dies_at_one_version_answers_and_the_rerun_converges(
    place, job, triton, photograph, tmp_path
):
    network = network_name(MODEL, 32)

    def answering() -> int:
        return infer_front_door(triton.address, MODEL, photograph(3)).model_version

    first = run(job(1))
    assert first.returncode == 0, first.stderr[-2000:]
    undisturbed = run(job(2))
    assert undisturbed.returncode == 0, undisturbed.stderr[-2000:]
    writes = undisturbed.stdout.split("writes ")[1].split()
    assert {"s3", "rename", "replace", "alias", "event"} <= set(writes)
    version, seen, uploaded = 2, set(), set()
    moments = [*((number, "before") for number in range(1, len(writes) + 1)), (len(writes), "after")]
    with ProbeLoad(triton.address, MODEL, [photograph(seed) for seed in range(4)], pause=0.05) as load:
        for number, when in moments:
            version += 1
            killed = run(job(version), number, when)
            assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr[-2000:]
            table = read_routing(place.root, MODEL)
            assert table.champion.version in (version - 1, version), f"{when} write {number}, {writes[number - 1]}"
            assert answering() == table.champion.version
            seen.add(table.champion.version == version)
            for directory in (repository(place.root) / network).glob("[0-9]*"):  # what Triton would take for a version
                read_sealed(directory)
            uploaded.add(is_on_s3(place, network, version, tmp_path))
            again = run(job(version))
            assert again.returncode == 0, again.stderr[-2000:]
            assert answering() == read_routing(place.root, MODEL).champion.version == version
            assert champion_version(place.tracking_uri, MODEL) == version
            assert is_on_s3(place, network, version, tmp_path)
    assert len(load.probes) > 20 * len(moments) and [probe for probe in load.probes if probe.error] == []
    assert uploaded == {True, False}, "some of the writes came before the seal on S3 and some after it"
    assert seen == {True, False}, "some of the writes came before the commit point and some after it"
    entries = read_ledger(place.store, MODEL)
    assert [entry.version for entry in entries] == list(range(1, version + 1)) and breaks(entries) == []
    assert all(entry.action == "promoted" and entry.evidence["accuracy"] == 1.0 for entry in entries)
    assert any("completed_by" in entry.evidence for entry in entries)
    assert champion_at(entries, datetime.now(UTC)).version == version
    for _ in range(50):
        if announced() >= set(range(1, version + 1)):
            break
        time.sleep(0.2)
    assert announced() == set(range(1, version + 1)), json.dumps(sorted(announced()))
