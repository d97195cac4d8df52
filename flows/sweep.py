"""sweep: finds what lost events have left undone, and sends those events again.

Compares what S3 and MLflow hold with what the line has decided: a complete batch that was neither ingested nor refused, a
dataset version that no training decided about, a registered model without a verdict. Completes the records of a switch of
champion that was killed, refuses what waited for a person for too long, lets the ONNX network answer where a server refuses a
version's TensorRT plan, uploads what answers and is not on S3 yet, takes old versions off the server's disk, and moves what
front doors captured to S3. Runs on a schedule; by hand:

    prefect deployment run 'sweep/line'

Sending an event once too often is harmless: whoever follows it claims its subject first (`tasks/claims.py`).
"""

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field

from flows.settings import Settings, settings
from tasks.storage import NETWORK_RETRY

if TYPE_CHECKING:
    from tasks.followers import Follower
    from tasks.lost import Lost

T = TypeVar("T")

log = logging.getLogger(__name__)

ONCE_MORE: Final = {**NETWORK_RETRY, "retries": 1, "retry_delay_seconds": 2}  # the next sweep comes in ten minutes


class SweepOptions(BaseModel):
    """How long something may be undecided before it counts as lost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grace_minutes: float = Field(5, ge=0, description="What was made later than this may still be on its way")
    quiet_minutes: float = Field(
        30, ge=0, description="A batch without a marker counts as complete when nothing came for so long"
    )
    look_back_days: float = Field(
        30, gt=0, description="Batches that were decided or uploaded earlier are not looked at"
    )
    keep_versions: int = Field(
        5,
        ge=1,
        description="The newest versions of a model that stay on the server's disk; of older ones, those in use",
    )


class Attempts:
    """Steps that do not depend on each other: what keeps one from its work is kept with its name, and the next one begins."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def __call__(self, name: str, step: Callable[[], Sequence[T]]) -> Sequence[T]:
        """What the step gives; nothing where it fails."""
        try:
            return step()
        except Exception as error:  # the store, MLflow, Prefect, the server's disk: each is needed by some steps only
            log.exception("%s failed", name)
            self.failed.append(f"{name}: {type(error).__name__}: {error}"[:500])
            return ()


@flow(name="sweep")
def sweep(options: SweepOptions = SweepOptions()) -> State[Any]:
    """Look for what should have been decided by now, and send its events again. A step that fails ends the run Failed once all
    others have done their work.

    Args:
        options: How long something may be undecided before it counts as lost.
    """
    here, attempt = settings(), Attempts()
    lost = send_what_is_lost(here, options, attempt)
    done = make_good(here, options, attempt)
    if lost:
        show(lost)
    told = "; ".join([*(each.what for each in lost), *done])
    if attempt.failed:
        failed = f"{len(attempt.failed)} steps failed: {'; '.join(attempt.failed)}"
        return Failed(message=f"{failed}. Done: {told}" if told else failed)
    if not told:
        return Completed(name="NothingLost", message="everything that was uploaded, made and registered is decided")
    return Completed(name="Repeated" if lost else "MadeGood", message=told)


def send_what_is_lost(here: Settings, options: SweepOptions, attempt: Attempts) -> "list[Lost]":
    """What nothing has come of, each sent again as soon as it is found."""
    from tasks.lost import BATCH_SEALED, MODEL_REGISTERED, VERSION_CREATED

    found: list[Lost] = []
    finders = {BATCH_SEALED: find_lost_batches, VERSION_CREATED: find_lost_versions, MODEL_REGISTERED: find_lost_models}
    for event, find in finders.items():
        for follower in attempt(f"who follows {event}", partial(followers_of, event)):
            for lost in attempt(f"{find.name} of {follower.stage}", partial(find, here, options, follower)):
                log.warning("%s: sending %s again", lost.what, lost.event)
                found += attempt(f"sending {lost.event} again ({lost.what})", partial(repeat, lost))
    return found


def make_good(here: Settings, options: SweepOptions, attempt: Attempts) -> list[str]:
    """What a run that died, a server that came back or a full disk has left, model by model; what was done."""
    from monitoring.capture import captured_models
    from tasks.model_repository import front_doors
    from tasks.transaction import models_with_switches

    done: list[str] = []
    for model in attempt("models with switches", partial(models_with_switches, here.store)):
        done += attempt(f"complete_switch of {model}", partial(complete_switch, here, options, model))
    done += attempt("end_approvals", partial(end_approvals, here))
    for model in attempt("front doors", partial(front_doors, here.serving_root)):
        done += attempt(f"answer_without_plan of {model}", partial(answer_without_plan, here, model))
        done += attempt(f"keep_copies of {model}", partial(keep_copies, here, model))
        done += attempt(f"make_room of {model}", partial(make_room, here, options, model))
    for model in attempt("captured models", partial(captured_models, here.serving_root / "spool")):
        attempt(f"collect_captures of {model}", partial(collect_captures, here, model))
    return done


@task(**ONCE_MORE, cache_policy=NO_CACHE)
def followers_of(event: str) -> "list[Follower]":
    """Deployments that automations start on the event."""
    from tasks.followers import read_followers

    return read_followers(event)


@task(**ONCE_MORE, cache_policy=NO_CACHE)
def find_lost_batches(here: Settings, options: SweepOptions, follower: "Follower") -> "list[Lost]":
    """Complete batches that were neither ingested nor refused."""
    from tasks.lost import lost_batches

    waits = (timedelta(minutes=options.grace_minutes), timedelta(minutes=options.quiet_minutes))
    look_back = timedelta(days=options.look_back_days)
    return list(lost_batches(here.store, [follower], datetime.now(UTC), *waits, look_back))


@task(**ONCE_MORE, cache_policy=NO_CACHE)
def find_lost_versions(here: Settings, options: SweepOptions, follower: "Follower") -> "list[Lost]":
    """Dataset versions that no training decided about."""
    from tasks.lost import lost_versions

    grace = timedelta(minutes=options.grace_minutes)
    return list(lost_versions(here.store, [follower], datetime.now(UTC), grace))


@task(**ONCE_MORE, cache_policy=NO_CACHE)
def find_lost_models(here: Settings, options: SweepOptions, follower: "Follower") -> "list[Lost]":
    """Registered versions without a verdict."""
    from tasks.lost import lost_registrations

    grace = timedelta(minutes=options.grace_minutes)
    return list(lost_registrations(here.store, here.mlflow_tracking_uri, [follower], datetime.now(UTC), grace))


@task(**ONCE_MORE, cache_policy=NO_CACHE)
def complete_switch(here: Settings, options: SweepOptions, model: str) -> list[str]:
    """Ledger, alias and event of a switch whose run died after it had replaced the routing table; what was completed."""
    from tasks.routing import read_routing
    from tasks.runs import this_run
    from tasks.transaction import Place, settle

    table = read_routing(here.serving_root, model)
    age = datetime.now(UTC) - datetime.fromisoformat(table.changed_at) if table else None
    if age is None or age < timedelta(minutes=options.grace_minutes):  # a promotion watches its switch for a while
        return []
    entry = settle(Place(here.serving_root, here.store, here.mlflow_tracking_uri, model), f"flow-run/{this_run()}")
    return [f"the ledger of {model} did not know that v{entry.version} answers: {entry.action}"] if entry else []


@task(**ONCE_MORE, cache_policy=NO_CACHE)
def end_approvals(here: Settings) -> list[str]:
    """Candidates that nobody approved in time are refused: their suspended runs go on with that answer."""
    from tasks.approval import expire

    late = expire(here.store, datetime.now(UTC))
    return [f"nobody decided about {each.model} v{each.version} within {each.minutes:g} minutes" for each in late]


@task(**ONCE_MORE, cache_policy=NO_CACHE)
def answer_without_plan(here: Settings, model: str) -> list[str]:
    """Where the server came up and does not run the model's plan: another card, another TensorRT; why, and what answers now."""
    from tasks.engine_stage import make_answer
    from tasks.model_repository import Runtime

    why = make_answer(here.serving_root, here.triton, model, Runtime(accelerator=here.cpu_accelerator))
    if why:
        log.warning("%s: %s", model, why)
    return [f"{model}: {why}"] if why else []


@task(**ONCE_MORE, cache_policy=NO_CACHE)
def keep_copies(here: Settings, model: str) -> list[str]:
    """What a server that loses its disk could not be given back: uploaded now."""
    from tasks.version_store import upload_routed

    uploaded = upload_routed(here.store, here.serving_root, model)
    return [f"{route.network} version {route.version} was not on S3" for route in uploaded]


@task(**ONCE_MORE, cache_policy=NO_CACHE)
def make_room(here: Settings, options: SweepOptions, model: str) -> list[str]:
    """Old versions that nobody needs on the server's disk leave it; S3 holds them."""
    from tasks.pruning import prune

    gone = prune(here.store, here.serving_root, here.mlflow_tracking_uri, model, options.keep_versions)
    return [f"{route.network} version {route.version} is on S3 and left the server's disk" for route in gone]


@task(**ONCE_MORE, cache_policy=NO_CACHE)
def collect_captures(here: Settings, model: str) -> list[str]:
    """What the front door captured leaves the bounded spool for S3, whether or not anybody looks at drift. The run's state has
    no word about it: there is something in every sweep.
    """
    from tasks.production import collect

    if moved := collect(here.store, here.serving_root / "spool" / model, model):
        log.info("%d captured requests of %s are on S3 now", moved, model)
    return []


@task(**ONCE_MORE, cache_policy=NO_CACHE)
def repeat(lost: "Lost") -> "list[Lost]":
    """The lost event once more; what was sent."""
    from tasks.lost import send_again
    from tasks.runs import this_run

    send_again(lost, this_run())
    return [lost]


def show(lost: "list[Lost]") -> None:
    """What was found, on the run's page."""
    table = [{"undecided": each.what, "sent again": each.event} for each in lost]
    create_table_artifact(table, key="sweep", description=f"{len(lost)} events were lost and sent again")
