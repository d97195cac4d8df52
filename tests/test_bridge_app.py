"""The bridge as a process, in front of a real Prefect server."""

import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import httpx
import pytest
from starlette.requests import Request
from starlette.testclient import TestClient

from bridge.app import came_over_loopback, create_app
from bridge.metrics import Metrics
from bridge.sealing import Batch, event_id
from bridge.settings import BridgeSettings
from deploy import services

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

TOKEN = "a-token-for-the-tests"
WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}

Sealed = Callable[..., list[dict[str, Any]]]
StartBridge = Callable[..., Any]


def record(key: str, etag: str = "e1", bucket: str = "tirewatch", written: str | None = None) -> dict[str, Any]:
    found = {"key": key, "size": 4, "eTag": etag}
    told = {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": bucket}, "object": found}}
    return {"Records": [{**told, "eventTime": written} if written else told]}


def post(running: Any, body: object, token: str = f"Bearer {TOKEN}") -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{running.service.url}/s3", content=content, headers={"Authorization": token}, timeout=20)


def health(running: Any) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{running.service.url}/health").json()
    return found


def metrics(running: Any) -> str:
    return httpx.get(f"{running.service.url}/metrics").text


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bridge") / "bridge.log"


@pytest.fixture(scope="module")
def bridge(log: Path, prefect_api: str, start_bridge: StartBridge) -> Iterator[Any]:
    running = start_bridge(log.parent, prefect_api, quiet_seconds=1)
    yield running
    running.stop()


def test_a_marker_becomes_one_event_however_often_it_is_reported(bridge: Any, sealed_events: Sealed) -> None:
    for _ in range(3):
        assert post(bridge, record("incoming/often/b1/_SUCCESS")).status_code == 200
    [event] = sealed_events("often")
    assert event["payload"] == {"dataset": "often", "batch": "b1", "prefix": "incoming/often/b1/"}
    assert event["id"] == str(event_id("tirewatch", Batch("often", "b1"), "e1"))
    assert 'tirewatch_bridge_repeated_total{what="marker"} 2' in metrics(bridge)


def test_a_batch_without_marker_is_sealed_after_the_quiet_period(bridge: Any, sealed_events: Sealed) -> None:
    assert post(bridge, record("incoming/quiet/b1/good/a.jpg")).status_code == 200
    assert post(bridge, record("incoming/quiet/b1/good/b.jpg")).status_code == 200
    [event] = sealed_events("quiet")
    assert event["payload"]["prefix"] == "incoming/quiet/b1/"


@pytest.mark.slow
def test_a_late_photograph_is_taken_in_when_the_empty_marker_is_written_again(
    bridge: Any, sealed_events: Sealed
) -> None:
    for second, name in enumerate(["a.jpg", "_SUCCESS", "late.jpg"]):
        assert (
            post(bridge, record(f"incoming/late/b1/{name}", written=f"2026-11-21T07:00:0{second}Z")).status_code == 200
        )
    assert 'tirewatch_bridge_late_total{dataset="late"} 1' in metrics(bridge)
    [first] = sealed_events("late")
    assert post(bridge, record("incoming/late/b1/_SUCCESS", written="2026-11-21T07:00:03Z")).status_code == 200
    again = sealed_events("late", count=2)
    assert len({event["id"] for event in again}) == 2
    assert {event["payload"]["prefix"] for event in again} == {first["payload"]["prefix"]}


@pytest.mark.slow
@pytest.mark.parametrize("versions", [True, False], ids=["versioned bucket", "plain bucket"])
def test_seaweedfs_tells_enough_to_take_in_a_late_photograph(
    bridge: Any, sealed_events: Sealed, start_service: Callable[..., Any], tmp_path: Path, versions: bool
) -> None:
    """The real webhook of a real filer, whose clock shows seconds; the marker is empty both times."""
    dataset = f"seaweed-{versions}".lower()
    events = '["create"]' if versions else '["create", "update"]'
    (tmp_path / "notification.toml").write_text(
        f'[notification.webhook]\nenabled = true\nendpoint = "{bridge.service.url}/s3"\nbearer_token = "{TOKEN}"\n'
        f'event_types = {events}\npath_prefixes = ["/buckets/tirewatch/incoming/"]\n'
    )
    service = services.seaweedfs(tmp_path, services.free_ports(11), "key", "a-secret-for-the-tests")
    running = start_service(service, tmp_path / "s3.log")
    try:
        access = {"aws_access_key_id": "key", "aws_secret_access_key": "a-secret-for-the-tests"}
        s3 = boto3.client("s3", endpoint_url=service.url, region_name="us-east-1", **access)
        create_bucket(s3, versions)
        for name in ("a.jpg", "_SUCCESS", "_SUCCESS", "late.jpg", "_SUCCESS"):
            s3.put_object(Bucket="tirewatch", Key=f"incoming/{dataset}/b1/{name}", Body=b"")
            time.sleep(1.2)
        assert len(sealed_events(dataset, count=2)) == 2
        time.sleep(2)
        assert len(sealed_events(dataset, count=3, within=1)) == 2
    finally:
        running.stop()


def create_bucket(s3: "S3Client", versions: bool) -> None:
    for _ in range(50):  # the gateway answers a moment before the filer behind it does
        try:
            s3.create_bucket(Bucket="tirewatch")
            break
        except s3.exceptions.ClientError:
            time.sleep(0.2)
    if versions:
        s3.put_bucket_versioning(Bucket="tirewatch", VersioningConfiguration={"Status": "Enabled"})


def test_a_marker_before_any_photograph_is_sealed_named_and_counted(
    bridge: Any, sealed_events: Sealed, log: Path
) -> None:
    """Its photographs may have been told to nobody; ingest refuses the batch if there are none."""
    assert post(bridge, record("incoming/bare/b1/_SUCCESS")).status_code == 200
    assert len(sealed_events("bare")) == 1
    assert "incoming/bare/b1/ is complete, but not one photograph of it has been told" in log.read_text()
    # Prometheus finds the counter before the first event too; the batches of other tests count as well.
    assert counted(bridge, "bare_markers_total") >= 1
    before = counted(bridge, "bare_markers_total")
    assert post(bridge, record("incoming/bare/b2/annotations.json")).status_code == 200
    assert post(bridge, record("incoming/bare/b3/good/a.jpg")).status_code == 200
    assert post(bridge, record("incoming/bare/b3/_SUCCESS")).status_code == 200
    assert counted(bridge, "bare_markers_total") == before + 1, "b2 is bare, b3 is not"


def test_objects_outside_incoming_are_counted_and_start_nothing(bridge: Any, sealed_events: Sealed, log: Path) -> None:
    for body in (
        record("incoming/elsewhere/../b1/_SUCCESS"),
        record("incoming/elsewhere/b1/%2E%2E/%2E%2E/_SUCCESS"),
        record("incoming/elsewhere/b1/_SUCCESS", bucket="other"),
        record("datasets/elsewhere/_SUCCESS\nforged line of the log"),
    ):
        assert post(bridge, body).status_code == 200
    told, sealed = metrics(bridge), counted(bridge, 'sealed_total{by="marker"}')
    for reason in ("bad_name", "bad_path", "other_bucket", "not_incoming"):
        assert f'tirewatch_bridge_ignored_total{{reason="{reason}"}} 1' in told
        assert f": {reason}\n" in log.read_text()
    assert "\nforged" not in log.read_text()
    assert sealed_events("elsewhere", within=2) == []
    assert counted(bridge, 'sealed_total{by="marker"}') == sealed


@pytest.mark.parametrize("header", ["", "Bearer wrong", f"Token {TOKEN}", TOKEN, "Basic !!!", f"Bearer {TOKEN}x"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/s3"), ("GET", "/dead-letters"), ("DELETE", "/dead-letters/1")])
def test_a_wrong_token_is_refused_everywhere(bridge: Any, log: Path, header: str, method: str, path: str) -> None:
    before, line = refusals(bridge, "token"), f"refused {method} '{path}' from 127.0.0.1: a bearer token is needed"
    told = log.read_text().count(line)
    answer = httpx.request(method, bridge.service.url + path, headers={"Authorization": header}, content=b"{}" * 100)
    assert answer.status_code == 401
    assert refusals(bridge, "token") == before + 1
    assert log.read_text().count(line) == told + 1
    assert TOKEN not in log.read_text()


def refusals(running: Any, reason: str) -> int:
    return counted(running, f'refused_total{{reason="{reason}"}}')


def counted(running: Any, counter: str) -> int:
    start = f"tirewatch_bridge_{counter} "
    return sum(int(line.removeprefix(start)) for line in metrics(running).splitlines() if line.startswith(start))


def test_the_token_is_accepted_as_basic_password(bridge: Any) -> None:
    header = "Basic " + base64.b64encode(f"sns:{TOKEN}".encode()).decode()
    assert post(bridge, {"Type": "SubscriptionConfirmation", "Message": "x"}, header).status_code == 200


def test_a_request_of_sns_to_be_confirmed_is_told_and_not_followed(bridge: Any, log: Path) -> None:
    body = {"Type": "SubscriptionConfirmation", "Message": "x", "SubscribeURL": "https://sns.example/confirm-me"}
    headers = {**WITH_TOKEN, "x-amz-sns-message-type": "SubscriptionConfirmation"}
    assert httpx.post(f"{bridge.service.url}/s3", json=body, headers=headers).status_code == 200
    assert "https://sns.example/confirm-me" in log.read_text()


def test_metrics_are_open_only_to_who_is_on_this_machine_and_asks_for_itself(
    bridge: Any, tmp_path: Path, prefect_api: str, start_bridge: StartBridge
) -> None:
    url = f"{bridge.service.url}/metrics"
    assert httpx.get(url).status_code == 200
    assert httpx.get(url, headers={"X-Forwarded-For": "127.0.0.1"}).status_code == 401
    assert httpx.get(url, headers={"X-Forwarded-For": "10.0.0.7", **WITH_TOKEN}).status_code == 200
    for host, is_open in (("127.0.0.1", True), ("::1", True), ("10.0.0.7", False), ("0.0.0.0", False), ("name", False)):
        assert came_over_loopback(Request({"type": "http", "headers": [], "server": (host, 80)})) is is_open
    closed = start_bridge(tmp_path, prefect_api, open_metrics=False)
    try:
        assert httpx.get(f"{closed.service.url}/metrics").status_code == 401
        assert httpx.get(f"{closed.service.url}/metrics", headers=WITH_TOKEN).status_code == 200
        assert httpx.get(f"{closed.service.url}/health").status_code == 200
    finally:
        closed.stop()


def test_bodies_that_are_no_storage_event_are_refused_with_the_reason(bridge: Any, log: Path) -> None:
    before = refusals(bridge, "unknown_body")
    bodies = (b"", b"\xff\xfe", b"[" * 5000, b'{"a": 1}', b"[]", b'{"Records": [{"eventName": "ObjectCreated:Put"}]}')
    for body in bodies:
        answer = post(bridge, body)
        assert answer.status_code == 400
        assert "not a storage event" in answer.json()["detail"]
    assert refusals(bridge, "unknown_body") == before + len(bodies)
    assert log.read_text().count("refused POST '/s3' from 127.0.0.1: not a storage event") == len(bodies)


def test_a_body_above_the_limit_is_refused_and_read_no_further(bridge: Any, log: Path) -> None:
    assert post(bridge, b" " * (2 * 2**20 + 1)).status_code == 413
    told = b"refused POST '/s3' from 127.0.0.1: the body is larger than 2097152 bytes"
    assert (refusals(bridge, "too_large"), log.read_bytes().count(told)) == (1, 1)
    sent = []

    def endless() -> Iterator[bytes]:
        while len(sent) < 2000:  # 125 MiB, without a length in front of it
            sent.append(0)
            yield b" " * 2**16

    with suppress(httpx.WriteError):  # the connection may be closed while the rest is being sent
        answer = httpx.post(f"{bridge.service.url}/s3", content=endless(), headers=WITH_TOKEN, timeout=20)
        assert answer.status_code == 413
    assert refusals(bridge, "too_large") == 2
    assert len(sent) < 1000, "the bridge went on reading"


def test_a_batch_sealed_while_prefect_is_away_is_kept_over_a_restart(
    tmp_path: Path, prefect_api: str, start_bridge: StartBridge, sealed_events: Sealed
) -> None:
    away = f"http://127.0.0.1:{services.free_ports(1)[0]}/api"
    first = start_bridge(tmp_path, away)
    try:
        for batch in ("b1", "b2", "b3"):
            assert post(first, record(f"incoming/patient/{batch}/annotations.json")).status_code == 202
        time.sleep(2.5)  # several attempts
        assert health(first) == {"status": "degraded", "pending": 3, "prefect": "away", "dead_letters": 0}
        assert "tirewatch_bridge_prefect_up 0" in metrics(first)
        [overdue] = [
            line for line in metrics(first).splitlines() if line.startswith("tirewatch_bridge_overdue_seconds")
        ]
        assert float(overdue.split()[1]) > 2
        assert (tmp_path / "bridge.log").read_text().count("does not answer") == 1
    finally:
        first.process.kill()  # no chance to write anything any more
        first.process.wait()
    second = start_bridge(tmp_path, prefect_api)
    try:
        events = sealed_events("patient", count=3)
        assert sorted(event["payload"]["batch"] for event in events) == ["b1", "b2", "b3"]
        assert health(second) == {"status": "ok", "pending": 0, "prefect": "ok", "dead_letters": 0}
    finally:
        second.stop()


def test_a_proxy_of_the_network_does_not_stand_between_services_of_one_machine(
    tmp_path: Path,
    prefect_api: str,
    start_bridge: StartBridge,
    sealed_events: Sealed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("no_proxy", "intranet")
    running = start_bridge(tmp_path, prefect_api)
    try:
        with httpx.Client(trust_env=False, headers=WITH_TOKEN) as client:
            sent = client.post(f"{running.service.url}/s3", json=record("incoming/proxied/b1/_SUCCESS"))
        assert sent.status_code == 200
    finally:
        running.stop()
    monkeypatch.undo()
    assert [event["payload"]["batch"] for event in sealed_events("proxied")] == ["b1"]


def test_prefect_that_comes_back_is_told_without_a_restart(
    tmp_path: Path, prefect_api: str, start_bridge: StartBridge, sealed_events: Sealed, gateway: Callable[[str], Any]
) -> None:
    between = gateway(prefect_api.removesuffix("/api"))
    between.before = lambda path, headers: False
    running = start_bridge(tmp_path, f"{between.url}/api")
    try:
        assert post(running, record("incoming/back/b1/_SUCCESS")).status_code == 202
        between.before = lambda path, headers: True
        assert len(sealed_events("back")) == 1
        log = (tmp_path / "bridge.log").read_text()
        assert log.count("does not answer") == log.count("answers again") == 1
    finally:
        running.stop()


@pytest.mark.parametrize("page", [b'{"detail": "please log in"}', b"<html>please log in", b"[]"])
def test_a_login_page_in_front_of_prefect_is_an_outage_that_is_named_and_ends(
    tmp_path: Path,
    prefect_api: str,
    start_bridge: StartBridge,
    sealed_events: Sealed,
    gateway: Callable[[str], Any],
    page: bytes,
) -> None:
    dataset = f"login-{len(page)}"
    between = gateway(prefect_api.removesuffix("/api"))
    between.after = lambda path, headers: path != "/api/events"  # the event arrives, its answer does not
    first = start_bridge(tmp_path, f"{between.url}/api")
    try:
        assert post(first, record(f"incoming/{dataset}/b1/_SUCCESS")).status_code == 202
    finally:
        first.stop()
    between.instead = lambda path: page
    second = start_bridge(tmp_path, f"{between.url}/api")
    try:
        until(lambda: counted(second, "publish_failures_total") >= 2)
        assert f"/api/events/filter answers {page.decode()!r}" in (tmp_path / "bridge.log").read_text()
        assert health(second)["status"] == "degraded"
        between.after, between.instead = (lambda path, headers: True), (lambda path: None)
        until(lambda: health(second)["pending"] == 0)
        assert len(sealed_events(dataset)) == 1
    finally:
        second.stop()


def until(holds: Callable[[], bool], within: float = 15) -> None:
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline, f"it did not come within {within} s"
        time.sleep(0.1)


def test_publishing_goes_on_after_any_error_and_health_says_503_once_it_has_ended(
    tmp_path: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = {"token": TOKEN, "prefect_api_url": prefect_api, "state": tmp_path / "bridge.db"}
    app = create_app(BridgeSettings.model_validate(chosen))
    with TestClient(app) as client:
        bridge = app.state.bridge

        def nobody_thought_of() -> None:
            raise RuntimeError("nobody thought of it")

        monkeypatch.setattr(bridge.pending, "settle", nobody_thought_of)
        until(lambda: "nobody thought of it" in caplog.text)
        assert client.get("/health").json() == {"status": "ok", "pending": 0, "prefect": "ok", "dead_letters": 0}
        assert client.portal is not None
        client.portal.call(bridge._publishing.cancel)
        until(lambda: client.get("/health").status_code == 503)
        assert client.get("/health").json() == {"status": "stopped", "pending": 0}


def test_the_labels_of_a_counter_are_bounded() -> None:
    counted = Metrics()
    for number in range(1000):
        counted.count("objects", f"d{number}")
    text = counted.text({"pending": 3})
    assert text.count("tirewatch_bridge_objects_total{") == 101
    assert 'tirewatch_bridge_objects_total{dataset="other"} 900' in text
    assert "tirewatch_bridge_pending 3\n" in text
    with pytest.raises(KeyError):
        counted.count("nothing_known")


def test_the_documentation_names_every_setting_and_every_metric() -> None:
    from bridge.metrics import COUNTERS, GAUGES
    from bridge.settings import BridgeSettings

    docs = Path(__file__).parents[1] / "docs"
    settings, events = (docs / "settings.md").read_text(), (docs / "events.md").read_text()
    for name, field in BridgeSettings.model_fields.items():
        assert f"`TIREWATCH_BRIDGE_{name.upper()}`" in settings
        assert str(field.description) in settings, f"the meaning of {name} differs"
    for name in (*(f"{family}_total" for family in COUNTERS), *GAUGES):
        assert f"`{name}`" in events, name
