"""A search on real services: workers as processes, trials from the validation split, killed and resumed."""

import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from sklearn.datasets import load_digits

from flows.settings import settings
from flows.tune import tune
from tasks.dataset import DatasetVersion, open_version
from tasks.recipe import Augmentation, TrainConfig
from tasks.sample_cache import load_samples
from tasks.search_processes import Job
from tasks.search_runs import OUTCOME_TAG, STUDY_TAG, open_study_run, trial_runs
from tasks.search_space import Range, Search, Values
from tasks.search_worker import Worker
from tasks.storage import Store, list_objects, read
from tasks.training import train
from tasks.tuning import Tried, best_of, identity_of, lay_out, open_storage, open_study, standing, take

ROOT = Path(__file__).parents[1]
CONFIG = TrainConfig(
    architecture="tinyvgg",
    pretrained=False,
    image_size=16,
    epochs=4,
    max_minutes=300,
    batch_size=16,
    augmentation=Augmentation(flip_horizontal=False),
    precision="float32",
    minimum_accuracy=0,
    minimum_balanced_accuracy=0,
)
SPACE: dict[str, Values | Range] = {
    "learning_rate": Range(low=1e-4, high=1e-2, log=True),
    "augmentation.shift": Range(low=0, high=0.1),
}


def scans(poisoned: bool = False) -> dict[str, bytes]:
    """Scans of 0, 1 and 4 with given splits; poisoned: the test split holds them under wrong labels."""
    found, names, files = load_digits(), ("0", "1", "4"), {}
    for place, name in enumerate(names):
        for number, scan in enumerate(found.images[found.target == int(name)][:100]):
            out = io.BytesIO()
            Image.fromarray((scan * 15.9).astype("uint8")).resize((16, 16), Image.Resampling.NEAREST).save(out, "PNG")
            split = "train" if number < 60 else "val" if number < 80 else "test"
            label = names[(place + 1) % 3] if poisoned and split == "test" else name
            files[f"{split}/{label}/{name}-{number:03d}.png"] = out.getvalue()
    return {**files, "_SUCCESS": b""}


@pytest.fixture
def here(
    store: Store, mlflow_uri: str, configured: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The stack's settings, with a storage of searches of the test's own."""
    monkeypatch.setenv("TIREWATCH_MLFLOW_TRACKING_URI", mlflow_uri)
    monkeypatch.setenv("TIREWATCH_SEARCH_STORAGE", f"sqlite:///{tmp_path}/state/search.db")
    settings.cache_clear()
    yield tmp_path
    settings.cache_clear()


pytestmark = pytest.mark.usefixtures("prefect_server", "here")


def trials_of(version: DatasetVersion, search: Search, config: TrainConfig = CONFIG) -> tuple[Tried, ...]:
    storage = open_storage(settings().search_storage.get_secret_value())
    return standing(open_study(storage, identity_of(version, config, search), search), search.metric)


@pytest.mark.slow
def test_a_search_ends_with_a_registered_model_and_tells_every_trial(
    store: Store, mlflow_uri: str, ingested: Callable[..., Any]
) -> None:
    version = ingested(store, "tuned", "batch", scans()).version
    search = Search(space=SPACE, trials=5, workers=2, epochs=2, pruning="none", seed=3)
    state = tune("tuned", search, config=CONFIG, return_state=True)
    assert state.is_completed(), state.message
    tried = trials_of(version, search)
    assert [each.state for each in tried] == ["complete"] * 5 and [each.slot for each in tried] == list(range(5))
    best = best_of(tried, "loss")
    assert best is not None and best.value == min(each.value for each in tried if each.value is not None)
    client = MlflowClient(mlflow_uri)
    [parent] = client.search_runs(
        [client.get_experiment_by_name("tuned").experiment_id], f"tags.{OUTCOME_TAG} = 'search'"
    )
    nested = trial_runs(mlflow_uri, parent.info.run_id)
    assert {run.info.status for run in nested} == {"FINISHED"} and len(nested) == 5
    assert {each.run_id for each in tried} == {run.info.run_id for run in nested}
    for run in nested:
        assert [point.step for point in client.get_metric_history(run.info.run_id, "val/Loss")] == [1, 2]
    assert {"trials.csv", "search.png", "best.json", "best_trial.json"} <= {
        found.path for found in client.list_artifacts(parent.info.run_id)
    }
    params = client.get_run(state.result().run_id).data.params
    assert float(params["learning_rate"]) == best.overrides["learning_rate"] and params["epochs"] == "4"

    again = tune("tuned", search, config=CONFIG, return_state=True)
    assert again.result() == state.result(), "run again, it searches and registers nothing anew"


@pytest.mark.slow
def test_a_poisoned_test_split_changes_no_trial(store: Store, ingested: Callable[..., Any]) -> None:
    search = Search(space=SPACE, trials=3, epochs=1, pruning="none")
    values = []
    for name, files in (("tuned-clean", scans()), ("tuned-poisoned", scans(poisoned=True))):
        version = ingested(store, name, "batch", files).version
        assert tune(name, search, config=CONFIG, train_best=False, return_state=True).is_completed()
        values.append([(each.value, each.overrides) for each in trials_of(version, search)])
    clean, poisoned = (open_version(store, name, 1) for name in ("tuned-clean", "tuned-poisoned"))
    assert clean.digest != poisoned.digest and clean.splits == poisoned.splits
    assert values[0] == values[1] and len(values[0]) == 3


def test_a_version_to_continue_from_that_is_none_fails_the_trial_and_not_the_worker(
    store: Store, mlflow_uri: str, ingested: Callable[..., Any], here: Path
) -> None:
    version = ingested(store, "tuned-onwards", "batch", scans()).version
    search, config = Search(space=SPACE, trials=2), CONFIG.model_copy(update={"continue_from": 7})
    name, url = identity_of(version, config, search), settings().search_storage.get_secret_value()
    run = open_study_run(mlflow_uri, name, version, config, search, "run", "page")
    job = Job(url, name, run, mlflow_uri, store, settings().cache, version.name, version.version, config, search)
    study = open_study(open_storage(url), name, search)
    lay_out(study, search, 1)
    worker = Worker(job, study)
    while trial := take(study, "me:1", search):
        worker.work_on(trial)
    tried = standing(study, "loss")
    assert [each.state for each in tried] == ["failed", "failed"]
    assert all("LookupError" in each.reason and "tuned-onwards" in each.reason for each in tried)
    assert {each.info.status for each in trial_runs(mlflow_uri, run)} == {"FAILED"}


# Kills itself like a machine that loses its power; what Prefect would find out by missing heartbeats is told by the test.
RUN = """
import sys
from flows.tune import tune
from tasks.recipe import TrainConfig
from tasks.search_space import Search
state = tune(sys.argv[1], Search.model_validate_json(sys.argv[2]), config=TrainConfig.model_validate_json(sys.argv[3]),
             train_best=False, return_state=True)
print("state", state.name, state.message)
"""


def crash_the_owner(store: Store, dataset: str) -> None:
    [claim] = [each.key for each in list_objects(store, f"line/search/{dataset}/")]
    owner = json.loads(read(store, claim))["run"]
    with get_client(sync_client=True) as client:
        body = {"state": {"type": "CRASHED"}, "force": True}
        client.request("POST", "/flow_runs/{id}/set_state", path_params={"id": owner}, json=body).raise_for_status()


def workers_of(trials: tuple[Any, ...]) -> set[int]:
    return {int(each.user_attrs["worker"].rsplit(":", 1)[1]) for each in trials if "worker" in each.user_attrs}


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come to that"
        time.sleep(0.2)


def begun(database: Path) -> bool:
    """Whether a search has made its study there."""
    if not database.exists():
        return False
    with sqlite3.connect(database) as connection, suppress(sqlite3.OperationalError):  # its tables are being made
        return bool(connection.execute("select count(*) from trials").fetchone()[0])
    return False


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(1200)  # four minutes alone, and much longer on a machine that others use
def test_killed_worker_and_killed_search_keep_the_finished_trials_and_the_best_is_reproducible(  # noqa: PLR0915
    store: Store, mlflow_uri: str, ingested: Callable[..., Any], here: Path
) -> None:
    from optuna.trial import TrialState

    version = ingested(store, "searched", "batch", scans()).version
    search = Search(space=SPACE, trials=8, workers=2, epochs=3, seed=1, metric="accuracy", sampler="random")
    env = {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, "searched", search.model_dump_json(), CONFIG.model_dump_json()]
    with (here / "first.log").open("wb") as output:
        first = subprocess.Popen(command, env=env, stdout=output, stderr=output, cwd=ROOT)
    try:
        url = settings().search_storage.get_secret_value()
        wait_until(lambda: begun(here / "state" / "search.db"))
        study = open_study(open_storage(url), identity_of(version, CONFIG, search), search)

        def in_state(*states: TrialState) -> list[Any]:
            return [each for each in study.get_trials() if each.state in states]

        wait_until(lambda: len(workers_of(tuple(study.get_trials()))) == 2 and bool(in_state(TrialState.RUNNING)))
        [victim, *_] = in_state(TrialState.RUNNING)
        wait_until(lambda: "worker" in study.get_trials()[victim.number].user_attrs)
        killed = int(study.get_trials()[victim.number].user_attrs["worker"].rsplit(":", 1)[1])
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: len(workers_of(tuple(study.get_trials()))) == 3)
        assert first.poll() is None, "the search goes on without the worker"
        wait_until(lambda: len(in_state(TrialState.COMPLETE)) >= 2 and bool(in_state(TrialState.RUNNING)))
    finally:
        first.kill()
        first.wait()
    wait_until(lambda: not any(map(alive, workers_of(tuple(study.get_trials())))), 10)
    kept = {each.slot: each for each in standing(study, "accuracy") if each.state in ("complete", "pruned")}
    assert 2 <= len(kept) < 8, "killed on the way"

    blocked = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=ROOT)
    assert "is at work on this search" in blocked.stdout + blocked.stderr
    crash_the_owner(store, "searched")
    second = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=ROOT)
    assert "state Completed" in second.stdout, second.stdout + second.stderr[-3000:]

    tried = trials_of(version, search)
    assert [each.slot for each in tried] == list(range(8)) and {each.state for each in tried} <= {"complete", "pruned"}
    for slot, before in kept.items():
        assert tried[slot] == before, "a finished trial is not run again"
    client = MlflowClient(mlflow_uri)
    experiment = client.get_experiment_by_name("searched").experiment_id
    runs = client.search_runs([experiment], f"tags.`{STUDY_TAG}` = '{identity_of(version, CONFIG, search)}'")
    assert len([run for run in runs if run.data.tags[OUTCOME_TAG] == "search"]) == 1, "one study, found again"
    assert {run.info.status for run in runs} == {"FINISHED", "KILLED"}

    best = best_of(tried, "accuracy")
    assert best is not None
    config = TrainConfig.model_validate(best.config)
    training, validation = (
        load_samples(store, version, split, config.image_size, settings().cache) for split in ("train", "val")
    )
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(processors)[:1])  # as each of two workers on two processors
    try:
        by_hand = train(training, validation, version.classes, config)
    finally:
        os.sched_setaffinity(0, processors)
    assert {epoch.number: epoch.refined_loss for epoch in by_hand.epochs} == best.losses
    assert by_hand.epochs[by_hand.best_epoch - 1].validation.accuracy == best.figures["accuracy"]
