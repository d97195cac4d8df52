"""tune: a search for a better configuration of a recipe, which then trains at full length and is registered like any other.

Makes an MLflow run for the study and one below it for each trial, a table of the trials with a picture and the best
configuration on the run's page, and then a run of `train` with that configuration. Needs S3, MLflow, the Prefect server and
the Optuna storage (`TIREWATCH_SEARCH_STORAGE`). By hand:

    prefect deployment run 'tune/tire' -p search='{"space": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": true}}}'

Trials are judged on the validation split. A search that was killed goes on with its finished trials when it is run again.
"""

import logging
from typing import TYPE_CHECKING, Any

from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.settings import Settings, settings
from flows.train import find_version, train
from tasks.recipe import TrainConfig
from tasks.runs import artifact_key
from tasks.search_space import Search
from tasks.storage import NETWORK_RETRY

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from tasks.dataset import DatasetVersion
    from tasks.registry import TrainedModel
    from tasks.tuning import Tried

log = logging.getLogger(__name__)


@flow(name="tune", flow_run_name="tune {dataset}")
def tune(
    dataset: str,
    search: Search,
    dataset_version: int | None = None,
    config: TrainConfig = TrainConfig(),
    train_best: bool = True,
) -> "State[TrainedModel | None]":
    """Search on the validation split, then train the best configuration at full length and register it.

    Args:
        dataset: Name of the dataset, and of the registered model.
        search: What varies, how it is sampled, and the budget.
        dataset_version: Version of the dataset; the newest one when left empty.
        config: The recipe that the search starts from; what does not vary stays as it is here.
        train_best: Train the best configuration at the end; otherwise the page only tells it.
    """
    here = settings()
    version = find_version(here.store, dataset, dataset_version)
    check(here, version, config, search)
    study = take_up(here, version, config, search)
    try:
        best = search_for_best(here, study, version, config, search)
        if best is None:
            return Completed(name="NothingFound", message=f"no trial of {study} was completed: its page says why")
        if not train_best:
            return Completed(message=f"{study}: trial {best.slot} is best, {search.metric} {best.value:.4f}")
        return train_at_full_length(here, study, version, config, best)
    finally:
        let_go(here, study, version)


def search_for_best(
    here: Settings, study: str, version: "DatasetVersion", config: TrainConfig, search: Search
) -> "Tried | None":
    """Run the trials that are missing and tell what all of them found."""
    run_id = open_run(here, study, version, config, search)
    try:
        why_ended = run_trials(here, study, run_id, version, config, search)
        return publish(here, study, run_id, version, config, search, why_ended)
    except BaseException:  # cancellation too: no run may stay open for ever
        fail_run(here, run_id)
        raise


def train_at_full_length(
    here: Settings, study: str, version: "DatasetVersion", config: TrainConfig, best: "Tried"
) -> "State[TrainedModel | None]":
    """Train and register the best configuration, unless an earlier run of this search has done so."""
    from tasks.search_space import with_overrides

    chosen = with_overrides(config, best.overrides)
    known = trained_earlier(here, study, chosen)
    if known is not None:
        return Completed(message=f"{known.name} v{known.version} has this configuration already", data=known)
    state: State[Any] = train(version.name, version.version, chosen, return_state=True)
    model = state.result()  # a failed training fails the search's run too; its trials are kept
    if model is not None:
        remember(here, study, chosen, model)
    return Completed(name=state.name, message=state.message, data=model)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def check(here: Settings, version: "DatasetVersion", config: TrainConfig, search: Search) -> None:
    """ValueError, before any work, for a space that the recipe does not allow or data that cannot be trained on."""
    from tasks.search_space import check_space
    from tasks.tracked_training import check_version

    largest: dict[tuple[str, int], TrainConfig] = {}
    for each in check_space(search, config):
        key = (each.architecture, each.image_size)
        if key not in largest or each.batch_size > largest[key].batch_size:
            largest[key] = each
    for each in largest.values():
        check_version(here.mlflow_tracking_uri, here.store, version, each)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def take_up(here: Settings, version: "DatasetVersion", config: TrainConfig, search: Search) -> str:
    """Name of the study, claimed for this run. RuntimeError while another run is at work on the same search."""
    from tasks.claims import Subject, claim, claimant
    from tasks.runs import is_running, this_run
    from tasks.tuning import identity_of

    study = identity_of(version, config, search)
    subject = Subject("search", f"{version.name}/{study}")
    if not claim(here.store, subject, this_run(), is_running):
        raise RuntimeError(
            f"run {claimant(here.store, subject)} is at work on this search: wait for its end. Where its process has "
            "died, it is marked Crashed as soon as its missing heartbeats are noticed; then run this again"
        )
    return study


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def let_go(here: Settings, study: str, version: "DatasetVersion") -> None:
    """The search may be taken up again, with a larger budget for one."""
    from tasks.claims import Subject, release

    release(here.store, Subject("search", f"{version.name}/{study}"))


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def open_run(here: Settings, study: str, version: "DatasetVersion", config: TrainConfig, search: Search) -> str:
    """The MLflow run of the study, new or found again, linked with this flow run both ways."""
    from tasks.registry import run_page
    from tasks.runs import this_run
    from tasks.search_runs import open_study_run

    page = f"{here.prefect_ui_url.rstrip('/')}/runs/flow-run/{flow_run.get_id()}"
    run_id = open_study_run(here.mlflow_tracking_uri, study, version, config, search, this_run(), page)
    link = run_page(here.mlflow_tracking_uri, run_id)
    create_link_artifact(
        link=link, link_text="MLflow run of the search", key=artifact_key("search-mlflow", version.name)
    )
    return run_id


@task(cache_policy=NO_CACHE)
def run_trials(
    here: Settings, study: str, run_id: str, version: "DatasetVersion", config: TrainConfig, search: Search
) -> str:
    """The trials, in processes of their own, until the budget is used up; why they ended. It holds a training slot."""
    from tasks.limits import training_slot
    from tasks.search_processes import Job, run_search
    from tasks.search_space import left_out
    from tasks.tuning import open_storage, open_study

    if partly := left_out(search):
        log.warning(partly)
    storage, uri = here.search_storage.get_secret_value(), here.mlflow_tracking_uri
    job = Job(storage, study, run_id, uri, here.store, here.cache, version.name, version.version, config, search)

    def told(trial: "FrozenTrial") -> None:
        value = "" if trial.value is None else f"{abs(trial.value):.4f}"
        log.info("trial %d: %s %s %s", trial.user_attrs["slot"], trial.state.name.lower(), value, dict(trial.params))

    with training_slot(here.training_limit):
        return run_search(open_study(open_storage(storage), study, search), job, told)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def publish(
    here: Settings,
    study: str,
    run_id: str,
    version: "DatasetVersion",
    config: TrainConfig,
    search: Search,
    why_ended: str,
) -> "Tried | None":
    """The table of trials, the picture and the best configuration to MLflow and to the run's page; the best trial."""
    from tasks import search_report
    from tasks.registry import run_page
    from tasks.search_runs import log_standing
    from tasks.search_space import with_overrides
    from tasks.tuning import best_of, importance_of, open_storage, open_study, slots_of, standing

    found = open_study(open_storage(here.search_storage.get_secret_value()), study, search)
    known, importance = standing(found, search.metric), importance_of(found)
    tried = tuple(each for each in known if each.state != "waiting" or each.slot < slots_of(search))
    best, picture = best_of(tried, search.metric), search_report.draw(search, tried, importance)
    figures = search_report.summary(tried, search, float(found.user_attrs.get("seconds", 0.0)))
    chosen = with_overrides(config, best.overrides).model_dump(mode="json") if best else {}
    log_standing(here.mlflow_tracking_uri, run_id, tried, best, chosen, picture, figures)
    title, link = f"Search on {version.name} v{version.version}", run_page(here.mlflow_tracking_uri, run_id)
    create_markdown_artifact(
        search_report.page(title, search, tried, chosen, importance, why_ended, picture, link),
        key=artifact_key("search", version.name),
        description=f"{title}: {why_ended}",
    )
    return best


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def fail_run(here: Settings, run_id: str) -> None:
    """The study's MLflow run is not going on; running the search again opens it again."""
    from tasks.tracking import close_run

    close_run(here.mlflow_tracking_uri, run_id, "FAILED")


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def trained_earlier(here: Settings, study: str, chosen: TrainConfig) -> "TrainedModel | None":
    """The version that a run of this search has trained with this very configuration."""
    from tasks.registry import TrainedModel
    from tasks.tuning import open_storage, winner_of

    told = winner_of(open_storage(here.search_storage.get_secret_value()), study)
    if told is None or told["config"] != chosen.model_dump(mode="json"):
        return None
    return TrainedModel(told["name"], told["version"], told["run_id"])


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def remember(here: Settings, study: str, chosen: TrainConfig, model: "TrainedModel") -> None:
    """What was registered stands with the study: run again, the search makes no second version of it."""
    from tasks.tuning import open_storage, set_winner

    told = {
        "config": chosen.model_dump(mode="json"),
        "name": model.name,
        "version": model.version,
        "run_id": model.run_id,
    }
    set_winner(open_storage(here.search_storage.get_secret_value()), study, told)
