"""The bridge as a process, in front of a real Prefect server."""

import base64
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from bridge.sealing import Batch, event_id
from deploy import services

TOKEN = "a-token-for-the-tests"


def record(key: str, etag: str = "e1", bucket: str = "tirewatch") -> dict[str, Any]:
    found = {"key": key, "size": 4, "eTag": etag}
    return {"Records": [{"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": bucket}, "object": found}}]}


StartBridge = Callable[..., Any]  # (folder, prefect_api, **settings) -> the running bridge


@pytest.fixture(scope="module")
def run_bridge(start_service: Callable[..., Any]) -> StartBridge:
    def run(folder: Path, prefect_api: str, **settings: str) -> Any:
        env = {
            "TIREWATCH_BRIDGE_TOKEN": TOKEN,
            "TIREWATCH_BRIDGE_PREFECT_API_URL": prefect_api,
            "TIREWATCH_BRIDGE_STATE": str(folder / "bridge.db"),
            "TIREWATCH_BRIDGE_ANSWER_WITHIN": "1.5",
            **settings,
        }
        return start_service(services.bridge(folder, services.free_ports(1)[0], env), folder / "bridge.log")

    return run


def post(running: Any, body: object, token: str = f"Bearer {TOKEN}") -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{running.service.url}/s3", content=content, headers={"Authorization": token}, timeout=20)


@pytest.fixture(scope="module")
def prefect_api(prefect_server: None) -> str:
    from prefect.settings import PREFECT_API_URL

    return str(PREFECT_API_URL.value())


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory, prefect_api: str, run_bridge: StartBridge) -> Iterator[Any]:
    running = run_bridge(tmp_path_factory.mktemp("bridge"), prefect_api, TIREWATCH_BRIDGE_QUIET_SECONDS="1")
    yield running
    running.stop()


def sealed_batches(prefect_api: str, dataset: str, within: float = 15) -> list[dict[str, Any]]:
    """Events about the dataset that the server has stored; waits until there is one."""
    since = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    wanted = {
        "filter": {
            "occurred": {"since": since, "until": until},
            "event": {"name": ["tirewatch.batch.sealed"]},
            "resource": {"id": [f"tirewatch.dataset.{dataset}"]},
        }
    }
    deadline = time.monotonic() + within
    while True:
        found: list[dict[str, Any]] = httpx.post(f"{prefect_api}/events/filter", json=wanted).json()["events"]
        if found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def test_a_marker_becomes_one_event_however_often_it_is_reported(bridge: Any, prefect_api: str) -> None:
    for _ in range(3):
        assert post(bridge, record("incoming/often/b1/_SUCCESS")).status_code == 200
    [event] = sealed_batches(prefect_api, "often")
    assert event["payload"] == {"dataset": "often", "batch": "b1", "prefix": "incoming/often/b1/"}
    assert event["id"] == str(event_id("tirewatch", Batch("often", "b1"), "e1"))


def test_a_batch_without_marker_is_sealed_after_the_quiet_period(bridge: Any, prefect_api: str) -> None:
    assert post(bridge, record("incoming/quiet/b1/good/a.jpg")).status_code == 200
    assert post(bridge, record("incoming/quiet/b1/good/b.jpg")).status_code == 200
    [event] = sealed_batches(prefect_api, "quiet")
    assert event["payload"]["prefix"] == "incoming/quiet/b1/"


def test_objects_outside_incoming_are_counted_and_start_nothing(bridge: Any, prefect_api: str) -> None:
    for body in (
        record("incoming/elsewhere/../b1/_SUCCESS"),
        record("incoming/elsewhere/b1/_SUCCESS", bucket="other"),
        record("datasets/elsewhere/_SUCCESS"),
    ):
        assert post(bridge, body).status_code == 200
    metrics = httpx.get(f"{bridge.service.url}/metrics").text
    assert 'tirewatch_bridge_ignored_total{reason="bad_name"} 1' in metrics
    assert 'tirewatch_bridge_ignored_total{reason="other_bucket"} 1' in metrics
    assert 'tirewatch_bridge_ignored_total{reason="not_incoming"} 1' in metrics
    assert sealed_batches(prefect_api, "elsewhere", within=2) == []


@pytest.mark.parametrize("header", ["", "Bearer wrong", f"Token {TOKEN}", TOKEN, "Basic !!!"])
def test_a_wrong_token_is_refused(bridge: Any, header: str) -> None:
    assert post(bridge, record("incoming/tire/b1/_SUCCESS"), header).status_code == 401


def test_the_token_is_accepted_as_basic_password(bridge: Any) -> None:
    header = "Basic " + base64.b64encode(f"sns:{TOKEN}".encode()).decode()
    assert post(bridge, {"Type": "SubscriptionConfirmation", "Message": "x"}, header).status_code == 200


def test_bodies_that_are_no_storage_event_are_refused_with_the_reason(bridge: Any) -> None:
    for body in (b"", b"\xff\xfe", b"[" * 5000, b'{"a": 1}', b"[]"):
        answer = post(bridge, body)
        assert answer.status_code == 400
        assert "not a storage event" in answer.json()["detail"]


def test_a_body_above_the_limit_is_refused(bridge: Any) -> None:
    assert post(bridge, b" " * (2 * 2**20 + 1)).status_code == 413


def test_a_batch_sealed_while_prefect_is_away_is_kept_over_a_restart(
    tmp_path: Path, prefect_api: str, run_bridge: StartBridge
) -> None:
    away = f"http://127.0.0.1:{services.free_ports(1)[0]}/api"
    first = run_bridge(tmp_path, away)
    try:
        assert post(first, record("incoming/patient/b1/annotations.json")).status_code == 202
        assert httpx.get(f"{first.service.url}/health").json() == {"status": "ok", "pending": 1}
    finally:
        first.process.kill()  # no chance to write anything any more
        first.process.wait()
    second = run_bridge(tmp_path, prefect_api)
    try:
        [event] = sealed_batches(prefect_api, "patient")
        assert event["payload"]["batch"] == "b1"
    finally:
        second.stop()
