"""Promotion of other forms than the float32 network: INT8, an engine beside it, a rehearsal. All services are real ones."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.promote import promote
from tasks import registry
from tasks.engine_passport import read_passport
from tasks.export import Export
from tasks.gates import Limits
from tasks.model_repository import published_versions, version_directory
from tasks.quantize import calibration_of
from tasks.routing import read_routing
from tasks.sealed import read_sealed
from tasks.serving import infer_front_door
from tasks.tensorrt_engine import NoEngine, server_of

pytestmark = pytest.mark.slow
MODEL, NETWORK = "stamps", "stamps_onnx_16"
LIMITS = Limits(min_accuracy=0.6, min_test_images=50, max_p99_ms=2000, must_beat_champion=False)


@pytest.fixture(scope="module")
def here(stack_settings, register_prints):
    register_prints(MODEL, versions=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.promote.settings", lambda: stack_settings)
        yield stack_settings


def told(here, version):
    run_id = registry.load_card(here.mlflow_tracking_uri, MODEL, version)[0].run_id
    path = MlflowClient(here.mlflow_tracking_uri).download_artifacts(run_id, registry.PROMOTION)
    return {gate["name"]: gate for gate in json.loads(Path(path).read_text())["gates"]}


def test_an_int8_version_with_an_engine_for_inspection_pcs_is_proven_rung_by_rung_and_answers(here, prints):
    how = Export(precision="int8", calibration_images=64, engine="tensorrt_rtx")
    state = promote(MODEL, 1, LIMITS, how, return_state=True)
    assert state.name == "Promoted", state.message
    directory = version_directory(here.serving_root, NETWORK, 1)
    sealed, passport = read_sealed(directory), read_passport(directory)
    assert sealed.precision == passport.precision == "int8" and sealed.rehearsal is None
    _, card = registry.load_card(here.mlflow_tracking_uri, MODEL, 1)
    from tasks.dataset import open_version

    again = calibration_of(here.store, open_version(here.store, MODEL, 1), 16, card.preprocessing, 64)
    assert again.digest == sealed.passport["calibration_digest"] == passport.calibration_digest, (
        "it can be computed again"
    )
    gates = told(here, 1)
    rungs = ["training -> PyTorch", "PyTorch -> ONNX", "ONNX -> int8", "int8 -> Triton", "Triton -> front door"]
    assert [name.removeprefix("parity ") for name in gates if name.startswith("parity ")] == rungs
    assert gates["engine"]["measured"].startswith("tensorrt_rtx 1.")
    answer = infer_front_door(here.triton, MODEL, prints.encoded["test"][0])
    assert answer.model_version == 1


def test_a_rehearsal_without_a_card_is_proven_and_does_not_take_the_alias(here):
    try:
        server_of("tensorrt")
    except NoEngine:
        pass
    else:
        pytest.skip("about machines without a CUDA card; this one has one and can build plans")
    before = read_routing(here.serving_root, MODEL)
    state = promote(MODEL, 2, LIMITS, Export(engine="tensorrt"), return_state=True)
    assert state.name == "Refused" and "engine: a rehearsal without it: tensorrt cannot be loaded here" in state.message
    gates = told(here, 2)
    assert [name for name, gate in gates.items() if not gate["held"]] == ["engine"], "everything else was proven"
    assert read_routing(here.serving_root, MODEL) == before and published_versions(here.serving_root, NETWORK) == [1]
    assert registry.champion_version(here.mlflow_tracking_uri, MODEL) == 1
