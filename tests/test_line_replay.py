"""The whole line behind a transport that shuffles, repeats and loses, on a real stack: whatever happens to the events, the
dataset and the registry end as if nothing had. Minutes, so marked slow.
"""

import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import httpx
import psutil
import pytest

from bridge.s3_events import read
from deploy import local
from deploy.recipes import read_prefect_yaml
from deploy.stack import SOURCE, Stack
from deploy.supervisor import Supervisor
from flows.ingest import IngestOptions
from flows.settings import Settings
from tasks.batch import content_of
from tasks.claims import read_verdict, version_subject
from tasks.dataset import Record, digest_of, newest_record, open_rows
from tasks.ledger import read_ledger
from tasks.registry import newest_registration
from tasks.sources import digit_folders
from tasks.storage import ensure_bucket, write, write_many

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
BATCHES = [f"b{number:02d}" for number in range(20)]
PER_BATCH = 60
UNTOLD, MARKER_LOST, WHILE_INGESTING = "b07", "b03", "b19"
AT_ONCE = {"options": {"grace_minutes": 0, "quiet_minutes": 0}}


class Transport:
    """Stands where the store believes the bridge to be, and keeps what it is told."""

    def __init__(self) -> None:
        self._bodies: list[bytes] = []
        transport = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                transport._bodies.append(body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        Thread(target=self._server.serve_forever, daemon=True).start()

    def events(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Key -> what the store told about its object; waits until it has told all of them."""
        wanted, deadline = set(keys), time.monotonic() + 120
        while True:
            found = {created.key: body for body in list(self._bodies) for created in read(body)}
            if wanted <= found.keys():
                return {key: found[key] for key in keys}
            assert time.monotonic() < deadline, f"the store has not told of {sorted(wanted - found.keys())[:5]}"
            time.sleep(0.5)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Line:
    """The stack, its settings, the transport before its bridge, and the photographs of each batch."""

    stack: Stack
    here: Settings
    transport: Transport
    batches: dict[str, dict[str, bytes]]
    sent: int = 0

    def __post_init__(self) -> None:
        self.prefect = httpx.Client(base_url=f"{self.stack.prefect_url}/api", timeout=60)
        self._bridge = httpx.Client(
            headers={"Authorization": f"Bearer {self.stack.secrets['bridge_token']}"}, timeout=30
        )
        self._lock = Lock()

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """The answer of Prefect's API. SQLite under load answers 503, which Prefect's own client tries again as well."""
        for _ in range(20):
            answer = self.prefect.request(method, path, json=body)
            if answer.status_code != 503:
                break
            time.sleep(2)
        return answer.raise_for_status().json() if answer.content else answer.raise_for_status()

    def upload(self, batch: str) -> dict[str, bytes]:
        """The batch, sealed by its marker, and what the store told about it: key -> event."""
        prefix = f"incoming/digits/{batch}/"
        write_many(self.here.store, ((prefix + name, data) for name, data in self.batches[batch].items()))
        write(self.here.store, f"{prefix}_SUCCESS", b"")
        return self.transport.events([*(prefix + name for name in self.batches[batch]), f"{prefix}_SUCCESS"])

    def tell(self, event: bytes) -> None:
        """Hands an event to the bridge and, like every store, tries again where it was not taken."""
        url, deadline = f"http://127.0.0.1:{self.stack.ports['bridge']}/s3", time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                answer = self._bridge.post(url, content=event)
            except httpx.TransportError:
                time.sleep(0.2)
                continue
            assert answer.status_code in (200, 202), answer.text
            with self._lock:
                self.sent += 1
            return
        raise AssertionError("the bridge did not come back")

    def kill_bridge(self) -> None:
        killed = psutil.Process(Supervisor(self.stack).programs()["bridge"].pid)
        killed.kill()
        killed.wait(10)

    def deployment(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/deployments/name/{name}")
        return found

    def follow(self, deployment: str, enabled: bool) -> None:
        """Lets events start the deployment, or not: then they are lost on it."""
        [automation] = [
            each
            for each in self.ask("POST", "/automations/filter", {"limit": 200})
            if each["name"].endswith(f" starts {deployment}")
        ]
        self.ask("PATCH", f"/automations/{automation['id']}", {"enabled": enabled})

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        wanted = {"id": {"any_": [self.deployment(deployment)["id"]]}}
        found: list[dict[str, Any]] = self.ask("POST", "/flow_runs/filter", {"deployments": wanted, "limit": 200})
        return found

    def finished(self, deployment: str, at_least: int, within: float = 600) -> list[dict[str, Any]]:
        """The runs of the deployment, once there are that many and all have ended."""
        deadline = time.monotonic() + within
        while True:
            found = self.runs(deployment)
            if len(found) >= at_least and all(run["state_type"] in ENDED for run in found):
                return found
            states = Counter(run["state_name"] for run in found)
            assert time.monotonic() < deadline, f"{deployment} after {within:.0f} s: {dict(states)}"
            time.sleep(1)

    def settled(self, deployment: str, within: float = 900) -> list[dict[str, Any]]:
        """The runs of the deployment, once all have ended and no other was made for a while."""
        deadline, known, since = time.monotonic() + within, -1, time.monotonic()
        while time.monotonic() < deadline:
            found = self.runs(deployment)
            if len(found) != known or any(run["state_type"] not in ENDED for run in found):
                known, since = len(found), time.monotonic()
            if time.monotonic() > since + 15:
                return found
            time.sleep(1)
        raise AssertionError(
            f"{deployment} after {within:.0f} s: {Counter(run['state_name'] for run in self.runs(deployment))}"
        )

    def doubled(self, deployment: str) -> Counter[str]:
        """How the runs of the deployment ended, once the doubled events have made theirs."""
        eventually(lambda: len(self.runs(deployment)) > 1, 300, f"a doubled event starts {deployment}")
        return Counter(run["state_name"] for run in self.settled(deployment))

    def after_sweep(self, deployment: str, undecided: str) -> list[dict[str, Any]]:
        """The runs of the deployment after a sweep has found the subject undecided. A sweep whose event Prefect lost is
        followed by another, as on the schedule.
        """
        for _ in range(5):
            assert undecided in self.sweep()["message"]
            if found := self.settled(deployment):
                return found
        raise AssertionError(f"no sweep made {deployment} run")

    def sweep(self) -> dict[str, Any]:
        """A run of the deployed sweep for which nothing is too young; its last state."""
        before = len(self.runs("sweep/line"))
        path = f"/deployments/{self.deployment('sweep/line')['id']}/create_flow_run"
        self.ask("POST", path, {"parameters": AT_ONCE, "idempotency_key": f"sweep {before}"})
        last = max(self.finished("sweep/line", before + 1, 180), key=lambda run: run["start_time"])
        found: dict[str, Any] = last["state"]
        return found

    def repeat(self, event: str, resource: str, payload: dict[str, Any], times: int) -> None:
        """The event again under ids that Prefect has never seen: as after the half hour for which it remembers them."""
        for _ in range(times):
            identity = f"00000000-0000-4000-8000-{random.getrandbits(47):012x}"
            body = {"id": identity, "occurred": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event}
            told = {**body, "resource": {"prefect.resource.id": resource}, "payload": payload}
            self.ask("POST", "/events", [told])

    def record(self) -> Record:
        found = newest_record(self.here.store, "digits")
        assert found is not None
        return found


ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def eventually(true: Callable[[], object], within: float, what: str) -> None:
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline, f"not true within {within:.0f} s: {what}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    """A whole stack whose store tells its events to the transport; only ingest follows events at first."""
    scans = sorted(digit_folders(tmp_path_factory.mktemp("scans")).rglob("*.png"), key=lambda path: path.name)
    shares = {
        batch: {f"{path.parent.name}/{path.name}": path.read_bytes() for path in scans[first : first + PER_BATCH]}
        for batch, first in zip(BATCHES, range(0, len(scans), PER_BATCH), strict=False)
    }
    state, transport = tmp_path_factory.mktemp("line") / "state", Transport()
    with pytest.MonkeyPatch.context() as patch:
        tells_the_bridge = local._write_notification

        def tells_the_transport(stack: Stack) -> None:
            tells_the_bridge(replace(stack, ports={**stack.ports, "bridge": transport.port}))

        patch.setattr(local, "_write_notification", tells_the_transport)
        for name in [name for name in os.environ if name.startswith(("PREFECT_", "TIREWATCH_"))]:
            patch.delenv(name)
        try:
            stack = local.up(state, lambda name, seconds, url: None, without=["watchdog"])
            for name, value in stack.environment().items():
                patch.setenv(name, value)
            made = Line(stack, Settings(), transport, shares)
            sweep = made.deployment("sweep/line")
            for schedule in sweep["schedules"]:  # the test says when
                made.ask("DELETE", f"/deployments/{sweep['id']}/schedules/{schedule['id']}")
            for deployment in ("train/digits", "promote/digits"):
                made.follow(deployment, enabled=False)
            # Two at a time: they also race for the number of the next version.
            identity = made.deployment("ingest/digits")["id"]
            made.ask("PATCH", f"/deployments/{identity}", {"concurrency_limit": 2})
            yield made
        finally:
            if (state / "stack.json").exists():
                local.down(state)
            transport.stop()


def undisturbed(line: Line, ingested: Callable[..., Any]) -> Record:
    """The same batches in their order, one after the other, in a bucket of their own."""
    here = replace(line.here.store, bucket="undisturbed")
    ensure_bucket(here)
    options = next(
        IngestOptions(**each["parameters"]["options"])
        for each in read_prefect_yaml(SOURCE / "prefect.yaml")["deployments"]
        if each["entrypoint"] == "flows.ingest.ingest" and each["name"] == "digits"
    )
    for batch, files in line.batches.items():
        ingested(here, "digits", batch, files, options)
    found = newest_record(here, "digits")
    assert found is not None
    return found


def test_twenty_batches_told_three_times_shuffled_and_one_in_ten_not_at_all_end_as_if_undisturbed(
    line: Line, ingested: Callable[..., Any]
) -> None:
    chance = random.Random(20)
    told = {key: event for batch in BATCHES if batch != WHILE_INGESTING for key, event in line.upload(batch).items()}
    lost = {key for key in told if f"/{UNTOLD}/" in key} | {f"incoming/digits/{MARKER_LOST}/_SUCCESS"}
    markers = {key for key in told if key.endswith("_SUCCESS")}
    lost |= set(chance.sample(sorted(told.keys() - lost - markers), len(told) // 10 - len(lost)))
    events = [event for key, event in told.items() if key not in lost for _ in range(3)]
    chance.shuffle(events)

    with ThreadPoolExecutor(4) as pool:
        sending = [pool.submit(line.tell, event) for event in events]
        for share in (1 / 3, 2 / 3):
            eventually(lambda share=share: line.sent >= share * len(events), 180, f"{share:.0%} of the events are sent")
            line.kill_bridge()
        for each in sending:
            each.result()
    assert line.sent == len(events)

    eventually(
        lambda: any(run["state_type"] == "RUNNING" for run in line.runs("ingest/digits")), 120, "a run is at work"
    )
    at_work = [run["id"] for run in line.runs("ingest/digits") if run["state_type"] == "RUNNING"]
    for event in line.upload(WHILE_INGESTING).values():
        line.tell(event)
    assert at_work, "no batch was being ingested when the next was uploaded"
    for batch in ("b00", "b01", WHILE_INGESTING):
        payload = {"dataset": "digits", "batch": batch, "prefix": f"incoming/digits/{batch}/"}
        line.repeat("tirewatch.batch.sealed", "tirewatch.dataset.digits", payload, 1)
    line.settled("ingest/digits")
    assert UNTOLD not in line.record().batches

    # What Prefect itself lost is found as well: an action that its database refuses ("locked") is never repeated.
    state = line.sweep()
    assert state["name"] == "Repeated" and f"incoming/digits/{UNTOLD}/" in state["message"]
    for _ in range(5):
        runs = line.settled("ingest/digits")
        if line.sweep()["name"] == "NothingLost":
            break

    outcomes = defaultdict(list)
    for run in runs:
        outcomes[run["parameters"]["prefix"].split("/")[2]].append(run["state_name"])
    assert sorted(outcomes) == BATCHES
    assert {batch: Counter(names)["Completed"] for batch, names in outcomes.items()} == dict.fromkeys(BATCHES, 1)
    assert {name for names in outcomes.values() for name in names} == {"Completed", "Unchanged"}

    expected, found = undisturbed(line, ingested), line.record()
    assert (found.version.version, expected.version.version) == (20, 20)
    contents = {name: batch["content"] for name, batch in found.batches.items()}
    assert contents == {name: batch["content"] for name, batch in expected.batches.items()}
    for batch in BATCHES:
        assert contents[batch] == content_of(line.here.store, "digits", f"incoming/digits/{batch}/")
    assert found.version.digest == expected.version.digest
    rows = open_rows(line.here.store, found).to_table(columns=["sha256", "label", "split"])
    assert digest_of(rows) == found.version.digest and rows.num_rows == 20 * PER_BATCH


def test_the_versions_whose_event_was_lost_are_trained_and_proven_once_and_doubled_events_change_nothing(
    line: Line,
) -> None:
    """Nobody followed the twenty events of the test before, so all of them are lost on training, and its own on promotion."""
    store = line.here.store
    if newest_record(store, "digits") is None:  # this test by itself
        for batch in BATCHES:
            for event in line.upload(batch).values():
                line.tell(event)
        line.finished("ingest/digits", len(BATCHES))
    version = line.record().version
    assert line.runs("train/digits") == []
    line.follow("train/digits", enabled=True)
    line.after_sweep("train/digits", f"train/digits has not decided about digits v{version.version}")
    created = {"dataset": "digits", "version": version.version, "digest": version.digest}
    line.repeat("tirewatch.dataset.version.created", "tirewatch.dataset.digits", created, 2)

    assert line.runs("promote/digits") == []
    line.follow("promote/digits", enabled=True)
    registered = {"model": "digits", "version": 1, "dataset": "digits", "dataset_version": version.version}
    line.after_sweep("promote/digits", "promote/digits has not decided about digits v1")
    line.repeat("tirewatch.model.registered", "tirewatch.model.digits", registered, 2)

    trained, proven = (line.doubled(deployment) for deployment in ("train/digits", "promote/digits"))
    assert trained["Completed"] == 1 and trained.keys() == {"Completed", "Unchanged"}, trained
    assert proven["Promoted"] + proven["Refused"] == 1 and len(proven) == 2 and proven["Unchanged"], proven
    newest = newest_registration(line.here.mlflow_tracking_uri, "digits")
    assert newest is not None and newest.version == 1
    trained_verdict = read_verdict(store, version_subject("train/digits", "digits", version.version))
    assert trained_verdict is not None and trained_verdict.outcome == "registered"
    verdict = read_verdict(store, version_subject("promote/digits", "digits", 1))
    assert verdict is not None and verdict.outcome == ("promoted" if proven["Promoted"] else "refused")
    assert len(read_ledger(store, "digits")) == proven["Promoted"]
    assert line.sweep()["name"] == "NothingLost"
