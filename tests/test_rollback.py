"""The emergency: the previous version answers at once, whoever else is away. All services are real ones."""

import logging
import time

import pytest
from mlflow import MlflowClient

from tasks import rollback
from tasks.ledger import read_ledger
from tasks.model_repository import FrontDoor, install_front_door, network_name, publish_version, stage_version
from tasks.registry import CHAMPION, champion_version, set_alias
from tasks.rollback import roll_back
from tasks.routing import Route, promoted, read_routing, replace_routing
from tasks.serving import infer_front_door, load_model
from tasks.transaction import PROMOTED, Place, enter, intend, settle

MODEL = "withdrawn"
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def place(triton, store, mlflow_uri, prefect_server, small_network, describe) -> Place:
    """Two versions were promoted; of the second only the ledger knows, because its run died there."""
    client, made = MlflowClient(mlflow_uri), Place(triton.root, store, mlflow_uri, MODEL)
    client.create_registered_model(MODEL)
    run = client.create_run(client.create_experiment(MODEL))
    for version in (1, 2):
        client.create_model_version(MODEL, f"{run.info.artifact_uri}/model", run.info.run_id)
        publish_version(triton.root, stage_version(triton.root, small_network(version), describe(MODEL, version)))
        load_model(triton.address, network_name(MODEL, 32), version)
        intention = intend(made, PROMOTED, version, "test", "all gates held", {})
        after = promoted(read_routing(triton.root, MODEL), MODEL, Route(network_name(MODEL, 32), version))
        enter(made, intention, replace_routing(triton.root, after))
    set_alias(mlflow_uri, MODEL, CHAMPION, 1)
    install_front_door(triton.root, MODEL, FrontDoor(capture_share=0.0))
    load_model(triton.address, MODEL)
    return made


def test_the_routing_is_back_at_once_although_mlflow_is_away_and_the_next_reader_tells_the_rest(
    place, triton, photograph, monkeypatch, caplog
):
    monkeypatch.setattr(rollback, "TELL_WITHIN", 2.0)
    assert infer_front_door(triton.address, MODEL, photograph(1)).model_version == 2
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "tasks.rollback"):
        done = roll_back(place.root, triton.address, place.store, NOBODY, MODEL, "user/anna", "rejects everything")
    assert time.monotonic() - began < 10
    assert (done.version, done.withdrawn) == (1, 2)
    assert infer_front_door(triton.address, MODEL, photograph(1)).model_version == 1
    assert [entry.action for entry in read_ledger(place.store, MODEL)] == ["promoted", "promoted", "rolled-back"]
    assert "its alias in MLflow (http://127.0.0.1:9) and its event are not done" in caplog.text
    set_alias(place.tracking_uri, MODEL, CHAMPION, 2)
    assert settle(place, "sweep") is None
    assert champion_version(place.tracking_uri, MODEL) == 1
