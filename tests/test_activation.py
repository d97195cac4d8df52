"""An imported version takes over at a plant under a live server, says on whose word, and can be rolled back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from deploy.cli import app
from tasks import activation, storage
from tasks.activation import activate
from tasks.archive import InvalidArchive, key_id, make_keys, signing_key, trusted_key
from tasks.ledger import breaks, read_ledger
from tasks.model_repository import publish_version, stage_version
from tasks.registry import champion_version, newest_registration
from tasks.rollback import roll_back
from tasks.routing import read_routing
from tasks.sealed import file_digest
from tasks.serving import infer_front_door
from tasks.transaction import Place, settle
from tasks.version_store import stored_networks
from tasks.version_transfer import Plant, export_version, import_version

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("prefect_server")]
MODEL = "sent"
REHEARSAL = 4


@pytest.fixture(scope="module")
def archives(store, mlflow_uri, prints, register_prints, describe, tmp_path_factory):
    """(archives of versions 2, 3 and 4, key that signed them) of a plant that trains; 4 is a rehearsal. Afterwards its registry
    has forgotten them, and stands for that of another plant.
    """
    from tasks.onnx_export import export_onnx

    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("sent")
    register_prints(MODEL, versions=REHEARSAL)
    export_onnx(prints.network, 16, folder / "model.onnx")
    signing, trusted = make_keys(folder)
    made = {}
    for version in (2, 3, REHEARSAL):
        told = describe(MODEL, version, network=f"{MODEL}_onnx_16", rule=prints.rule, image_size=16, dataset_version=1)
        told = replace(told, run_id=f"{version}", rehearsal="no card there" if version == REHEARSAL else None)
        publish_version(home, stage_version(home, folder / "model.onnx", told))
        made[version] = folder / f"{version}.tar"
        export_version(Plant(home, store, mlflow_uri, "openvino"), MODEL, version, made[version], signing_key(signing))
    MlflowClient(mlflow_uri).delete_registered_model(MODEL)
    return made, trusted_key(trusted)


@pytest.fixture(scope="module")
def plant(store, mlflow_uri, triton, archives):
    """A plant that trains nothing: its own S3 bucket, and a server. All three versions have arrived."""
    there = replace(store, bucket="plant")
    storage.ensure_bucket(there)
    made = Plant(triton.root, there, mlflow_uri, "openvino")
    for file in archives[0].values():
        import_version(made, file, archives[1])
    return made


def activated(plant, triton, version):
    return activate(plant, triton.address, MODEL, version, "user/anna@plant", f"v{version} was released", 0.0)


def test_an_imported_version_takes_over_on_its_archives_word_and_a_rollback_brings_back_the_one_before(
    plant, triton, archives, prints, monkeypatch
):
    files, trusted = archives
    place = Place(plant.root, plant.store, plant.tracking_uri, MODEL)

    def answering():
        return infer_front_door(triton.address, MODEL, prints.encoded["test"][0]).model_version

    first = activated(plant, triton, 2)
    assert answering() == 2 and first.swap.previous is None and first.rung.flips == 0

    def with_one_that_is_no_photograph(root, address, staged, golden, images, *rest, **more):
        return real(root, address, staged, golden, [*images, b"no photograph"], *rest, **more)

    real = activation.swap
    with monkeypatch.context() as patch:
        patch.setattr(activation, "swap", with_one_that_is_no_photograph)
        undone = activated(plant, triton, 3)
    assert undone.swap.undone and undone.entry.action == "undone" and answering() == 2

    second = activated(plant, triton, 3)
    assert answering() == 3 and second.swap.previous == 2 and not second.swap.undone
    assert second.swap.figures["swap_failed_requests"] == 0
    entry = read_ledger(plant.store, MODEL)[-1]
    assert (entry.version, entry.who, entry.why) == (3, "user/anna@plant", "v3 was released")
    assert entry.evidence["archive"] == f"sha256:{file_digest(files[3])}"
    assert entry.evidence["signed_by"] == key_id(trusted)
    assert entry.evidence["golden"] == second.rung.measured and second.rung.flips == 0
    assert champion_version(plant.tracking_uri, MODEL) == 3 and settle(place, "test") is None
    assert stored_networks(plant.store, MODEL, 3) == [f"{MODEL}_onnx_16"], "the plant can restore it"
    with pytest.raises(ValueError, match="sent v3 is the champion already"):
        activated(plant, triton, 3)

    back = roll_back(plant.root, triton.address, plant.store, plant.tracking_uri, MODEL, "user/anna@plant", "wrong")
    assert back.version == 2 and answering() == 2
    entries = read_ledger(plant.store, MODEL)
    assert [each.version for each in entries] == [2, 3, 2, 3, 2] and breaks(entries) == []


def test_what_is_a_rehearsal_was_trained_here_or_never_arrived_is_refused_and_nothing_changes(
    plant, triton, register_prints
):
    before = read_routing(plant.root, MODEL)
    with pytest.raises(ValueError, match="sent v4 is a rehearsal and cannot be champion: no card there"):
        activated(plant, triton, REHEARSAL)
    with pytest.raises(LookupError, match="sent v9 is not registered: import its archive first"):
        activated(plant, triton, 9)
    register_prints("trained_here")
    with pytest.raises(LookupError, match="trained_here v1 was trained here and not imported: prove it with promote"):
        activate(plant, triton.address, "trained_here", 1, "user/anna@plant", "why not", 0.0)
    assert read_routing(plant.root, MODEL) == before and read_routing(plant.root, "trained_here") is None


def test_on_the_command_line_it_says_what_answers_and_a_refusal_is_one_sentence(
    plant, triton, stack_settings, monkeypatch
):
    """After the rollback above version 2 answers. What stands in for a stack's folder is only its addresses."""
    secret = stack_settings.triton_admin_key.get_secret_value()
    found = {
        "TIREWATCH_S3_BUCKET": plant.store.bucket,
        "TIREWATCH_S3_ENDPOINT_URL": plant.store.endpoint_url,
        "TIREWATCH_S3_ACCESS_KEY_ID": plant.store.access_key_id,
        "TIREWATCH_S3_SECRET_ACCESS_KEY": plant.store.secret_access_key,
        "TIREWATCH_SERVING_ROOT": str(plant.root),
        "TIREWATCH_TRITON_HTTP": triton.address.http,
        "TIREWATCH_TRITON_GRPC": triton.address.grpc,
        "TIREWATCH_TRITON_ADMIN_KEY": secret,
        "TIREWATCH_MLFLOW_TRACKING_URI": plant.tracking_uri,
    }
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    said = CliRunner().invoke(app, ["version", "activate", MODEL, "3", "--why", "the line was told"])
    assert said.exit_code == 0, said.output
    assert "sent v3 answers instead of v2; 0 failed, " in said.output
    assert "golden photographs on this machine: " in said.output
    entry = read_ledger(plant.store, MODEL)[-1]
    assert (entry.version, entry.why) == (3, "the line was told") and entry.who.startswith("user/")
    again = CliRunner().invoke(app, ["version", "activate", MODEL, "3", "--why", "twice"])
    assert again.exit_code == 1 and "error sent v3 is the champion already" in again.output
    assert secret not in said.output + again.output
    roll_back(plant.root, triton.address, plant.store, plant.tracking_uri, MODEL, "user/anna@plant", "told enough")


def test_a_version_that_decides_otherwise_here_is_not_announced(plant, triton, tmp_path):
    client = MlflowClient(plant.tracking_uri)
    run_id = client.get_model_version(MODEL, "3").run_id
    golden = Path(client.download_artifacts(run_id, "golden/golden.json", str(tmp_path)))
    told = json.loads(golden.read_text())
    golden.write_text(json.dumps(told | {"probabilities": [row[::-1] for row in told["probabilities"]]}))
    client.log_artifact(run_id, str(golden), "golden")
    before, announced = read_routing(plant.root, MODEL), storage.list_objects(plant.store, "switches")
    with pytest.raises(InvalidArchive, match=r"sent v3: on this machine .* golden decisions flip"):
        activated(plant, triton, 3)
    assert read_routing(plant.root, MODEL) == before
    assert storage.list_objects(plant.store, "switches") == announced


def test_nobody_trains_or_promotes_after_a_version_that_was_proven_elsewhere(plant):
    assert newest_registration(plant.tracking_uri, MODEL) is None
