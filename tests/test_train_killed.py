"""The train flow, killed with SIGKILL at ten random moments of its training and twice after it: a new run goes on each time."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from tasks import registry
from tasks.checkpoints import unpacked
from tasks.recipe import Augmentation, TrainConfig
from tasks.storage import Store, ensure_bucket, list_objects, read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[1]
CONFIG = TrainConfig(
    architecture="cnn",
    pretrained=False,
    image_size=16,
    epochs=40,
    max_minutes=300,  # on a busy machine epochs take long, and what does not fit would be dropped
    batch_size=16,
    learning_rate=1e-3,
    patience=100,
    augmentation=Augmentation(quarter_turns=True, shift=0.1),
    precision="float32",
    checkpoint_minutes=0.002,  # 0.12 s: also in the middle of epochs
    minimum_accuracy=0,
    minimum_balanced_accuracy=0,
)
# Kills itself so many seconds after so many steps of training, or after the given function of the given module has returned.
RUN = """
import importlib, os, signal, sys, threading
from flows.train import train
from tasks.recipe import TrainConfig

def die():
    os.kill(os.getpid(), signal.SIGKILL)

how = sys.argv[2]
if ":" in how:
    module, name = how.split(":")
    module = importlib.import_module(module)
    wanted = getattr(module, name)
    def last(*given, **named):
        wanted(*given, **named)
        die()
    setattr(module, name, last)
elif how:
    from torch.optim.optimizer import register_optimizer_step_post_hook
    left, seconds = how.split("+")
    left = int(left)
    def stepped(*_):
        global left
        left -= 1
        if left == 0:
            threading.Timer(float(seconds), die).start()
    register_optimizer_step_post_hook(stepped)
state = train(sys.argv[1], config=TrainConfig.model_validate_json(sys.argv[3]), return_state=True)
print("state", state.name, state.message)
"""
OWN = {"epoch_end_seconds", "train_seconds", "train_cpu_seconds"}  # times: nobody's but the run's own


def run(store: Store, mlflow_uri: str, cache: Path, dataset: str, dies: str = "") -> subprocess.CompletedProcess[str]:
    settings = {
        "TIREWATCH_S3_BUCKET": store.bucket,
        "TIREWATCH_S3_ENDPOINT_URL": store.endpoint_url or "",
        "TIREWATCH_S3_ACCESS_KEY_ID": store.access_key_id or "",
        "TIREWATCH_S3_SECRET_ACCESS_KEY": store.secret_access_key or "",
        "TIREWATCH_MLFLOW_TRACKING_URI": mlflow_uri,
        "TIREWATCH_CACHE_DIR": str(cache),
        "PREFECT_API_URL": str(PREFECT_API_URL.value()),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", RUN, dataset, dies, CONFIG.model_dump_json()]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)


def crash_the_owner(store: Store, dataset: str) -> None:
    """What the automation does with a run whose heartbeats ended."""
    claims = [each.key for each in list_objects(store, f"line/training/{dataset}/")]
    owner = json.loads(read(store, claims[-1]))["run"]
    with get_client(sync_client=True) as client:
        body = {"state": {"type": "CRASHED"}, "force": True}
        client.request("POST", "/flow_runs/{id}/set_state", path_params={"id": owner}, json=body).raise_for_status()


def end_of(mlflow_uri: str, dataset: str) -> dict[str, Any]:
    """Everything that a training leaves in MLflow: of one run, or the test has failed."""
    client = MlflowClient(mlflow_uri)
    experiment = client.get_experiment_by_name(dataset)
    [found] = client.search_runs([experiment.experiment_id])
    histories = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
    return {
        "status": found.info.status,
        "steps": {name: [point.step for point in points] for name, points in histories.items()},
        "values": {name: [p.value for p in points] for name, points in histories.items() if name not in OWN},
        "parameters": found.data.params,
        "inputs": len(found.inputs.dataset_inputs),
        "versions": [int(each.version) for each in client.search_model_versions(f"name = '{dataset}'")],
    }


@pytest.mark.usefixtures("prefect_server")
def test_killed_again_and_again_a_training_ends_as_an_undisturbed_one(
    store: Store,
    mlflow_uri: str,
    photograph: Callable[..., bytes],
    ingested: Callable[..., Any],
    tmp_path: Path,
) -> None:
    here = replace(store, bucket="train-killed")
    ensure_bucket(here)
    files = {  # the splits are given: else they would follow from the name of the dataset too
        f"{split}/{label}/{number}.png": photograph(number + shift, kind="PNG")
        for label, shift in (("cut", 0), ("good", 500))
        for split, numbers in (("train", range(42)), ("val", range(42, 51)), ("test", range(51, 60)))
        for number in numbers
    }
    made = [ingested(here, dataset, "batch", {**files, "_SUCCESS": b""}).version for dataset in ("calm", "killed")]
    assert made[0].digest == made[1].digest

    undisturbed = run(here, mlflow_uri, tmp_path, "calm")
    assert "state Completed" in undisturbed.stdout, undisturbed.stdout + undisturbed.stderr[-3000:]
    expected = end_of(mlflow_uri, "calm")
    assert expected["steps"]["train/Loss"] == list(range(1, 41)) and expected["versions"] == [1]

    moments = random.Random(5)  # of 240 steps; six are an epoch: each attempt gets somewhere and none to the end
    dies = [f"{moments.randint(7, 22)}+{moments.uniform(0, 0.1):.4f}" for _ in range(10)]
    done = []
    for how in [*dies, "tasks.tracking:log_outcome", "tasks.registry:register"]:
        killed = run(here, mlflow_uri, tmp_path, "killed", how)
        assert killed.returncode == -signal.SIGKILL, f"after {how}: " + killed.stdout + killed.stderr[-3000:]
        kept = [read(here, each.key) for each in list_objects(here, "checkpoints/killed/")]
        states = [unpacked(data) for data in kept]  # raises where one is not whole
        done.append(max((len(state["epochs"]) + 0.1 * state["step"] for state in states), default=0.0))
        crash_the_owner(here, "killed")
    assert done == sorted(done) and len(set(done[:11])) == 11, f"each attempt went on from the one before: {done}"
    assert done[0] >= 1 and done[9] < done[10] == done[11] == 40, done
    last = run(here, mlflow_uri, tmp_path, "killed")
    assert "state Completed" in last.stdout, last.stdout + last.stderr[-3000:]

    found = end_of(mlflow_uri, "killed")
    assert found == expected
    assert all(math.isfinite(value) for values in found["values"].values() for value in values)
    calm, killed_weights = (
        registry.load_weights(mlflow_uri, name, 1, "cnn", ("cut", "good")) for name in ("calm", "killed")
    )
    assert all(torch.equal(calm[name], killed_weights[name]) for name in calm)
    assert list_objects(here, "checkpoints/") == [] and list_objects(here, "line/training/") == []

    again = run(here, mlflow_uri, tmp_path, "killed")
    assert "state Completed" in again.stdout, again.stdout + again.stderr[-3000:]
    experiment = MlflowClient(mlflow_uri).get_experiment_by_name("killed")
    assert len(MlflowClient(mlflow_uri).search_runs([experiment.experiment_id])) == 2, "a finished training begins anew"
