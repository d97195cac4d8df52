"""Progressive delivery on a live server, under traffic: who answers whom, what ends it, and that every client is answered."""

import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from monitoring.capture import read_spool
from tasks import rollout, storage
from tasks.decision import decide
from tasks.delivery import Canary, Delivery
from tasks.images import decode
from tasks.inference import open_network
from tasks.model_repository import (
    FrontDoor,
    network_name,
    publish_version,
    published_versions,
    stage_version,
)
from tasks.production import read_window
from tasks.proof import Golden
from tasks.rollout import Server, deliveries, roll_out
from tasks.routing import Route, RoutingTable, read_routing, replace_routing, write_routing
from tasks.serving import NotServed, infer_front_door, is_version_ready, load_model

ROOT = Path(__file__).parents[1]
LOOSE = Delivery(
    shadow_requests=30,
    canary=(Canary(share=0.5),),
    canary_requests=20,
    minutes=2,
    max_late_rate=0.9,
)


class Traffic:
    """Clients that ask without pause; every answer's version, and every refusal."""

    def __init__(self, address, model: str, images: list[bytes], **parameters: str) -> None:
        self.answers: list[tuple[float, int]] = []
        self.refused: list[str] = []
        self._stop = threading.Event()
        self._ask = lambda number: infer_front_door(
            address, model, images[number % len(images)], parameters={"tire_id": f"T{number}", **parameters}
        )
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        for number in itertools.count():
            if self._stop.is_set():
                return
            try:
                self.answers.append((time.time(), self._ask(number).model_version))
            except NotServed as error:
                self.refused.append(str(error))
            time.sleep(0.01)

    @property
    def versions(self) -> set[int]:
        return {version for _, version in self.answers}


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(rollout, "LOOK_EVERY", 0.2)


@pytest.fixture
def images(photograph):
    return [photograph(seed, 32 + seed % 7) for seed in range(24)]


@pytest.fixture
def produced(triton, in_production):
    """`produced(model)`: version 1 of the model in production, everything captured; the server's side of a delivery."""

    def server_of(model: str) -> Server:
        in_production(model, FrontDoor(instances=2, capture_share=1.0))
        return Server(triton.root, triton.address, "openvino")

    return server_of


@pytest.fixture
def candidate(triton, describe, images):
    """`candidate(model, file)`: the network as a staged version 2, and its golden answers."""

    def staged(model: str, file, shown=images):
        pixels = np.stack([decode(image, 32) for image in shown[:4]])
        golden = Golden(pixels, open_network(file)(pixels)["probabilities"])
        return stage_version(triton.root, file, describe(model, 2)), golden

    return staged


def edited(file, target, body) -> None:
    """The network with `probabilities` changed: `body(graph, raw)` adds nodes that make `probabilities` out of `raw`."""
    model = onnx.load(file)
    for node in model.graph.node:
        node.output[:] = ["raw" if name == "probabilities" else name for name in node.output]
    body(model.graph)
    onnx.checker.check_model(model)
    onnx.save(model, target)


def always_good(graph) -> None:
    graph.initializer.append(helper.make_tensor("say_good", TensorProto.FLOAT, [3], [-9.0, 9.0, -9.0]))
    graph.node.extend(
        [
            helper.make_node("Add", ["raw", "say_good"], ["louder"]),
            helper.make_node("Softmax", ["louder"], ["probabilities"], axis=-1),
        ]
    )


def no_number_for_bright(graph) -> None:
    """log(200 - the first pixel): not a number for a bright one."""
    for name, kind, value in (
        ("from", TensorProto.INT64, [0, 0, 0]),
        ("to", TensorProto.INT64, [1, 1, 1]),
        ("axes", TensorProto.INT64, [1, 2, 3]),
    ):
        graph.initializer.append(helper.make_tensor(name, kind, [3], value))
    graph.initializer.append(helper.make_tensor("bright", TensorProto.FLOAT, [1], [200.0]))
    graph.initializer.append(helper.make_tensor("nothing", TensorProto.FLOAT, [1], [0.0]))
    graph.initializer.append(helper.make_tensor("flat", TensorProto.INT64, [2], [-1, 1]))
    graph.node.extend(
        [
            helper.make_node("Slice", ["image", "from", "to", "axes"], ["corner"]),
            helper.make_node("Cast", ["corner"], ["number"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["number", "flat"], ["row"]),
            helper.make_node("Sub", ["bright", "row"], ["left"]),
            helper.make_node("Log", ["left"], ["logged"]),
            helper.make_node("Mul", ["logged", "nothing"], ["zero_or_nan"]),
            helper.make_node("Add", ["raw", "zero_or_nan"], ["probabilities"]),
        ]
    )


def delivered(server, store, staged, golden, how=LOOSE, late_ms=60_000.0, told=None):
    seen = told if told is not None else []
    return roll_out(
        server, store, staged, golden, how, late_ms, "test", lambda stage, total: seen.append((stage, total))
    )


def test_a_candidate_that_agrees_is_asked_in_the_shadow_then_answers_its_share(
    produced, candidate, store, small_network, images
):
    server, told = produced("agreeing"), []
    staged, golden = candidate("agreeing", small_network(1))
    with Traffic(server.address, "agreeing", images) as traffic:
        gates = delivered(server, store, staged, golden, told=told)
        time.sleep(0.3)
    assert [(gate.name, gate.held) for gate in gates] == [
        ("delivery, shadow", True),
        ("delivery, canary, 0.5 of the requests", True),
    ]
    assert traffic.refused == [] and traffic.versions == {1, 2}
    shadow_ended, canary_ended = (
        datetime.fromisoformat(each["ended"]).timestamp() for each in deliveries(store, "agreeing")[0].stages
    )
    assert not any(version == 2 for at, version in traffic.answers if at < shadow_ended)
    assert not any(version == 2 for at, version in traffic.answers if at > canary_ended + 0.2)
    stage, total = told[-1]
    assert stage.tally.served >= 20 and total.pairs >= 30 and total.disagreements == 0
    table = read_routing(server.root, "agreeing")
    assert (table.challenger, table.share, table.champion.version) == (None, 0.0, 1)
    assert is_version_ready(server.address, network_name("agreeing", 32), 2) and staged.exists()


def test_one_that_says_good_to_everything_is_withdrawn_in_the_shadow_and_answers_nobody(
    produced, candidate, store, small_network, images, tmp_path
):
    server, told = produced("yes_man"), []
    edited(small_network(1), tmp_path / "good.onnx", always_good)
    staged, golden = candidate("yes_man", tmp_path / "good.onnx")
    with Traffic(server.address, "yes_man", images) as traffic:
        gates = delivered(server, store, staged, golden, LOOSE.model_copy(update={"shadow_requests": 5000}), told=told)
    assert [gate.held for gate in gates] == [False]
    assert "good where the champion says defective" in gates[0].measured
    assert traffic.versions == {1} and traffic.refused == []
    assert told[-1][1].pairs < 200
    assert not is_version_ready(server.address, network_name("yes_man", 32), 2)
    assert published_versions(server.root, network_name("yes_man", 32)) == [1]


def test_where_the_candidate_has_no_answer_the_champion_gives_one_and_the_candidate_goes(
    produced, candidate, store, small_network, images, tmp_path
):
    server = produced("speechless")
    edited(small_network(1), tmp_path / "nan.onnx", no_number_for_bright)
    probabilities = open_network(tmp_path / "nan.onnx")(np.stack([decode(image, 32) for image in images]))[
        "probabilities"
    ]
    silent = ~np.isfinite(probabilities).all(axis=1)
    assert 0 < silent.sum() < len(images) / 2, "else the test shows nothing"
    spoken, unspoken = (
        [image for image, gone in zip(images, silent, strict=True) if gone == is_silent] for is_silent in (0, 1)
    )
    staged, golden = candidate("speechless", tmp_path / "nan.onnx", spoken)
    asked = list(spoken)

    def meet_the_bright_ones(stage, total) -> None:
        if stage.done:  # clients have had its answers
            asked[:] = unspoken

    how = LOOSE.model_copy(update={"shadow_requests": 0, "canary": (Canary(share=1.0),), "canary_requests": 5000})
    with Traffic(server.address, "speechless", asked) as traffic:
        gates = roll_out(server, store, staged, golden, how, 60_000.0, "test", meet_the_bright_ones)
        time.sleep(0.3)
    assert [gate.held for gate in gates] == [False] and "without an answer" in gates[0].measured
    assert traffic.refused == [] and traffic.versions == {1, 2}
    assert traffic.answers[-1][1] == 1
    kept = deliveries(store, "speechless")[0].stages[0]
    assert kept["errors"] >= 1 and kept["held"] is False


def test_a_slow_candidate_is_withdrawn_for_being_late(produced, candidate, store, small_network, images):
    server = produced("late")
    staged, golden = candidate("late", small_network(1))
    how = LOOSE.model_copy(update={"max_late_rate": 0.5})
    with Traffic(server.address, "late", images) as traffic:
        gates = delivered(server, store, staged, golden, how, late_ms=0.001)
    assert not gates[-1].held and "; late: " in gates[-1].measured and traffic.refused == []


def test_a_canary_on_one_line_leaves_the_others_to_the_champion(produced, candidate, store, small_network, images):
    server = produced("lined")
    staged, golden = candidate("lined", small_network(1))
    how = LOOSE.model_copy(update={"shadow_requests": 0, "canary": (Canary(lines=("north",)),)})
    with (
        Traffic(server.address, "lined", images, line="north") as north,
        Traffic(server.address, "lined", images, line="south") as south,
    ):
        gates = delivered(server, store, staged, golden, how)
    assert [gate.held for gate in gates] == [True], gates
    assert (2 in north.versions, south.versions) == (True, {1})


def test_a_rollback_or_another_switch_ends_the_delivery(produced, candidate, store, small_network, images):
    server = produced("contested")
    staged, golden = candidate("contested", small_network(1))

    def interfere(stage, total) -> None:
        if stage.canary and stage.done:
            table = read_routing(server.root, "contested")
            replace_routing(
                server.root, replace(table, challenger=None, share=0.0, until=None, revision=table.revision + 1)
            )

    how = LOOSE.model_copy(update={"canary_requests": 5000})
    with Traffic(server.address, "contested", images) as traffic:
        gates = roll_out(server, store, staged, golden, how, 60_000.0, "test", interfere)
    assert not gates[-1].held and "was changed meanwhile" in gates[-1].measured
    assert traffic.refused == [] and read_routing(server.root, "contested").champion.version == 1


def test_without_traffic_the_candidate_does_not_get_in(produced, candidate, store, small_network):
    server = produced("quiet")
    staged, golden = candidate("quiet", small_network(1))
    gates = delivered(server, store, staged, golden, LOOSE.model_copy(update={"minutes": 0.02}))
    assert [gate.held for gate in gates] == [False]
    assert gates[0].measured.startswith("production had shown too little after 0.02 minutes")


def test_a_store_that_is_away_blinds_the_delivery_and_nothing_is_lost(
    produced, candidate, store, small_network, images, monkeypatch
):
    server, calls = produced("blind"), itertools.count()
    staged, golden = candidate("blind", small_network(1))
    real = rollout.Shadow.look

    def sometimes(self):
        if next(calls) in (1, 2, 3):
            gone = replace(store, endpoint_url="http://127.0.0.1:9")
            storage.read(gone, "nothing")
        return real(self)

    monkeypatch.setattr(rollout.Shadow, "look", sometimes)
    with Traffic(server.address, "blind", images) as traffic:
        gates = delivered(server, store, staged, golden)
    assert [gate.held for gate in gates] == [True, True] and traffic.refused == []


def test_requests_without_an_answer_stay_out_of_what_drift_looks_at(
    produced, store, triton, small_network, describe, images, tmp_path
):
    server = produced("undisturbed")
    edited(small_network(1), tmp_path / "nan.onnx", no_number_for_bright)
    publish_version(server.root, stage_version(server.root, tmp_path / "nan.onnx", describe("undisturbed", 2)))
    network = network_name("undisturbed", 32)
    load_model(server.address, network, 2)
    write_routing(server.root, RoutingTable("undisturbed", Route(network, 1), None, Route(network, 2), share=1.0))
    answered = [infer_front_door(server.address, "undisturbed", image).model_version for image in images]
    assert {*answered} == {1, 2}
    spool = server.root / "spool" / "undisturbed"
    deadline = time.monotonic() + 10
    while len(records := [record for _, record in read_spool(spool)]) < len(images) + answered.count(1):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    failed = [record for record in records if record.error]
    assert len(failed) == answered.count(1) and all(record.version == 2 for record in failed)
    assert all(record.milliseconds > 0 for record in records)
    rollout.Shadow(
        store,
        spool,
        "undisturbed",
        server.address,
        describe("undisturbed", 1),
        describe("undisturbed", 2),
        1.0,
        datetime.now(UTC),
    ).look()
    window = read_window(store, "undisturbed", 2, 100, datetime.now(UTC) - timedelta(hours=1))
    assert len(window) == answered.count(2)
    assert decide(window.probabilities, describe("undisturbed", 2).rule).shape == (len(window),)


KILLED = """
import pickle, sys
from tasks import rollout

rollout.LOOK_EVERY, rollout.LEASE = 0.2, 3.0
server, store, staged, golden, how = pickle.load(open(sys.argv[1], "rb"))
rollout.roll_out(server, store, staged, golden, how, 60_000.0, "test", lambda stage, total: print(stage.name, flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["shadow", "canary"])
def test_a_delivery_that_is_killed_leaves_the_champion_alone_and_the_next_one_goes_through(
    produced, candidate, store, small_network, images, tmp_path, moment
):
    model = f"killed_in_{moment}"
    server = produced(model)
    staged, golden = candidate(model, small_network(1))
    how = LOOSE.model_copy(update={"canary_requests": 5000} if moment == "canary" else {"shadow_requests": 5000})
    job = tmp_path / "job"
    job.write_bytes(pickle.dumps((server, store, staged, golden, how)))
    with Traffic(server.address, model, images) as traffic:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(job)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(moment):
                break
        if moment == "canary":
            eventually(lambda: 2 in traffic.versions)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(3.5)
        killed = time.time()
        time.sleep(1.0)
        assert {version for at, version in traffic.answers if at > killed} == {1}
        gates = delivered(server, store, staged, golden)
    assert [gate.held for gate in gates] == [True, True]
    assert traffic.refused == [] and read_routing(server.root, model).challenger is None
    assert is_version_ready(server.address, network_name(model, 32), 2)


def eventually(true, within: float = 30.0) -> None:
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
