"""labels: which labels of a dataset version are probably wrong, and a review batch for the person who decides.

Makes a ranking of all labels on S3 (`labels/<dataset>/v<n>/`), a page with pictures and a table on the run's page, and a review
batch (`review/<dataset>/v<n>/annotations.json`) with the suggestions, which becomes a correction once a person has edited it
and `tirewatch labels submit` has sent it. Needs the bucket, the Prefect server and ImageNet weights (the extra `demo`), or
MLflow where the champion's network is asked. By hand:

    prefect deployment run 'labels/tire'

The state's name says what was found: Suspects or Clean. Running again with the same options changes nothing.
"""

import logging
from typing import TYPE_CHECKING, Any, Literal

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict, Field

from flows.settings import Settings, settings
from tasks.recipe import TrainConfig
from tasks.storage import NETWORK_RETRY, Store

if TYPE_CHECKING:
    from tasks.dataset import DatasetVersion
    from tasks.label_evidence import LabelledRows
    from tasks.label_review import Findings
    from tasks.labels import Probabilities

log = logging.getLogger(__name__)

_METHOD = 1  # changes with what is computed, so that an older ranking is not taken for one of today


class LabelOptions(BaseModel):
    """What judges the labels, and how much of it a person is shown."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    judge: Literal["pretrained", "champion", "training"] = Field(
        "pretrained",
        description="Features of EfficientNet-Lite0 with ImageNet weights; those of the champion's network, which has seen "
        "most of these labels; or the recipe's own training, once for each fold",
    )
    splits: tuple[Literal["train", "val", "test"], ...] = Field(
        ("train", "val", "test"), min_length=1, description="Splits whose labels are judged"
    )
    image_size: int = Field(160, ge=32, le=768, description="Side in pixels of what the pretrained network sees")
    folds: int = Field(5, ge=2, le=20, description="Parts of the cross validation")
    rounds: int = Field(
        3, ge=1, le=10, description="Draws of the folds whose mean is taken; one where the judge trains"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the folds")
    shown: int = Field(36, ge=0, le=60, description="Photographs on the page and in the table")
    review: int = Field(100, ge=1, le=2000, description="Suspects in the review batch, at most")


@flow(name="labels", flow_run_name="labels {dataset}")
def labels(
    dataset: str,
    dataset_version: int | None = None,
    options: LabelOptions = LabelOptions(),
    config: TrainConfig = TrainConfig(),
) -> "State[Findings | None]":
    """Judge every label by models that have not seen it; rank, show and offer for review what they doubt.

    Args:
        dataset: Name of the dataset.
        dataset_version: Version of the dataset; the newest one when left empty.
        options: What judges the labels, and how much of it a person is shown.
        config: The recipe's training, for the judge `training`.
    """
    here = settings()
    version = find_version(here.store, dataset, dataset_version)
    method = method_of(here, version, options, config)
    findings = examined_before(here.store, version, method)
    if findings is None:
        rows = read_labels(here.store, version, options)
        if options.judge == "training":
            probabilities = by_training(here, version, rows, options, config)
        else:
            probabilities = by_network(here, version, rows, options, method)
        findings = decide(here.store, version, rows, probabilities, method)
    offered = offer_review(here.store, findings, options)
    show(here.store, version, findings, options, offered)
    return final_state(findings, offered)


def final_state(findings: "Findings", offered: int) -> "State[Findings | None]":
    """Whether there is something to look at is the name of the state, for triggers and people."""
    from tasks.label_report import headline

    at = f"; {offered} to review in {findings.review_prefix}" if offered else ""
    return Completed(name="Suspects" if offered else "Clean", message=f"{headline(findings)}{at}", data=findings)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def find_version(store: Store, dataset: str, version: int | None) -> "DatasetVersion":
    """The dataset version whose labels are judged. Raises LookupError saying what exists."""
    from tasks.dataset import open_version, read_records

    if version is not None:
        return open_version(store, dataset, version)
    return read_records(store, dataset)[-1].version


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def method_of(here: Settings, version: "DatasetVersion", options: LabelOptions, config: TrainConfig) -> dict[str, Any]:
    """Everything that the ranking depends on beside the version. Raises LookupError where a champion is asked and none is."""
    from tasks.registry import champion_version

    common = {"judge": options.judge, "splits": list(options.splits), "folds": options.folds, "seed": options.seed}
    if options.judge == "training":
        return {**common, "config": config.model_dump(mode="json"), "method": _METHOD}
    if options.judge == "pretrained":
        network: dict[str, Any] = {"network": "efficientnet_lite0", "image_size": options.image_size}
    else:
        champion = champion_version(here.mlflow_tracking_uri, version.name)
        if champion is None:
            raise LookupError(f"{version.name} has no champion yet: set judge to pretrained or training")
        network = {"network": f"{version.name} v{champion}", "champion": champion}
    return {**common, **network, "rounds": options.rounds, "method": _METHOD}


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def examined_before(store: Store, version: "DatasetVersion", method: dict[str, Any]) -> "Findings | None":
    """What an earlier run with this very method found about the version; None where there was none."""
    from tasks.label_review import identity_of, read_findings

    try:
        earlier = read_findings(store, version.name, version.version)
    except LookupError:
        return None
    return earlier if earlier.identity == identity_of(version, method) else None


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False)
def read_labels(store: Store, version: "DatasetVersion", options: LabelOptions) -> "LabelledRows":
    """The labels, and their groups. Raises ValueError when they cannot be judged, before any photograph is read."""
    from tasks.label_evidence import groups_to_train
    from tasks.label_evidence import read_labels as read
    from tasks.labels import groups_needed, require_judgeable

    rows = read(store, version, options.splits)
    needed = groups_to_train(options.folds) if options.judge == "training" else groups_needed(options.folds)
    require_judgeable(rows.labels, rows.groups, rows.classes, needed, more_splits=len(set(options.splits)) < 3)
    return rows


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False)
def by_network(
    here: Settings, version: "DatasetVersion", rows: "LabelledRows", options: LabelOptions, method: dict[str, Any]
) -> "Probabilities":
    """Out-of-sample probabilities by a linear model on the features of a network; while it looks it holds a training slot."""
    from tasks.images import CURRENT
    from tasks.label_evidence import features_of
    from tasks.labels import by_features
    from tasks.limits import training_slot
    from tasks.model import build_model, image_network
    from tasks.registry import load_card, load_network

    if options.judge == "champion":
        name, number = version.name, method["champion"]
        _, card = load_card(here.mlflow_tracking_uri, name, number)
        network, size = load_network(here.mlflow_tracking_uri, name, number), card.image_size
        preprocessing = card.preprocessing
    else:
        network = image_network("efficientnet_lite0", build_model("efficientnet_lite0", 2, pretrained=True))
        size, preprocessing = options.image_size, CURRENT

    def progress(done: int) -> None:
        log.info("features of %d of %d photographs", done, len(rows))

    with training_slot(here.training_limit):
        features = features_of(here.store, version, options.splits, network, size, preprocessing, progress)
    probabilities, strength = by_features(
        features, rows.labels, rows.groups, len(rows.classes), options.folds, options.rounds, options.seed
    )
    log.info("the inverse strength %g of the ridge predicts the given labels best", strength)
    return probabilities


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False)
def by_training(
    here: Settings, version: "DatasetVersion", rows: "LabelledRows", options: LabelOptions, config: TrainConfig
) -> "Probabilities":
    """Out-of-sample probabilities by the recipe's training, once for each fold; while it trains it holds a training slot."""
    from tasks.dataset import read_rows
    from tasks.label_evidence import by_trainings, training_folds
    from tasks.limits import training_slot
    from tasks.samples import read_samples

    folds = training_folds(rows, config, options.folds, options.seed)
    batches = read_rows(here.store, version, options.splits, ["image", "label", "sha256"])
    samples = read_samples(batches, len(rows), rows.classes, config.image_size)
    with training_slot(here.training_limit):
        return by_trainings(samples, folds, rows.classes, config, log.info)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def decide(
    store: Store,
    version: "DatasetVersion",
    rows: "LabelledRows",
    probabilities: "Probabilities",
    method: dict[str, Any],
) -> "Findings":
    """Confident learning on the probabilities; ranking and figures to S3."""
    from tasks.label_review import Findings, identity_of, keep, ranking
    from tasks.labels import opinion

    found = opinion(rows.labels, probabilities, rows.classes)
    findings = Findings(
        dataset=version.name,
        version=version.version,
        digest=version.digest,
        identity=identity_of(version, method),
        method=method,
        classes=rows.classes,
        photographs=len(rows),
        suspects=int(found.suspect.sum()),
        error_rate=found.error_rate,
        agreement=found.agreement,
        noise=found.noise,
    )
    keep(store, findings, ranking(rows, probabilities, found))
    return findings


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def offer_review(store: Store, findings: "Findings", options: LabelOptions) -> int:
    """The review batch, without what a person has confirmed meanwhile; how many photographs it holds."""
    from tasks.label_review import offer, read_ranking

    return offer(store, findings, read_ranking(store, findings), options.review)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def show(store: Store, version: "DatasetVersion", findings: "Findings", options: LabelOptions, offered: int) -> None:
    """The page with pictures and the table, on the run's page."""
    from prefect.artifacts import create_markdown_artifact, create_table_artifact

    from tasks.label_evidence import photographs_of
    from tasks.label_report import headline, page, sheet, table
    from tasks.label_review import open_suspects, read_ranking

    suspects = open_suspects(read_ranking(store, findings))
    shown = suspects.slice(0, options.shown).to_pylist()
    pictures = photographs_of(store, version, [row["sha256"] for row in shown])
    photographs = [pictures[row["sha256"]] for row in shown]
    drawn = sheet(shown, photographs) if shown else None
    key, described = version.name.replace("_", "-"), headline(findings)
    review = store.uri(findings.review_prefix)
    create_markdown_artifact(page(findings, shown, drawn, review, offered), key=f"labels-{key}", description=described)
    listed = suspects.slice(0, options.review).to_pylist()
    create_table_artifact(table(listed, photographs), key=f"suspects-{key}", description=described)
