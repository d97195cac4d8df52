"""What a training run leaves for people in MLflow and Prefect, and that its test split decides nothing: real services."""

import cv2
import numpy as np
import pytest
from pydantic import SecretStr

from flows.ingest import IngestOptions, ingest
from flows.settings import Settings
from flows.train import train
from tasks import registry
from tasks.recipe import Augmentation, TrainConfig
from tasks.storage import write, write_many

CONFIG = TrainConfig(
    **{"architecture": "cnn", "pretrained": False, "image_size": 16, "epochs": 2, "batch_size": 16},
    **{"learning_rate": 3e-3, "precision": "float32", "augmentation": Augmentation(brightness=0, contrast=0)},
    **{"defect_labels": ("scratched",), "minimum_accuracy": 0.0, "minimum_balanced_accuracy": 0.0},
)
COUNTS = {"train": 40, "val": 30, "test": 30}


def photograph(number: int, scratched: bool) -> bytes:
    """A noisy grey plate, with a bright line across it or without."""
    random = np.random.default_rng(number)
    plate = random.normal(110, 12, (40, 40, 3)).clip(0, 255).astype(np.uint8)
    if scratched:
        start, end = random.integers(0, 40, 2)
        cv2.line(plate, (int(start), 0), (int(end), 39), (250, 250, 250), 3)
    return cv2.imencode(".png", plate)[1].tobytes()


def upload(store, dataset, lie=False):
    """Given splits, ingested; with a lie every photograph of the test split has the other label."""
    prefix, photographs, number = f"incoming/{dataset}/batch/", [], 0
    for split, count in COUNTS.items():
        for scratched in (False, True) * count:
            number += 1
            label = ("plain", "scratched")[scratched != (lie and split == "test")]
            photographs.append((f"{prefix}{split}/{label}/{number}.png", photograph(number, scratched)))
    write_many(store, photographs)
    write(store, f"{prefix}_SUCCESS", b"")
    ingest(dataset, prefix, IngestOptions())


@pytest.fixture(scope="module")
def here(store, mlflow_uri, prefect_server):
    """The stack's settings for the flows of this module."""
    found = Settings(
        s3_bucket=store.bucket,
        s3_endpoint_url=store.endpoint_url,
        s3_access_key_id=store.access_key_id,
        s3_secret_access_key=SecretStr(store.secret_access_key),
        mlflow_tracking_uri=mlflow_uri,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.train.settings", lambda: found)
        patch.setattr("flows.ingest.settings", lambda: found)
        yield found


@pytest.fixture(scope="module")
def honest(here):
    """The final state of a training on labels that are right."""
    upload(here.store, "honest")
    return train("honest", config=CONFIG, return_state=True)


@pytest.fixture(scope="module")
def run_id(honest):
    assert honest.is_completed(), honest.message
    return honest.result().run_id


@pytest.mark.slow
def test_a_poisoned_test_split_changes_nothing_but_the_test_figures(here, honest, run_id):
    upload(here.store, "poisoned", lie=True)
    other = train("poisoned", config=CONFIG, return_state=True).result()
    uri = here.mlflow_tracking_uri
    mine, theirs = registry.run_metrics(uri, run_id), registry.run_metrics(uri, other.run_id)
    timed = {"train_seconds", "train_cpu_seconds", "epoch_end_seconds"}
    different = {name for name in mine if name not in timed and mine[name] != theirs[name]}
    assert different and all(name.startswith("test_") for name in different), different
    assert mine["test_accuracy"] == pytest.approx(1 - theirs["test_accuracy"])
    _, card = registry.load_card(uri, "honest", honest.result().version)
    _, poisoned = registry.load_card(uri, "poisoned", other.version)
    assert (card.rule, card.temperature) == (poisoned.rule, poisoned.temperature)
    ours = registry.load_weights(uri, "honest", honest.result().version, "cnn", card.rule.labels)
    for name, value in registry.load_weights(uri, "poisoned", other.version, "cnn", card.rule.labels).items():
        assert value.equal(ours[name]), name


def test_the_card_the_served_network_and_the_drift_reference_have_the_temperature(here, honest, run_id):
    uri, version = here.mlflow_tracking_uri, honest.result().version
    _, card = registry.load_card(uri, "honest", version)
    assert card.temperature == pytest.approx(registry.run_metrics(uri, run_id)["temperature"])
    network = registry.load_network(uri, "honest", version)
    assert float(network.temperature) == pytest.approx(card.temperature)
    import torch

    from tasks.temperature import softmax

    reference = registry.load_reference(uri, "honest", version)
    with torch.inference_mode():
        logits = network.classifier.head(torch.from_numpy(reference.embedding)).numpy()
    np.testing.assert_allclose(reference.probabilities, softmax(logits / card.temperature), atol=1e-5)


def test_mlflow_holds_pictures_tables_tensorboard_and_a_description(here, run_id):
    from mlflow import MlflowClient

    client = MlflowClient(here.mlflow_tracking_uri)
    paths = {
        entry.path for folder in ("figures", "tables", "tensorboard") for entry in client.list_artifacts(run_id, folder)
    }
    wanted = {f"figures/{kind}_{split}.png" for kind in ("roc", "reliability") for split in ("validation", "test")}
    wanted |= {"figures/explanation.png", "tables/slices_test.csv", "tables/classes_validation.csv"}
    assert wanted <= paths, wanted - paths
    assert any("events.out.tfevents" in path for path in paths)
    run = client.get_run(run_id)
    assert (
        "| test (60) |" in run.data.tags["mlflow.note.content"]
        and "[Prefect run]" in run.data.tags["mlflow.note.content"]
    )
    assert run.data.tags["recipe"] == "train/by-hand", "this test starts the flow without a deployment"


def test_the_evaluation_that_is_stored_is_what_the_metrics_say(here, honest, run_id):
    uri = here.mlflow_tracking_uri
    stored, metrics = (
        registry.load_evaluation(uri, "honest", honest.result().version),
        registry.run_metrics(uri, run_id),
    )
    assert stored["test"]["figures"]["accuracy"] == pytest.approx(metrics["test_accuracy"])
    assert stored["calibration"]["temperature"] == pytest.approx(metrics["temperature"])
    assert sum(part["count"] for part in stored["test"]["slices"] if part["column"] == "sharpness") == 60
