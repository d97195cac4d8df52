"""What the bridge promises, against a real Prefect server: whatever happens to events, a sealing arrives exactly once."""

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import httpx
import pytest

WITH_TOKEN = {"Authorization": "Bearer a-token-for-the-tests"}
BATCHES = [f"b{number:02d}" for number in range(20)]

Sealed = Callable[..., list[dict[str, Any]]]
Start = Callable[..., Any]


def told(key: str, number: int) -> dict[str, Any]:
    """The creation of one object as one of four senders tells it; the store wrote object after object."""
    written = f"2026-11-21T07:{number // 60:02d}:{number % 60:02d}Z"
    record = {
        "eventName": ("s3:" if number % 4 == 1 else "") + "ObjectCreated:Put",  # MinIO writes the prefix
        "eventTime": written,
        "s3": {"bucket": {"name": "tirewatch"}, "object": {"key": key, "size": 4, "eTag": f"e{number}"}},
    }
    if number % 4 == 2:
        found = {"key": key, "size": 4, "etag": f"e{number}"}
        return {
            "detail-type": "Object Created",
            "time": written,
            "detail": {"bucket": {"name": "tirewatch"}, "object": found},
        }
    if number % 4 == 3:
        return {"Type": "Notification", "MessageId": str(number), "Message": json.dumps({"Records": [record]})}
    return {"Records": [record]}


class Sender:
    """A store that posts events and, like all of them, tries again what was not taken."""

    def __init__(self, bridge: Any) -> None:
        self.bridge = bridge
        self.sent = 0
        self._lock = Lock()

    def send(self, event: dict[str, Any]) -> None:
        for _ in range(600):
            try:
                answer = httpx.post(f"{self.bridge.service.url}/s3", json=event, headers=WITH_TOKEN, timeout=20)
            except httpx.TransportError:
                time.sleep(0.1)
                continue
            assert answer.status_code in (200, 202), answer.text
            with self._lock:
                self.sent += 1
            return
        raise AssertionError("the bridge did not come back")


def counts(events: Sequence[dict[str, Any]]) -> Counter[str]:
    return Counter(event["payload"]["batch"] for event in events)


@pytest.mark.slow
def test_twenty_batches_told_three_times_in_any_order_and_one_in_ten_not_at_all_are_sealed_once_each(
    tmp_path: Path, prefect_api: str, start_bridge: Start, sealed_events: Sealed
) -> None:
    chance = random.Random(20)
    keys = [f"incoming/replay/{batch}/{name}" for batch in BATCHES for name in (*"abcde", "_SUCCESS")]
    survived = [(key, told(key, number)) for number, key in enumerate(keys) if chance.random() >= 0.1]
    marked = {key.split("/")[2] for key, _ in survived if key.endswith("_SUCCESS")}
    unmarked = {key.split("/")[2] for key, _ in survived} - marked
    assert unmarked and len(survived) < 0.95 * len(keys), "nothing was lost: choose another seed"
    events = [event for _, event in survived for _ in range(3)]
    chance.shuffle(events)

    running = start_bridge(tmp_path, prefect_api, quiet_seconds=3600)
    sender = Sender(running)
    try:
        with ThreadPoolExecutor(4) as pool:
            sending = [pool.submit(sender.send, event) for event in events]
            for share in (1 / 3, 2 / 3):
                while sender.sent < share * len(events):
                    time.sleep(0.01)
                sender.bridge.process.send_signal(signal.SIGKILL)
                sender.bridge.process.wait()
                sender.bridge = start_bridge(tmp_path, prefect_api, quiet_seconds=3600)
            for each in sending:
                each.result()
        assert sender.sent == len(events)
        assert counts(sealed_events("replay", count=len(marked))) == dict.fromkeys(marked, 1)
        assert httpx.get(f"{sender.bridge.service.url}/health").json()["pending"] == len(unmarked)
        time.sleep(1.5)  # what came in the last second is written down

        sender.bridge.process.kill()
        sender.bridge.process.wait()
        sender.bridge = start_bridge(tmp_path, prefect_api, quiet_seconds=1)
        everything = dict.fromkeys(marked | unmarked, 1)
        assert counts(sealed_events("replay", count=len(everything))) == everything

        chance.shuffle(events)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(sender.send, events))
        time.sleep(4)  # longer than the quiet period
        assert counts(sealed_events("replay", count=len(everything))) == everything
        assert httpx.get(f"{sender.bridge.service.url}/health").json()["pending"] == 0
    finally:
        sender.bridge.stop()


@pytest.mark.parametrize("arrived", [True, False], ids=["event arrived", "event did not arrive"])
def test_an_event_whose_answer_was_lost_is_looked_for_before_it_is_posted_again(
    tmp_path: Path,
    prefect_api: str,
    start_bridge: Start,
    sealed_events: Sealed,
    gateway: Callable[[str], Any],
    arrived: bool,
) -> None:
    """Prefect recognises a repeated id for half an hour only; after that a second post would be a second event."""
    between, posts, dataset = gateway(prefect_api.removesuffix("/api")), [], f"lost-answer-{arrived}".lower()

    def cut(path: str, headers: Any) -> bool:
        if path.endswith("/events"):
            posts.append(path)
        return not path.endswith("/events")

    if arrived:
        between.after = cut
    else:
        between.before = cut
    event = told(f"incoming/{dataset}/b1/_SUCCESS", 0)
    first = start_bridge(tmp_path, f"{between.url}/api")
    answer = httpx.post(f"{first.service.url}/s3", json=event, headers=WITH_TOKEN, timeout=20)
    first.process.kill()
    first.process.wait()
    assert answer.status_code == 202
    if arrived:
        assert len(sealed_events(dataset)) == 1
    before = len(posts)
    between.before = lambda path, headers: posts.append(path) or True
    between.after = lambda path, headers: True
    second = start_bridge(tmp_path, f"{between.url}/api")
    try:
        assert len(sealed_events(dataset)) == 1
        deadline = time.monotonic() + 10
        while httpx.get(f"{second.service.url}/health").json()["pending"] and time.monotonic() < deadline:
            time.sleep(0.1)
        asked = posts[before:]
        assert asked == (["/api/events/filter"] if arrived else ["/api/events/filter", "/api/events"])
        assert httpx.post(f"{second.service.url}/s3", json=event, headers=WITH_TOKEN).status_code == 200
        assert posts[before:] == asked
    finally:
        second.stop()
