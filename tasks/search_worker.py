"""One worker of a search: takes waiting trials from the shared storage, one at a time, until its starter ends it.

What `tasks/search_processes.py` starts: `python -m tasks.search_worker <parent>`, with the job as JSON on standard input.
A trial sees the training and the validation split; nothing here opens the test split.
"""

import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from tasks.rank import end_with_parent
from tasks.search_processes import Job
from tasks.search_runs import close_trial_run, open_trial_run
from tasks.search_space import Scalar, with_overrides
from tasks.tuning import HEARTBEAT, drawn, objective_of, open_storage, open_study, take

if TYPE_CHECKING:
    from optuna import Study, Trial

    from tasks.dataset import DatasetVersion
    from tasks.loop import Epoch
    from tasks.recipe import TrainConfig
    from tasks.samples import Samples
    from tasks.training import Trained

log = logging.getLogger(__name__)

_PAUSE = 0.5  # seconds between looks for a waiting trial


def main() -> None:
    end_with_parent(int(sys.argv[1]), signal.SIGKILL)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    job = Job.from_json(sys.stdin.read())
    _take_share(job)
    study = open_study(open_storage(job.storage), job.study, job.search)
    worker = Worker(job, study)
    while True:
        trial = take(study, f"{socket.gethostname()}:{os.getpid()}", job.search)
        if trial is None:
            time.sleep(_PAUSE)
        else:
            worker.work_on(trial)


class Worker:
    """Runs trials of one search; photographs of the sizes it has met stay open."""

    def __init__(self, job: Job, study: "Study") -> None:
        from tasks.dataset import open_version

        self.job, self.study = job, study
        self.version: DatasetVersion = open_version(job.store, job.dataset, job.dataset_version)
        self.splits: dict[tuple[str, int], Samples] = {}

    def work_on(self, trial: "Trial") -> None:
        """Run the trial to its end: told to the storage last, so that what is told is complete in MLflow too."""
        import optuna

        with beating(self.study, trial._trial_id):
            overrides = drawn(self.study, trial, self.job.search)
            trial.set_user_attr("overrides", overrides)
            try:
                config = self.config_of(overrides)
            except ValueError as error:  # some combinations are none: it is told, and the next one is taken
                self.end(trial, "failed", reason=str(error))
                return
            try:
                self.train(trial, config)
            except optuna.exceptions.UpdateFinishedTrialError:  # taken for dead; another worker has the slot now
                log.warning("trial %d was given to another worker: what came of it here is dropped", trial.number)
                if run := trial.user_attrs.get("run"):
                    close_trial_run(self.job.tracking_uri, run, "KILLED", "died")

    def config_of(self, overrides: dict[str, Scalar]) -> "TrainConfig":
        """What the trial trains with. ValueError where the values do not go together."""
        from tasks.model import require_size

        epochs: dict[str, Scalar] = {} if self.job.search.epochs is None else {"epochs": self.job.search.epochs}
        config = with_overrides(self.job.config, {**epochs, **overrides})
        require_size(config.architecture, config.image_size)
        return config

    def train(self, trial: "Trial", config: "TrainConfig") -> None:
        import optuna

        from tasks.registry import load_weights
        from tasks.tracking import log_epoch
        from tasks.training import train

        job, slot = self.job, trial.user_attrs["slot"]
        run = open_trial_run(
            job.tracking_uri, job.study_run, job.study, slot, f"trial {slot} {config.architecture}", config
        )
        trial.set_user_attr("run", run)

        def on_epoch(epoch: "Epoch") -> None:
            log_epoch(job.tracking_uri, run, epoch)
            trial.report(epoch.refined_loss, epoch.number)
            if trial.should_prune():
                raise optuna.TrialPruned(
                    f"validation loss {epoch.refined_loss:.4f} after epoch {epoch.number} is behind"
                )

        try:
            weights = None
            if config.continue_from is not None:
                of = (job.tracking_uri, job.dataset, config.continue_from)
                weights = load_weights(*of, config.architecture, self.version.classes)
            training, validation = self.split("train", config.image_size), self.split("val", config.image_size)
            trained = train(training, validation, self.version.classes, config, on_epoch, weights)
        except optuna.TrialPruned as early:
            self.end(trial, "pruned", run, reason=str(early))
        except (ValueError, RuntimeError, LookupError) as error:
            # Of this configuration: too large for the memory, a loss that is no number, no such version to continue from.
            if isinstance(error, optuna.exceptions.UpdateFinishedTrialError):
                raise
            self.end(trial, "failed", run, reason=f"{type(error).__name__}: {error}")
        else:
            self.record(trial, config, trained)
            self.end(trial, "complete", run, figures=_figures(trained))

    def record(self, trial: "Trial", config: "TrainConfig", trained: "Trained") -> None:
        """The configuration as it was trained, with the precision that `auto` chose: by hand it gives the same figures."""
        from tasks.samples import processors

        exact = config.model_copy(update={"precision": trained.precision})
        trial.set_user_attr("config", exact.model_dump(mode="json"))
        trial.set_user_attr("threads", processors())
        trial.set_user_attr("stopped", trained.stopped)

    def end(
        self, trial: "Trial", outcome: str, run: str = "", figures: dict[str, float] | None = None, reason: str = ""
    ) -> None:
        from optuna.trial import TrialState

        if reason:
            trial.set_user_attr("reason", reason[:1000])
        if figures:
            trial.set_user_attr("figures", figures)
        if run:
            status = "FAILED" if outcome == "failed" else "FINISHED"
            close_trial_run(self.job.tracking_uri, run, status, outcome, figures, reason)
        if outcome == "complete" and figures:
            self.study.tell(trial, objective_of(self.job.search.metric, figures), skip_if_finished=True)
        else:
            state = TrialState.PRUNED if outcome == "pruned" else TrialState.FAIL
            self.study.tell(trial, state=state, skip_if_finished=True)
        log.info("trial %d is %s %s", trial.number, outcome, reason or figures)

    def split(self, name: str, size: int) -> "Samples":
        from tasks.sample_cache import load_samples

        if (name, size) not in self.splits:
            self.splits[name, size] = load_samples(self.job.store, self.version, name, size, self.job.cache)
        return self.splits[name, size]


@contextmanager
def beating(study: "Study", trial_id: int) -> Iterator[None]:
    """A heartbeat in the storage while the trial is worked on: without one its slot is given to another worker."""
    over, storage = Event(), study._storage

    def beat() -> None:
        while not over.wait(HEARTBEAT):
            storage.record_heartbeat(trial_id)  # type: ignore[attr-defined]

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _figures(trained: "Trained") -> dict[str, float]:
    """Of the best epoch, on the validation split; what has no value is left out."""
    best = trained.epochs[trained.best_epoch - 1]
    found: dict[str, Any] = {"loss": best.refined_loss, **asdict(best.validation), "best_epoch": trained.best_epoch}
    return {name: float(value) for name, value in found.items() if not math.isnan(value)}


def _take_share(job: Job) -> None:
    """Workers on one machine share its processors and GPUs: each computes on its own."""
    import torch

    if hasattr(os, "sched_setaffinity"):
        mine = sorted(os.sched_getaffinity(0))[job.index :: job.workers]
        if mine:
            os.sched_setaffinity(0, mine)
    if torch.cuda.is_available():
        torch.cuda.set_device(job.index % torch.cuda.device_count())


if __name__ == "__main__":
    main()
