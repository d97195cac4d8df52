"""A server that takes requests and never answers: whoever asks it ends in time."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import grpc
import numpy as np
import pytest

from monitoring.capture import CaptureRecord, write_record
from tasks import serving, shadow
from tasks.delivery import Tally
from tasks.probe import ProbeLoad
from tasks.serving import NotServed, TritonAddress, infer_front_door, infer_network


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[TritonAddress]:
    """A gRPC server whose every call hangs, as a network that never comes back; half a second is allowed."""
    free = threading.Event()

    class Hangs(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(lambda request, context: free.wait(60) and b"")

    monkeypatch.setattr(serving, "ANSWER_WITHIN", 0.5)
    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((Hangs(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield TritonAddress("127.0.0.1:9", f"127.0.0.1:{port}")
    free.set()
    server.stop(0).wait()


def test_a_network_that_hangs_is_no_answer_within_the_time_allowed(hung):
    """A delivery asks the candidate by its number: for ever, it would hold its slot and the canary's page."""
    began = time.monotonic()
    with pytest.raises(NotServed, match=r"tire_onnx_32 version 7 .*Deadline Exceeded"):
        infer_network(hung, "tire_onnx_32", 7, np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(NotServed, match="Deadline Exceeded"):
        infer_front_door(hung, "tire", b"a photograph")
    assert time.monotonic() - began < 10


def test_a_look_at_production_ends_although_the_candidate_hangs(
    hung, store, describe, photograph, tmp_path, monkeypatch
):
    """Forty photographs at half a minute each would be twenty minutes in which nobody is told."""
    monkeypatch.setattr(shadow, "LOOK_WITHIN", 1.0)
    spool, began = tmp_path / "spool", datetime.now(UTC)
    spool.mkdir()
    for number in range(40):
        facts = (f"r{number}", time.time(), "hangs", 1, "good", 0.9, photograph(number))
        write_record(spool, CaptureRecord(*facts, np.zeros(3, np.float32), np.zeros(2, np.float32)), number)
    versions = (describe("hangs", 1), describe("hangs", 2))
    shown = shadow.Shadow(store, spool, "hangs", hung, *versions, 500.0, began)
    started = time.monotonic()
    assert shown.look() == Tally(), "neither version answers: it is the server that is ill"
    assert time.monotonic() - started < 10


def test_a_probe_that_hangs_is_a_failed_request(hung):
    with ProbeLoad(hung, "tire", [b"a photograph"], lanes=("grpc",)) as load:
        load.wait_for(2, within=10)
    assert len(load.probes) >= 2 and all("Deadline Exceeded" in probe.error for probe in load.probes)


def test_a_probe_load_does_not_keep_a_process_alive(hung):
    script = f"""
from tasks.probe import ProbeLoad
from tasks.serving import TritonAddress
load = ProbeLoad(TritonAddress("127.0.0.1:9", {hung.grpc!r}), "tire", [b"a photograph"]).__enter__()
load.wait_for(1, within=20)  # of the HTTP lanes, which nobody hears
raise SystemExit(3)
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], timeout=60, check=False)
    assert ended.returncode == 3
