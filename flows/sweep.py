"""sweep: finds what lost events have left undone, and sends those events again.

Compares what S3 and MLflow hold with what the line has decided: a complete batch that was neither ingested nor refused, a
dataset version that no training decided about, a registered model without a verdict. Completes the records of a switch of
champion that was killed, refuses what waited for a person for too long, lets the ONNX network answer where a server refuses a
version's TensorRT plan, uploads what answers and is not on S3 yet, and takes old versions off the server's disk. Runs on a
schedule; by hand:

    prefect deployment run 'sweep/line'

Sending an event once too often is harmless: whoever follows it claims its subject first (`tasks/claims.py`).
"""

import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict, Field

from flows.settings import Settings, settings
from tasks.storage import NETWORK_RETRY

if TYPE_CHECKING:
    from tasks.lost import Lost

log = logging.getLogger(__name__)


class SweepOptions(BaseModel):
    """How long something may be undecided before it counts as lost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grace_minutes: float = Field(5, ge=0, description="What was made later than this may still be on its way")
    quiet_minutes: float = Field(
        30, ge=0, description="A batch without a marker counts as complete when nothing came for so long"
    )
    look_back_days: float = Field(30, gt=0, description="Batches that were uploaded earlier are not looked at")
    keep_versions: int = Field(
        5,
        ge=1,
        description="The newest versions of a model that stay on the server's disk; of older ones, those in use",
    )


@flow(name="sweep")
def sweep(options: SweepOptions = SweepOptions()) -> State[Any]:
    """Look for what should have been decided by now, and send its events again.

    Args:
        options: How long something may be undecided before it counts as lost.
    """
    here = settings()
    lost = [*find_lost_batches(here, options), *find_lost_versions(here, options), *find_lost_models(here, options)]
    for each in lost:
        log.warning("%s: sending %s again", each.what, each.event)
        repeat(each)
    done = [*complete_switches(here, options), *end_approvals(here), *answer_without_plans(here), *keep_copies(here)]
    done += make_room(here, options)
    if lost:
        show(lost)
        return Completed(name="Repeated", message="; ".join([*(each.what for each in lost), *done]))
    if done:
        return Completed(name="MadeGood", message="; ".join(done))
    return Completed(name="NothingLost", message="everything that was uploaded, made and registered is decided")


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def find_lost_batches(here: Settings, options: SweepOptions) -> "list[Lost]":
    """Complete batches that were neither ingested nor refused."""
    from tasks.followers import read_followers
    from tasks.lost import BATCH_SEALED, lost_batches

    followers = read_followers(BATCH_SEALED)
    waits = (timedelta(minutes=options.grace_minutes), timedelta(minutes=options.quiet_minutes))
    return list(lost_batches(here.store, followers, datetime.now(UTC), *waits, timedelta(days=options.look_back_days)))


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def find_lost_versions(here: Settings, options: SweepOptions) -> "list[Lost]":
    """Dataset versions that no training decided about."""
    from tasks.followers import read_followers
    from tasks.lost import VERSION_CREATED, lost_versions

    grace = timedelta(minutes=options.grace_minutes)
    return list(lost_versions(here.store, read_followers(VERSION_CREATED), datetime.now(UTC), grace))


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def find_lost_models(here: Settings, options: SweepOptions) -> "list[Lost]":
    """Registered versions without a verdict."""
    from tasks.followers import read_followers
    from tasks.lost import MODEL_REGISTERED, lost_registrations

    followers, grace = read_followers(MODEL_REGISTERED), timedelta(minutes=options.grace_minutes)
    return list(lost_registrations(here.store, here.mlflow_tracking_uri, followers, datetime.now(UTC), grace))


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def complete_switches(here: Settings, options: SweepOptions) -> list[str]:
    """Ledger, alias and event of switches whose run died after it had replaced the routing table; what was completed."""
    from tasks.routing import read_routing
    from tasks.runs import this_run
    from tasks.transaction import Place, models_with_switches, settle

    told = []
    for model in models_with_switches(here.store):
        table = read_routing(here.serving_root, model)
        age = datetime.now(UTC) - datetime.fromisoformat(table.changed_at) if table else None
        if age is None or age < timedelta(minutes=options.grace_minutes):  # a promotion watches its switch for a while
            continue
        place = Place(here.serving_root, here.store, here.mlflow_tracking_uri, model)
        if entry := settle(place, f"flow-run/{this_run()}"):
            told.append(f"the ledger of {model} did not know that v{entry.version} answers: {entry.action}")
    return told


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def end_approvals(here: Settings) -> list[str]:
    """Candidates that nobody approved in time are refused: their suspended runs go on with that answer."""
    from tasks.approval import expire

    late = expire(here.store, datetime.now(UTC))
    return [f"nobody decided about {each.model} v{each.version} within {each.minutes:g} minutes" for each in late]


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def answer_without_plans(here: Settings) -> list[str]:
    """Models whose server came up and does not run their plan: another card, another TensorRT; why, and what answers now."""
    from tasks.engine_stage import make_answer
    from tasks.model_repository import Runtime, front_doors

    told = []
    for model in front_doors(here.serving_root):
        runtime = Runtime(accelerator=here.cpu_accelerator)
        if why := make_answer(here.serving_root, here.triton, model, runtime):
            log.warning("%s: %s", model, why)
            told.append(f"{model}: {why}")
    return told


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def keep_copies(here: Settings) -> list[str]:
    """What a server that loses its disk could not be given back: uploaded now."""
    from tasks.model_repository import front_doors
    from tasks.version_store import upload_routed

    uploaded = [
        route
        for model in front_doors(here.serving_root)
        for route in upload_routed(here.store, here.serving_root, model)
    ]
    return [f"{route.network} version {route.version} was not on S3" for route in uploaded]


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def make_room(here: Settings, options: SweepOptions) -> list[str]:
    """Old versions that nobody needs on the server's disk leave it; S3 holds them."""
    from tasks.model_repository import front_doors
    from tasks.pruning import prune

    gone = [
        route
        for model in front_doors(here.serving_root)
        for route in prune(here.store, here.serving_root, here.mlflow_tracking_uri, model, options.keep_versions)
    ]
    return [f"{route.network} version {route.version} is on S3 and left the server's disk" for route in gone]


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def repeat(lost: "Lost") -> None:
    """The lost event once more."""
    from tasks.lost import send_again
    from tasks.runs import this_run

    send_again(lost, this_run())


def show(lost: "list[Lost]") -> None:
    """What was found, on the run's page."""
    table = [{"undecided": each.what, "sent again": each.event} for each in lost]
    create_table_artifact(table, key="sweep", description=f"{len(lost)} events were lost and sent again")
