"""The engine that a recipe demands: beside the network, instead of it, or not to be had here; and what answers then."""

from dataclasses import replace

import pytest

from tasks.engine_passport import PASSPORT_FILE, EnginePassport, read_passport, write_passport
from tasks.engine_stage import (
    RTX_FILE,
    engine_gates,
    make_answer,
    names_engine,
    publish_twin,
    require_no_rehearsal,
    stage_engine,
)
from tasks.export import Export
from tasks.model_config import config_text, network_config
from tasks.model_repository import (
    NETWORK_FILE,
    PLAN_FILE,
    published_versions,
    repository,
    served_file,
    stage_version,
    version_directory,
)
from tasks.model_repository import publish_version as publish
from tasks.routing import Route, RoutingTable, read_routing, write_routing
from tasks.sealed import file_digest, read_sealed
from tasks.serving import NotServed, TritonAddress, infer_front_door, is_version_ready, load_model
from tasks.tensorrt_engine import NoEngine, server_of
from tasks.version_store import upload_version

RTX = Export(engine="tensorrt_rtx")
PLAN = Export(engine="tensorrt")


@pytest.fixture
def staged(tmp_path, small_network, describe):
    return stage_version(tmp_path, small_network(), describe("lids", 4))


def no_card() -> bool:
    try:
        server_of("tensorrt")
    except NoEngine:
        return True
    return False


def test_an_engine_for_inspection_pcs_is_sealed_beside_the_network_that_triton_serves(tmp_path, staged):
    made = stage_engine(tmp_path, staged, RTX)
    sealed, passport = read_sealed(made), read_passport(made)
    assert made == staged and sealed.files.keys() == {NETWORK_FILE, RTX_FILE, PASSPORT_FILE}
    assert passport.engine_sha256 == sealed.files[RTX_FILE] and passport.onnx_sha256 == sealed.files[NETWORK_FILE]
    assert served_file(made).name == NETWORK_FILE and sealed.rehearsal is None
    (gate,) = engine_gates(made, RTX)
    assert gate.held and gate.measured.startswith("tensorrt_rtx 1.") and "compute capability 8.9" in gate.measured
    require_no_rehearsal(sealed)


def test_a_recipe_that_demands_no_engine_gets_the_network_as_it_is(tmp_path, staged):
    before = read_sealed(staged)
    assert stage_engine(tmp_path, staged, Export()) == staged and read_sealed(staged) == before
    assert engine_gates(staged, Export()) == ()


@pytest.mark.skipif(not no_card(), reason="about machines without a CUDA card; this one has one and can build plans")
def test_a_rehearsal_without_a_card_is_marked_refused_by_the_gates_and_can_never_be_champion(tmp_path, staged):
    told = []
    made = stage_engine(tmp_path, staged, PLAN, told.append)
    sealed = read_sealed(made)
    assert "tensorrt" in sealed.rehearsal and told == [f"no tensorrt engine: {sealed.rehearsal}"]
    (gate,) = engine_gates(made, PLAN)
    assert not gate.held and gate.measured == f"a rehearsal without it: {sealed.rehearsal}"
    with pytest.raises(ValueError, match="lids v4 is a rehearsal and cannot be champion"):
        require_no_rehearsal(sealed)


def test_a_run_that_goes_on_where_another_was_killed_takes_the_engine_that_was_kept(
    tmp_path, store, small_network, describe
):
    """Built a second time it has another passport at least, and the number would be refused for ever."""

    def made(kept, how=RTX):
        fresh = stage_version(tmp_path, small_network(), describe("resumed", 4))
        return stage_engine(tmp_path, fresh, how, store=kept)

    assert upload_version(store, made(store))
    assert not upload_version(store, made(store)), "S3 holds this very version"
    with pytest.raises(FileExistsError, match="holds another version"):
        upload_version(store, made(None))
    with pytest.raises(FileExistsError, match="holds another version"):
        upload_version(store, made(store, RTX.model_copy(update={"max_batch_size": 4})))


@pytest.mark.skipif(not no_card(), reason="about machines without a CUDA card; this one has one and can build plans")
def test_where_the_engine_is_not_required_the_onnx_network_answers_and_the_gate_says_so(tmp_path, staged):
    how = PLAN.model_copy(update={"engine_required": False})
    made = stage_engine(tmp_path, staged, how)
    (gate,) = engine_gates(made, how)
    assert gate.held and gate.measured == "the ONNX network answers" and read_sealed(made).rehearsal is None


def test_a_model_of_plans_is_one_of_the_tensorrt_backend():
    text = config_text(network_config("lids_trt_32", 32, (4,), "openvino", threads=2))
    assert 'backend: "tensorrt"' in text and "intra_op" not in text and "openvino" not in text
    assert "versions: [4]" in text and "max_batch_size: 8" in text


@pytest.fixture
def planned(tmp_path_factory, small_network, describe):
    """`planned(root, model)`: a published version of a plan, as a machine with a card leaves it. The plan's bytes are never
    opened here: this server has no card, which is what the tests are about.
    """

    def made(root, model):
        folder = tmp_path_factory.mktemp("plan")
        (folder / PLAN_FILE).write_bytes(b"a plan for another card")
        network = small_network()
        passport = EnginePassport(
            *(
                "tensorrt",
                "10.13.2",
                file_digest(network),
                file_digest(folder / PLAN_FILE),
                "float32",
                "8.6",
                "NVIDIA A10",
            ),
            *((1, 8, 8), False, False, None, "2026-11-21T10:00:00+00:00", 40.0),
        )
        told = describe(model, 4, network=f"{model}_trt_32")
        beside = {NETWORK_FILE: network, PASSPORT_FILE: write_passport(folder, passport)}
        publish(root, stage_version(root, folder / PLAN_FILE, told, beside))
        return version_directory(root, told.network, 4)

    return made


def test_the_network_that_a_plan_was_built_from_becomes_a_version_of_its_own(tmp_path, planned):
    directory = planned(tmp_path, "lids")
    assert served_file(directory).name == PLAN_FILE
    twin = publish_twin(tmp_path, directory)
    assert twin == publish_twin(tmp_path, directory)
    assert (twin.network, twin.version, set(twin.files)) == ("lids_onnx_32", 4, {NETWORK_FILE})
    assert twin.files[NETWORK_FILE] == read_sealed(directory).files[NETWORK_FILE]
    assert published_versions(tmp_path, "lids_onnx_32") == [4]
    assert 'backend: "tensorrt"' in (repository(tmp_path) / "lids_trt_32" / "config.pbtxt").read_text()


@pytest.fixture
def refused(triton, planned):
    """`refused(model)`: the routing table of a model whose champion is a plan, on a server without a card."""
    from tasks.model_repository import install_front_door

    def made(model):
        planned(triton.root, model)
        install_front_door(triton.root, model)
        table = write_routing(triton.root, RoutingTable(model, Route(f"{model}_trt_32", 4), revision=3))
        load_model(triton.address, model)
        return table

    return made


@pytest.mark.skipif(not no_card(), reason="about servers without a CUDA card")
def test_a_server_that_came_up_and_refuses_the_plan_answers_with_the_onnx_network_and_the_ledger_keeps_silent(
    triton, refused, store, mlflow_uri, photograph
):
    """The plan as champion, the ledger up to date; `sweep` looks, and `settle` has nothing to enter."""
    from mlflow import MlflowClient

    from tasks.ledger import append, read_ledger
    from tasks.registry import CHAMPION, set_alias
    from tasks.transaction import PROMOTED, Place, settle

    table = refused("pots")
    with pytest.raises(NotServed):
        infer_front_door(triton.address, "pots", photograph(1))
    client = MlflowClient(mlflow_uri)
    client.create_registered_model("pots")
    run = client.create_run(client.create_experiment("pots"))
    for _ in range(4):
        client.create_model_version("pots", f"{run.info.artifact_uri}/model", run.info.run_id)
    append(store, "pots", PROMOTED, 4, "test", "all gates held", {})
    set_alias(mlflow_uri, "pots", CHAMPION, 4)
    why = make_answer(triton.root, triton.address, "pots")
    assert why.startswith("pots_trt_32 version 4: loading pots_trt_32 ")
    assert infer_front_door(triton.address, "pots", photograph(1)).model_version == 4
    after = read_routing(triton.root, "pots")
    assert (after.champion, after.revision) == (Route("pots_onnx_32", 4), table.revision + 1)
    assert settle(Place(triton.root, store, mlflow_uri, "pots"), "test") is None
    assert len(read_ledger(store, "pots")) == 1
    assert make_answer(triton.root, triton.address, "pots") is None


LOAD = "loading x_trt_32 on 127.0.0.1:8001 failed: "
FAILED = f"{LOAD}[StatusCode.INVALID_ARGUMENT] load failed for model 'x_trt_32': version 4 is at UNAVAILABLE state: "
BUILT = f"{FAILED}Internal: unable to create TensorRT engine: IRuntime::deserializeCudaEngine: Error Code 1: "


@pytest.mark.parametrize(
    ("said", "of_the_engine"),
    [
        (
            f"{FAILED}Invalid argument: unable to find backend library for backend 'tensorrt', try specifying runtime",
            True,
        ),
        (f"{FAILED}Internal: unable to load plan file to auto complete config: /m/x_trt_32/4/model.plan;", True),
        (
            f"{BUILT}Serialization (Version tag does not match. Current Version: 240, Serialized Engine Version: 239)",
            True,
        ),
        (f"{BUILT}Cuda Runtime (out of memory)", False),
        (f"{FAILED}Internal: failed to allocate CUDA memory for the plan file", False),
        (f"{LOAD}[StatusCode.DEADLINE_EXCEEDED] Deadline Exceeded", False),
        (f"{LOAD}[StatusCode.UNAVAILABLE] failed to connect to all addresses; last error: plan file", False),
        ("x_trt_32 was loaded on 127.0.0.1:8001, but version 4 is not ready: read the server's log", False),
    ],
)
def test_a_refused_plan_is_told_from_what_may_pass(said, of_the_engine):
    """The first in the words of the server here, the others as Triton's sources and people with a card quote them."""
    assert names_engine(said) == of_the_engine


@pytest.mark.skipif(not no_card(), reason="about servers without a CUDA card")
def test_a_plan_stays_in_force_where_the_load_failed_for_a_reason_that_may_pass(triton, refused, caplog):
    """Its gRPC port is away, HTTP answers: nobody said anything about the plan."""
    table = refused("lost_calls")
    deaf = replace(triton.address, grpc="127.0.0.1:9")
    assert make_answer(triton.root, deaf, "lost_calls") is None
    assert read_routing(triton.root, "lost_calls") == table
    assert published_versions(triton.root, "lost_calls_onnx_32") == []
    assert "the plan lost_calls_trt_32 version 4 may still be served" in caplog.text


@pytest.mark.skipif(not no_card(), reason="about servers without a CUDA card")
def test_a_rollback_to_a_plan_that_the_server_refuses_finds_its_onnx_network(triton, refused, small_network):
    table = refused("jars")
    plan = read_sealed(version_directory(triton.root, "jars_trt_32", 4))
    later = replace(plan, network="jars_onnx_32", version=5, files={})
    staged = stage_version(triton.root, small_network(), later)
    publish(triton.root, staged)
    load_model(triton.address, "jars_onnx_32", 5)
    after = replace(table, champion=Route("jars_onnx_32", 5), previous=table.champion, revision=4)
    write_routing(triton.root, after)
    assert "ONNX network of the same version answers" in make_answer(triton.root, triton.address, "jars")
    routed = read_routing(triton.root, "jars")
    assert (routed.champion, routed.previous) == (Route("jars_onnx_32", 5), Route("jars_onnx_32", 4))
    assert all(is_version_ready(triton.address, "jars_onnx_32", version) for version in (4, 5))


@pytest.mark.skipif(not no_card(), reason="about servers without a CUDA card")
def test_a_plan_is_restored_on_a_server_that_refuses_it_as_its_onnx_network(
    triton, planned, store, tmp_path, photograph
):
    from tasks.ledger import append
    from tasks.model_repository import FrontDoor, Runtime
    from tasks.restore import Server, restore
    from tasks.transaction import PROMOTED, Place
    from tasks.version_store import upload_version

    upload_version(store, planned(tmp_path, "bowls"))
    append(store, "bowls", PROMOTED, 4, "test", "all gates held", {})
    server = Server(triton.address, Runtime(), FrontDoor(capture_share=0.0))
    done = restore(Place(triton.root, store, "", "bowls"), server)
    assert done.table.champion == Route("bowls_onnx_32", 4) and done.fetched == (Route("bowls_trt_32", 4),)
    assert "bowls_onnx_32 answers in its place" in done.notes[0]
    assert infer_front_door(triton.address, "bowls", photograph(1)).model_version == 4


def test_where_no_server_is_up_or_nothing_is_in_production_nothing_is_changed(tmp_path, planned, small_network):
    nobody = TritonAddress("127.0.0.1:9", "127.0.0.1:9")
    assert make_answer(tmp_path, nobody, "cups") is None
    planned(tmp_path, "cups")
    table = write_routing(tmp_path, RoutingTable("cups", Route("cups_trt_32", 4)))
    assert make_answer(tmp_path, nobody, "cups") is None and read_routing(tmp_path, "cups") == table
