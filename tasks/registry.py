"""Registered versions in MLflow: the card, weights and drift reference of each, and the aliases. Runs are in tracking.py.
Nothing here sets a global tracking address: every function takes it. A version is created after everything it consists of
is stored, so a version that exists is complete.
"""

import io
import json
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from tasks.decision import DecisionRule

if TYPE_CHECKING:
    import pyarrow as pa
    from mlflow import MlflowClient
    from torch import Tensor

    from tasks.model import ImageNetwork

CHAMPION: Final = "champion"
STAGED: Final = "staged"  # served for testing (flows/stage.py)
CARD, WEIGHTS, MLMODEL = "model/model.json", "model/weights.safetensors", "model/MLmodel"
EVALUATION, PROMOTION = "evaluation.json", "promotion.json"
REFERENCE, STATISTICS = "reference/outputs.npz", "reference/statistics.parquet"
FLOW_RUN_TAG: Final = "prefect.flow_run_id"
CANDIDATE_TAG, CHOSEN_TAG = "candidate_of", "chosen"  # of a version that is one of several, and of the one put forward
IMPORTED_TAG: Final = "imported_from_run"  # of a version that was proven elsewhere (tasks/version_transfer.py)


@dataclass(frozen=True)
class ModelCard:
    """What is needed to use a version: model/model.json of its run, beside model/weights.safetensors.

    temperature: what the logits are divided by before the softmax; cards from before it was fitted mean 1.
    """

    architecture: str
    image_size: int
    preprocessing: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rule: DecisionRule
    dataset: str
    dataset_version: int
    dataset_digest: str
    commit: str
    seed: int
    temperature: float = 1.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "ModelCard":
        fields = json.loads(text)
        rule = fields.pop("rule")
        rule = DecisionRule(tuple(rule["labels"]), tuple(rule["defect_labels"]), rule["threshold"])
        return cls(**{**fields, "mean": tuple(fields["mean"]), "std": tuple(fields["std"]), "rule": rule})


@dataclass(frozen=True)
class TrainedModel:
    """One registered version; version 7 here is version 7 in every model repository."""

    name: str
    version: int
    run_id: str


@dataclass(frozen=True)
class Reference:
    """What the model saw and answered on the validation split: drift compares production with it.

    embedding float32 [N, D], probabilities float32 [N, C], labels int64 [N] and sha256 [N] in the order of the rows;
    statistics: a table of N rows with every column of the dataset but the photograph.
    """

    embedding: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    labels: NDArray[np.int64]
    sha256: NDArray[np.str_]
    statistics: "pa.Table"


def register(
    tracking_uri: str,
    run_id: str,
    card: ModelCard,
    weights: "Mapping[str, Tensor]",
    reference: Reference,
    tags: Mapping[str, str],
) -> TrainedModel:
    """Store weights, card and drift reference with the run, then create the version; its name is that of the dataset.

    A flow run has at most one version: where it made one already, that one is returned and nothing is stored.
    """
    import pyarrow.parquet as pq
    from mlflow.exceptions import MlflowException
    from safetensors.torch import save

    from tasks.mlflow_model import mlmodel

    client = client_of(tracking_uri)
    run = client.get_run(run_id)
    flow_run_id = run.data.tags[FLOW_RUN_TAG]
    earlier = registered_by(tracking_uri, card.dataset, flow_run_id)
    if earlier is not None:
        client.set_terminated(earlier.run_id, "FINISHED")  # who died right after registering left it open
        return earlier
    outputs, statistics = io.BytesIO(), io.BytesIO()
    np.savez_compressed(
        outputs, **{name: getattr(reference, name) for name in ("embedding", "probabilities", "labels", "sha256")}
    )
    pq.write_table(reference.statistics, statistics)
    log_bytes(client, run_id, outputs.getvalue(), REFERENCE)
    log_bytes(client, run_id, statistics.getvalue(), STATISTICS)
    log_bytes(client, run_id, save({name: value.contiguous() for name, value in weights.items()}), WEIGHTS)
    log_bytes(client, run_id, card.to_json().encode(), CARD)
    log_bytes(client, run_id, mlmodel(card, run_id, reference.embedding.shape[1]).encode(), MLMODEL)
    try:
        client.create_registered_model(card.dataset, description=f"Trained on the dataset {card.dataset}")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.create_model_version(
        card.dataset,
        source=f"{run.info.artifact_uri}/{Path(CARD).parent}",  # with runs:/ MLflow's page finds no signature
        run_id=run_id,
        tags={
            FLOW_RUN_TAG: flow_run_id,
            "dataset": card.dataset,
            "dataset_version": str(card.dataset_version),
            "dataset_digest": card.dataset_digest,
            "architecture": card.architecture,
            "threshold": str(card.rule.threshold),
            "temperature": f"{card.temperature:.4g}",
            "commit": card.commit,
            **tags,
        },
    )
    client.set_terminated(run_id, "FINISHED")
    return TrainedModel(card.dataset, int(created.version), run_id)


def registered_by(tracking_uri: str, name: str, flow_run_id: str) -> TrainedModel | None:
    """The version that the flow run registered, if it got that far."""
    found = client_of(tracking_uri).search_model_versions(
        f"name = '{name}' and tags.`{FLOW_RUN_TAG}` = '{flow_run_id}'"
    )
    return TrainedModel(name, int(found[0].version), str(found[0].run_id)) if found else None


def version_of_flow_run(tracking_uri: str, name: str, flow_run_id: str) -> int:
    """The version that the training flow run registered; LookupError when it registered none."""
    found = registered_by(tracking_uri, name, flow_run_id)
    if found is None:
        raise LookupError(
            f"flow run {flow_run_id} registered no version of {name!r}: its page in the Prefect UI says why"
        )
    return found.version


def tagged_version(tracking_uri: str, name: str, tag: str, value: str) -> TrainedModel | None:
    """The newest version whose tag has this value."""
    found = client_of(tracking_uri).search_model_versions(f"name = '{name}' and tags.`{tag}` = '{value}'")
    newest = max(found, key=lambda each: int(each.version), default=None)
    return TrainedModel(name, int(newest.version), str(newest.run_id)) if newest else None


def choose_candidate(tracking_uri: str, model: TrainedModel) -> None:
    """Mark the version as the one of its scenario that is put forward."""
    client_of(tracking_uri).set_model_version_tag(model.name, str(model.version), CHOSEN_TAG, "yes")


@dataclass(frozen=True)
class Registration:
    """A registered version, and when it was registered."""

    version: int
    at: datetime


def newest_registration(tracking_uri: str, name: str) -> Registration | None:
    """The highest registered version; None when the model has none. Candidates that were not chosen do not count, nor do
    versions that were proven elsewhere: nobody trained them here, and what they were proven with is not here either.
    """
    every = client_of(tracking_uri).search_model_versions(f"name = '{name}'")
    ours = [each for each in every if IMPORTED_TAG not in each.tags]
    found = [each for each in ours if CANDIDATE_TAG not in each.tags or CHOSEN_TAG in each.tags]
    if not found:
        return None
    newest = max(found, key=lambda each: int(each.version))
    return Registration(int(newest.version), datetime.fromtimestamp(newest.creation_timestamp / 1000, UTC))


def newest_version(tracking_uri: str, name: str) -> int:
    """The highest registered version; LookupError when the model has none."""
    newest = newest_registration(tracking_uri, name)
    if newest is None:
        raise LookupError(f"model {name!r} has no version in {tracking_uri}: run its train deployment first")
    return newest.version


def log_promotion(
    tracking_uri: str, model: TrainedModel, figures: Mapping[str, float], summary: Mapping[str, Any]
) -> None:
    """What promotion measured: the figures as metrics of the version's run, everything as promotion.json."""
    client = client_of(tracking_uri)
    log_metrics(client, model.run_id, figures)
    client.log_dict(model.run_id, dict(summary), PROMOTION)
    client.set_model_version_tag(model.name, str(model.version), "promotion", str(summary.get("verdict", "")))


def run_metrics(tracking_uri: str, run_id: str) -> dict[str, float]:
    """The newest value of every metric of the run."""
    return dict(client_of(tracking_uri).get_run(run_id).data.metrics)


def load_card(tracking_uri: str, name: str, version: int) -> tuple[TrainedModel, ModelCard]:
    """The version and its card; LookupError naming what exists."""
    model = _registered(tracking_uri, name, version)
    return model, ModelCard.from_json(_artifact(tracking_uri, model.run_id, CARD).decode())


def load_weights(
    tracking_uri: str, name: str, version: int, architecture: str, classes: tuple[str, ...]
) -> "dict[str, Tensor]":
    """The tensors of the version's classifier. Raises what `require_fit` does."""
    from safetensors.torch import load

    model = require_fit(tracking_uri, name, version, architecture, classes)
    return load(_artifact(tracking_uri, model.run_id, WEIGHTS))


def require_fit(
    tracking_uri: str, name: str, version: int, architecture: str, classes: tuple[str, ...]
) -> TrainedModel:
    """The version. Raises LookupError naming what exists, ValueError when it is another architecture or knows other classes."""
    model, card = load_card(tracking_uri, name, version)
    if (card.architecture, card.rule.labels) != (architecture, classes):
        raise ValueError(
            f"{name} v{version} is a {card.architecture} for the classes {list(card.rule.labels)}: its weights do not fit "
            f"a {architecture} for {list(classes)}"
        )
    return model


def load_network(tracking_uri: str, name: str, version: int) -> "ImageNetwork":
    """The version's served graph as a torch module, on the CPU, in evaluation mode."""
    _, card = load_card(tracking_uri, name, version)
    return built(card, load_weights(tracking_uri, name, version, card.architecture, card.rule.labels))


def built(card: ModelCard, weights: "Mapping[str, Tensor]") -> "ImageNetwork":
    """The network that the card describes, with the weights in it."""
    from tasks.model import ImageNetwork, build_model

    classifier = build_model(card.architecture, len(card.rule.labels), pretrained=False)
    classifier.load_state_dict(dict(weights))
    return ImageNetwork(classifier, card.mean, card.std, card.temperature).eval()


def load_reference(tracking_uri: str, name: str, version: int) -> Reference:
    """The drift reference of the version."""
    import pyarrow.parquet as pq

    run_id = _registered(tracking_uri, name, version).run_id
    outputs = np.load(io.BytesIO(_artifact(tracking_uri, run_id, REFERENCE)))
    statistics = pq.read_table(io.BytesIO(_artifact(tracking_uri, run_id, STATISTICS)))
    return Reference(**{key: outputs[key] for key in outputs.files}, statistics=statistics)


def load_evaluation(tracking_uri: str, name: str, version: int) -> dict[str, Any]:
    """evaluation.json of the version's run."""
    run_id = _registered(tracking_uri, name, version).run_id
    loaded: dict[str, Any] = json.loads(_artifact(tracking_uri, run_id, EVALUATION))
    return loaded


def set_alias(tracking_uri: str, name: str, alias: str, version: int) -> None:
    """Point the alias at the version. MLflow keeps no history of aliases (mlflow#2169): the ledger does."""
    client_of(tracking_uri).set_registered_model_alias(name, alias, str(version))


def champion_version(tracking_uri: str, name: str, alias: str = CHAMPION) -> int | None:
    """The version that the alias points at; None when the model or the alias does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        model = client_of(tracking_uri).get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    version = model.aliases.get(alias)
    return None if version is None else int(version)


def run_page(tracking_uri: str, run_id: str) -> str:
    """Address of the run's page in the MLflow UI."""
    experiment = client_of(tracking_uri).get_run(run_id).info.experiment_id
    return f"{tracking_uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


def client_of(tracking_uri: str) -> "MlflowClient":
    """A client of that server for both tracking and registry."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri, registry_uri=tracking_uri)


def _registered(tracking_uri: str, name: str, version: int) -> TrainedModel:
    versions = client_of(tracking_uri).search_model_versions(f"name = '{name}'")
    for found in versions:
        if int(found.version) == version:
            return TrainedModel(name, version, str(found.run_id))
    known = sorted(int(found.version) for found in versions)
    raise LookupError(f"model {name!r} has no version {version} in {tracking_uri}; registered: {known or 'nothing'}")


def _artifact(tracking_uri: str, run_id: str, path: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="tirewatch-") as directory:
        return Path(client_of(tracking_uri).download_artifacts(run_id, path, directory)).read_bytes()


def log_metrics(client: "MlflowClient", run_id: str, values: Mapping[str, float], step: int = 0) -> None:
    """One request for all of them; a value that is not a number (a rate of nothing) is left out."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    numbers = [Metric(key, float(value), now, step) for key, value in values.items() if not math.isnan(value)]
    client.log_batch(run_id, metrics=numbers)


def log_bytes(client: "MlflowClient", run_id: str, data: bytes, path: str) -> None:
    """The bytes as the artifact `path` of the run."""
    with tempfile.TemporaryDirectory(prefix="tirewatch-") as directory:
        local = Path(directory) / Path(path).name
        local.write_bytes(data)
        folder = str(Path(path).parent)
        client.log_artifact(run_id, str(local), None if folder == "." else folder)
