"""flows/sweep.py and the line's claims, with a real S3, MLflow and Prefect server: lost and doubled events."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from prefect import flow
from prefect.client.orchestration import get_client
from pydantic import SecretStr

from deploy.services import free_ports
from flows.ingest import ingest
from flows.settings import Settings
from flows.sweep import SweepOptions, sweep
from flows.train import train
from monitoring.capture import CaptureRecord, spooled, write_record
from tasks.batch import content_of
from tasks.claims import Subject, read_verdict
from tasks.dataset import newest_version
from tasks.followers import read_followers
from tasks.ledger import read_ledger
from tasks.lost import BATCH_SEALED, MODEL_REGISTERED, VERSION_CREATED, lost_batches
from tasks.model_repository import install_front_door, publish_version, stage_version
from tasks.recipe import Augmentation, TrainConfig
from tasks.registry import champion_version, newest_registration
from tasks.routing import Route, RoutingTable, replace_routing
from tasks.sealed import SealedVersion
from tasks.start import StartRule
from tasks.storage import Store, StoredObject, list_objects, write_many
from tasks.trace import find_captured
from tasks.transaction import Place, intend
from tasks.version_store import stored_networks

AT_ONCE = SweepOptions(grace_minutes=0, quiet_minutes=0)
QUICK = TrainConfig(
    architecture="cnn",
    pretrained=False,
    image_size=16,
    epochs=1,
    batch_size=16,
    augmentation=Augmentation(flip_vertical=False, quarter_turns=False, brightness=0, contrast=0),
    precision="float32",
    minimum_accuracy=0,
    minimum_balanced_accuracy=0,
)


@flow(name="follow")
def follow(
    prefix: str = "", dataset: str = "", dataset_version: int = 0, model: str = "", version: int = 0, occasion: str = ""
) -> None:
    """Stands for any deployment that an event starts; no worker runs it, so its runs can be counted."""


# What the triggers of prefect.yaml hand to the deployments.
PARAMETERS = {
    BATCH_SEALED: {"dataset": "{{ event.payload.dataset }}", "prefix": "{{ event.payload.prefix }}"},
    VERSION_CREATED: {
        "dataset": "{{ event.payload.dataset }}",
        "dataset_version": "{{ event.payload.version }}",
    },
    MODEL_REGISTERED: {"model": "{{ event.payload.model }}", "version": "{{ event.payload.version }}"},
}


@pytest.fixture(scope="module")
def here(store: Store, mlflow_uri: str, prefect_server: None) -> Iterator[Settings]:
    assert store.secret_access_key
    found = Settings(
        s3_bucket=store.bucket,
        s3_endpoint_url=store.endpoint_url,
        s3_access_key_id=store.access_key_id,
        s3_secret_access_key=SecretStr(store.secret_access_key),
        mlflow_tracking_uri=mlflow_uri,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ingest", "train", "sweep"):
            patch.setattr(f"flows.{name}.settings", lambda: found)
        yield found


@pytest.fixture
def follower(here: Settings) -> Iterator[Callable[..., str]]:
    """`follower(event, resource)`: the id of a deployment that an automation starts on the event; both go with the test."""
    automations = []

    def made(event: str, resource: str) -> str:
        name = resource.rsplit(".", 1)[-1]
        with get_client(sync_client=True) as client:
            flow_id = client.create_flow(follow)
            deployment = str(client.create_deployment(flow_id, f"{name}-{event.rsplit('.', 1)[-1]}"))
            automation = client.request(
                "POST",
                "/automations/",
                json={
                    "name": f"{event} {resource}",
                    "trigger": {
                        "type": "event",
                        "expect": [event],
                        "match": {"prefect.resource.id": resource},
                        "posture": "Reactive",
                        "threshold": 1,
                        "within": 0,
                    },
                    "actions": [
                        {
                            "type": "run-deployment",
                            "source": "selected",
                            "deployment_id": deployment,
                            "parameters": {**PARAMETERS[event], "occasion": "event {{ event.id }}"},
                        }
                    ],
                },
            ).json()
        automations.append(automation["id"])
        return deployment

    yield made
    with get_client(sync_client=True) as client:
        for identity in automations:
            client.request("DELETE", f"/automations/{identity}")


def runs_of(deployment: str, at_least: int, within: float = 20.0) -> list[dict[str, Any]]:
    wanted = {"deployments": {"id": {"any_": [deployment]}}}
    deadline = time.monotonic() + within
    with get_client(sync_client=True) as client:
        while True:
            found: list[dict[str, Any]] = client.request("POST", "/flow_runs/filter", json=wanted).json()
            if len(found) >= at_least or time.monotonic() > deadline:
                return found
            time.sleep(0.2)


def delete_runs(deployment: str) -> int:
    """As if no run had been made of the event; how many there were."""
    found = runs_of(deployment, 1)
    with get_client(sync_client=True) as client:
        for run in found:
            client.request("DELETE", "/flow_runs/{id}", path_params={"id": run["id"]}).raise_for_status()
    return len(found)


def upload(
    store: Store,
    dataset: str,
    batch: str,
    photograph: Callable[..., bytes],
    count: int = 8,
    first: int = 0,
    marker: bool = True,
) -> str:
    prefix = f"incoming/{dataset}/{batch}/"
    entries = [
        (f"{prefix}{label}/{number}.jpg", photograph(first + number + shift))
        for label, shift in (("cut", 0), ("good", 1000))
        for number in range(count)
    ]
    write_many(store, [*entries, *([(f"{prefix}_SUCCESS", b"")] if marker else [])])
    return prefix


def test_a_complete_batch_that_nobody_announced_is_found_and_its_event_starts_whoever_follows(
    here: Settings, follower: Callable[..., str], photograph: Callable[..., bytes]
) -> None:
    deployment = follower(BATCH_SEALED, "tirewatch.dataset.unseen")
    prefix = upload(here.store, "unseen", "lost", photograph)
    state = sweep(AT_ONCE, return_state=True)
    assert state.name == "Repeated" and prefix in (state.message or "")
    [run] = runs_of(deployment, 1)
    assert run["parameters"]["prefix"] == prefix
    assert sweep(AT_ONCE, return_state=True).name == "NothingLost", "a run will decide about it"
    assert len(runs_of(deployment, 1)) == 1


def test_when_nothing_came_of_what_a_sweep_sent_again_the_next_sweep_is_heard(
    here: Settings, follower: Callable[..., str], photograph: Callable[..., bytes]
) -> None:
    """A failed action of an automation is never repeated: Prefect has seen the event, and no run was made."""
    deployment = follower(BATCH_SEALED, "tirewatch.dataset.unheard")
    prefix = upload(here.store, "unheard", "lost", photograph)
    for _ in range(2):
        state = sweep(AT_ONCE, return_state=True)
        assert state.name == "Repeated" and prefix in (state.message or "")
        assert delete_runs(deployment) == 1


def test_what_is_young_quiet_for_too_short_old_ingested_or_refused_is_left_alone(
    here: Settings, follower: Callable[..., str], photograph: Callable[..., bytes]
) -> None:
    deployment = follower(BATCH_SEALED, "tirewatch.dataset.seen")
    prefix = upload(here.store, "seen", "batch-1", photograph, marker=False)
    assert sweep(SweepOptions(grace_minutes=0, quiet_minutes=1), return_state=True).name == "NothingLost"
    ingest("seen", prefix)
    assert sweep(AT_ONCE, return_state=True).name == "NothingLost", "it has been ingested"
    write_many(
        here.store, [("incoming/seen/batch-2/notes.txt", b"no photograph"), ("incoming/seen/batch-2/_SUCCESS", b"")]
    )
    assert "batch-2" in (sweep(AT_ONCE, return_state=True).message or "")
    assert delete_runs(deployment) == 1, "nobody works on it"
    assert ingest("seen", "incoming/seen/batch-2/", return_state=True).is_failed()
    assert sweep(AT_ONCE, return_state=True).name == "NothingLost", "it has been refused"
    write_many(here.store, [("incoming/seen/batch-2/good/1.jpg", photograph(77))])
    assert "batch-2" in (sweep(AT_ONCE, return_state=True).message or ""), "its content changed"
    assert delete_runs(deployment) == 1
    assert sweep(SweepOptions(grace_minutes=5), return_state=True).name == "NothingLost", "it may be on its way"
    far = SweepOptions(grace_minutes=0, quiet_minutes=0, look_back_days=1e-9)
    assert sweep(far, return_state=True).name == "NothingLost"


def test_a_batch_that_was_refused_is_not_read_again_for_a_repeated_event_but_by_hand(here: Settings) -> None:
    prefix = "incoming/refused-once/batch/"
    write_many(here.store, [(f"{prefix}good/1.jpg", b"no image"), (f"{prefix}good/2.jpg", b"no image")])
    first = ingest("refused-once", prefix, occasion="event 1", return_state=True)
    assert first.is_failed()
    subject = Subject(
        "ingest/refused-once", f"batch/{content_of(here.store, 'refused-once', prefix).removeprefix('sha256:')[:16]}"
    )
    verdict = read_verdict(here.store, subject)
    assert verdict is not None and verdict.outcome == "refused" and "not_an_image" in verdict.figures["reason"]
    again = ingest("refused-once", prefix, occasion="event 1 again", return_state=True)
    assert (again.name, newest_version(here.store, "refused-once")) == ("Unchanged", None)
    assert "refused with this very content" in (again.message or "")
    assert ingest("refused-once", prefix, return_state=True).is_failed()


def test_a_doubled_dataset_event_trains_once_and_a_lost_one_is_found(
    here: Settings, follower: Callable[..., str], photograph: Callable[..., bytes]
) -> None:
    ingest("doubled", upload(here.store, "doubled", "batch-1", photograph, count=30))
    first = train("doubled", 1, QUICK, occasion="event 1", return_state=True)
    again = train("doubled", 1, QUICK, occasion="event 1", return_state=True)
    assert first.is_completed() and first.name == "Completed", first.message
    assert again.name == "Unchanged" and "has decided about doubled v1: registered" in (again.message or "")
    registered = newest_registration(here.mlflow_tracking_uri, "doubled")
    assert registered is not None and registered.version == 1
    assert train("doubled", 1, QUICK, return_state=True).name == "Completed", "by hand it trains again"

    deployment = follower(VERSION_CREATED, "tirewatch.dataset.doubled")
    state = sweep(AT_ONCE, return_state=True)
    assert "has not decided about doubled v1" in (state.message or ""), "this deployment has not"
    [run] = runs_of(deployment, 1)
    assert run["parameters"]["dataset_version"] == 1, "the number is a number after its way through the automation"
    assert sweep(AT_ONCE, return_state=True).name == "NothingLost"
    assert len(runs_of(deployment, 1)) == 1

    promotion = follower(MODEL_REGISTERED, "tirewatch.model.doubled")
    assert "has not decided about doubled v2" in (sweep(AT_ONCE, return_state=True).message or "")
    [_] = runs_of(promotion, 1)


def test_too_few_new_photographs_wait_for_more_and_by_hand_nobody_waits(
    here: Settings, photograph: Callable[..., bytes]
) -> None:
    ingest("slow", upload(here.store, "slow", "batch-1", photograph, count=30, first=5000))
    rule = StartRule(min_new_images=20)
    assert train("slow", 1, QUICK, rule, "event 1", return_state=True).name == "Completed", (
        "the first is always trained"
    )
    ingest("slow", upload(here.store, "slow", "batch-2", photograph, count=6, first=7000))
    waits = train("slow", 2, QUICK, rule, "event 2", return_state=True)
    assert waits.name == "Unchanged" and "12 photographs more than the last training, 20 are asked for" in waits.message
    assert train("slow", 2, QUICK, StartRule(min_new_share=0.5), "event 2b", return_state=True).name == "Unchanged"
    ingest("slow", upload(here.store, "slow", "batch-3", photograph, count=6, first=9000))
    assert train("slow", 3, QUICK, rule, "event 3", return_state=True).name == "Completed", "24 by now"


def test_followers_are_read_with_their_stage_and_what_they_are_at(here: Settings, follower: Callable[..., str]) -> None:
    deployment = follower(BATCH_SEALED, "tirewatch.dataset.followed")
    with get_client(sync_client=True) as client:
        client.create_flow_run_from_deployment(deployment, parameters={"prefix": "incoming/x/y/"})
    [found] = [each for each in read_followers(BATCH_SEALED) if each.name == "followed"]
    assert found.stage == "follow/followed-sealed"
    assert found.is_at({"prefix": "incoming/x/y/"}) and not found.is_at({"prefix": "incoming/x/z/"})


def test_a_switch_whose_records_were_never_written_is_completed_once_it_is_old_enough(
    here: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, name = MlflowClient(here.mlflow_tracking_uri), "half-switched"
    client.create_registered_model(name)
    run = client.create_run(client.create_experiment(name))
    client.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id)
    rooted = here.model_copy(update={"serving_root": tmp_path})
    monkeypatch.setattr("flows.sweep.settings", lambda: rooted)
    place = Place(tmp_path, here.store, here.mlflow_tracking_uri, name)
    intention = intend(place, "promoted", 1, "flow-run/dead", "all gates held", {"served_accuracy": 0.9})
    replace_routing(tmp_path, RoutingTable(name, Route("net", 1), revision=intention.revision))
    young = sweep(AT_ONCE.model_copy(update={"grace_minutes": 5}), return_state=True)
    assert read_ledger(here.store, name) == [], "its promotion may still watch it"
    assert young.name in ("NothingLost", "Repeated")
    told = sweep(AT_ONCE, return_state=True)
    assert "the ledger of half-switched did not know that v1 answers: promoted" in (told.message or "")
    [entry] = read_ledger(here.store, name)
    assert (entry.who, entry.why, entry.evidence["served_accuracy"]) == ("flow-run/dead", "all gates held", 0.9)
    assert entry.evidence["completed_by"].startswith("flow-run/") and champion_version(place.tracking_uri, name) == 1
    assert "half-switched" not in (sweep(AT_ONCE, return_state=True).message or "")


def test_what_answers_and_is_not_on_s3_is_uploaded_so_that_a_lost_server_can_be_restored(
    here: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, describe: Callable[..., SealedVersion]
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"a network")
    publish_version(tmp_path, stage_version(tmp_path, tmp_path / "model.onnx", describe("unkept", 3)))
    install_front_door(tmp_path, "unkept")
    replace_routing(tmp_path, RoutingTable("unkept", Route("unkept_onnx_32", 3)))
    monkeypatch.setattr("flows.sweep.settings", lambda: here.model_copy(update={"serving_root": tmp_path}))
    assert "unkept_onnx_32 version 3 was not on S3" in (sweep(AT_ONCE, return_state=True).message or "")
    assert stored_networks(here.store, "unkept", 3) == ["unkept_onnx_32"]
    assert "unkept" not in (sweep(AT_ONCE, return_state=True).message or "")


def test_with_mlflow_away_a_lost_batch_is_announced_and_the_run_fails_naming_what_could_not_be_done(
    here: Settings, follower: Callable[..., str], photograph: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("flows.sweep.settings", lambda: here.model_copy(update={"mlflow_tracking_uri": nobody}))
    follower(MODEL_REGISTERED, "tirewatch.model.unasked")
    deployment = follower(BATCH_SEALED, "tirewatch.dataset.unhurt")
    prefix = upload(here.store, "unhurt", "lost", photograph)
    state = sweep(AT_ONCE, return_state=True)
    assert state.is_failed() and "find_lost_models of follow/unasked-registered: " in (state.message or "")
    assert f"Done: batch {prefix} has not been ingested" in (state.message or "")
    [run] = runs_of(deployment, 1)
    assert run["parameters"]["prefix"] == prefix


def test_a_damaged_routing_table_keeps_nobody_else_from_being_put_right(
    here: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, describe: Callable[..., SealedVersion]
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"a network")
    for model in ("ailing", "healthy"):
        publish_version(tmp_path, stage_version(tmp_path, tmp_path / "model.onnx", describe(model, 1)))
        install_front_door(tmp_path, model)
    intend(Place(tmp_path, here.store, here.mlflow_tracking_uri, "ailing"), "promoted", 1, "user/tests", "", {})
    replace_routing(tmp_path, RoutingTable("healthy", Route("healthy_onnx_32", 1)))
    (tmp_path / "routing" / "ailing.json").write_text("{")
    monkeypatch.setattr("flows.sweep.settings", lambda: here.model_copy(update={"serving_root": tmp_path}))
    state = sweep(AT_ONCE, return_state=True)
    assert state.is_failed() and "ailing.json is no routing table" in (state.message or "")
    for step in ("complete_switch of ailing", "keep_copies of ailing", "answer_without_plan of ailing"):
        assert step in (state.message or "")
    assert "Done: healthy_onnx_32 version 1 was not on S3" in (state.message or "")
    assert stored_networks(here.store, "healthy", 1) == ["healthy_onnx_32"]


def test_photographs_of_batches_that_were_decided_long_ago_are_not_even_listed(
    here: Settings, follower: Callable[..., str], photograph: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    follower(BATCH_SEALED, "tirewatch.dataset.historic")
    [historic] = [each for each in read_followers(BATCH_SEALED) if each.name == "historic"]
    ingest("historic", upload(here.store, "historic", "decided", photograph))
    upload(here.store, "historic", "forgotten", photograph, first=500)
    listed: list[str] = []

    def told(store: Store, prefix: str) -> list[StoredObject]:
        listed.append(prefix)
        return list_objects(store, prefix)

    monkeypatch.setattr("tasks.lost.list_objects", told)

    def looked(after: timedelta) -> tuple[list[str], list[str]]:
        listed.clear()
        waits = (timedelta(minutes=5), timedelta(minutes=30), timedelta(days=30))
        found = lost_batches(here.store, [historic], datetime.now(UTC) + after, *waits)
        return [each.payload["batch"] for each in found], sorted(listed)

    both = ["incoming/historic/decided/", "incoming/historic/forgotten/"]
    assert looked(timedelta(days=29)) == (["forgotten"], both)
    assert looked(timedelta(days=31)) == ([], both[1:]), "nobody ever decided about it, but it is too old"


def test_what_was_captured_leaves_the_bounded_spool_though_nobody_looks_at_drift(
    here: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, nothing = tmp_path / "spool" / "captured", np.zeros(2, np.float32)
    spool.mkdir(parents=True)
    write_record(spool, CaptureRecord("r1", time.time(), "captured", 1, "good", 0.5, b"photograph", nothing, nothing))
    monkeypatch.setattr("flows.sweep.settings", lambda: here.model_copy(update={"serving_root": tmp_path}))
    sweep(AT_ONCE, return_state=True)
    assert spooled(spool) == []
    found = find_captured(here.store, tmp_path, "captured", "r1")
    assert found is not None and found.image == b"photograph" and found.where.startswith("s3://")
