"""A person decides whether a proven candidate may take over: what is asked, who may answer, and what was answered.

    approvals/<model>/00000007-<flow run>.json          the question: by conditional write, so a resumed run asks only once
    approvals/<model>/00000007-<flow run>.answer.json   the answer that counted

A run of a deployment is suspended: its process ends, and a worker starts it again with the answer. A run by hand waits in its
process. Either is answered in the Prefect UI or by `tirewatch approve | reject`. The open Prefect server knows no users: a name
in the form says who took it upon himself, and is no proof of identity.
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from prefect.input import RunInput
from pydantic import BaseModel, ConfigDict, Field

from tasks.evidence import Gate
from tasks.storage import Store, list_objects, read, write, write_if_absent

PREFIX: Final = "approvals"
TIME_OUT: Final = "time-out"  # who answers when nobody does
_ASKED: Final = 5  # times, before wrong names are taken for a refusal
_PATIENCE: Final = timedelta(days=7)  # Prefect ends a suspended run itself after so much longer than it should wait


class Approval(BaseModel):
    """A person must agree before the switch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    minutes: float = Field(
        default=1440, gt=0, le=43_200, description="Time to decide; after it the candidate is refused"
    )
    who: tuple[str, ...] = Field(default=(), description="Names that may decide; empty: anybody")


class Answer(RunInput):
    """The form."""

    decision: Literal["approve", "reject"] = Field(description="Whether this version may take over")
    who: str = Field(min_length=1, max_length=80, description="Your name; it stands in the ledger")
    why: str = Field(min_length=1, max_length=500, description="Your reason; it stands in the ledger")


@dataclass(frozen=True)
class Request:
    """What a promotion asks. run: the flow run that waits. champion: the version the candidate was compared with."""

    model: str
    version: int
    run: str
    asked_at: str
    minutes: float
    who: tuple[str, ...]
    champion: int | None

    @property
    def key(self) -> str:
        return f"{PREFIX}/{self.model}/{self.version:08d}-{self.run}.json"

    @property
    def answer_key(self) -> str:
        return f"{self.key.removesuffix('.json')}.answer.json"

    @property
    def deadline(self) -> datetime:
        return datetime.fromisoformat(self.asked_at) + timedelta(minutes=self.minutes)

    @property
    def demanded(self) -> str:
        people = " or ".join(self.who) or "a person"
        return f"approved by {people} before {self.deadline:%Y-%m-%d %H:%M} UTC"


def ask(store: Store, model: str, version: int, run: str, approval: Approval, champion: int | None) -> Request:
    """The question of this run, as it was asked first."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    asked = Request(model, version, run, now, approval.minutes, approval.who, champion)
    if write_if_absent(store, asked.key, json.dumps(asdict(asked), indent=1).encode()):
        return asked
    return _request(store, asked.key)


def _request(store: Store, key: str) -> Request:
    told = json.loads(read(store, key))
    return Request(**{**told, "who": tuple(told["who"])})


def open_requests(store: Store, model: str = "") -> list[Request]:
    """Questions whose run is paused and waits for an answer, the oldest first."""
    keys = [each.key for each in list_objects(store, f"{PREFIX}/{model}".rstrip("/") + "/")]
    answered = {key for key in keys if key.endswith(".answer.json")}
    asked = [_request(store, key) for key in keys if not key.endswith(".answer.json")]
    waiting = [each for each in asked if each.answer_key not in answered and _is_paused(each.run)]
    return sorted(waiting, key=lambda each: each.asked_at)


def _is_paused(run: str) -> bool:
    from uuid import UUID

    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(run)).state
    except (ObjectNotFound, ValueError):  # deleted, or a run without a server
        return False
    return state is not None and state.is_paused()


def answer(request: Request, decision: str, who: str, why: str) -> None:
    """Resume the run with the answer. Raises ValueError when `who` may not decide, RuntimeError when Prefect refuses."""
    from uuid import UUID

    from prefect.flow_runs import resume_flow_run

    if who != TIME_OUT and not may_decide(request, who):
        raise ValueError(
            f"{who} may not decide about {request.model} v{request.version}: its recipe names {', '.join(request.who)}"
        )
    resume_flow_run(UUID(request.run), run_input={"decision": decision, "who": who, "why": why})


def may_decide(request: Request, who: str) -> bool:
    """Whether the recipe lets this person decide."""
    return not request.who or who.strip() in request.who


def expire(store: Store, now: datetime) -> list[Request]:
    """Answer the questions of suspended runs whose time is over with a refusal; those questions."""
    late = [each for each in open_requests(store) if each.deadline <= now]
    for request in late:
        answer(request, "reject", TIME_OUT, f"nobody decided within {request.minutes:g} minutes")
    return late


def wait_for_answer(request: Request, page: str) -> Answer | None:
    """Ends this process until the run is resumed where a deployment can start it again, else waits; None when the time is over.

    page: Markdown above the form. Call it in a flow and outside its tasks. A name that may not decide is asked again.
    """
    from prefect.runtime import deployment

    suspended = deployment.get_id() is not None
    note = ""
    for attempt in range(_ASKED):
        form = Answer.with_initial_data(description=note + page)
        found = _suspended(form, request, attempt) if suspended else _paused(form, request, attempt)
        if found is None or found.who == TIME_OUT or may_decide(request, found.who):
            return found
        note = f"**{found.who} may not decide; {' or '.join(request.who)} may.**\n\n"
    return found


def _suspended(form: type[Answer], request: Request, attempt: int) -> Answer:
    from prefect.flow_runs import suspend_flow_run

    allowed = timedelta(minutes=request.minutes) + _PATIENCE  # `sweep` answers in time, so that the flow itself refuses
    return suspend_flow_run(wait_for_input=form, timeout=int(allowed.total_seconds()), key=f"approval-{attempt}")


def _paused(form: type[Answer], request: Request, attempt: int) -> Answer | None:
    from uuid import UUID

    from prefect.client.orchestration import get_client
    from prefect.exceptions import FlowPauseTimeout
    from prefect.flow_runs import pause_flow_run
    from prefect.states import Running

    left = max(1, round((request.deadline - datetime.now(UTC)).total_seconds()))
    try:
        return pause_flow_run(wait_for_input=form, timeout=left, poll_interval=2, key=f"approval-{attempt}")
    except FlowPauseTimeout:
        with get_client(sync_client=True) as client:  # else Prefect calls a run failed that goes on to refuse
            client.set_flow_run_state(UUID(request.run), Running(), force=True)
        return None


def judged(store: Store, request: Request, found: Answer | None, champion: int | None) -> Gate:
    """The answer as the last gate before the switch, written down. champion: the version in force now."""
    told: dict[str, Any] = {
        "decision": "reject",
        "who": TIME_OUT,
        "why": f"nobody decided within {request.minutes:g} minutes",
    }
    if found is not None:
        told = {"decision": found.decision, "who": found.who.strip(), "why": found.why}
    told["at"] = datetime.now(UTC).isoformat(timespec="seconds")
    write(store, request.answer_key, json.dumps(told, indent=1).encode())
    approved = told["decision"] == "approve"
    measured = f"{'approved' if approved else 'rejected'} by {told['who']}: {told['why']}"
    if told["who"] != TIME_OUT and not may_decide(request, told["who"]):
        return Gate("approval", False, f"{told['who']} may not decide", request.demanded)
    if approved and champion != request.champion:
        measured += f"; but v{champion} was promoted meanwhile, and this version was compared with v{request.champion}"
        approved = False
    return Gate("approval", approved, measured, request.demanded)
