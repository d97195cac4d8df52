"""tasks/events.py against a real Prefect server."""

import time
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.events import EventRefused, emit, event_id

ABOUT = ("tirewatch.dataset.version.created", "tirewatch.dataset.test-events")


def received(resource: str, at_least: int) -> list[dict[str, Any]]:
    """Events about the resource, once that many have arrived (they pass a queue)."""
    wanted = {"filter": {"resource": {"id": [resource]}}}
    for _ in range(100):
        with get_client(sync_client=True) as client:
            events: list[dict[str, Any]] = client.request("POST", "/events/filter", json=wanted).json()["events"]
        if len(events) >= at_least:
            return events
        time.sleep(0.1)
    return events


@pytest.mark.usefixtures("prefect_server")
def test_an_event_arrives_with_its_resource_and_payload() -> None:
    payload = {"dataset": "tire", "version": 3, "digest": "sha256:aa"}
    identity = emit(ABOUT[0], "tirewatch.dataset.arrives", payload)
    (event,) = received("tirewatch.dataset.arrives", 1)
    assert (event["id"], event["event"], event["payload"]) == (str(identity), ABOUT[0], payload)


@pytest.mark.usefixtures("prefect_server")
def test_the_same_event_sent_again_is_one_event_and_another_occasion_is_another() -> None:
    for _ in range(3):
        emit(ABOUT[0], "tirewatch.dataset.twice", {"version": 1})
    emit(ABOUT[0], "tirewatch.dataset.twice", {"version": 1}, occasion="another time")
    emit(ABOUT[0], "tirewatch.dataset.twice", {"version": 2})
    events = received("tirewatch.dataset.twice", 3)
    time.sleep(0.5)  # for a fourth that must not come
    assert len({event["id"] for event in events}) == len(received("tirewatch.dataset.twice", 3)) == 3


@pytest.mark.usefixtures("prefect_server")
def test_a_flow_has_sent_its_event_when_it_ends() -> None:
    @flow
    def says() -> str:
        return str(emit(ABOUT[0], "tirewatch.dataset.in-flow", {"version": 1}))

    assert says() == received("tirewatch.dataset.in-flow", 1)[0]["id"]


def test_the_id_follows_the_meaning_and_not_the_order_of_the_payload() -> None:
    assert event_id(*ABOUT, {"a": 1, "b": 2}) == event_id(*ABOUT, {"b": 2, "a": 1})
    assert event_id(*ABOUT, {"a": 1}) != event_id(*ABOUT, {"a": 2})


@pytest.mark.usefixtures("prefect_server")
def test_an_event_the_server_will_not_have_is_an_error() -> None:
    with pytest.raises(EventRefused, match="did not take"):
        emit("", "", {"version": 1, "of": ABOUT[1]})


def test_an_unreachable_server_is_an_error() -> None:
    from deploy.services import free_ports

    with (
        temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_ports(1)[0]}/api"}),
        pytest.raises(
            EventRefused, match=r"did not take tirewatch\.dataset\.version\.created for tirewatch\.dataset\.x"
        ),
    ):
        emit(ABOUT[0], "tirewatch.dataset.x", {"version": 1})
