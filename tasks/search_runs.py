"""A search in MLflow: one run for the study, and below it one for each trial, with its series and what became of it."""

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from tasks.passport import commit
from tasks.recipe import NOT_IDENTITY, TrainConfig
from tasks.registry import FLOW_RUN_TAG, client_of, log_bytes, log_metrics
from tasks.search_space import Search
from tasks.tracking import experiment_of, flat

if TYPE_CHECKING:
    from tasks.dataset import DatasetVersion
    from tasks.tuning import Tried

log = logging.getLogger(__name__)

STUDY_TAG: Final = "tirewatch.study"
TRIAL_TAG: Final = "tirewatch.trial"
PARENT_TAG: Final = "mlflow.parentRunId"
OUTCOME_TAG: Final = "outcome"


def open_study_run(
    tracking_uri: str, study: str, version: "DatasetVersion", config: TrainConfig, search: Search, run: str, page: str
) -> str:
    """The run of the study, opened again where an earlier attempt made it; trials it left open are closed as killed."""
    from mlflow.entities import Param, RunTag

    client = client_of(tracking_uri)
    experiment = experiment_of(client, version.name)
    tags = {
        STUDY_TAG: study,
        FLOW_RUN_TAG: run,
        "prefect.flow_run_url": page,
        "mlflow.note.content": f"[Prefect run]({page})",
        "mlflow.source.git.commit": commit(),
        "dataset": version.name,
        "dataset_version": str(version.version),
        "dataset_digest": version.digest,
    }
    known = client.search_runs([experiment], f"tags.`{STUDY_TAG}` = '{study}' and tags.`{OUTCOME_TAG}` = 'search'")
    if known:
        run_id = str(known[0].info.run_id)
        client.update_run(run_id, "RUNNING")
    else:
        name = f"search {version.name} v{version.version}"
        created = client.create_run(experiment, run_name=name, tags={**tags, OUTCOME_TAG: "search"})
        run_id = str(created.info.run_id)
    told = {**flat(config.model_dump(exclude=NOT_IDENTITY)), **_told(search)}
    params = [Param(key, str(value)) for key, value in told.items()]
    client.log_batch(run_id, params=params, tags=[RunTag(key, value) for key, value in tags.items()])
    for left in trial_runs(tracking_uri, run_id):
        if left.info.status == "RUNNING":
            close_trial_run(tracking_uri, left.info.run_id, "KILLED", "died")
    return run_id


def open_trial_run(tracking_uri: str, parent: str, study: str, slot: int, name: str, config: TrainConfig) -> str:
    """A nested run of this trial, with its whole configuration; runs of earlier attempts at the slot are marked as such."""
    from mlflow.entities import Param

    client = client_of(tracking_uri)
    experiment = client.get_run(parent).info.experiment_id
    for left in _runs_below(client, experiment, parent, f" and tags.`{TRIAL_TAG}` = '{slot}'"):
        close_trial_run(tracking_uri, left.info.run_id, "KILLED", "died")
    tags = {PARENT_TAG: parent, STUDY_TAG: study, TRIAL_TAG: str(slot), OUTCOME_TAG: "running"}
    run_id = str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)
    params = flat(config.model_dump(exclude=NOT_IDENTITY))
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
    return run_id


def close_trial_run(
    tracking_uri: str,
    run_id: str,
    status: str,
    outcome: str,
    figures: Mapping[str, float] | None = None,
    reason: str = "",
) -> None:
    """outcome: complete, pruned, failed, died or interrupted, as a tag; MLflow itself knows no pruned runs."""
    client = client_of(tracking_uri)
    client.set_tag(run_id, OUTCOME_TAG, outcome)
    if reason:
        client.set_tag(run_id, "reason", reason)
    if figures:
        log_metrics(client, run_id, {f"val_{name}": value for name, value in figures.items()})
    client.set_terminated(run_id, status)


def trial_runs(tracking_uri: str, parent: str) -> list[Any]:
    """The nested runs of a study, newest first."""
    client = client_of(tracking_uri)
    return _runs_below(client, client.get_run(parent).info.experiment_id, parent)


def log_standing(
    tracking_uri: str,
    run_id: str,
    tried: Sequence["Tried"],
    best: "Tried | None",
    chosen: Mapping[str, Any],
    picture: bytes,
    figures: Mapping[str, float],
) -> None:
    """The table of trials, the picture and the best configuration into the run of the study, which is then finished."""
    client = client_of(tracking_uri)
    log_bytes(client, run_id, as_csv(tried), "trials.csv")
    log_bytes(client, run_id, picture, "search.png")
    if best is not None:
        log_bytes(client, run_id, json.dumps(chosen, indent=2).encode(), "best.json")
        log_bytes(client, run_id, json.dumps(best.config, indent=2).encode(), "best_trial.json")
        client.set_tag(run_id, "best_trial", str(best.slot))
    log_metrics(client, run_id, figures)
    client.set_terminated(run_id, "FINISHED")


def as_csv(tried: Sequence["Tried"]) -> bytes:
    """One line a slot: state, value, what was drawn, figures, time, MLflow run, reason."""
    names = list(dict.fromkeys(name for each in tried for name in each.overrides))
    figures = list(dict.fromkeys(name for each in tried for name in each.figures))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "state", "value", *names, *figures, "epochs", "seconds", "mlflow_run", "reason"])
    for each in tried:
        drawn, found = [each.overrides.get(name) for name in names], [each.figures.get(name) for name in figures]
        row = [each.slot, each.state, each.value, *drawn, *found]
        writer.writerow([*row, len(each.losses), round(each.seconds, 1), each.run_id, each.reason])
    return out.getvalue().encode()


def _runs_below(client: Any, experiment: str, parent: str, also: str = "") -> list[Any]:
    """Every page of what the filter finds."""
    found: list[Any] = []
    token: str | None = None
    while True:
        page = client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{parent}'{also}", page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _told(search: Search) -> dict[str, str]:
    """Parameters of a run are written once: the budget, which a resumption may raise, is none."""
    told = search.model_dump(mode="json", exclude={"trials", "minutes", "workers", "space"})
    space = {
        f"space.{name}": dimension.model_dump_json(exclude_defaults=True) for name, dimension in search.space.items()
    }
    return {**{f"search.{name}": str(value) for name, value in told.items()}, **space}
