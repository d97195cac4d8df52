"""A search on real services: workers as processes, trials from the validation split, killed and resumed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
from tasks.search_runs import OUTCOME_TAG, STUDY_TAG, trial_runs
from tasks.search_space import Range, Search, Values
from tasks.storage import Store, list_objects, read
from tasks.training import train
from tasks.tuning import Tried, best_of, identity_of, open_storage, open_study, standing

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
def here(store: Store, mlflow_uri: str, configured: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
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
    [parent] = client.search_runs([client.get_experiment_by_name("tuned").experiment_id], f"tags.{OUTCOME_TAG} = 'search'")
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
