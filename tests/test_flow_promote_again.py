"""Promotions that meet others or come again: what was proven holds only for what it was compared with, and no decision is
undone by a repeated event. All services are real ones.
"""

import contextvars
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from flows import promote as flow
from flows.promote import promote
from tasks import registry
from tasks.approval import Approval, answer, open_requests
from tasks.claims import claimant, read_verdict, version_subject
from tasks.events import EventRefused, emit
from tasks.gates import Limits
from tasks.ledger import breaks, read_ledger
from tasks.rollback import roll_back
from tasks.routing import read_routing
from tasks.serving import infer_front_door

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
MODEL = "coins"
LIMITS = Limits(min_accuracy=0.6, min_test_images=50, max_p99_ms=5000, must_beat_champion=False)
NOT_TO_HOLD = LIMITS.model_copy(update={"min_test_images": 10_000})


@pytest.fixture(scope="module")
def here(stack_settings, register_prints):
    """Five registered versions; the first has been replaced by the second."""
    register_prints(MODEL, versions=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.promote.settings", lambda: stack_settings)
        for version in (1, 2):
            state = promote(MODEL, version, LIMITS, return_state=True)
            assert state.name == "Promoted", state.message
        yield stack_settings


def by_event(version: int) -> Any:
    """The state of a run that an event started."""
    return promote(MODEL, version, LIMITS, occasion="an event", return_state=True)


def subject(version: int):
    return version_subject("promote/by-hand", MODEL, version)


def withdrawn(here, why: str) -> None:
    roll_back(here.serving_root, here.triton, here.store, here.mlflow_tracking_uri, MODEL, "user/anna", why)


def staged(here) -> list[str]:
    return [path.name for path in (here.serving_root / "staging").glob(f"{MODEL}*")]


def test_a_version_that_was_proven_against_another_champion_is_proven_anew_against_the_one_that_answers(
    here, monkeypatch
):
    from tasks import proof

    gather = proof.gather

    def while_somebody_rolls_back(*arguments: Any) -> proof.Proof:
        found = gather(*arguments)
        withdrawn(here, "rejects every second coin")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(proof, "gather", while_somebody_rolls_back)
        state = by_event(3)
    assert state.name == "Outdated" and "v3 was compared with v2, and v1 came meanwhile" in state.message
    assert read_routing(here.serving_root, MODEL).champion.version == 1 and staged(here) == []
    assert read_verdict(here.store, subject(3)) is None and claimant(here.store, subject(3)) is None
    client = registry.client_of(here.mlflow_tracking_uri)
    assert client.get_model_version(MODEL, "3").tags["promotion"] == "refused"
    assert by_event(3).name == "Promoted"
    table = read_routing(here.serving_root, MODEL)
    assert (table.champion.version, table.previous.version) == (3, 1)
    assert breaks(read_ledger(here.store, MODEL)) == []


def test_a_version_that_was_rolled_back_is_not_brought_back_by_the_event_of_a_run_that_died_after_its_switch(
    here, monkeypatch
):
    def dies(*_: Any) -> None:
        raise RuntimeError("the process is gone")

    with monkeypatch.context() as patch:
        patch.setattr(flow, "decided", dies)
        assert by_event(4).is_failed()
    assert read_routing(here.serving_root, MODEL).champion.version == 4
    assert read_verdict(here.store, subject(4)) is None
    withdrawn(here, "rejects every old coin")
    state = by_event(4)
    assert state.name == "Unchanged" and "rolled-back to v3 by user/anna, 'rejects every old coin'" in state.message
    assert read_verdict(here.store, subject(4)).outcome == "promoted"
    assert read_routing(here.serving_root, MODEL).champion.version == 3
    assert promote(MODEL, 4, LIMITS, return_state=True).name == "Promoted", "by hand somebody means it"


def test_a_refusal_is_told_before_it_is_decided_and_told_again_when_nobody_took_it(here, monkeypatch):
    """A Prefect server that is away for one call; the run itself needs it, so it cannot be stopped here."""
    calls: list[bool] = []

    def away_at_first(*arguments: Any, **how: Any) -> Any:
        calls.append(read_verdict(here.store, subject(5)) is None)
        if len(calls) == 1:
            raise EventRefused("the Prefect API did not take it")
        return emit(*arguments, **how)

    monkeypatch.setattr(flow, "emit", away_at_first)
    state = promote(MODEL, 5, NOT_TO_HOLD, return_state=True)
    assert state.name == "Refused" and calls == [True, True]
    assert read_verdict(here.store, subject(5)).outcome == "refused"


def test_a_run_that_waits_for_a_person_keeps_what_it_staged_while_the_same_version_is_promoted_by_hand(here, prints):
    others: list[Any] = []

    def meanwhile() -> None:
        while not (waiting := open_requests(here.store, MODEL)):
            time.sleep(0.2)
        others.append(promote(MODEL, 5, NOT_TO_HOLD, return_state=True))
        answer(waiting[0], "approve", "anna", "it is fine")

    beside(meanwhile)
    state = promote(MODEL, 5, LIMITS, approval=Approval(minutes=5), return_state=True)
    assert [other.name for other in others] == ["Refused"]
    assert state.name == "Promoted", state.message
    assert infer_front_door(here.triton, MODEL, prints.encoded["test"][0]).model_version == 5
    assert staged(here) == []


def beside(act: Callable[[], None]) -> None:
    """In a thread that knows the same Prefect server."""
    threading.Thread(target=contextvars.copy_context().run, args=(act,)).start()
