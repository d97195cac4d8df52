"""drift: does production still look like what the serving version was validated on, and if not, why.

Makes a verdict with a cause on the newest captured photographs, a page with pictures on the run's page, Evidently's page with
the version's MLflow run, a line of history on S3, and, when it is news, the event `tirewatch.drift.detected` or
`.cleared`. Needs S3, MLflow, the Prefect server and the spool of the serving machine. By hand:

    prefect deployment run 'drift/tire' -p options='{"window": 200}'

The state's name says the verdict: Drifted, Quiet or Insufficient. No verdict changes anything by itself.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict, Field, model_validator

from flows.settings import Settings, settings
from tasks.storage import NETWORK_RETRY

if TYPE_CHECKING:
    from monitoring.alerts import Announcement, Finding
    from monitoring.calibration import Sample
    from monitoring.drift import DriftResult
    from monitoring.report import Subject
    from tasks.production import Window
    from tasks.registry import ModelCard, Reference, TrainedModel

log = logging.getLogger(__name__)

CONSIDERED = 50  # the newest findings that an alarm looks at, of this month and the last


class DriftOptions(BaseModel):
    """Which photographs are compared, how sure a verdict must be, and when it becomes an alarm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window: int = Field(
        400, ge=30, le=1000, description="Newest captured photographs of the serving version to compare"
    )
    minimum: int = Field(100, ge=30, le=1000, description="Fewer photographs than this get no verdict: Insufficient")
    max_age_hours: float = Field(168, gt=0, le=24 * 90, description="Older photographs are left out")
    false_alarm_rate: float = Field(
        0.01, ge=0.001, le=0.2, description="Share of runs that may say Drifted although nothing changed"
    )
    alarm_after: int = Field(1, ge=1, le=20, description="Alarm when this many of the last windows drifted ...")
    alarm_of: int = Field(1, ge=1, le=20, description="... of this many, and the latest one did")
    cool_down_minutes: float = Field(240, ge=0, le=10080, description="The same alarm is not raised again before that")

    @model_validator(mode="after")
    def _possible(self) -> "DriftOptions":
        if self.minimum > self.window:
            raise ValueError(f"minimum {self.minimum} is more than the window of {self.window} photographs")
        if self.alarm_after > self.alarm_of:
            raise ValueError(f"alarm_after {self.alarm_after} is more than alarm_of {self.alarm_of}")
        return self


@dataclass(frozen=True)
class Served:
    """The version in production, and what it was validated on."""

    model: "TrainedModel"
    card: "ModelCard"
    reference: "Reference"


@flow(name="drift", flow_run_name="drift {model}")
def drift(model: str, options: DriftOptions = DriftOptions()) -> "State[DriftResult | None]":
    """Compare what production saw with what the serving version was validated on; say what changed and what to do.

    Args:
        model: Registered model, and public name of the Triton model.
        options: Which photographs are compared, how sure a verdict must be, and when it becomes an alarm.
    """
    here = settings()
    collect(here, model)
    served = find_served(here, model)
    if served is None:
        return Completed(name="Insufficient", message=f"{model} has no champion yet: run its promote deployment first")
    window = find_window(here, served, options)
    result, training, production = compare(served, window, options)
    archived = archive(here, served, training, production, result) if result.verdict != "insufficient" else None
    artifact = show(here, served, window, result, training, production, archived)
    announced = announce(here, served, window, result, options, artifact)
    return final_state(served, result, announced)


def final_state(served: Served, result: "DriftResult", announced: "Announcement | None") -> "State[DriftResult | None]":
    """The verdict is the name of the state, for triggers and people."""
    of = f"{served.model.name} v{served.model.version}"
    news = f"; {announced}" if announced else ""
    if result.verdict == "insufficient":
        message = f"{of}: {result.reason}"
    elif result.verdict == "quiet":
        message = f"{of}: {result.window} photographs look like the training, score {result.score:.2f}{news}"
    else:
        message = f"{of}: {', '.join(each.name for each in result.causes)}, score {result.score:.2f}{news}"
    return Completed(name=result.verdict.capitalize(), message=message, data=result)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def collect(here: Settings, model: str) -> int:
    """Captured records from the server's spool to S3; how many. The spool keeps what could not be moved."""
    from tasks.production import collect as move

    moved = move(here.store, here.serving_root / "spool" / model, model)
    log.info("%d captured photographs of %s moved to S3", moved, model)
    return moved


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False)
def find_served(here: Settings, model: str) -> Served | None:
    """The champion with its card and training reference; None when there is no champion yet."""
    from tasks.production import part_of
    from tasks.registry import champion_version, load_card, load_reference

    version = champion_version(here.mlflow_tracking_uri, model)
    if version is None:
        return None
    found, card = load_card(here.mlflow_tracking_uri, model, version)
    return Served(found, card, part_of(load_reference(here.mlflow_tracking_uri, model, version)))


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False)
def find_window(here: Settings, served: Served, options: DriftOptions) -> "Window":
    """The newest captured photographs that the champion answered, with their statistics."""
    from tasks.production import read_window

    since = datetime.now(UTC) - timedelta(hours=options.max_age_hours)
    return read_window(here.store, served.model.name, served.model.version, options.window, since)


@task(cache_policy=NO_CACHE, persist_result=False)
def compare(served: Served, window: "Window", options: DriftOptions) -> "tuple[DriftResult, Sample, Sample]":
    """The verdict, and both sides as they were compared."""
    from monitoring.drift import compare as judge
    from tasks.production import expected, observed

    training = expected(served.reference, served.card.rule)
    production = observed(window, served.card.rule)
    return judge(training, production, options.false_alarm_rate, options.minimum), training, production


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False)
def archive(here: Settings, served: Served, training: "Sample", production: "Sample", result: "DriftResult") -> str:
    """Evidently's page, kept with the version's MLflow run; its address in the MLflow UI."""
    from monitoring.drift import save_evidently
    from tasks.registry import client_of, run_page

    run_id = served.model.run_id
    name = f"{_started():%Y%m%dT%H%M%SZ}.html"
    with TemporaryDirectory(prefix="tirewatch-drift-") as folder:
        path = Path(folder) / name
        save_evidently(training, production, result, path)
        client_of(here.mlflow_tracking_uri).log_artifact(run_id, str(path), "drift")
    return f"{run_page(here.mlflow_tracking_uri, run_id)}/artifacts/drift/{name}"


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def show(
    here: Settings,
    served: Served,
    window: "Window",
    result: "DriftResult",
    training: "Sample",
    production: "Sample",
    archived: str | None,
) -> str:
    """The page of this run in the Prefect UI; id of the artifact."""
    from prefect.artifacts import create_markdown_artifact

    from monitoring.report import distribution_plot, headline, page

    subject = _subject(served, window)
    sheet = plot = None
    if result.verdict != "insufficient":
        sheet = pictures(here, served, window, training, production)
        plot = distribution_plot(training, production, result)
    identity = create_markdown_artifact(
        page(subject, result, sheet, plot, archived),
        key=f"drift-{served.model.name.replace('_', '-')}",
        description=headline(subject, result),
    )
    return str(identity)


def pictures(here: Settings, served: Served, window: "Window", training: "Sample", production: "Sample") -> bytes:
    """Typical and unusual photographs of both sides on one sheet."""
    from monitoring.drift import exemplars
    from monitoring.report import contact_sheet
    from tasks.dataset import open_version
    from tasks.production import training_tiles

    chosen = exemplars(training, production)
    version = open_version(here.store, served.card.dataset, served.card.dataset_version)
    typical, unusual = (
        training_tiles(here.store, version, served.reference.sha256[rows].tolist())
        for rows in (chosen.training_typical, chosen.training_unusual)
    )
    seen = [window.tiles[chosen.production_typical], window.tiles[chosen.production_unusual]]
    return contact_sheet([typical, unusual], seen, ["most typical", "most unlike training"])


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def announce(
    here: Settings,
    served: Served,
    window: "Window",
    result: "DriftResult",
    options: DriftOptions,
    artifact: str,
) -> "Announcement | None":
    """The event when the verdict is news, then the line of history that remembers both.

    A run killed between the two announces again when it is started again: rather twice than never.
    """
    from monitoring.alerts import AlarmRule, Finding, decide_announcement
    from tasks.events import emit
    from tasks.storage import write

    model, version = served.model.name, served.model.version
    causes = [each.name for each in result.causes]
    latest = Finding(time.time(), version, result.verdict, window.digest, causes[0] if causes else "")
    rule = AlarmRule(options.alarm_after, options.alarm_of, options.cool_down_minutes * 60)
    announced = decide_announcement(history(here, model), latest, rule)
    if announced:
        payload = {
            "model": model,
            "version": version,
            "verdict": result.verdict,
            "causes": causes,
            "score": round(result.score, 4),
            "artifact": artifact,
        }
        emit(f"tirewatch.drift.{announced}", f"tirewatch.model.{model}", payload)
    line = {"finding": {**asdict(latest), "announced": announced}, "result": result.as_dict(), "artifact": artifact}
    write(here.store, _history_key(model), json.dumps(line, indent=1).encode())
    return announced


def history(here: Settings, model: str) -> "list[Finding]":
    """What earlier runs found, oldest first: at most CONSIDERED of this month and the last."""
    from monitoring.alerts import Finding
    from tasks.storage import list_objects, read

    months = sorted({f"{day:%Y-%m}" for day in (_started(), _started().replace(day=1) - timedelta(days=1))})
    keys = [found.key for month in months for found in list_objects(here.store, f"drift/{model}/{month}")]
    earlier = [key for key in keys if key != _history_key(model)]
    return [Finding(**json.loads(read(here.store, key))["finding"]) for key in earlier[-CONSIDERED:]]


def _history_key(model: str) -> str:
    """One line of history a flow run, however often it is started again."""
    started = _started()
    return f"drift/{model}/{started:%Y-%m}/{started:%Y%m%dT%H%M%SZ}-{flow_run.get_id()}.json"


def _started() -> datetime:
    """When this flow run was to start; the same when it is started again."""
    planned: Any = flow_run.get_scheduled_start_time()
    return datetime.fromtimestamp(planned.timestamp(), UTC)


def _subject(served: Served, window: "Window") -> "Subject":
    from monitoring.report import Subject

    times = window.captured_at if len(window) else [0.0]
    dataset = f"{served.card.dataset} v{served.card.dataset_version}"
    return Subject(served.model.name, served.model.version, dataset, float(times[0]), float(times[-1]))
