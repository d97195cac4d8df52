import json
import subprocess
import sys
import uuid

import numpy as np
import pyarrow as pa
import pytest
import torch

from tasks import registry
from tasks.dataset import DatasetVersion
from tasks.decision import DecisionRule
from tasks.model import build_model, image_network, normalisation
from tasks.passport import commit, passport
from tasks.recipe import TrainConfig
from tasks.registry import ModelCard, Reference
from tasks.tracking import close_run, open_run

CONFIG = TrainConfig(architecture="tinyvgg", pretrained=False, image_size=32, defect_labels=("worn",))


def dataset(name: str) -> DatasetVersion:
    return DatasetVersion(name, 3, "sha256:" + "ab" * 32, "s3://b/x.lance", ("good", "worn"), {"train": 9, "val": 2})


def card_of(name: str) -> ModelCard:
    mean, std = normalisation("tinyvgg")
    rule = DecisionRule(("good", "worn"), ("worn",), 0.37)
    return ModelCard("tinyvgg", 32, "resize-area-v1", mean, std, rule, name, 3, "sha256:" + "ab" * 32, commit(), 7)


REFERENCE = Reference(
    embedding=np.arange(8, dtype=np.float32).reshape(2, 4),
    probabilities=np.array([[0.9, 0.1], [0.2, 0.8]], dtype=np.float32),
    labels=np.array([0, 1]),
    sha256=np.array(["aa", "bb"]),
    statistics=pa.table({"sha256": ["aa", "bb"], "brightness": [0.4, 0.5]}),
)


def registered(uri: str, name: str, flow_run_id: str = ""):
    """A run with everything in it, registered; its weights."""
    torch.manual_seed(len(name))
    weights = build_model("tinyvgg", 2, pretrained=False).state_dict()
    run_id = open_run(uri, dataset(name), CONFIG, flow_run_id or str(uuid.uuid4()), "http://prefect/runs/flow-run/x")
    return registry.register(uri, run_id, card_of(name), weights, REFERENCE, {"quality": "fine"}), weights


def test_a_registered_version_comes_back_as_it_was_stored(mlflow_uri):
    model, weights = registered(mlflow_uri, "roundtrip")
    found, card = registry.load_card(mlflow_uri, "roundtrip", model.version)
    assert (found, card) == (model, card_of("roundtrip"))
    image = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    classifier = build_model("tinyvgg", 2, pretrained=False)
    classifier.load_state_dict(weights)
    with torch.inference_mode():
        expected = image_network("tinyvgg", classifier).eval()(image)
        loaded = registry.load_network(mlflow_uri, "roundtrip", model.version)(image)
    assert all(torch.equal(a, b) for a, b in zip(expected, loaded, strict=True))
    reference = registry.load_reference(mlflow_uri, "roundtrip", model.version)
    np.testing.assert_array_equal(reference.embedding, REFERENCE.embedding)
    assert reference.statistics.to_pydict() == REFERENCE.statistics.to_pydict()


def test_a_version_tells_what_it_was_made_from(mlflow_uri):
    from mlflow import MlflowClient

    model, _ = registered(mlflow_uri, "told", flow_run_id="flow-1")
    tags = MlflowClient(mlflow_uri).get_model_version("told", str(model.version)).tags
    assert tags["dataset_version"] == "3" and tags["dataset_digest"] == "sha256:" + "ab" * 32
    assert tags["threshold"] == "0.37" and tags["architecture"] == "tinyvgg" and tags["quality"] == "fine"
    assert tags["prefect.flow_run_id"] == "flow-1"


def test_a_flow_run_registers_once_however_often_it_is_repeated(mlflow_uri):
    from mlflow import MlflowClient

    first, _ = registered(mlflow_uri, "once", flow_run_id="flow-once")
    again, _ = registered(mlflow_uri, "once", flow_run_id="flow-once")
    assert again == first
    assert len(MlflowClient(mlflow_uri).search_model_versions("name = 'once'")) == 1
    other, _ = registered(mlflow_uri, "once", flow_run_id="flow-other")
    assert other.version == first.version + 1
    assert registry.version_of_flow_run(mlflow_uri, "once", "flow-other") == other.version


def test_a_flow_run_that_registered_nothing_is_named(mlflow_uri):
    with pytest.raises(LookupError, match="flow run lost registered no version of 'nobody'"):
        registry.version_of_flow_run(mlflow_uri, "nobody", "lost")


def test_an_attempt_that_died_is_closed_when_its_flow_run_starts_again(mlflow_uri):
    from mlflow import MlflowClient

    died, again = (open_run(mlflow_uri, dataset("restart"), CONFIG, "flow-restart", "http://p") for _ in range(2))
    client = MlflowClient(mlflow_uri)
    assert client.get_run(died).info.status == "KILLED"
    assert client.get_run(again).info.status == "RUNNING"
    close_run(mlflow_uri, again, "FINISHED", ("too weak", "too few"))
    assert client.get_run(again).data.tags["not_registered"] == "too weak; too few"


def test_a_version_that_does_not_exist_is_answered_with_those_that_do(mlflow_uri):
    registered(mlflow_uri, "few")
    with pytest.raises(LookupError, match=r"'few' has no version 9 .* registered: \[1\]"):
        registry.load_card(mlflow_uri, "few", 9)
    with pytest.raises(LookupError, match="registered: nothing"):
        registry.load_card(mlflow_uri, "unknown", 1)
    with pytest.raises(LookupError, match="run its train deployment first"):
        registry.newest_version(mlflow_uri, "unknown")


def test_weights_for_other_classes_are_refused(mlflow_uri):
    model, _ = registered(mlflow_uri, "classes")
    with pytest.raises(ValueError, match=r"do not fit a tinyvgg for \['good', 'torn'\]"):
        registry.load_weights(mlflow_uri, "classes", model.version, "tinyvgg", ("good", "torn"))


def test_the_champion_is_nobody_until_the_alias_is_set_and_moves_with_it(mlflow_uri):
    assert registry.champion_version(mlflow_uri, "throne") is None
    first, _ = registered(mlflow_uri, "throne")
    second, _ = registered(mlflow_uri, "throne")
    assert registry.champion_version(mlflow_uri, "throne") is None
    registry.set_alias(mlflow_uri, "throne", "champion", first.version)
    assert registry.champion_version(mlflow_uri, "throne") == first.version
    registry.set_alias(mlflow_uri, "throne", "champion", second.version)
    assert registry.champion_version(mlflow_uri, "throne") == second.version
    assert registry.newest_version(mlflow_uri, "throne") == second.version


def test_promotion_leaves_its_figures_with_the_run(mlflow_uri):
    model, _ = registered(mlflow_uri, "promoted")
    figures = {"served_accuracy": 0.9, "served_p50_ms": 3.5, "served_rate_of_nothing": float("nan")}
    registry.log_promotion(mlflow_uri, model, figures, {"verdict": "promoted", "gates": []})
    found = registry.run_metrics(mlflow_uri, model.run_id)
    assert found["served_accuracy"] == 0.9 and "served_rate_of_nothing" not in found


def test_the_registry_works_where_no_tracking_address_was_ever_set(mlflow_uri):
    model, _ = registered(mlflow_uri, "stranger")
    script = (
        "import sys; from tasks.registry import load_card, run_page; u = sys.argv[1];"
        f"print(load_card(u, 'stranger', {model.version})[1].to_json()); print(run_page(u, '{model.run_id}'))"
    )
    done = subprocess.run(
        (sys.executable, "-c", script, mlflow_uri),
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    text, page = done.stdout.rsplit("}", 1)
    assert json.loads(text + "}")["dataset"] == "stranger"
    assert f"/runs/{model.run_id}" in page


def test_the_passport_names_machine_libraries_lock_and_commit():
    found = passport()
    assert found["torch"] == torch.__version__.split("+")[0]
    assert found["lock"].startswith("sha256:") and found["cpu"] and int(found["cores"]) >= 1
    assert found["commit"] == commit() != ""


def test_the_passport_names_the_gpus_before_torch_is_loaded(tmp_path):
    from tasks.passport import gpus

    for number, model in enumerate(("NVIDIA H200", "NVIDIA L4")):
        listing = tmp_path / "gpus" / f"0000:0{number}:00.0" / "information"
        listing.parent.mkdir(parents=True)
        listing.write_text(f"Model: \t\t {model}\nIRQ:   \t\t 44\n")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65\nGCC version: 12\n")
    found = gpus(tmp_path)
    assert found["gpu"] == "NVIDIA H200, NVIDIA L4" and found["gpu_driver"].endswith("580.65")
    assert gpus(tmp_path / "absent") == {"gpu": "none"}
