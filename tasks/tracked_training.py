"""A training that is kept and told: from its newest checkpoint, every epoch to MLflow, to the log and to the run's page."""

import logging

import numpy as np
from numpy.typing import NDArray

from tasks.checkpoints import Undertaking, keeping, newest
from tasks.dataset import DatasetVersion, read_rows
from tasks.limits import training_slot
from tasks.progress import ProgressBar
from tasks.recipe import TrainConfig
from tasks.registry import load_weights, require_fit
from tasks.samples import Samples
from tasks.storage import Store
from tasks.tracking import log_epoch, logged_epochs
from tasks.training import Epoch, Trained, check_labels, train

log = logging.getLogger(__name__)


def check_version(tracking_uri: str, store: Store, version: DatasetVersion, config: TrainConfig) -> None:
    """Before a photograph is read: ValueError where the dataset version cannot be trained on with this recipe, LookupError
    where the version to continue from does not exist.
    """
    if config.continue_from is not None:
        require_fit(tracking_uri, version.name, config.continue_from, config.architecture, version.classes)
    training, validation = (_labels(store, version, split) for split in ("train", "val"))
    check_labels(training, validation, version.classes, config)


def _labels(store: Store, version: DatasetVersion, split: str) -> NDArray[np.int64]:
    """[N] indices into the version's classes; empty for a split it does not have."""
    names = [name for rows in read_rows(store, version, [split], ["label"]) for name in rows["label"].to_pylist()]
    return np.array([version.classes.index(name) for name in names], dtype=np.int64)


def train_tracked(
    tracking_uri: str,
    run_id: str,
    version: DatasetVersion,
    training: Samples,
    validation: Samples,
    config: TrainConfig,
    work: Undertaking,
    limit: str | None,
) -> Trained:
    """Train, holding a slot of the global limit; without one named, of `gpu` where there is a GPU. Called in a Prefect run.

    An epoch is kept before it is told, and told only where MLflow does not have it: whenever the process dies, each series
    ends with one point for each epoch.
    """
    state, told = newest(work), logged_epochs(tracking_uri, run_id)
    bar = ProgressBar(version.name, config)

    def report(epoch: Epoch) -> None:
        if epoch.number not in told:
            log_epoch(tracking_uri, run_id, epoch)
        bar.tell(epoch)
        log.info(
            "epoch %d: loss %.4f, validation loss %.4f, accuracy %.4f, %.0f s",
            *(epoch.number, epoch.train_loss, epoch.validation_loss, epoch.validation.accuracy, epoch.seconds),
        )

    weights = None
    if config.continue_from is not None:
        weights = load_weights(tracking_uri, version.name, config.continue_from, config.architecture, version.classes)
    for kept in state["epochs"] if state else ():  # of which the dead run may not have told the last
        report(Epoch.from_dict(kept))
    with training_slot(limit):
        trained = train(training, validation, version.classes, config, report, weights, state, keeping(work, run_id))
    bar.end(trained.epochs[-1], trained.stopped)
    return trained
