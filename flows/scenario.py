"""scenario: declared configurations are trained on a dataset version, and the best of them is put forward for promotion.

Each candidate is a run of `train` and is registered when it reaches its minimum quality; all are shown in one table. Only the
chosen one is announced (`tirewatch.model.registered`), so only that one is promoted. Needs S3, MLflow and the Prefect
server. By hand:

    prefect deployment run 'scenario/tire'

A scenario that was killed goes on when it is run again: what is trained stays, what was begun goes on from its checkpoint.
It may be started by `tirewatch.dataset.version.created` in place of `train` (prefect.yaml, docs/tuning.md).
"""

import time
from typing import TYPE_CHECKING

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.settings import Settings, settings
from flows.train import announce, check, decided, find_version, reason_to_wait, train
from tasks.candidates import Scenario, Trained
from tasks.recipe import TrainConfig
from tasks.runs import artifact_key
from tasks.start import StartRule
from tasks.storage import NETWORK_RETRY

if TYPE_CHECKING:
    from tasks.dataset import DatasetVersion
    from tasks.registry import TrainedModel


@flow(name="scenario", flow_run_name="scenario {dataset}")
def scenario(
    dataset: str,
    scenario: Scenario,
    dataset_version: int | None = None,
    config: TrainConfig = TrainConfig(),
    start: StartRule = StartRule(),
    occasion: str | None = None,
) -> "State[TrainedModel | None]":
    """Train every candidate within the budget, compare them on the validation split, announce the chosen one.

    Args:
        dataset: Name of the dataset, and of the registered models.
        scenario: The candidates, the metric that decides, and the budget.
        dataset_version: Version of the dataset; the newest one when left empty.
        config: The recipe that the candidates differ from.
        start: When a new dataset version is worth it. Not asked by hand.
        occasion: The event or schedule that started this run. Empty by hand.
    """
    from tasks.candidates import choose, configurations

    here = settings()
    version = find_version(here.store, dataset, dataset_version)
    configs = configurations(scenario, config)
    if occasion and (why := reason_to_wait(here.store, version, start)):
        return Completed(name="Unchanged", message=why)
    for each in configs.values():
        check(here, version, each)
    trained = [known_result(here, version, name, each, scenario) for name, each in configs.items()]
    for place, (name, each) in enumerate(configs.items()):
        if trained[place].outcome == "not trained" and sum(one.seconds for one in trained) < scenario.minutes * 60:
            trained[place] = train_candidate(here, version, name, each, scenario)
    chosen = choose(trained, scenario.metric)
    show(version, scenario, trained, chosen)
    if chosen is None or chosen.model is None:
        if failed := [f"{each.name} {each.outcome}" for each in trained if each.outcome.startswith("failed")]:
            raise RuntimeError(f"nothing is decided about {dataset} v{version.version}: {'; '.join(failed)}")
        decided(here.store, version, "below minimum", {"candidates": len(trained)})
        return Completed(
            name="BelowMinimum", message=f"no candidate on {dataset} v{version.version} reached its minimum"
        )
    put_forward(here, chosen.model)
    decided(here.store, version, "registered", {"model_version": chosen.model.version, "candidate": chosen.name})
    announce(chosen.model, version)
    return Completed(message=f"{chosen.name} is put forward as {dataset} v{chosen.model.version}", data=chosen.model)


def train_candidate(
    here: Settings, version: "DatasetVersion", name: str, config: TrainConfig, scenario: Scenario
) -> Trained:
    """A run of `train` that registers without announcing. A training that fails leaves the others their chance."""
    began = time.monotonic()
    state = train(version.name, version.version, config, candidate_of=work_of(version, config), return_state=True)
    seconds = time.monotonic() - began
    if not state.is_completed():
        return Trained(name, f"failed: {state.message}"[:200], seconds)
    remember(here, version, config, state.name or "", seconds)
    return known_result(here, version, name, config, scenario)


def work_of(version: "DatasetVersion", config: TrainConfig) -> str:
    """Identity of one candidate: the data and what decides the result of its training."""
    from tasks.checkpoints import identity_of

    return identity_of(version, config, "scenario")


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, task_run_name="look for {name}")
def known_result(
    here: Settings, version: "DatasetVersion", name: str, config: TrainConfig, scenario: Scenario
) -> Trained:
    """What came of the candidate, in this run or an earlier one; `not trained` where nothing has."""
    from tasks.candidates import evaluated_on, value_of
    from tasks.claims import Subject, read_verdict
    from tasks.registry import CANDIDATE_TAG, load_evaluation, load_reference, tagged_version

    work = work_of(version, config)
    verdict = read_verdict(here.store, Subject("candidate", f"{version.name}/{work}"))
    seconds = float(verdict.figures["seconds"]) if verdict else 0.0
    model = tagged_version(here.mlflow_tracking_uri, version.name, CANDIDATE_TAG, work)
    if model is None:
        return Trained(name, verdict.outcome if verdict else "not trained", seconds)
    evaluation = load_evaluation(here.mlflow_tracking_uri, model.name, model.version)
    reference = load_reference(here.mlflow_tracking_uri, model.name, model.version)
    return Trained(
        name=name,
        outcome="registered",
        seconds=seconds,
        model=model,
        value=value_of(scenario.metric, evaluation, config.threshold),
        figures=evaluation["validation"]["figures"],
        evaluated=evaluated_on(reference),
    )


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def remember(here: Settings, version: "DatasetVersion", config: TrainConfig, state: str, seconds: float) -> None:
    """How long the candidate took, and that it missed its minimum where it did: run again, it is not trained again."""
    from tasks.claims import Subject, Verdict, write_verdict
    from tasks.runs import this_run

    subject = Subject("candidate", f"{version.name}/{work_of(version, config)}")
    outcome = "below minimum" if state == "BelowMinimum" else "registered"
    write_verdict(here.store, subject, Verdict(outcome, this_run(), figures={"seconds": seconds}))


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def put_forward(here: Settings, model: "TrainedModel") -> None:
    """Marks the version as chosen: from now on it counts as the newest registration, which promotion and sweep look at."""
    from tasks.registry import choose_candidate

    choose_candidate(here.mlflow_tracking_uri, model)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def show(version: "DatasetVersion", scenario: Scenario, trained: list[Trained], chosen: Trained | None) -> None:
    """The table of all candidates on the run's page."""
    from tasks.candidates import page

    left = [each.name for each in trained if each.outcome == "not trained"]
    note = f"The time of {scenario.minutes:g} minutes left out {', '.join(left)}." if left else ""
    title = f"Candidates on {version.name} v{version.version}"
    text = page(title, scenario.metric, trained, chosen, note)
    create_markdown_artifact(
        text, key=artifact_key("scenario", version.name), description=f"{title}: {chosen.name if chosen else 'none'}"
    )
