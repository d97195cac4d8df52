"""The front door on a live server: what it answers, refuses and captures, and that a switch is noticed by nobody."""

import asyncio
import io
import json
import time
import urllib.error
import urllib.request
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from monitoring.capture import read_spool
from tasks.decision import decide, score
from tasks.images import decode
from tasks.inference import open_network
from tasks.model_repository import (
    NETWORK_FILE,
    FrontDoor,
    install_front_door,
    network_name,
    publish_version,
    stage_version,
    version_directory,
)
from tasks.probe import ProbeLoad
from tasks.routing import Route, RoutingTable, promoted, routing_file, write_routing
from tasks.sealed import read_sealed
from tasks.serving import (
    NotServed,
    answer_of,
    encoded_input,
    infer_front_door,
    load_model,
    module_of,
    unload_model,
)

MODEL = "tire"
NETWORK = network_name(MODEL, 32)


@pytest.fixture(scope="module")
def produce(triton, small_network, describe):
    """`produce(model, versions=2, **door)`: that many versions loaded, the first one routed, the front door open."""

    def produced(model: str, versions: int = 2, **door: object) -> RoutingTable:
        network = network_name(model, 32)
        for version in range(1, versions + 1):
            staged = stage_version(triton.root, small_network(version), describe(model, version))
            publish_version(triton.root, staged)
            table = write_routing(triton.root, promoted(None, model, Route(network, 1)))
            if version > 1:  # what a table names stays loaded
                table = write_routing(triton.root, RoutingTable(model, Route(network, 1), Route(network, version)))
            load_model(triton.address, network, version)
        install_front_door(triton.root, model, FrontDoor(**({"instances": 2, "capture_share": 0.0} | door)))
        load_model(triton.address, model)
        return table

    return produced


@pytest.fixture(scope="module")
def address(triton, produce):
    """A server with versions 1 and 2 of `tire` loaded and version 1 in production."""
    produce(MODEL)
    return triton.address


@pytest.fixture
def routed(triton, address):
    """Puts a table in force; the one before comes back after the test."""
    before = RoutingTable(MODEL, Route(NETWORK, 1), Route(NETWORK, 2))
    yield lambda *args, **named: write_routing(triton.root, RoutingTable(MODEL, *args, **named))
    write_routing(triton.root, before)


def ask(address, model: str, tensor, protocol: str = "grpc", **named):
    with module_of(protocol).InferenceServerClient(getattr(address, protocol)) as client:
        return client.infer(model, [tensor], **named)


def pixel_input(pixels: np.ndarray, protocol: str = "grpc"):
    tensor = module_of(protocol).InferInput("pixels", [1, *pixels.shape], "UINT8")
    tensor.set_data_from_numpy(pixels[None])
    return tensor


def versions_answering(address, photograph) -> set[int]:
    """Of several requests in turn, so that every process of the front door is asked."""
    return {infer_front_door(address, MODEL, photograph(seed)).model_version for seed in range(8)}


# --- answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_every_answer_says_which_version_gave_it_and_what_that_was_trained_on(
    triton, address, photograph, describe, protocol
):
    answer = infer_front_door(address, MODEL, photograph(1), protocol)
    sealed = read_sealed(version_directory(triton.root, NETWORK, 1))
    assert answer.model_version == 1
    assert answer.lineage == sealed.lineage() | {"routed": "champion"}
    assert answer.lineage["dataset_digest"] == describe(MODEL, 1).dataset_digest
    assert (answer.lineage["dataset"], answer.lineage["dataset_version"]) == (MODEL, 11)
    assert answer.lineage["threshold"] == 0.6


def test_served_decisions_are_those_of_the_sealed_network_in_process(triton, address, photograph):
    images = [photograph(seed, size, kind) for seed in range(60) for size, kind in [(24 + seed, "JPEG"), (40, "PNG")]]
    directory = version_directory(triton.root, NETWORK, 1)
    rule = read_sealed(directory).rule
    offline = open_network(directory / NETWORK_FILE)(np.stack([decode(image, 32) for image in images]))["probabilities"]
    answers = [infer_front_door(address, MODEL, image) for image in images]
    labels = [rule.labels[index] for index in decide(offline, rule)]
    assert [answer.label for answer in answers] == labels
    assert set(labels) == {"cut", "good", "worn"}  # else equality would say little
    np.testing.assert_allclose([answer.probabilities for answer in answers], offline, atol=1e-6)
    np.testing.assert_allclose([answer.score for answer in answers], score(offline, rule), atol=1e-6)


def test_pixels_that_the_same_contract_decoded_get_the_same_answer(address, photograph):
    image = photograph(3, 50)
    by_pixels = answer_of(ask(address, MODEL, pixel_input(decode(image, 32))))
    encoded = infer_front_door(address, MODEL, image)
    assert by_pixels.label == encoded.label
    np.testing.assert_allclose(by_pixels.probabilities, encoded.probabilities, atol=1e-6)


def test_http_with_plain_json_gives_the_answer_of_binary_grpc(address, photograph):
    image = photograph(4)
    data = np.frombuffer(image, np.uint8).tolist()
    body = {"id": "line-7", "inputs": [{"name": "image", "shape": [1, len(data)], "datatype": "UINT8", "data": data}]}
    request = urllib.request.Request(f"http://{address.http}/v2/models/{MODEL}/infer", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as answer:
        told = json.load(answer)
    outputs = {output["name"]: output["data"] for output in told["outputs"]}
    binary = infer_front_door(address, MODEL, image)
    assert told["id"] == "line-7"
    assert outputs["label"] == [binary.label] and outputs["model_version"] == [1]
    np.testing.assert_allclose(outputs["probabilities"], binary.probabilities, atol=1e-6)
    assert json.loads(outputs["lineage"][0]) == binary.lineage


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_client_gets_the_outputs_it_asked_for(address, photograph, protocol):
    module = module_of(protocol)
    result = ask(
        address,
        MODEL,
        encoded_input(module, photograph(1)),
        protocol,
        outputs=[module.InferRequestedOutput("label"), module.InferRequestedOutput("score")],
    )
    assert result.as_numpy("label").shape == (1, 1) and result.as_numpy("score").shape == (1, 1)
    assert result.as_numpy("probabilities") is None and result.as_numpy("lineage") is None


# --- bad input --------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (90, 90, 90)).save(out, "PNG", compress_level=1)
    return out.getvalue()


@pytest.fixture(scope="module")
def bad(photograph):
    """name -> (input tensor, parameters, what the error says)."""
    grpc = module_of("grpc")
    jpeg = photograph(9, 64)
    return {
        "empty": (encoded_input(grpc, b""), {}, "empty: the image is empty"),
        "truncated": (encoded_input(grpc, jpeg[: len(jpeg) // 2]), {}, "truncated: the JPEG file is truncated"),
        "text": (encoded_input(grpc, b"A tire, honestly.\n" * 9), {}, "not_an_image: no readable JPEG/PNG"),
        "one pixel": (encoded_input(grpc, png(1, 1)), {}, "too_small: 1x1 pixels"),
        "60 megapixels": (encoded_input(grpc, png(10_000, 6_000)), {}, "too_large: 10000x6000 pixels are more than"),
        "parameter": (encoded_input(grpc, jpeg), {"colour": "red"}, "unknown request parameter 'colour'"),
        "pixels of another size": (pixel_input(np.zeros((16, 16, 3), np.uint8)), {}, r"takes \[32, 32, 3\]"),
    }


NAMES = ("empty", "truncated", "text", "one pixel", "60 megapixels", "parameter", "pixels of another size")


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_request_is_refused_with_its_reason(address, bad, name):
    tensor, parameters, said = bad[name]
    with pytest.raises(InferenceServerException, match=said) as refused:
        ask(address, MODEL, tensor, parameters=parameters or None)
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_bad_request_is_a_client_error_over_http(address):
    with pytest.raises(NotServed, match=r"\[400\].*not_an_image"):
        infer_front_door(address, MODEL, b"A tire, honestly.", "http")


def test_both_inputs_or_none_are_refused(address, photograph):
    grpc = module_of("grpc")
    with grpc.InferenceServerClient(address.grpc) as client:
        both = [encoded_input(grpc, photograph(1)), pixel_input(np.zeros((32, 32, 3), np.uint8))]
        with pytest.raises(InferenceServerException, match="send either `image`"):
            client.infer(MODEL, both)
        with pytest.raises(InferenceServerException):
            client.infer(MODEL, [])


def test_bad_requests_fail_alone_and_their_neighbours_in_the_batch_are_answered(triton, address, photograph, bad):
    """Bursts of good and bad requests at once; the server's own counts show that they were batched together."""
    images = [photograph(seed) for seed in range(16)]
    expected = [infer_front_door(address, MODEL, image) for image in images]
    before = executions(triton)
    outcomes = asyncio.run(bursts(address, images, bad, rounds=5))
    batches, requests = (after - was for after, was in zip(executions(triton), before, strict=True))
    assert batches < requests / 1.5
    for number, outcome in outcomes:
        if isinstance(number, str):
            assert isinstance(outcome, InferenceServerException), number
            assert bad[number][2].replace("\\", "") in str(outcome)
        else:
            assert not isinstance(outcome, BaseException), outcome
            answer = answer_of(outcome)
            assert answer.label == expected[number].label
            np.testing.assert_allclose(answer.probabilities, expected[number].probabilities, atol=1e-6)


async def bursts(address, images, bad, rounds):
    import tritonclient.grpc.aio as grpc

    outcomes = []
    async with grpc.InferenceServerClient(address.grpc) as client:
        for _ in range(rounds):
            asked = {number: (encoded_input(grpc, image), {}) for number, image in enumerate(images)}
            asked |= {name: (tensor, parameters) for name, (tensor, parameters, _) in bad.items()}
            order = sorted(asked, key=str)  # good and bad mixed
            calls = [client.infer(MODEL, [asked[key][0]], parameters=asked[key][1] or None) for key in order]
            outcomes += zip(order, await asyncio.gather(*calls, return_exceptions=True), strict=True)
    return outcomes


def executions(triton, model: str = MODEL) -> tuple[int, int]:
    """(batches run, requests answered or refused) by the server's own counts."""
    with urllib.request.urlopen(f"http://127.0.0.1:{triton.ports[2]}/metrics", timeout=5) as answer:
        lines = [line for line in answer.read().decode().splitlines() if f'model="{model}"' in line]
    counts = Counter()
    for line in lines:
        counts[line.partition("{")[0]] += float(line.rpartition(" ")[2])
    requests = counts["nv_inference_request_success"] + counts["nv_inference_request_failure"]
    return int(counts["nv_inference_exec_count"]), int(requests)


# --- routing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_without_a_version_in_production_it_says_so(triton, address, photograph, protocol):
    model = f"unborn_{protocol}"
    install_front_door(triton.root, model)
    load_model(triton.address, model)
    with pytest.raises(NotServed, match=f"no version of {model} is in production yet: run the promote flow") as refused:
        infer_front_door(address, model, photograph(1), protocol)
    assert ("UNAVAILABLE" if protocol == "grpc" else "[503]") in str(refused.value)


def test_a_new_table_is_in_force_for_the_next_request(address, photograph, routed):
    for version in (2, 1, 2, 2, 1):
        routed(Route(NETWORK, version), Route(NETWORK, 3 - version))
        answers = [infer_front_door(address, MODEL, photograph(seed)) for seed in range(6)]  # every process of the door
        assert {answer.model_version for answer in answers} == {version}
        assert {answer.lineage["run_id"] for answer in answers} == {f"run-{version}"}


def test_a_damaged_table_changes_nothing(triton, address, photograph, routed):
    routed(Route(NETWORK, 2))
    assert versions_answering(address, photograph) == {2}  # a process keeps the last table that it saw
    for text in ("{", "null", json.dumps({"model": MODEL, "champion": None, "previous": None, "challenger": None})):
        routing_file(triton.root, MODEL).write_text(text)
        assert versions_answering(address, photograph) == {2}
    assert "the new routing is refused, the former one stays" in triton.log


def test_a_table_that_names_a_version_which_is_not_there_changes_nothing(address, photograph, routed):
    routed(Route(NETWORK, 1))
    assert versions_answering(address, photograph) == {1}
    routed(Route(NETWORK, 99), Route(NETWORK, 1))
    assert versions_answering(address, photograph) == {1}


def test_a_version_that_is_sealed_but_not_loaded_is_an_error_and_never_another_version(
    triton, address, small_network, describe, photograph, routed
):
    publish_version(triton.root, stage_version(triton.root, small_network(3), describe(MODEL, 3)))
    routed(Route(NETWORK, 3), Route(NETWORK, 1))
    with pytest.raises(NotServed, match=rf"{NETWORK} version 3 did not answer.*"):
        infer_front_door(address, MODEL, photograph(1))


def test_a_version_whose_bytes_changed_is_not_what_the_door_opens_with(triton, produce, photograph):
    """Whatever backend runs the network: the container's own does not know our seals."""
    produce("rotten", versions=1)
    file = version_directory(triton.root, "rotten_onnx_32", 1) / NETWORK_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    unload_model(triton.address, "rotten")
    load_model(triton.address, "rotten")
    with pytest.raises(NotServed, match=r"rotten cannot be served: .*model.onnx has sha256"):
        infer_front_door(triton.address, "rotten", photograph(1))


def test_a_challenger_gets_its_share_and_a_tire_always_meets_the_same_version(address, photograph, routed):
    routed(Route(NETWORK, 1), None, Route(NETWORK, 2), share=0.3)
    image = photograph(1)
    asked = [
        (tire, infer_front_door(address, MODEL, image, parameters={"tire_id": f"T{tire}"}))
        for tire in [*range(200)] * 2
    ]
    versions = {}
    for tire, answer in asked:
        assert versions.setdefault(tire, answer.model_version) == answer.model_version
        assert answer.lineage["routed"] == {1: "champion", 2: "challenger"}[answer.model_version]
    assert 0.2 < sum(version == 2 for version in versions.values()) / 200 < 0.4


def test_a_challenger_answers_its_lines_and_no_other(address, photograph, routed):
    routed(Route(NETWORK, 1), None, Route(NETWORK, 2), lines=("north", "west"))
    image = photograph(1)
    asked = {
        line: infer_front_door(address, MODEL, image, parameters={"line": line}) for line in ("north", "west", "east")
    }
    assert {line: answer.model_version for line, answer in asked.items()} == {"north": 2, "west": 2, "east": 1}
    assert infer_front_door(address, MODEL, image).model_version == 1


def test_a_canary_that_nobody_renews_ends_by_itself(address, photograph, routed):
    routed(Route(NETWORK, 1), None, Route(NETWORK, 2), share=1.0, until=time.time() + 1.5)
    assert versions_answering(address, photograph) == {2}
    time.sleep(1.6)
    assert versions_answering(address, photograph) == {1}


def test_a_probe_is_answered_by_the_champion_whatever_share_a_challenger_has(address, photograph, routed):
    routed(Route(NETWORK, 1), None, Route(NETWORK, 2), share=1.0)
    assert infer_front_door(address, MODEL, photograph(1), parameters={"probe": True}).model_version == 1


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_what_a_challenger_cannot_answer_the_champion_does(
    triton, address, photograph, routed, small_network, describe, protocol
):
    publish_version(triton.root, stage_version(triton.root, small_network(4), describe(MODEL, 4)))  # never loaded
    routed(Route(NETWORK, 1), None, Route(NETWORK, 4), share=1.0)
    for seed in range(6):  # every process of the door
        answer = infer_front_door(address, MODEL, photograph(seed), protocol)
        assert (answer.model_version, answer.lineage["routed"]) == (1, "champion")
    with pytest.raises(NotServed, match="not_an_image"):
        infer_front_door(address, MODEL, b"no photograph", protocol)


def test_pixels_of_the_champions_size_are_never_refused_because_of_a_challenger_of_another(
    triton, address, photograph, routed, small_network, describe
):
    other = network_name(MODEL, 48)
    staged = stage_version(triton.root, small_network(2), describe(MODEL, 2, network=other, image_size=48))
    publish_version(triton.root, staged)
    routed(Route(NETWORK, 1), None, Route(other, 2), share=1.0)
    pixels = decode(photograph(3, 50), 32)
    assert answer_of(ask(address, MODEL, pixel_input(pixels))).model_version == 1


def test_switching_under_load_fails_no_request_and_every_answer_was_routed_at_its_time(address, photograph, routed):
    images = [photograph(seed, 32 + seed) for seed in range(24)]
    routed(Route(NETWORK, 1), Route(NETWORK, 2))
    in_force = [(0.0, 1)]  # (earliest moment of force, version)
    replaced = []  # latest moment at which the former one could still be in force
    with ProbeLoad(address, MODEL, images, lanes=("grpc",) * 6 + ("http",) * 2, pause=0.0) as load:
        load.wait_for(50)
        for turn in range(20):
            version = 2 - turn % 2
            in_force.append((time.monotonic(), version))
            routed(Route(NETWORK, version), Route(NETWORK, 3 - version))
            replaced.append(time.monotonic())
            load.wait_for(30)
    replaced.append(float("inf"))
    assert [probe.error for probe in load.probes if probe.error] == []
    assert len(load.probes) > 500
    for probe in load.probes:
        routed_then = {
            version
            for (began, version), ended in zip(in_force, replaced, strict=True)
            if began <= probe.answered and ended >= probe.sent
        }
        assert probe.version in routed_then, (probe, in_force)
    assert Counter(probe.version for probe in load.probes)[2] > 100


def test_a_model_that_leaves_production_says_so(triton, produce, photograph):
    produce("leaving", versions=1)
    assert infer_front_door(triton.address, "leaving", photograph(1)).model_version == 1
    routing_file(triton.root, "leaving").unlink()
    with pytest.raises(NotServed, match="no version of leaving is in production"):
        infer_front_door(triton.address, "leaving", photograph(1))


# --- capture ----------------------------------------------------------------------------------------------------


def records(triton, model: str, count: int):
    """The captured records, once there are as many."""
    deadline = time.monotonic() + 10
    while len(found := [record for _, record in read_spool(triton.root / "spool" / model)]) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} records"
        time.sleep(0.05)
    return found


def test_what_was_asked_and_answered_is_captured(triton, produce, photograph):
    produce("watched", versions=1, capture_share=1.0)
    images = {f"r{seed}": photograph(seed) for seed in range(12)}
    began = time.time()
    answers = {
        name: infer_front_door(
            triton.address, "watched", image, parameters={"request_id": name, "tire_id": f"T-{name}", "line": "north"}
        )
        for name, image in images.items()
    }
    found = {record.request_id: record for record in records(triton, "watched", 12)}
    assert found.keys() == images.keys()
    directory = version_directory(triton.root, "watched_onnx_32", 1)
    network = open_network(directory / NETWORK_FILE)
    for name, record in found.items():
        assert record.image == images[name]
        assert (record.model, record.version, record.label) == ("watched", 1, answers[name].label)
        assert (record.tire_id, record.line, record.dropped) == (f"T-{name}", "north", 0)
        assert began <= record.captured_at <= time.time()
        np.testing.assert_array_equal(record.probabilities, answers[name].probabilities)
        embedding = network(decode(images[name], 32)[None], ("embedding",))["embedding"][0]
        np.testing.assert_allclose(record.embedding, embedding, rtol=1e-4, atol=1e-5)


def test_neither_refused_requests_nor_our_own_probes_are_captured(triton, produce, photograph):
    produce("selective", versions=1, capture_share=1.0)
    with pytest.raises(NotServed):
        infer_front_door(triton.address, "selective", b"no photograph")
    infer_front_door(triton.address, "selective", photograph(1), parameters={"probe": "watchdog"})
    infer_front_door(triton.address, "selective", photograph(2), parameters={"request_id": "mine"})
    assert [record.request_id for record in records(triton, "selective", 1)] == ["mine"]


def test_pixels_are_captured_as_a_picture_of_them(triton, produce, photograph):
    produce("pixelwise", versions=1, capture_share=1.0)
    pixels = decode(photograph(5), 32)
    ask(triton.address, "pixelwise", pixel_input(pixels))
    [record] = records(triton, "pixelwise", 1)
    np.testing.assert_array_equal(decode(record.image, 32), pixels)


def test_a_spool_that_vanished_costs_records_but_no_answer_and_the_gap_is_counted(triton, produce, photograph):
    produce("gap", versions=1, capture_share=1.0, instances=1)
    spool = triton.root / "spool" / "gap"
    spool.rmdir()
    for seed in range(5):
        infer_front_door(triton.address, "gap", photograph(seed))
    spool.mkdir()
    deadline = time.monotonic() + 10
    while not list(spool.iterdir()):
        infer_front_door(triton.address, "gap", photograph(9))
        assert time.monotonic() < deadline
    assert records(triton, "gap", 1)[-1].dropped >= 1
