"""The client side of Triton, and the scratch server in which candidates are proven."""

import http.client
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from tasks.decision import DecisionRule, decide
from tasks.images import decode
from tasks.inference import open_network
from tasks.model_repository import install_front_door, network_name, publish_version, stage_version, version_directory
from tasks.routing import Route, promoted, write_routing
from tasks.scratch import free_ports
from tasks.serving import (
    NotServed,
    TritonAddress,
    evaluate_served,
    infer_network,
    is_version_ready,
    load_model,
    unload_model,
)

MODEL = "client"
NETWORK = network_name(MODEL, 32)


@pytest.fixture(scope="module")
def sealed(triton, small_network, describe):
    """Version 1 of `client` in production on the session's server."""
    version = publish_version(triton.root, stage_version(triton.root, small_network(), describe(MODEL)))
    write_routing(triton.root, promoted(None, MODEL, Route(NETWORK, 1)))
    install_front_door(triton.root, MODEL)
    for model in (NETWORK, MODEL):
        load_model(triton.address, model)
    return version


@pytest.fixture
def nobody() -> TritonAddress:
    """Where no server listens."""
    first, second = free_ports(2)
    return TritonAddress(f"127.0.0.1:{first}", f"127.0.0.1:{second}")


def test_the_admin_key_is_never_printed(triton):
    assert triton.address.admin_key not in repr(triton.address)


def test_a_served_evaluation_is_the_offline_one(triton, sealed, photograph):
    images = [photograph(seed, 20 + seed) for seed in range(80)]
    served = evaluate_served(triton.address, MODEL, images, sealed, concurrency=8)
    directory = version_directory(triton.root, NETWORK, 1)
    offline = open_network(directory / "model.onnx")(np.stack([decode(image, 32) for image in images]))["probabilities"]
    np.testing.assert_array_equal(served.decisions, decide(offline, sealed.rule))
    np.testing.assert_allclose(served.probabilities, offline, atol=1e-6)
    assert served.errors == {} and served.requests == 80
    assert 0 < served.p50_ms <= served.p95_ms <= served.p99_ms
    assert 1 < served.throughput < 1e5


def test_an_image_that_was_refused_is_an_error_of_its_own_and_no_decision(triton, sealed, photograph):
    images = [photograph(0), b"", photograph(1), b"text", photograph(2)]
    served = evaluate_served(triton.address, MODEL, images, sealed, concurrency=5)
    assert set(served.errors) == {1, 3}
    assert "empty: the image is empty" in served.errors[1] and "not_an_image" in served.errors[3]
    assert (served.decisions >= 0).tolist() == [True, False, True, False, True]
    assert np.isnan(served.probabilities[[1, 3]]).all() and np.isfinite(served.probabilities[[0, 2, 4]]).all()


def test_answers_of_another_version_are_errors(triton, sealed, photograph):
    served = evaluate_served(triton.address, MODEL, [photograph(1)], replace(sealed, version=2))
    assert served.errors == {0: "version 1 answered instead of 2"}
    assert served.decisions.tolist() == [-1]


def test_an_evaluation_against_nobody_is_all_errors_and_no_speed(nobody, sealed, photograph):
    served = evaluate_served(nobody, MODEL, [photograph(1), photograph(2)], sealed)
    assert set(served.errors) == {0, 1}
    assert served.p50_ms == float("inf") and served.throughput == 0


def test_an_evaluation_of_nothing_is_refused(triton, sealed):
    with pytest.raises(ValueError, match="no images to evaluate client with"):
        evaluate_served(triton.address, MODEL, [], sealed)


def test_concurrency_is_that_many_requests_in_flight(triton, sealed, photograph, monkeypatch):
    import tritonclient.grpc.aio as grpc

    now, most = 0, 0
    infer = grpc.InferenceServerClient.infer

    async def counted(*args, **named):
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        try:
            return await infer(*args, **named)
        finally:
            now -= 1

    monkeypatch.setattr(grpc.InferenceServerClient, "infer", counted)
    served = evaluate_served(triton.address, MODEL, [photograph(s) for s in range(40)], sealed, concurrency=6)
    assert most == 6 and served.errors == {}


def test_a_network_is_asked_for_exactly_that_version(triton, sealed, photograph):
    pixels = np.stack([decode(photograph(seed), 32) for seed in range(3)])
    found = infer_network(triton.address, NETWORK, 1, pixels)
    assert found.shape == (3, 3)
    with pytest.raises(NotServed, match=rf"{NETWORK} version 2 on 127.0.0.1:\d+: .*not"):
        infer_network(triton.address, NETWORK, 2, pixels)
    with pytest.raises(NotServed, match="unexpected shape"):
        infer_network(triton.address, NETWORK, 1, pixels[:, :16])


def test_loading_says_what_was_asked_and_what_the_server_said(triton, sealed, nobody):
    with pytest.raises(NotServed, match=r"loading absent on 127.0.0.1:\d+ failed: .*failed to load 'absent'"):
        load_model(triton.address, "absent")
    with pytest.raises(NotServed, match=r"loading client on .* failed"):
        load_model(nobody, MODEL)
    with pytest.raises(NotServed, match=r"failed: .*restricted"):
        load_model(replace(triton.address, admin_key=None), MODEL)


def test_a_load_holds_up_no_connection(triton, sealed, small_network, describe):
    """Over HTTP it would: that server loads on the thread that took the call, to which a quarter of all connections belong."""
    network = network_name("beside", 32)
    publish_version(triton.root, stage_version(triton.root, small_network(), describe("beside")))
    loaded, waited = threading.Event(), []

    def ask(started: threading.Event) -> None:
        connection = http.client.HTTPConnection(triton.address.http, timeout=60)
        while not loaded.is_set():
            began = time.monotonic()
            connection.request("GET", f"/v2/models/{NETWORK}/ready")
            assert connection.getresponse().read() == b""
            waited.append(time.monotonic() - began)
            started.set()
            time.sleep(0.02)
        connection.close()

    with ThreadPoolExecutor(12) as pool:
        began = [threading.Event() for _ in range(12)]
        asking = [pool.submit(ask, each) for each in began]
        try:
            assert all(each.wait(20) for each in began)
            waited.clear()
            since = time.monotonic()
            load_model(triton.address, network, 1)
            took = time.monotonic() - since
        finally:
            loaded.set()
        for each in asking:
            each.result(60)
    assert max(waited) < took / 2, f"a connection waited {max(waited):.2f} s of a load of {took:.2f} s"


def test_a_listed_version_that_triton_skipped_silently_is_found(triton, sealed):
    with pytest.raises(
        NotServed, match=f"{NETWORK} was loaded on .*, but version 9 is not ready: read the server's log"
    ):
        load_model(triton.address, NETWORK, 9)


def test_readiness_is_asked_per_version_and_nobody_is_not_ready(triton, sealed, nobody):
    assert is_version_ready(triton.address, NETWORK, 1) and is_version_ready(triton.address, NETWORK)
    assert not is_version_ready(triton.address, NETWORK, 2)
    assert not is_version_ready(triton.address, "absent")
    assert not is_version_ready(nobody, NETWORK, 1)


def test_an_unloaded_model_answers_no_more_until_it_is_loaded_again(triton, small_network, describe):
    network = network_name("passing", 32)
    publish_version(triton.root, stage_version(triton.root, small_network(), describe("passing")))
    load_model(triton.address, network, 1)
    unload_model(triton.address, network)
    deadline = time.monotonic() + 10
    while is_version_ready(triton.address, network, 1):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    load_model(triton.address, network, 1)
    assert is_version_ready(triton.address, network, 1)


def test_an_evaluation_runs_in_a_thread_beside_others(triton, sealed, photograph):
    """Flows run it in whatever thread they are given."""
    found = []
    thread = threading.Thread(
        target=lambda: found.append(evaluate_served(triton.address, MODEL, [photograph(1)], sealed))
    )
    thread.start()
    thread.join(20)
    assert found and found[0].errors == {}


def test_an_answer_with_a_label_of_another_rule_is_an_error_and_no_crash(triton, sealed, photograph):
    other = replace(sealed, rule=DecisionRule(("a", "b", "c")))
    served = evaluate_served(triton.address, MODEL, [photograph(1)], other)
    assert served.decisions.tolist() == [-1] and "label" in served.errors[0]
