import uuid

import numpy as np
import pyarrow as pa
import pytest
import torch

from tasks import registry
from tasks.dataset import DatasetVersion
from tasks.decision import DecisionRule
from tasks.model import build_model, normalisation
from tasks.recipe import TrainConfig
from tasks.registry import ModelCard, Reference
from tasks.tracking import open_run

CONFIG = TrainConfig(architecture="tinyvgg", pretrained=False, image_size=32, defect_labels=("worn",))


@pytest.fixture(scope="module")
def version(mlflow_uri):
    """A registered version, as training makes one, with a temperature of 1.7."""
    name, classes = "opened", ("good", "worn")
    dataset = DatasetVersion(name, 3, "sha256:" + "ab" * 32, "s3://b/x.lance", classes, {"train": 9, "val": 2})
    rule = DecisionRule(classes, ("worn",), 0.37)
    mean, std = normalisation("tinyvgg")
    card = ModelCard("tinyvgg", 32, "resize-area-v1", mean, std, rule, name, 3, dataset.digest, "commit", 7, 1.7)
    torch.manual_seed(2)
    classifier = build_model("tinyvgg", 2, pretrained=False)
    with torch.no_grad():
        classifier.head.weight *= 50
    reference = Reference(
        embedding=np.zeros((2, 64), dtype=np.float32),
        probabilities=np.full((2, 2), 0.5, dtype=np.float32),
        labels=np.array([0, 1]),
        sha256=np.array(["aa", "bb"]),
        statistics=pa.table({"sha256": ["aa", "bb"]}),
    )
    run_id = open_run(mlflow_uri, dataset, CONFIG, str(uuid.uuid4()), "http://prefect/runs/flow-run/x")
    return registry.register(mlflow_uri, run_id, card, classifier.state_dict(), reference, {})


@pytest.fixture(scope="module")
def opened(version):
    import mlflow

    return mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")


def test_mlflow_opens_a_registered_version_and_it_answers_as_it_is_served(mlflow_uri, version, opened):
    images = np.random.default_rng(3).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)
    answers = opened.predict({"image": images})
    with torch.inference_mode():
        network = registry.load_network(mlflow_uri, version.name, version.version)
        probabilities, embedding = network(torch.from_numpy(images))
    assert float(network.temperature) == pytest.approx(1.7)
    np.testing.assert_allclose(answers["probabilities"], probabilities.numpy(), atol=1e-5)
    np.testing.assert_allclose(answers["embedding"], embedding.numpy(), atol=1e-5)


def test_the_signature_names_inputs_and_outputs_with_types_and_shapes(opened):
    signature = opened.metadata.signature
    (image,) = signature.inputs.inputs
    assert (image.name, image.type, image.shape) == ("image", np.dtype("uint8"), (-1, 32, 32, 3))
    outputs = {each.name: (each.type, each.shape) for each in signature.outputs.inputs}
    assert outputs == {
        "probabilities": (np.dtype("float32"), (-1, 2)),
        "embedding": (np.dtype("float32"), (-1, 64)),
    }
    assert opened.metadata.metadata["labels"] == ["good", "worn"]
    assert opened.metadata.metadata["threshold"] == 0.37


def test_photographs_of_another_size_are_refused_by_the_signature(opened):
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match="shape"):
        opened.predict({"image": np.zeros((1, 64, 64, 3), dtype=np.uint8)})


def test_the_server_finds_the_signature_for_the_page_of_the_version(mlflow_uri, version):
    import httpx

    asked = {"path": "MLmodel", "name": version.name, "version": str(version.version)}
    answer = httpx.get(f"{mlflow_uri}/model-versions/get-artifact", params=asked, timeout=30)
    assert answer.status_code == 200 and "signature" in answer.text and "probabilities" in answer.text


def test_a_version_tells_its_temperature_and_the_run_its_recipe(mlflow_uri, version):
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_uri)
    assert client.get_model_version(version.name, str(version.version)).tags["temperature"] == "1.7"
    tags = client.get_run(version.run_id).data.tags
    assert tags["recipe"] == "by-hand/by-hand", "outside of a deployment"
    assert (tags["dataset"], tags["dataset_version"], tags["architecture"]) == ("opened", "3", "tinyvgg")
