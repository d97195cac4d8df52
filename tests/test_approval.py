"""A run waits for a person: suspended where a worker can start it again, else in its process. Real Prefect server and S3."""

import os
import subprocess
import sys
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from tasks.approval import Answer, Approval, Request, answer, ask, expire, judged, open_requests, wait_for_answer
from tasks.storage import Store

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def model() -> str:
    return f"m{uuid.uuid4().hex[:8]}"


@flow(name="wait by hand")
def by_hand(store: Store, model: str, approval: Approval) -> str:
    request = ask(store, model, 7, str(flow_run.get_id()), approval, 3)
    gate = judged(store, request, wait_for_answer(request, "| gate | held |"), 3)
    return f"{gate.held}: {gate.measured}"


def when_asked(store: Store, model: str, act) -> threading.Thread:
    """`act(request)` as soon as the run waits."""

    def run() -> None:
        for _ in range(200):
            if found := open_requests(store, model):
                act(found[0])
                return
            time.sleep(0.1)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_run_by_hand_waits_in_its_process_and_goes_on_with_the_answer(store, model):
    thread = when_asked(store, model, lambda asked: answer(asked, "approve", "anna", "the misses are scratches"))
    assert by_hand(store, model, Approval(minutes=1, who=("anna", "ben"))) == (
        "True: approved by anna: the misses are scratches"
    )
    thread.join()
    assert open_requests(store, model) == []


def test_nobody_answering_in_time_is_a_refusal_and_not_a_failed_run(store, model):
    state = by_hand(store, model, Approval(minutes=0.05), return_state=True)
    assert state.is_completed() and state.result() == "False: rejected by time-out: nobody decided within 0.05 minutes"


def request(model, **changes) -> Request:
    facts = {"run": "no-run", "asked_at": "2026-03-01T12:00:00+00:00", "minutes": 60.0, "who": ("anna",), "champion": 3}
    return Request(model, 7, **{**facts, **changes})


@pytest.mark.parametrize(
    ("found", "champion", "held", "measured"),
    [
        (("approve", "anna", "good"), 3, True, "approved by anna: good"),
        (("approve", " anna ", "good"), 3, True, "approved by anna: good"),
        (("reject", "anna", "the light was odd"), 3, False, "rejected by anna: the light was odd"),
        (("approve", "eve", "good"), 3, False, "eve may not decide"),
        (None, 3, False, "rejected by time-out: nobody decided within 60 minutes"),
        (
            ("approve", "anna", "good"),
            5,
            False,
            "approved by anna: good; but v5 was promoted meanwhile, and this version was compared with v3",
        ),
    ],
)
def test_only_a_timely_yes_of_one_who_may_about_the_same_champion_lets_a_version_take_over(
    store, model, found, champion, held, measured
):
    said = found and Answer(decision=found[0], who=found[1], why=found[2])
    gate = judged(store, request(model), said, champion)
    assert (gate.held, gate.measured) == (held, measured)
    assert gate.demanded == "approved by anna before 2026-03-01 13:00 UTC"


def test_who_may_not_decide_is_told_before_anything_is_resumed(model):
    with pytest.raises(ValueError, match=f"eve may not decide about {model} v7: its recipe names anna"):
        answer(request(model), "approve", "eve", "why not")


def test_a_question_is_asked_once_however_often_the_run_begins(store, model):
    first = ask(store, model, 7, "run-1", Approval(minutes=5), None)
    time.sleep(1.1)
    assert ask(store, model, 7, "run-1", Approval(minutes=99, who=("x",)), 4) == first
    assert open_requests(store, model) == [], "no such run waits"


# What a worker does with a run of a deployment, in a module that it can import.
WAITING = """
from prefect import flow, task
from prefect.cache_policies import CacheKeyFnPolicy
from flows.promote import of_this_run
from tasks.approval import Approval, ask, judged, wait_for_answer
from tasks.runs import this_run
from tasks.storage import Store

@task(persist_result=True, cache_policy=CacheKeyFnPolicy(cache_key_fn=of_this_run))
def work(log: str) -> str:
    with open(log, "a") as file:
        file.write("worked\\n")
    return "proof"

@flow
def waits(store: dict, model: str, log: str, approval: Approval) -> str:
    found = work(log)
    place = Store(**store)
    request = ask(place, model, 7, this_run(), approval, None)
    gate = judged(place, request, wait_for_answer(request, "the table"), None)
    return f"{found} {gate.held}: {gate.measured}"
"""


@pytest.fixture
def suspended(store, model, tmp_path):
    """A run of a deployment that a worker has brought to its question; `(run id, go on, what it did)`."""
    (tmp_path / "waiting_flow.py").write_text(WAITING)
    log = tmp_path / "log"
    facts = {name: getattr(store, name) for name in ("bucket", "endpoint_url", "access_key_id", "secret_access_key")}
    parameters = {"store": facts, "model": model, "log": str(log), "approval": {"minutes": 60, "who": ["anna"]}}
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow_from_name("waits")
        deployment = client.create_deployment(
            flow_id,
            f"waits-{model}",
            entrypoint="waiting_flow.py:waits",
            path=str(tmp_path),
            enforce_parameter_schema=False,
        )
        run = client.create_flow_run_from_deployment(deployment, parameters=parameters).id

    def go_on() -> str:
        env = {
            **os.environ,
            "PREFECT__FLOW_RUN_ID": str(run),
            "PREFECT_API_URL": str(PREFECT_API_URL.value()),
            "PREFECT_HOME": str(tmp_path / "prefect"),
            "PYTHONPATH": f"{ROOT}:{tmp_path}",
        }
        done = subprocess.run(
            [sys.executable, "-m", "prefect.engine"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(run).state
        assert state is not None, done.stderr[-3000:]
        return f"{state.type.value} {state.name} {done.stderr[-1500:] if state.is_failed() else ''}".strip()

    assert go_on() == "PAUSED Suspended"
    return run, go_on, log


@pytest.mark.slow
def test_a_suspended_run_is_resumed_with_the_answer_and_does_nothing_twice(store, model, suspended):
    run, go_on, log = suspended
    [asked] = open_requests(store, model)
    assert asked.run == str(run)
    answer(asked, "approve", "anna", "fine")
    assert go_on() == "COMPLETED Completed"
    assert log.read_text() == "worked\n"
    assert open_requests(store, model) == []


@pytest.mark.slow
def test_a_wrong_name_in_the_form_is_asked_again(store, model, suspended):
    """The form of the UI is filled in by whoever sees it."""
    from prefect.flow_runs import resume_flow_run

    run, go_on, log = suspended
    resume_flow_run(run, run_input={"decision": "approve", "who": "eve", "why": "I like it"})
    assert go_on() == "PAUSED Suspended"
    with get_client(sync_client=True) as client:
        told = client.read_flow_run_input(run, "suspended-approval-1-description")
    assert "**eve may not decide; anna may.**" in told
    [asked] = open_requests(store, model)
    answer(asked, "reject", "anna", "not yet")
    assert go_on() == "COMPLETED Completed"
    assert log.read_text() == "worked\n"


@pytest.mark.slow
def test_a_suspended_run_whose_time_is_over_is_answered_by_the_sweep(store, model, suspended):
    run, go_on, _ = suspended
    assert expire(store, datetime.now(UTC)) == []
    [late] = expire(store, datetime.now(UTC) + timedelta(minutes=61))
    assert late.run == str(run)
    assert go_on() == "COMPLETED Completed"
    assert open_requests(store, model) == []
