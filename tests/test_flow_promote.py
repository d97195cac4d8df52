"""The promote flow on real S3, MLflow, Prefect and Triton: digits, trained for real, promoted, refused, killed half-way."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from pydantic import SecretStr

from flows.ingest import IngestOptions, ingest
from flows.promote import promote
from flows.train import train
from tasks import ledger, registry, storage
from tasks.approval import Approval, answer, open_requests
from tasks.dataset import open_version, read_rows
from tasks.gates import Limits
from tasks.inference import open_network
from tasks.model_repository import network_name, published_versions, version_directory
from tasks.network_forms import run_all, torch_run
from tasks.onnx_export import export_onnx
from tasks.proof import photographs
from tasks.recipe import Augmentation, TrainConfig
from tasks.routing import read_routing, replace_routing, routing_file
from tasks.sealed import file_digest, read_sealed
from tasks.serving import NotServed, infer_front_door, is_version_ready
from tasks.sources import digit_folders, upload_folder
from tasks.trace import Captured, trace
from tasks.version_store import folder_of, stored_golden, stored_version

MODEL = "scans"
NETWORK = network_name(MODEL, 16)
LIMITS = Limits(min_accuracy=0.6, min_test_images=50, max_p99_ms=2000, must_beat_champion=False)
QUICK = TrainConfig(
    architecture="cnn",
    pretrained=False,
    image_size=16,
    epochs=8,
    learning_rate=5e-3,
    augmentation=Augmentation(brightness=0, contrast=0),
    precision="float32",
    minimum_accuracy=0.5,
    minimum_balanced_accuracy=0.5,
)


@pytest.fixture(scope="module")
def here(stack_settings):
    """The settings of the stack that the fixtures are."""
    with pytest.MonkeyPatch.context() as patch:
        for flow in ("ingest", "train", "promote"):
            patch.setattr(f"flows.{flow}.settings", lambda: stack_settings)
        yield stack_settings


@pytest.fixture(scope="module")
def trained(here, tmp_path_factory):
    """Version 1, trained on six hundred scans."""
    folder = digit_folders(tmp_path_factory.mktemp("digits"), side=16)
    for label in folder.iterdir():
        for path in sorted(label.iterdir())[60:]:
            path.unlink()
    ingest(MODEL, upload_folder(here.store, folder, MODEL, "first"), IngestOptions())
    state = train(MODEL, config=QUICK, return_state=True)
    assert state.is_completed() and state.name == "Completed", state.message
    return state.result()


def run(version=None, limits=LIMITS, model=MODEL):
    return promote(model, version, limits, return_state=True)


@pytest.fixture(scope="module")
def first(trained):
    """The final state of the first promotion."""
    return run()


@pytest.fixture
def register(here, trained):
    """`register(noise, flow_run)`: a further version, the first one's weights with noise added."""
    from tasks.tracking import open_run

    def registered(noise: float, flow_run: str) -> registry.TrainedModel:
        _, card = registry.load_card(here.mlflow_tracking_uri, MODEL, trained.version)
        weights = registry.load_weights(
            here.mlflow_tracking_uri, MODEL, trained.version, card.architecture, card.rule.labels
        )
        torch.manual_seed(1)
        noisy = {
            name: value + noise * torch.randn_like(value) * value.std() if value.ndim > 1 else value
            for name, value in weights.items()
        }
        dataset = open_version(here.store, MODEL, 1)
        run_id = open_run(here.mlflow_tracking_uri, dataset, QUICK, flow_run, "http://prefect/run")
        reference = registry.load_reference(here.mlflow_tracking_uri, MODEL, trained.version)
        validation = photographs(here.store, dataset, "val").encoded
        network = torch_run(registry.built(card, noisy))
        (probabilities,) = run_all([network], validation, card.image_size, card.preprocessing)
        reference = replace(reference, probabilities=probabilities)  # what this version's training would have noted
        return registry.register(here.mlflow_tracking_uri, run_id, card, noisy, reference, {})

    return registered


def held_back(here) -> list[bytes]:
    rows = read_rows(here.store, open_version(here.store, MODEL, 1), ["test"], ["image", "label"])
    return [image for batch in rows for image in batch.column("image").to_pylist()]


def events(kind: str, count: int = 1) -> list[dict]:
    """Payloads of the model's events of this kind; waits for them to pass the server's queue."""
    found: list[dict] = []
    for _ in range(100):
        with get_client(sync_client=True) as client:
            body = {"filter": {"resource": {"id": [f"tirewatch.model.{MODEL}"]}}}
            answer = client.request("POST", "/events/filter", json=body).json()
        found = [event["payload"] for event in answer["events"] if event["event"] == kind]
        if len(found) >= count:
            break
        time.sleep(0.1)
    return found


def artifact(key: str) -> str:
    with get_client(sync_client=True) as client:
        body = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC"}
        return client.request("POST", "/artifacts/filter", json=body).json()[0]["data"]


# --- the first promotion ----------------------------------------------------------------------------------------


def test_the_first_version_that_passes_its_gates_answers(here, first, trained):
    assert (first.name, first.message) == ("Promoted", f"{MODEL} v1 answers; before it: nothing")
    for protocol in ("grpc", "http"):
        answer = infer_front_door(here.triton, MODEL, held_back(here)[0], protocol)
        assert answer.model_version == trained.version == 1
        assert answer.lineage["run_id"] == trained.run_id
        assert answer.lineage["dataset_digest"] == open_version(here.store, MODEL, 1).digest
    table = read_routing(here.serving_root, MODEL)
    assert (table.champion.network, table.champion.version, table.previous) == (NETWORK, 1, None)


def test_the_sealed_version_says_what_it_was_made_from(here, first, trained):
    sealed = read_sealed(version_directory(here.serving_root, NETWORK, 1))
    _, card = registry.load_card(here.mlflow_tracking_uri, MODEL, 1)
    assert (sealed.rule, sealed.run_id, sealed.commit) == (card.rule, trained.run_id, card.commit)
    assert (sealed.dataset, sealed.dataset_version, sealed.precision) == (MODEL, 1, "float32")
    assert {"torch", "onnx", "onnxruntime", "openvino"} <= sealed.passport.keys()


def test_the_figures_of_the_served_engine_stand_with_the_run(here, first, trained):
    metrics = registry.run_metrics(here.mlflow_tracking_uri, trained.run_id)
    images = held_back(here)
    assert metrics["served_images"] == len(images)
    assert metrics["served_accuracy"] == pytest.approx(metrics["test_accuracy"], abs=0.011)
    assert metrics["served_differs_from_offline"] == 0
    assert 0 < metrics["served_p50_ms"] <= metrics["served_p95_ms"] <= metrics["served_p99_ms"]
    client = MlflowClient(here.mlflow_tracking_uri)
    assert client.get_model_version(MODEL, "1").tags["promotion"] == "promoted"
    told = json.loads(Path(client.download_artifacts(trained.run_id, registry.PROMOTION)).read_text())
    assert told["verdict"] == "promoted" and all(gate["held"] for gate in told["gates"])
    assert {"accuracy", "served equals offline", "parity PyTorch -> ONNX", "p99 latency"} <= {
        gate["name"] for gate in told["gates"]
    }


def test_alias_ledger_event_and_report_tell_the_same(here, first, trained):
    assert registry.champion_version(here.mlflow_tracking_uri, MODEL) == 1
    [entry] = ledger.read_ledger(here.store, MODEL)[:1]
    assert (entry.action, entry.version, entry.previous, entry.number) == ("promoted", 1, None, 1)
    assert entry.evidence["mlflow_run"] == trained.run_id and entry.evidence["served_accuracy"] > 0.6
    assert entry.who.startswith("flow-run/")
    assert events("tirewatch.model.promoted")[-1] == {"model": MODEL, "version": 1, "reasons": []}
    assert artifact(f"promotion-{MODEL}").startswith(f"# {MODEL} v1: promoted")


def test_nothing_is_left_beside_what_is_served(here, first):
    assert list((here.serving_root / "staging").iterdir()) == []
    assert list(here.serving_root.glob("scratch-*")) == []


def test_the_version_that_answers_lies_on_s3_with_what_was_proven_of_it(here, first):
    sealed = read_sealed(version_directory(here.serving_root, NETWORK, 1))
    assert stored_version(here.store, NETWORK, 1) == sealed
    golden = stored_golden(here.store, NETWORK, 1)
    assert len(golden.pixels) == len(golden.probabilities) > 0 and golden.pixels.shape[1:] == (16, 16, 3)


def test_the_same_network_exports_to_the_same_bytes(here, first, tmp_path):
    """Else a promotion that was killed after publishing could never be finished: its number would hold other bytes."""
    export_onnx(registry.load_network(here.mlflow_tracking_uri, MODEL, 1), 16, tmp_path / "again.onnx")
    sealed = read_sealed(version_directory(here.serving_root, NETWORK, 1))
    assert file_digest(tmp_path / "again.onnx") == sealed.files["model.onnx"]
    assert open_network(tmp_path / "again.onnx").output_shapes["probabilities"] == (10,)


# --- again ------------------------------------------------------------------------------------------------------


def test_promoting_the_champion_again_changes_nothing(here, first):
    table = read_routing(here.serving_root, MODEL)
    state = run()
    assert (state.name, state.message) == ("Unchanged", f"{MODEL} v1 is the champion already")
    assert read_routing(here.serving_root, MODEL) == table
    assert len(ledger.read_ledger(here.store, MODEL)) == 1


def test_a_run_that_was_killed_after_the_switch_is_made_good(here, first, trained):
    """Killed before alias and ledger were written: the routing table and the intention say who answers, and why."""
    MlflowClient(here.mlflow_tracking_uri).delete_registered_model_alias(MODEL, "champion")
    storage.delete(here.store, [ledger.key_of(MODEL, 1)])
    assert run().name == "Unchanged"
    assert registry.champion_version(here.mlflow_tracking_uri, MODEL) == 1
    [entry] = ledger.read_ledger(here.store, MODEL)
    assert (entry.action, entry.version, entry.previous, entry.why) == ("promoted", 1, None, "all gates held")
    assert entry.evidence["mlflow_run"] == trained.run_id and entry.evidence["completed_by"].startswith("flow-run/")


def test_a_run_that_was_killed_before_the_switch_is_run_again(here, first):
    """Killed after publishing and loading, before the table: nobody was routed, so all of it is done once more."""
    table = read_routing(here.serving_root, MODEL)
    routing_file(here.serving_root, MODEL).unlink()
    with pytest.raises(NotServed, match="no version of scans is in production"):
        infer_front_door(here.triton, MODEL, held_back(here)[0])
    assert run().name == "Promoted"
    after = read_routing(here.serving_root, MODEL)
    assert (after.champion, after.previous) == (table.champion, None)
    assert len(ledger.read_ledger(here.store, MODEL)) == 1
    assert infer_front_door(here.triton, MODEL, held_back(here)[0]).model_version == 1


# --- refused ----------------------------------------------------------------------------------------------------


def test_a_worse_candidate_is_refused_with_its_reasons_and_nothing_changes(here, first, register):
    worse = register(0.9, "worse")
    table, entries = read_routing(here.serving_root, MODEL), ledger.read_ledger(here.store, MODEL)
    state = run(worse.version, LIMITS.model_copy(update={"min_test_images": 10_000}))
    assert state.name == "Refused"
    reasons = state.message.removeprefix(f"{MODEL} v{worse.version}: ").split("; ")  # everything that failed is named
    assert f"test images: {len(held_back(here))}" in reasons and "demanded at least 10000" in reasons
    assert any(reason.startswith("accuracy: 0.") for reason in reasons)
    assert "not worse than the champion: " in state.message
    assert read_routing(here.serving_root, MODEL) == table
    assert ledger.read_ledger(here.store, MODEL) == entries
    assert registry.champion_version(here.mlflow_tracking_uri, MODEL) == 1
    assert published_versions(here.serving_root, NETWORK) == [1]
    assert not is_version_ready(here.triton, NETWORK, worse.version)
    assert list((here.serving_root / "staging").iterdir()) == []
    metrics = registry.run_metrics(here.mlflow_tracking_uri, worse.run_id)
    assert metrics["served_accuracy"] < 0.6 < metrics["champion_accuracy"]
    payload = next(each for each in events("tirewatch.model.refused") if each["version"] == worse.version)
    assert any(reason.startswith("accuracy: ") for reason in payload["reasons"])
    told = artifact(f"promotion-{MODEL}")
    assert told.startswith(f"# {MODEL} v{worse.version}: refused") and "What it did not prove" in told


def test_a_version_or_model_that_does_not_exist_is_named(first):
    state = run(99)
    assert state.is_failed() and "'scans' has no version 99" in state.message
    state = promote("nobody", None, LIMITS, return_state=True)
    assert state.is_failed() and "'nobody' has no version" in state.message


def test_a_network_that_is_damaged_on_the_way_is_not_routed(here, first, register, monkeypatch):
    """What the live server loads is compared with what was proven, before anybody is routed to it."""
    other = register(0.0, "damaged")
    table = read_routing(here.serving_root, MODEL)
    from tasks import swap

    def tampered(root, staged, runtime=None):
        from tasks.model_repository import publish_version
        from tasks.sealed import seal

        network = registry.load_network(here.mlflow_tracking_uri, MODEL, 1)
        with torch.no_grad():
            network.classifier.head.weight.neg_()
        sealed = read_sealed(staged)
        export_onnx(network, 16, staged / "model.onnx")
        seal(staged, sealed)
        return publish_version(root, staged, runtime)

    monkeypatch.setattr(swap, "publish_version", tampered)
    state = run(other.version)
    assert state.is_failed() and f"{NETWORK} version {other.version} on the live server decides" in state.message
    assert read_routing(here.serving_root, MODEL) == table
    assert infer_front_door(here.triton, MODEL, held_back(here)[0]).model_version == 1
    shutil.rmtree(version_directory(here.serving_root, NETWORK, other.version))


# --- a second champion ------------------------------------------------------------------------------------------


def test_a_second_version_takes_over_under_load_and_the_former_one_stays_loaded(here, first, register):
    second = register(0.02, "second")
    state = run(second.version)
    assert state.name == "Promoted", state.message
    table = read_routing(here.serving_root, MODEL)
    assert (table.champion.version, table.previous.version) == (second.version, 1)
    assert all(is_version_ready(here.triton, NETWORK, version) for version in (1, second.version))
    assert infer_front_door(here.triton, MODEL, held_back(here)[0]).model_version == second.version
    metrics = registry.run_metrics(here.mlflow_tracking_uri, second.run_id)
    assert metrics["swap_failed_requests"] == metrics["swap_misrouted_requests"] == 0
    assert metrics["swap_requests"] > 400
    entries = ledger.read_ledger(here.store, MODEL)
    assert [(entry.version, entry.previous) for entry in entries] == [(1, None), (second.version, 1)]
    assert registry.champion_version(here.mlflow_tracking_uri, MODEL) == second.version


def test_a_switch_during_which_a_request_fails_is_undone_and_refused(here, first, register, monkeypatch):
    """The champion's front door is pulled away in the middle of the switch."""
    from tasks import swap
    from tasks.serving import load_model, unload_model

    third = register(0.01, "third")
    before = read_routing(here.serving_root, MODEL)

    def pulled(root, table):
        written = replace_routing(root, table)
        if table.champion.version == third.version:
            unload_model(here.triton, MODEL)
            time.sleep(0.3)
            load_model(here.triton, MODEL)
        return written

    monkeypatch.setattr(swap, "replace_routing", pulled)
    state = run(third.version)
    assert state.name == "Refused" and "switch under load: " in state.message
    after = read_routing(here.serving_root, MODEL)
    assert (after.champion, after.previous) == (before.champion, before.previous)
    assert after.revision > before.revision
    entries = ledger.read_ledger(here.store, MODEL)
    told = [(entry.action, entry.version) for entry in entries[-2:]]
    assert told == [("promoted", third.version), ("undone", before.champion.version)] and ledger.breaks(entries) == []
    assert registry.champion_version(here.mlflow_tracking_uri, MODEL) == before.champion.version
    assert infer_front_door(here.triton, MODEL, held_back(here)[0]).model_version == before.champion.version


# --- a person decides -------------------------------------------------------------------------------------------------


def test_a_person_who_says_no_leaves_everything_as_it_was(here, first, register):
    candidate = register(0.005, "rejected")
    before = read_routing(here.serving_root, MODEL)

    def reject() -> None:
        while not (waiting := open_requests(here.store, MODEL)):
            time.sleep(0.2)
        answer(waiting[0], "reject", "anna", "the light was odd")

    thread = threading.Thread(target=reject)
    thread.start()
    state = promote(MODEL, candidate.version, LIMITS, approval=Approval(minutes=5), return_state=True)
    thread.join()
    assert state.name == "Refused" and "approval: rejected by anna: the light was odd" in state.message
    assert read_routing(here.serving_root, MODEL) == before
    assert list((here.serving_root / "staging").iterdir()) == []
    [row] = [line for line in artifact(f"promotion-{MODEL}").splitlines() if line.startswith("| approval | **no** |")]
    assert row.endswith("| rejected by anna: the light was odd |")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("staging", ["kept", "lost"])
def test_a_suspended_promotion_goes_on_after_its_approval_without_proving_anything_twice_that_is_still_there(
    here, first, register, tmp_path, staging
):
    """As a worker runs it: the process ends at the question, and another one begins with the answer."""
    candidate = register(0.004 if staging == "kept" else 0.003, f"approved {staging}")
    parameters = {
        "model": MODEL,
        "version": candidate.version,
        "limits": LIMITS.model_dump(),
        "approval": {"minutes": 60},
    }
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(
            client.create_flow_from_name("promote"),
            "approved",
            entrypoint="flows/promote.py:promote",
            path=str(Path(__file__).parents[1]),
            enforce_parameter_schema=False,
        )
        run = client.create_flow_run_from_deployment(deployment, parameters=parameters).id

    def work() -> str:
        settings = {
            f"TIREWATCH_{name.upper()}": value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            for name in here.model_fields_set
            for value in [getattr(here, name)]
        }
        prefect = {"PREFECT_API_URL": str(PREFECT_API_URL.value()), "PREFECT_HOME": str(tmp_path / "prefect")}
        subprocess.run(
            [sys.executable, "-m", "prefect.engine"],
            env={**os.environ, **settings, **prefect, "PREFECT__FLOW_RUN_ID": str(run)},
            check=False,
        )
        with get_client(sync_client=True) as client:
            return str(client.read_flow_run(run).state.name)

    assert work() == "Suspended"
    [asked] = open_requests(here.store, MODEL)
    [staged] = (here.serving_root / "staging").glob(f"{NETWORK}-{candidate.version}-{run}-*")
    if staging == "lost":
        shutil.rmtree(staged)
    answer(asked, "approve", "anna", "the misses are scratches")
    assert work() == "Promoted"
    with get_client(sync_client=True) as client:
        body = {"flow_runs": {"id": {"any_": [str(run)]}}}
        steps = client.request("POST", "/task_runs/filter", json=body).json()
    ends = {
        name: [step["state"]["name"] for step in steps if step["name"].startswith(name)] for name in ("export", "prove")
    }
    steps_of_export = ["Cached", "Completed"] if staging == "kept" else ["Cached", "Completed", "Completed"]
    assert sorted(ends["export"]) == steps_of_export and ends["prove"].count("Completed") == len(steps_of_export) - 1, (
        ends
    )
    entry = ledger.read_ledger(here.store, MODEL)[-1]
    assert (entry.version, entry.why) == (
        candidate.version,
        "all gates held; approved by anna: the misses are scratches",
    )
    assert {gate["name"] for gate in entry.evidence["gates"]} >= {"approval", "accuracy"}


# --- long after -------------------------------------------------------------------------------------------------------


def test_a_request_is_reproduced_by_the_registered_network_where_the_sealed_one_is_gone(here, first, tmp_path):
    image = held_back(here)[0]
    served = infer_front_door(here.triton, MODEL, image)
    facts = (served.model_version, served.label, float(served.score), image, "", "", "s3://captures")
    captured = Captured(MODEL, "request", datetime.now(UTC), *facts)
    places = (here.store, here.serving_root, here.mlflow_tracking_uri, here.cpu_accelerator)
    assert trace(captured, *places).equal
    from_s3 = trace(captured, here.store, tmp_path, here.mlflow_tracking_uri, here.cpu_accelerator)
    assert from_s3.equal and from_s3.by == trace(captured, *places).by
    seal = f"{folder_of(NETWORK, served.model_version)}/version.json"
    kept = storage.read(here.store, seal)
    storage.delete(here.store, [seal])
    try:
        again = trace(captured, here.store, tmp_path, here.mlflow_tracking_uri, here.cpu_accelerator)
    finally:
        storage.write(here.store, seal, kept)
    assert again.by.startswith("the registered PyTorch network") and again.label == served.label
    assert again.difference < 1e-4 and again.entry.version == served.model_version
