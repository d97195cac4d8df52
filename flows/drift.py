"""drift: what production sends, against what the served version was trained on; verdict, cause, and what to do.

Makes: a page with pictures in the Prefect UI, Evidently's report in the version's MLflow run, an entry of the history on S3,
and, when an alarm is due, the event `tirewatch.drift.detected` (`.cleared` when it is over). Needs: the serving root, S3,
MLflow. By hand: `prefect deployment run 'drift/tire'`.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict, Field, model_validator

from flows.settings import Settings, settings
from monitoring.alerts import AlarmRule, Looked, Told, what_to_tell
from tasks.events import emit
from tasks.routing import read_routing
from tasks.storage import NETWORK_RETRY, Store

if TYPE_CHECKING:
    from monitoring.calibration import Sample
    from monitoring.capture import CaptureRecord
    from monitoring.drift import DriftResult
    from tasks.registry import ModelCard, Reference, TrainedModel

_HISTORY = 50  # earlier looks that may matter for an alarm


class DriftOptions(BaseModel):
    """How one look is taken, and when it becomes an alarm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window: int = Field(300, ge=20, le=1000, description="The newest captured photographs that are compared")
    minimum: int = Field(50, ge=20, le=1000, description="Fewer than this give no verdict, and never an alarm")
    false_alarm_rate: float = Field(
        0.01, gt=0, lt=0.5, description="Share of looks at undrifted production that may call it drift"
    )
    alarm_after: int = Field(1, ge=1, le=20, description="Drifted windows among the last ones before an alarm")
    alarm_of: int = Field(1, ge=1, le=20, description="How many last windows are counted; the latest must be drifted")
    cool_down_minutes: int = Field(60, ge=0, le=10080, description="A lasting alarm is not told again within this")

    @model_validator(mode="after")
    def _fits(self) -> "DriftOptions":
        if self.alarm_after > self.alarm_of or self.minimum > self.window:
            raise ValueError(
                f"alarm_after {self.alarm_after} must not exceed alarm_of {self.alarm_of}, nor minimum {self.minimum} the "
                f"window {self.window}"
            )
        return self


@dataclass(frozen=True)
class Look:
    """One comparison, with what the page shows of it."""

    result: "DriftResult"
    reference: "Sample"
    window: "Sample"


@flow(name="drift", flow_run_name="drift {model}")
def drift(model: str, options: DriftOptions = DriftOptions()) -> State[Any]:
    """Compare what production sent with the training of the version that answers, and say what it means.

    Args:
        model: Registered model, and public name of the Triton model.
        options: How one look is taken, and when it becomes an alarm.
    """
    here = settings()
    now = datetime.now(UTC)
    bring_captures(here, model)
    trained, card, reference = served_version(here, model)
    records = captured(here, trained, options.window)
    look = compare_with_training(reference, records, card, options)
    told = tell_what(here.store, model, look.result, now, options)
    details = archive(here, trained, look, now, told)
    artifact = publish(here, trained, card, reference, look, records, details)
    announce(trained, look.result, told, artifact, now)
    return final_state(trained, look.result)


def final_state(trained: "TrainedModel", result: "DriftResult") -> State[Any]:
    """Quiet, Drifted or Insufficient: triggers and people read the name."""
    from monitoring.report import headline

    first = f" {result.causes[0].action}" if result.causes else f" {result.reason}" if result.reason else ""
    return Completed(
        name=result.verdict.capitalize(), message=f"{headline(trained.name, trained.version, result)}.{first}"
    )


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def bring_captures(here: Settings, model: str) -> int:
    """From the server's spool to S3."""
    from tasks.production import collect

    return collect(here.store, here.serving_root / "spool" / model, model)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False)
def served_version(here: Settings, model: str) -> "tuple[TrainedModel, ModelCard, Reference]":
    """The version that answers, and its training reference. Raises LookupError when none does."""
    from tasks.registry import load_card, load_reference

    table = read_routing(here.serving_root, model)
    if table is None:
        raise LookupError(f"no version of {model} is in production: there is nothing to compare")
    version, uri = table.champion.version, here.mlflow_tracking_uri
    return (*load_card(uri, model, version), load_reference(uri, model, version))


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False)
def captured(here: Settings, trained: "TrainedModel", count: int) -> "list[CaptureRecord]":
    """The newest photographs that this version answered."""
    from tasks.production import newest

    return newest(here.store, trained.name, trained.version, count)


@task(cache_policy=NO_CACHE, persist_result=False)
def compare_with_training(
    reference: "Reference", records: "list[CaptureRecord]", card: "ModelCard", options: DriftOptions
) -> Look:
    """Both sides as numbers, and the verdict."""
    from monitoring.calibration import at_most
    from monitoring.drift import compare
    from tasks.production_sample import of_records, of_reference

    before, after = at_most(of_reference(reference, card)), of_records(records, card)
    return Look(compare(before, after, options.false_alarm_rate, options.minimum), before, after)


def tell_what(store: Store, model: str, result: "DriftResult", now: datetime, options: DriftOptions) -> Told:
    """Alarm, cleared or nothing, by the history of earlier looks."""
    rule = AlarmRule(options.alarm_after, options.alarm_of, timedelta(minutes=options.cool_down_minutes))
    return what_to_tell(history(store, model), result.verdict, now, rule)


def history(store: Store, model: str) -> list[Looked]:
    """Earlier looks, oldest first."""
    from tasks.storage import list_objects, read

    keys = sorted(each.key for each in list_objects(store, f"drift/{model}/"))[-_HISTORY:]
    found = (json.loads(read(store, key)) for key in keys)
    return [Looked(each["verdict"], datetime.fromisoformat(each["at"]), each["told"]) for each in found]


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False)
def archive(here: Settings, trained: "TrainedModel", look: Look, now: datetime, told: Told) -> str | None:
    """Evidently's report into the version's MLflow run, the result into the history; the address of the report."""
    from tasks.production_sample import log_evidently
    from tasks.storage import write

    details = None
    if look.result.measures:
        details = log_evidently(here.mlflow_tracking_uri, trained, look.reference, look.window, look.result, now)
    entry = {"at": now.isoformat(), "told": told, "model": trained.name, "version": trained.version}
    stamp = now.strftime("%Y%m%dT%H%M%S%f")
    written = json.dumps({**entry, "report": details, **look.result.as_dict()}, indent=1)
    write(here.store, f"drift/{trained.name}/{stamp}.json", written.encode())
    return details


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False)
def publish(
    here: Settings,
    trained: "TrainedModel",
    card: "ModelCard",
    reference: "Reference",
    look: Look,
    records: "list[CaptureRecord]",
    details: str | None,
) -> str:
    """The page in the Prefect UI; the id of its artifact."""
    from monitoring.report import distributions, headline, page
    from tasks.production_sample import contact_sheet_of

    sheet = plot = None
    if look.result.measures:
        sheet = contact_sheet_of(here.store, card, look.reference, look.window, reference, records)
        plot = distributions(look.reference, look.window, look.result)
    made = create_markdown_artifact(
        key=f"drift-{trained.name.replace('_', '-')}",
        markdown=page(trained.name, trained.version, look.result, sheet, plot, details),
        description=headline(trained.name, trained.version, look.result),
    )
    return str(made)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def announce(trained: "TrainedModel", result: "DriftResult", told: Told, artifact: str, now: datetime) -> None:
    """The event others act upon, when there is something to tell."""
    if told == "nothing":
        return
    emit(
        "tirewatch.drift.detected" if told == "alarm" else "tirewatch.drift.cleared",
        f"tirewatch.model.{trained.name}",
        {
            "model": trained.name,
            "version": trained.version,
            "verdict": result.verdict,
            "causes": [cause.name for cause in result.causes],
            "score": round(result.score, 3),
            "artifact": artifact,
        },
        occasion=now.isoformat(),
    )
