"""The step of a promotion in which a person decides: the question, the wait, and the answer as a gate."""

from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows.settings import Settings
from tasks.approval import Approval
from tasks.gates import Decision, Gate, list_of
from tasks.routing import read_routing
from tasks.storage import NETWORK_RETRY

if TYPE_CHECKING:
    from tasks.approval import Answer, Request
    from tasks.registry import TrainedModel


def approved(here: Settings, candidate: "TrainedModel", decision: Decision, approval: Approval) -> Gate:
    """The run waits for a person, who sees the table of gates above the form; the answer as a gate of its own."""
    from tasks.approval import wait_for_answer

    request = ask_for_approval(here, candidate, approval)
    page = f"# {candidate.name} v{candidate.version} holds every gate: may it take over?\n\n{list_of(decision)}\n"
    return hear(here, request, wait_for_answer(request, page))


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def ask_for_approval(here: Settings, candidate: "TrainedModel", approval: Approval) -> "Request":
    """The question, written down once for this run."""
    from tasks.approval import ask
    from tasks.runs import this_run

    table = read_routing(here.serving_root, candidate.name)
    champion = table.champion.version if table else None
    return ask(here.store, candidate.name, candidate.version, this_run(), approval, champion)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def hear(here: Settings, request: "Request", answer: "Answer | None") -> Gate:
    """The answer, written down, and whether it lets the version take over."""
    from tasks.approval import judged

    table = read_routing(here.serving_root, request.model)
    return judged(here.store, request, answer, table.champion.version if table else None)
