import time

import cv2
import numpy as np
import pytest
from pydantic import SecretStr, ValidationError

from flows.ingest import IngestOptions, ingest
from flows.settings import Settings
from flows.train import train
from tasks import registry
from tasks.recipe import Augmentation, TrainConfig, below_minimum
from tasks.storage import write, write_many

QUICK = TrainConfig(
    architecture="cnn",
    pretrained=False,
    image_size=16,
    epochs=3,
    batch_size=16,
    learning_rate=3e-3,
    head_rate=1,
    defect_labels=("scratched",),
    augmentation=Augmentation(flip_vertical=True, quarter_turns=True, brightness=0, contrast=0),
    precision="float32",
)


def photograph(number: int, scratched: bool) -> bytes:
    """A noisy grey plate, with a bright line across it or without."""
    random = np.random.default_rng(number)
    plate = random.normal(110, 12, (40, 40, 3)).clip(0, 255).astype(np.uint8)
    if scratched:
        start, end = random.integers(0, 40, 2), random.integers(0, 40, 2)
        cv2.line(plate, (int(start[0]), 0), (int(end[0]), 39), (250, 250, 250), 3)
    return cv2.imencode(".png", plate)[1].tobytes()


def upload(store, dataset, labels=("plain", "scratched"), each=60, first=0):
    """A sealed batch of class folders, ingested."""
    prefix = f"incoming/{dataset}/batch-{first}/"
    write_many(
        store,
        [
            (f"{prefix}{label}/{n}.png", photograph(n * 7 + len(label), label == "scratched"))
            for label in labels
            for n in range(first, first + each)
        ],
    )
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
def plates(here):
    upload(here.store, "plates")
    return "plates"


@pytest.fixture(scope="module")
def trained(here, plates):
    """The final state of one real training run."""
    return train(plates, config=QUICK, return_state=True)


def test_a_run_registers_a_version_named_like_the_dataset(here, plates, trained):
    assert trained.is_completed(), trained.message
    model = trained.result()
    found, card = registry.load_card(here.mlflow_tracking_uri, plates, model.version)
    assert (found.name, found.run_id) == (plates, model.run_id)
    assert (card.dataset_version, card.image_size, card.preprocessing) == (1, 16, "resize-area-v1")
    assert card.rule.labels == ("plain", "scratched") and 0 < card.rule.threshold < 1


def test_the_run_holds_parameters_series_passport_and_the_final_figures(here, trained):
    from mlflow import MlflowClient

    client, run_id = MlflowClient(here.mlflow_tracking_uri), trained.result().run_id
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["architecture"] == "cnn" and run.data.params["augmentation.quarter_turns"] == "True"
    for split in ("train", "val"):
        for name in ("Loss", "Accuracy", "Precision", "Recall", "F1_Score"):
            history = client.get_metric_history(run_id, f"{split}/{name}")
            assert [point.step for point in history] == [1, 2, 3], f"{split}/{name}"
    rates = [point.value for point in client.get_metric_history(run_id, "learning_rate")]
    assert len(set(rates)) == 3, "the learning rate is a series, not a parameter"
    assert {"test_accuracy", "val_escape_upper", "train_seconds"} <= set(
        registry.run_metrics(here.mlflow_tracking_uri, run_id)
    )
    names = {entry.path for entry in client.list_artifacts(run_id)}
    wanted = {"evaluation.json", "figures", "tables", "tensorboard", "passport.json", "model", "reference"}
    assert wanted <= names


def test_the_dataset_is_an_input_of_the_run_and_its_whole_digest_is_told(here, plates, trained):
    from mlflow import MlflowClient

    from tasks.dataset import open_version

    version = open_version(here.store, plates, 1)
    (told,) = MlflowClient(here.mlflow_tracking_uri).get_run(trained.result().run_id).inputs.dataset_inputs
    assert version.digest.removeprefix("sha256:").startswith(told.dataset.digest)
    assert version.digest in told.dataset.source


def test_the_registered_network_answers_as_its_drift_reference_says(here, plates, trained):
    from tasks.dataset import open_version, read_rows
    from tasks.samples import read_samples
    from tasks.training import predict

    version = open_version(here.store, plates, 1)
    number = trained.result().version
    rows = read_rows(here.store, version, ["val"], ["image", "label", "sha256"])
    validation = read_samples(rows, version.splits["val"], version.classes, 16)
    reference = registry.load_reference(here.mlflow_tracking_uri, plates, number)
    network = registry.load_network(here.mlflow_tracking_uri, plates, number)
    answers = predict(network, validation.images)
    np.testing.assert_allclose(answers["probabilities"], reference.probabilities, atol=1e-5)
    np.testing.assert_allclose(answers["embedding"], reference.embedding, atol=1e-4)
    assert reference.sha256.tolist() == validation.sha256.tolist()
    assert reference.statistics.column("sha256").to_pylist() == validation.sha256.tolist()
    assert {"brightness", "sharpness", "captured_at"} <= set(reference.statistics.column_names)


def test_it_learns_to_tell_scratched_plates(here, trained):
    metrics = registry.run_metrics(here.mlflow_tracking_uri, trained.result().run_id)
    assert metrics["test_accuracy"] > 0.8, metrics


def test_registering_is_told_as_an_event_and_on_the_run_page(here, plates, trained):
    from prefect.client.orchestration import get_client

    flow_run_id = str(trained.state_details.flow_run_id)
    wanted = {"filter": {"event": {"name": ["tirewatch.model.registered"]}}}
    deadline = time.monotonic() + 20
    with get_client(sync_client=True) as client:
        payloads = []
        while not payloads and time.monotonic() < deadline:  # the server stores events a moment after it took them
            found = client.request("POST", "/events/filter", json=wanted).json()["events"]
            payloads = [event["payload"] for event in found if event["payload"]["model"] == plates]
        artifacts = client.request(
            "POST", "/artifacts/filter", json={"artifacts": {"flow_run_id": {"any_": [flow_run_id]}}}
        ).json()
    assert payloads and payloads[0]["dataset_version"] == 1
    pages = {artifact["key"]: artifact["data"] for artifact in artifacts}
    assert "data:image/png;base64," in pages["training-plates"] and "| escapes |" in pages["training-plates"]
    assert trained.result().run_id in pages["mlflow-plates"]
    (bar,) = [artifact for artifact in artifacts if artifact["key"] == "progress-plates"]
    assert bar["type"] == "progress" and bar["data"] == 100
    assert bar["description"].startswith("epoch 3 of 3, ") and bar["description"].endswith(": all 3 epochs done")


def test_training_goes_on_from_a_registered_version(here, plates, trained):
    from mlflow import MlflowClient

    config = QUICK.model_copy(update={"continue_from": trained.result().version, "epochs": 1})
    state = train(plates, config=config, return_state=True)
    client = MlflowClient(here.mlflow_tracking_uri)
    first = client.get_metric_history(trained.result().run_id, "train/Loss")[0].value
    assert client.get_metric_history(state.result().run_id, "train/Loss")[0].value < 0.7 * first


def test_weights_of_another_architecture_are_refused_by_name(here, plates, trained):
    config = QUICK.model_copy(update={"architecture": "tinyvgg", "continue_from": trained.result().version})
    state = train(plates, config=config, return_state=True)
    assert state.is_failed() and "is a cnn for the classes" in state.message


def test_a_failing_run_leaves_no_mlflow_run_open(here, plates, trained):
    from mlflow import MlflowClient

    state = train(plates, config=QUICK.model_copy(update={"batch_size": 500}), return_state=True)
    assert state.is_failed() and "fewer than one batch of 500" in state.message
    client = MlflowClient(here.mlflow_tracking_uri)
    experiment = client.get_experiment_by_name(plates)
    assert not client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'")


def mlflow_runs(here, dataset):
    """MLflow runs of the dataset's experiment, newest first."""
    from mlflow import MlflowClient

    client = MlflowClient(here.mlflow_tracking_uri)
    experiment = client.get_experiment_by_name(dataset)
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"]) if experiment else []


def test_a_failed_training_goes_on_in_its_mlflow_run(here, plates, trained, monkeypatch):
    from mlflow import MlflowClient

    from tasks import tracked_training

    config = QUICK.model_copy(update={"seed": 11})
    log_epoch, before = tracked_training.log_epoch, len(mlflow_runs(here, plates))

    def away(uri, run_id, epoch):
        if epoch.number == 2:
            raise ConnectionError("MLflow is away")
        log_epoch(uri, run_id, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(tracked_training, "log_epoch", away)
        assert train(plates, config=config, return_state=True).is_failed()
    left = mlflow_runs(here, plates)
    assert len(left) == before + 1 and left[0].info.status == "FAILED"

    model = train(plates, config=config, return_state=True).result()
    assert model.run_id == left[0].info.run_id and len(mlflow_runs(here, plates)) == before + 1
    client = MlflowClient(here.mlflow_tracking_uri)
    assert client.get_run(model.run_id).info.status == "FINISHED"
    for name in ("train/Loss", "val/F1_Score", "learning_rate", "epoch_end_seconds"):
        assert [point.step for point in client.get_metric_history(model.run_id, name)] == [1, 2, 3], name


@pytest.mark.slow
def test_a_killed_rank_fails_the_run_by_its_number_and_the_next_run_takes_the_training_up(here, plates, monkeypatch):
    import psutil
    from mlflow import MlflowClient

    from tasks import tracked_training

    log_epoch, left = tracked_training.log_epoch, []

    def kills_rank_1(uri, run_id, epoch):
        log_epoch(uri, run_id, epoch)
        if left:
            return
        ranks = [each for each in psutil.Process().children(recursive=True) if "tasks.rank" in each.cmdline()]
        left.extend(ranks)
        next(each for each in ranks if each.environ()["RANK"] == "1").kill()

    config = QUICK.model_copy(update={"processes": 2, "seed": 12, "epochs": 6})
    with monkeypatch.context() as patch:
        patch.setattr(tracked_training, "log_epoch", kills_rank_1)
        state = train(plates, config=config, return_state=True)
    assert state.is_failed() and "rank 1 of the training was killed by SIGKILL" in state.message
    assert len(left) >= 2 and not any(each.is_running() for each in left)
    [run, *_] = mlflow_runs(here, plates)
    assert run.info.status == "FAILED"

    again = train(plates, config=config, return_state=True).result()
    assert again.run_id == run.info.run_id
    told = MlflowClient(here.mlflow_tracking_uri).get_metric_history(run.info.run_id, "train/Loss")
    assert [point.step for point in told] == list(range(1, len(told) + 1)) and len(told) > 1


def test_a_limit_that_the_server_does_not_have_is_named_with_how_to_make_it(here, plates, monkeypatch):
    monkeypatch.setattr("flows.train.settings", lambda: here.model_copy(update={"training_limit": "press"}))
    state = train(plates, config=QUICK, return_state=True)
    assert state.is_failed() and "`prefect global-concurrency-limit create press --limit 1`" in state.message


@pytest.fixture(scope="module")
def unfit(here):
    """Datasets of one class, and of three photographs."""
    upload(here.store, "lonely", ("plain",), each=30)
    upload(here.store, "few", each=2)
    return here


@pytest.mark.parametrize(
    ("dataset", "version", "changes", "message"),
    [
        ("plates", None, {"architecture": "resnet18"}, "resnet18 takes images of 32 to 768 pixels a side, not 16"),
        ("plates", 99, {}, "no version 99"),
        ("plates", None, {"continue_from": 99}, "has no version 99"),
        (
            "plates",
            None,
            {"defect_labels": ("plain", "scratched")},
            "is a defect: nothing would be left to pass as good",
        ),
        ("lonely", None, {"defect_labels": ()}, "the only class is ['plain']: telling apart needs at least two"),
        ("few", None, {}, "fewer than one batch of 16: add photographs or lower batch_size"),
        ("plates", None, {"defect_labels": ("torn",)}, "defect labels ['torn'] are not among the labels"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_any_work(here, plates, unfit, dataset, version, changes, message):
    before = len(mlflow_runs(here, dataset))
    state = train(dataset, version, QUICK.model_copy(update=changes), return_state=True)
    assert state.is_failed() and message in state.message
    assert len(mlflow_runs(here, dataset)) == before, "not even an MLflow run"


@pytest.mark.parametrize(
    ("config", "field"),
    [({"optimizer": "lion"}, "optimizer"), ({"learning_rate": -0.1}, "learning_rate"), ({"clip_norm": 0}, "clip_norm")],
)
def test_a_value_that_no_training_can_have_is_refused_with_its_name(here, config, field):
    state = train("plates", config={"pretrained": False, "architecture": "cnn", **config}, return_state=True)
    assert state.is_failed() and field in state.message


def test_a_dataset_that_does_not_exist_is_named_with_what_to_do(here):
    state = train("unheard_of", config=QUICK, return_state=True)
    assert state.is_failed() and "put a batch under incoming/unheard_of/" in state.message


@pytest.fixture(scope="module")
def three(here):
    """Three classes, of which `plain` and `torn` look alike: nobody can be right about all of them."""
    upload(here.store, "three", ("plain", "scratched", "torn"), each=40)
    return "three"


def test_several_classes_without_a_defect_have_no_threshold(here, three):
    config = QUICK.model_copy(update={"defect_labels": (), "minimum_accuracy": 0, "minimum_balanced_accuracy": 0})
    model = train(three, config=config, return_state=True).result()
    _, card = registry.load_card(here.mlflow_tracking_uri, three, model.version)
    assert card.rule.threshold is None and len(card.rule.labels) == 3


def test_a_model_below_the_minimum_is_not_registered_and_the_state_says_so(here, three):
    from mlflow import MlflowClient

    config = QUICK.model_copy(update={"defect_labels": (), "minimum_accuracy": 0.9})
    state = train(three, config=config, return_state=True)
    assert state.name == "BelowMinimum" and state.is_completed()
    assert "is below the minimum 0.9000" in state.message
    flow_run_id = str(state.state_details.flow_run_id)
    assert registry.registered_by(here.mlflow_tracking_uri, three, flow_run_id) is None
    client = MlflowClient(here.mlflow_tracking_uri)
    experiment = client.get_experiment_by_name(three).experiment_id
    (run,) = client.search_runs([experiment], f"tags.`prefect.flow_run_id` = '{flow_run_id}'")
    assert run.info.status == "FINISHED" and "below the minimum" in run.data.tags["not_registered"]
    assert "test_accuracy" not in run.data.metrics, "the test split is looked at for models that may be registered only"


def test_a_parameter_outside_its_bound_is_refused_by_name():
    with pytest.raises(ValidationError, match="learning_rate"):
        TrainConfig(learning_rate=-1)
    with pytest.raises(ValidationError, match="no pretrained weights for cnn"):
        TrainConfig(architecture="cnn")


def test_the_minimum_is_judged_on_both_accuracies():
    from tasks.decision import DecisionRule
    from tasks.evaluation import evaluate

    rule = DecisionRule(("bad", "good"), ("bad",), 0.5)
    always_good = np.tile([0.1, 0.9], (10, 1))
    found = evaluate(always_good, np.array([0] + [1] * 9), rule)
    (reason,) = below_minimum(found, QUICK.model_copy(update={"minimum_accuracy": 0.8}))
    assert reason == "validation balanced accuracy 0.5000 is below the minimum 0.6000"
