"""The watchdog: its patience as a pure function, and a killed front-door process mended for real."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy import journal, local
from deploy.processes import processes_of
from deploy.stack import Stack
from deploy.supervisor import ProgramState, Supervisor
from deploy.watchdog import FAILURES, LOADING, Watch, find_problem, known_image, look
from tasks.decision import DecisionRule
from tasks.images import CURRENT, decode
from tasks.model_repository import install_front_door, network_name, publish_version, stage_version
from tasks.routing import Route, promoted, write_routing
from tasks.sealed import SealedVersion

RUNNING = ProgramState("triton", "RUNNING", pid=7, uptime=1000.0)
OTHERS = ("s3", "prefect", "mlflow", "bridge", "worker-cpu", "worker-gpu")


def looks(watch: Watch, problems: list[str | None], program: ProgramState = RUNNING, every: float = 5.0) -> list[bool]:
    """What each of a series of looks decides."""
    restarts = []
    for index, problem in enumerate(problems):
        watch, restart = look(watch, program, problem, now=index * every)
        restarts.append(restart)
    return restarts


def test_only_failures_in_a_row_restart_the_server() -> None:
    assert looks(Watch(), ["no", "no", None, "no", "no", "no"]) == [False] * 5 + [True]


def test_a_server_that_is_still_loading_is_left_alone() -> None:
    young = replace(RUNNING, uptime=LOADING - 1)
    assert not any(looks(Watch(), ["no"] * 10, young))


def test_a_young_server_that_has_answered_is_watched() -> None:
    young = replace(RUNNING, uptime=20.0)
    assert looks(Watch(), [None, "no", "no", "no"], young) == [False, False, False, True]


@pytest.mark.parametrize("program", [None, replace(RUNNING, state="STARTING"), replace(RUNNING, state="BACKOFF")])
def test_what_supervisor_is_mending_is_its_own_affair(program: ProgramState | None) -> None:
    watch, restart = look(Watch(pid=7, answered=True, failures=FAILURES - 1), program, "no", now=0.0)
    assert not restart
    assert watch.failures == 0


def test_restarts_that_do_not_help_come_at_growing_distances() -> None:
    times = [index * 5.0 for index, restart in enumerate(looks(Watch(), ["no"] * 400)) if restart]
    distances = np.diff(times)
    assert (np.diff(distances) > 0).all()
    assert len(times) < 8  # 2,000 seconds


def test_the_known_image_is_one_that_the_contract_accepts() -> None:
    assert decode(known_image(), 32).std() > 10


def mean_colour_network(path: Path) -> None:
    """uint8 [N, H, W, 3] -> probabilities [N, 2] and embedding [N, 3], from the mean colour."""
    weights = numpy_helper.from_array(np.array([[1, -1], [0, 0], [-1, 1]], np.float32), "weights")
    scale = numpy_helper.from_array(np.array(1 / 255, np.float32), "scale")
    axes = numpy_helper.from_array(np.array([1, 2], np.int64), "axes")
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["embedding"]),
        helper.make_node("MatMul", ["embedding", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "mean_colour",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 32, 32, 3])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 2]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 3]),
        ],
        [weights, scale, axes],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def put_into_production(root: Path, model: str, scratch: Path) -> None:
    network = network_name(model, 32)
    mean_colour_network(scratch / "model.onnx")
    version = SealedVersion(
        model=model,
        version=1,
        network=network,
        rule=DecisionRule(("blue", "red"), ("red",), 0.5),
        preprocessing=CURRENT,
        image_size=32,
        dataset=model,
        dataset_version=1,
        dataset_digest="sha256:00",
        run_id="run",
        commit="commit",
        precision="float32",
    )
    publish_version(root, stage_version(root, scratch / "model.onnx", version))
    install_front_door(root, model)
    write_routing(root, promoted(None, model, Route(network, 1)))


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Stack]:
    """Triton and the watchdog, with one model in production."""
    state = tmp_path / ".tirewatch"
    put_into_production(state / "serving", "colour", tmp_path)
    try:
        yield local.up(state, lambda name, seconds, url: None, without=OTHERS)
    finally:
        local.down(state)


@pytest.mark.slow
def test_a_killed_front_door_process_is_mended_and_told(serving: Stack) -> None:
    http, image = f"127.0.0.1:{serving.ports['triton_http']}", known_image()
    assert find_problem(http, ["colour"], image) is None
    time.sleep(6)  # the watchdog has seen it answer
    before = Supervisor(serving).programs()["triton"].pid
    stub = front_door_stub(serving, "colour")
    stub.kill()
    deadline = time.monotonic() + 90
    while Supervisor(serving).programs()["triton"].pid in (0, before) or find_problem(http, ["colour"], image):
        assert time.monotonic() < deadline, "the server was not mended"
        time.sleep(0.5)
    [told] = [entry for entry in journal.entries(serving.state) if entry.event == "restarted"]
    assert told.service == "triton"
    assert "colour" in told.text
    [row] = [row for row in local.status(serving.state) if row.name == "triton"]
    assert (row.state, row.healthy, row.restarts) == ("RUNNING", True, 1)


def front_door_stub(stack: Stack, model: str) -> psutil.Process:
    """One of the Python processes behind the model."""
    found = [
        process
        for process in processes_of(stack.id, "triton")
        if "triton_python_backend_stub" in " ".join(process.cmdline()) and f"/{model}/" in " ".join(process.cmdline())
    ]
    assert found, [process.cmdline() for process in processes_of(stack.id, "triton")]
    return found[0]
