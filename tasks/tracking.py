"""One MLflow run of training: what went in, how it went epoch by epoch, what came out. The versions are in registry.py."""

import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tasks.passport import commit, passport
from tasks.recipe import NOT_IDENTITY, TrainConfig
from tasks.registry import EVALUATION, FLOW_RUN_TAG, client_of, log_metrics
from tasks.runs import this_stage

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from tasks.dataset import DatasetVersion
    from tasks.training import Epoch
    from tasks.training_report import Outcome

log = logging.getLogger(__name__)

TRAINING_TAG: Final = "tirewatch.training"
_DIGEST_LENGTH: Final = 36  # of the column in MLflow's database; the whole digest stands in the source and the tags


def open_run(
    tracking_uri: str,
    dataset: "DatasetVersion",
    config: TrainConfig,
    flow_run_id: str,
    flow_run_url: str,
    training: str | None = None,
    has_checkpoint: bool = False,
    checkpoints: str = "",
) -> str:
    """The MLflow run of this training in the experiment of the dataset: parameters once, the dataset as input, the environment.

    training: the identity of the work (tasks/checkpoints.py), where this flow run may take up what a dead one left: its MLflow
    run goes on. checkpoints: where they lie until it ends. What a flow run left open otherwise is closed as killed, so that
    no metric series mixes two attempts.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

    client = client_of(tracking_uri)
    experiment_id = experiment_of(client, dataset.name)
    known = _runs_with(client, experiment_id, TRAINING_TAG, training) if training else []
    run_id = _to_continue(known, has_checkpoint)
    for left in [*known, *_runs_with(client, experiment_id, FLOW_RUN_TAG, flow_run_id)]:
        if left.info.status == "RUNNING" and left.info.run_id != run_id:
            client.set_terminated(left.info.run_id, "KILLED")
    digest = dataset.digest.removeprefix("sha256:")
    tags = {
        FLOW_RUN_TAG: flow_run_id,
        "prefect.flow_run_url": flow_run_url,
        "mlflow.note.content": f"[Prefect run]({flow_run_url})",
        "mlflow.source.git.commit": commit(),
        **_identity(dataset, config),
        **({TRAINING_TAG: training, "checkpoints": checkpoints} if training else {}),
    }
    if run_id is None:
        name = f"{dataset.name} v{dataset.version}"
        run_id = str(client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)
    else:
        log.info("going on in the MLflow run %s", run_id)
        client.update_run(run_id, "RUNNING")
        tags["resumed"] = "the last time by the Prefect run above"
    # Everything below may have been done by a run that died half-way: each is the same when it is done again.
    client.log_batch(
        run_id,
        params=[Param(key, str(value)) for key, value in flat(config.model_dump(exclude=NOT_IDENTITY)).items()],
        tags=[
            RunTag("mlflow.runName", f"{dataset.name} v{dataset.version} {config.architecture}"),
            *(RunTag(key, value) for key, value in tags.items()),
        ],
    )
    recorded = Dataset(
        name=f"{dataset.name} v{dataset.version}",
        digest=digest[:_DIGEST_LENGTH],
        source_type="s3",
        source=json.dumps({"uri": dataset.uri, "version": dataset.version, "digest": dataset.digest}),
        profile=json.dumps({"num_rows": sum(dataset.splits.values()), **dataset.splits}),
    )
    client.log_inputs(run_id, [DatasetInput(recorded, [InputTag("mlflow.data.context", "training")])])
    client.log_dict(run_id, passport(), "passport.json")
    return run_id


def log_epoch(tracking_uri: str, run_id: str, epoch: "Epoch") -> None:
    """Loss, Accuracy, Precision, Recall and F1_Score of both splits, and the learning rate, as series over the epochs."""
    log_metrics(client_of(tracking_uri), run_id, series_of(epoch), epoch.number)


def logged_epochs(tracking_uri: str, run_id: str) -> set[int]:
    """Epochs whose figures the run has: one request logs all series of an epoch, so one of them tells for all."""
    return {point.step for point in client_of(tracking_uri).get_metric_history(run_id, "train/Loss")}


def series_of(epoch: "Epoch") -> dict[str, float]:
    """What one epoch adds to the metric series, in MLflow and in the TensorBoard log."""
    values = {
        "learning_rate": epoch.learning_rate,
        "epoch_end_seconds": epoch.seconds,
        "val/Refined_Loss": epoch.refined_loss,
    }
    for split, loss, found in (
        ("train", epoch.train_loss, epoch.train),
        ("val", epoch.validation_loss, epoch.validation),
    ):
        values |= {
            f"{split}/Loss": loss,
            f"{split}/Accuracy": found.accuracy,
            f"{split}/Balanced_Accuracy": found.balanced_accuracy,
            f"{split}/Precision": found.precision,
            f"{split}/Recall": found.recall,
            f"{split}/F1_Score": found.f1,
        }
    return values


def log_outcome(tracking_uri: str, run_id: str, outcome: "Outcome", drawn: Mapping[str, bytes]) -> None:
    """The final figures as metrics and in the run's description, everything that was found as evaluation.json, the pictures,
    the tables and the TensorBoard log as artifacts.
    """
    from tasks.training_report import as_dict, files, note, summary_metrics

    client = client_of(tracking_uri)
    link = client.get_run(run_id).data.tags.get("mlflow.note.content", "").split("\n", 1)[0]
    if not client.get_metric_history(
        run_id, "train_seconds"
    ):  # else the run died after this, and its figures are the same
        log_metrics(client, run_id, summary_metrics(outcome))
    client.log_dict(run_id, as_dict(outcome), EVALUATION)
    with tempfile.TemporaryDirectory(prefix="tirewatch-") as folder:
        for path, data in files(outcome, drawn).items():
            local = Path(folder) / path
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(data)
        write_tensorboard(Path(folder) / "tensorboard", outcome.trained.epochs)
        client.log_artifacts(run_id, folder)
    client.set_tag(run_id, "mlflow.note.content", f"{link}\n\n{note(outcome)}")


def write_tensorboard(folder: Path, epochs: Sequence["Epoch"]) -> None:
    """The series over all epochs, those before a resumption too, as one event file; times are those of the epochs' ends."""
    from torch.utils.tensorboard import SummaryWriter

    began = time.time() - (epochs[-1].seconds if epochs else 0.0)
    with SummaryWriter(str(folder), filename_suffix=".written") as writer:
        for epoch in epochs:
            for name, value in series_of(epoch).items():
                writer.add_scalar(name, value, epoch.number, began + epoch.seconds)
    [written] = folder.glob("*.written")
    written.rename(folder / "events.out.tfevents.training")  # one name: written again it replaces the first


def close_run(tracking_uri: str, run_id: str, status: str, reasons: tuple[str, ...] = ()) -> None:
    """End a run that registered nothing; status FINISHED or FAILED, the reasons as a tag."""
    client = client_of(tracking_uri)
    if reasons:
        client.set_tag(run_id, "not_registered", "; ".join(reasons))
    client.set_terminated(run_id, status)


def experiment_of(client: "MlflowClient", name: str) -> str:
    """Id of the experiment, made when it is new; two runs may make it at the same moment."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return experiment_of(client, name)


def _runs_with(client: "MlflowClient", experiment_id: str, tag: str, value: str) -> list[Any]:
    """Newest first."""
    return list(
        client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'", order_by=["attributes.start_time DESC"])
    )


def _to_continue(known: Sequence[Any], has_checkpoint: bool) -> str | None:
    """The run of the work that was left: the newest one where there is a checkpoint; without one only a run that died before
    its first epoch was told, because a second attempt at told epochs is another run.
    """
    if not known:
        return None
    newest = known[0]
    barely_begun = newest.info.status != "FINISHED" and not newest.data.metrics
    return str(newest.info.run_id) if has_checkpoint or barely_begun else None


def _identity(dataset: "DatasetVersion", config: TrainConfig) -> dict[str, str]:
    return {
        "dataset": dataset.name,
        "dataset_version": str(dataset.version),
        "dataset_digest": dataset.digest,
        "architecture": config.architecture,
        "recipe": this_stage(),
        "mlflow.source.name": this_stage(),
        "mlflow.source.type": "JOB",
    }


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            found |= flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner
    return found
