"""stage: a registered version on a server of its own; production knows nothing of it."""

import os
import re
import signal
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from prefect.client.orchestration import get_client
from pydantic import SecretStr

from flows.settings import Settings
from flows.stage import keep, stage
from tasks.model_repository import stage_version
from tasks.registry import STAGED, champion_version
from tasks.scratch import ScratchServer
from tasks.serving import NotServed, TritonAddress, infer_front_door


@pytest.fixture
def here(store, mlflow_uri, prefect_server, triton_python, tmp_path, monkeypatch):
    found = Settings(
        s3_bucket=store.bucket,
        s3_endpoint_url=store.endpoint_url,
        s3_access_key_id=store.access_key_id,
        s3_secret_access_key=SecretStr(store.secret_access_key),
        mlflow_tracking_uri=mlflow_uri,
        serving_root=tmp_path / "serving",
        triton_python=triton_python,
    )
    monkeypatch.setattr("flows.stage.settings", lambda: found)
    return found


def address_on_the_page(within: float = 60.0) -> TritonAddress:
    body = {"artifacts": {"key": {"any_": ["stage-rehearsed"]}}}
    for _ in range(int(within * 5)):
        with get_client(sync_client=True) as client:
            found = client.request("POST", "/artifacts/filter", json=body).json()
        if found:
            http, grpc = (re.search(rf"Triton, {name} \| `([^`]+)`", found[-1]["data"])[1] for name in ("HTTP", "gRPC"))
            return TritonAddress(http, grpc)
        time.sleep(0.2)
    raise AssertionError("no page says where the version is served")


@pytest.mark.slow
def test_a_registered_version_answers_where_its_page_says_until_its_time_is_over(here, register_prints, prints):
    register_prints("rehearsed", versions=2)
    states = []
    run = threading.Thread(target=lambda: states.append(stage("rehearsed", 1, minutes=1, return_state=True)))
    run.start()
    address = address_on_the_page()
    answer = infer_front_door(address, "rehearsed", prints.encoded["test"][0])
    assert (answer.model_version, answer.label in prints.rule.labels) == (1, True)
    assert champion_version(here.mlflow_tracking_uri, "rehearsed", STAGED) == 1
    assert champion_version(here.mlflow_tracking_uri, "rehearsed") is None
    run.join(120)
    assert states[0].name == "Ended", states[0].message
    with pytest.raises(NotServed):
        infer_front_door(address, "rehearsed", prints.encoded["test"][0])
    assert not here.serving_root.exists()


def test_a_version_that_does_not_exist_is_named_with_those_that_do(here, register_prints):
    register_prints("rehearsed_once")
    state = stage("rehearsed_once", 9, return_state=True)
    assert state.is_failed() and "version 9" in state.message


def test_a_server_that_dies_ends_the_run_with_its_last_words(tmp_path, triton_python, small_network, describe):
    staged = stage_version(tmp_path / "made", small_network(1), describe("mortal"))
    with ScratchServer(triton_python, staged, tmp_path / "scratch") as server:
        os.killpg(server._process.pid, signal.SIGKILL)  # the launcher leads a process group of its own
        with pytest.raises(RuntimeError, match="ended before its time"):
            keep(server, datetime.now(UTC) + timedelta(minutes=1))
