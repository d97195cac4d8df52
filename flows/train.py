"""train: a dataset version becomes a registered model version, or the run says why it does not.

Makes an MLflow run (parameters, series over the epochs, evaluation, weights, drift reference), a registered version named
like the dataset, a report with curves on the run's page, and the event `tirewatch.model.registered`, which starts promotion.
Needs S3, MLflow and the Prefect server. By hand:

    prefect deployment run 'train/tire' -p config='{"epochs": 10}'

The test split is read once, after everything has been decided, and never by training or selection. A run that an event or a
schedule started (it has an `occasion`) trains only when its deployment has not yet decided about this dataset version.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.settings import Settings, settings
from tasks.recipe import TrainConfig, below_minimum
from tasks.runs import artifact_key, is_alive, is_running, this_run, this_stage
from tasks.start import StartRule
from tasks.storage import NETWORK_RETRY, Store

if TYPE_CHECKING:
    from tasks.checkpoints import Undertaking
    from tasks.claims import Subject
    from tasks.dataset import DatasetVersion
    from tasks.judgement import Finding, Judged
    from tasks.registry import TrainedModel
    from tasks.samples import Samples
    from tasks.training import Trained

log = logging.getLogger(__name__)


@flow(name="train", flow_run_name="train {dataset}")
def train(
    dataset: str,
    dataset_version: int | None = None,
    config: TrainConfig = TrainConfig(),
    start: StartRule = StartRule(),
    occasion: str | None = None,
    candidate_of: str | None = None,
    seed: int | None = None,
) -> "State[TrainedModel | None]":
    """Train on a dataset version, judge on its validation split, register what reaches the minimum quality.

    Args:
        dataset: Name of the dataset, and of the registered model.
        dataset_version: Version of the dataset; the newest one when left empty.
        config: What is trained, and how.
        start: When a new dataset version is worth a training. Not asked by hand.
        occasion: The event or schedule that started this run. Empty by hand: then it trains whatever was decided before.
        candidate_of: Given by `scenario`: what is registered waits, unannounced, until it is chosen among others.
        seed: Instead of the configuration's, for the same training over again by chance: `-p seed=2`.
    """
    here = settings()
    config = config if seed is None else TrainConfig.model_validate({**config.model_dump(), "seed": seed})
    version = find_version(here.store, dataset, dataset_version)
    if occasion and (why := reason_to_wait(here.store, version, start)):
        return Completed(name="Unchanged", message=why)
    check(here, version, config)
    work = take_up(here.store, version, config)
    model = registered_earlier(here, work)
    if model is None:
        training, validation = (load(here.store, version, split, config) for split in ("train", "val"))
        with mlflow_run(here, version, config, work) as run_id:
            trained = fit(here, run_id, version, training, validation, config, work)
            judged = judge(here.store, trained, validation, version, config)
            reasons = below_minimum(judged.validation.evaluation, config)
            test = None if reasons else final_test(here.store, version, judged, config)
            publish_report(here, run_id, version, trained, judged, validation, test, reasons, config)
            if reasons:
                close(here, run_id, reasons)
                if candidate_of is None:
                    decided(here.store, version, "below minimum", {"reasons": list(reasons)})
                done(work)
                return Completed(name="BelowMinimum", message=f"{dataset} v{version.version}: {'; '.join(reasons)}")
            model = register_model(here, run_id, version, judged, validation, config, candidate_of, work)
    if candidate_of is None:
        decided(here.store, version, "registered", {"model_version": model.version})
        announce(model, version)
    done(work)
    return Completed(message=f"{model.name} v{model.version} from {dataset} v{version.version}", data=model)


@contextmanager
def mlflow_run(here: Settings, version: "DatasetVersion", config: TrainConfig, work: "Undertaking") -> Iterator[str]:
    """The work's MLflow run, linked with this flow run both ways; failed when what is done inside fails."""
    from tasks.checkpoints import Superseded, has_checkpoint
    from tasks.registry import run_page
    from tasks.tracking import close_run, open_run

    uri, flow_run_id = here.mlflow_tracking_uri, str(flow_run.get_id())
    page = f"{here.prefect_ui_url.rstrip('/')}/runs/flow-run/{flow_run_id}"
    identity = work.identity if work.resumable else None
    where = work.store.uri(work.folder)
    run_id = open_run(uri, version, config, flow_run_id, page, identity, has_checkpoint(work), where)
    create_link_artifact(link=run_page(uri, run_id), link_text="MLflow run", key=artifact_key("mlflow", version.name))
    try:
        yield run_id
    except Superseded:  # the run goes on in other hands
        raise
    except BaseException:  # cancellation too: no run may stay open for ever
        close_run(uri, run_id, "FAILED")
        raise


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def find_version(store: Store, dataset: str, version: int | None) -> "DatasetVersion":
    """The dataset version to train on. Raises LookupError saying what exists."""
    from tasks.dataset import newest_version, open_version

    if version is not None:
        return open_version(store, dataset, version)
    newest = newest_version(store, dataset)
    if newest is None:
        raise LookupError(f"dataset {dataset!r} has no version yet: put a batch under incoming/{dataset}/ first")
    return newest


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def reason_to_wait(store: Store, version: "DatasetVersion", start: StartRule) -> str | None:
    """Why this deployment must not train on the version now: it has decided, another run is at it, or too little is new."""
    from tasks.claims import reason_to_leave
    from tasks.start import too_little_new

    subject = subject_of(version)
    if why := reason_to_leave(store, subject, this_run(), is_alive, f"{version.name} v{version.version}"):
        return why
    if why := too_little_new(store, subject.stage, version, start):
        decided(store, version, "not enough new photographs", {"reason": why})
    return why


def subject_of(version: "DatasetVersion") -> "Subject":
    """What this deployment decides about: the dataset version."""
    from tasks.claims import version_subject

    return version_subject(this_stage(), version.name, version.version)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def decided(store: Store, version: "DatasetVersion", outcome: str, figures: Mapping[str, Any]) -> None:
    """Writes down what became of the dataset version here: repeated events and `sweep` read it."""
    from tasks.claims import Verdict, write_verdict

    known = {"dataset": version.name, "photographs": sum(version.splits.values())}
    write_verdict(store, subject_of(version), Verdict(outcome, this_run(), figures={**known, **figures}))


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def check(here: Settings, version: "DatasetVersion", config: TrainConfig) -> None:
    """ValueError or LookupError, before a photograph is read, for data and a recipe that do not go together."""
    from tasks.tracked_training import check_version

    check_version(here.mlflow_tracking_uri, here.store, version, config)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def take_up(store: Store, version: "DatasetVersion", config: TrainConfig) -> "Undertaking":
    """This training, with the checkpoints of a dead run at the same work; a living one is left alone."""
    from tasks.checkpoints import undertake

    return undertake(store, version, config, this_stage(), this_run(), is_running)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def done(work: "Undertaking") -> None:
    """Nothing is left to take up: the next run with this configuration trains anew."""
    from tasks.checkpoints import conclude

    conclude(work)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def registered_earlier(here: Settings, work: "Undertaking") -> "TrainedModel | None":
    """What an earlier attempt registered, of this flow run or of the dead one it took over from: no second version is made."""
    from tasks.registry import client_of, registered_by

    uri, runs = here.mlflow_tracking_uri, (str(flow_run.get_id()), work.predecessor)
    found = next(filter(None, (registered_by(uri, work.dataset, run) for run in runs if run)), None)
    if found:
        client_of(uri).set_terminated(found.run_id, "FINISHED")  # the dead run may have left it open
    return found


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False, task_run_name="load {split}")
def load(store: Store, version: "DatasetVersion", split: str, config: TrainConfig) -> "Samples":
    """A split at the size the network sees: from this machine's cache, decoded into it where it is not there yet."""
    from tasks.model import require_size
    from tasks.sample_cache import load_samples

    require_size(config.architecture, config.image_size)
    return load_samples(store, version, split, config.image_size, settings().cache)


@task(cache_policy=NO_CACHE, persist_result=False)
def fit(
    here: Settings,
    run_id: str,
    version: "DatasetVersion",
    training: "Samples",
    validation: "Samples",
    config: TrainConfig,
    work: "Undertaking",
) -> "Trained":
    """The training loop, from its newest checkpoint; every epoch goes to MLflow, to the log and to the run's page."""
    from tasks.tracked_training import train_tracked

    if config.deterministic:  # read by cuBLAS when it starts: without it torch refuses on a GPU
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    uri, limit = here.mlflow_tracking_uri, here.training_limit
    return train_tracked(uri, run_id, version, training, validation, config, work, limit)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False)
def judge(
    store: Store, trained: "Trained", validation: "Samples", version: "DatasetVersion", config: TrainConfig
) -> "Judged":
    """Temperature and operating threshold, chosen on the validation split, and that split's figures under both."""
    from tasks.dataset import read_table
    from tasks.judgement import judge_validation

    rows = read_table(store, version, "val")
    return judge_validation(trained.network, validation, rows, version.classes, config)


def final_test(store: Store, version: "DatasetVersion", judged: "Judged", config: TrainConfig) -> "Finding | None":
    """The one look at the test split, after weights, temperature and threshold are final; None when the version has none."""
    from tasks.dataset import read_table
    from tasks.judgement import judge_test

    if not version.splits.get("test"):
        log.warning("%s v%d has no test split: promotion will lack evidence", version.name, version.version)
        return None
    test = load(store, version, "test", config)
    return judge_test(judged, test, read_table(store, version, "test"))


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False)
def publish_report(
    here: Settings,
    run_id: str,
    version: "DatasetVersion",
    trained: "Trained",
    judged: "Judged",
    validation: "Samples",
    test: "Finding | None",
    reasons: tuple[str, ...],
    config: TrainConfig,
) -> None:
    """Figures, tables, curves and heat maps to MLflow; the page with all of it to the Prefect UI."""
    from tasks.explanation import explain
    from tasks.registry import run_page
    from tasks.tracking import log_outcome
    from tasks.training_report import Outcome, page, pictures

    title = f"{version.name} on dataset version {version.version}"
    heat = explain(judged.network, validation.images, judged.validation)
    outcome = Outcome(title, config, trained, judged, test, reasons, heat)
    drawn = pictures(outcome)
    log_outcome(here.mlflow_tracking_uri, run_id, outcome, drawn)
    create_markdown_artifact(
        page(outcome, drawn, run_page(here.mlflow_tracking_uri, run_id)),
        key=artifact_key("training", version.name),
        description=f"{title}: validation accuracy {judged.validation.evaluation.figures.accuracy:.4f}",
    )


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def close(here: Settings, run_id: str, reasons: tuple[str, ...]) -> None:
    """End the MLflow run of a model that is not registered, with the reasons."""
    from tasks.tracking import close_run

    close_run(here.mlflow_tracking_uri, run_id, "FINISHED", reasons)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False)
def register_model(
    here: Settings,
    run_id: str,
    version: "DatasetVersion",
    judged: "Judged",
    validation: "Samples",
    config: TrainConfig,
    candidate_of: str | None,
    work: "Undertaking",
) -> "TrainedModel":
    """Weights, card and drift reference into the run, then the version; a repetition finds it made."""
    from tasks.checkpoints import require_ours
    from tasks.images import CURRENT
    from tasks.model import normalisation
    from tasks.passport import commit
    from tasks.registry import CANDIDATE_TAG, ModelCard, Reference, register

    require_ours(work)
    mean, std = normalisation(config.architecture)
    card = ModelCard(
        architecture=config.architecture,
        image_size=config.image_size,
        preprocessing=CURRENT,
        mean=mean,
        std=std,
        rule=judged.rule,
        dataset=version.name,
        dataset_version=version.version,
        dataset_digest=version.digest,
        commit=commit(),
        seed=config.seed,
        temperature=judged.calibration.temperature,
    )
    reference = Reference(
        embedding=judged.outputs["embedding"],
        probabilities=judged.outputs["probabilities"],
        labels=validation.labels,
        sha256=validation.sha256,
        statistics=judged.rows,
    )
    found = judged.validation.evaluation.figures
    tags = {
        "recipe": this_stage(),
        "quality": f"validation accuracy {found.accuracy:.4f}, balanced {found.balanced_accuracy:.4f}",
        **({CANDIDATE_TAG: candidate_of} if candidate_of else {}),
    }
    return register(here.mlflow_tracking_uri, run_id, card, judged.network.classifier.state_dict(), reference, tags)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def announce(model: "TrainedModel", version: "DatasetVersion") -> None:
    """The event that starts promotion; sent again it is the same event."""
    from tasks.events import emit

    payload: dict[str, Any] = {
        "model": model.name,
        "version": model.version,
        "dataset": version.name,
        "dataset_version": version.version,
    }
    emit("tirewatch.model.registered", f"tirewatch.model.{model.name}", payload)
