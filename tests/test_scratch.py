"""The scratch server in which candidates are proven."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tasks.model_repository import stage_version
from tasks.scratch import ScratchServer, remove_abandoned
from tasks.serving import NotServed, infer_front_door

MODEL = "client"


@pytest.fixture
def staged(tmp_path, small_network, describe) -> Path:
    return stage_version(tmp_path / "live", small_network(), describe(MODEL, 5))


def test_a_scratch_server_serves_one_version_and_leaves_no_trace(tmp_path, triton_python, staged, photograph):
    live = tmp_path / "live"
    with ScratchServer(triton_python, staged, live) as scratch:
        assert scratch.root.parent == live.resolve()
        assert infer_front_door(scratch.address, MODEL, photograph(1)).model_version == 5
        [launcher] = [p for p in psutil.Process().children() if str(scratch.root) in p.cmdline()]
        family = [launcher, *launcher.children(recursive=True)]
        assert len(family) >= 4
    assert not any(process.is_running() for process in family)
    assert sorted(path.name for path in live.iterdir()) == ["staging"]
    assert staged.is_dir()  # the candidate itself stays


def test_a_scratch_server_is_gone_when_its_block_fails(tmp_path, triton_python, staged):
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        ScratchServer(triton_python, staged, tmp_path / "live") as s,
    ):
        raise RuntimeError("in the middle")
    assert not s.root.exists()
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(s.root) in (p.info["cmdline"] or ())]


def test_a_scratch_server_that_cannot_serve_says_why_and_leaves_nothing(tmp_path, staged):
    live = tmp_path / "live"
    with (
        pytest.raises(NotServed, match=r"(?s)does not serve client: not serving: .*numpy 2"),
        ScratchServer(Path(sys.executable), staged, live),
    ):
        pytest.fail("this Python has numpy 2")
    assert sorted(path.name for path in live.iterdir()) == ["staging"]


def test_a_scratch_server_refuses_a_network_that_the_runtime_cannot_open(tmp_path, triton_python, describe):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no network at all")
    staged = stage_version(tmp_path / "live", broken, describe(MODEL, 5))
    with (
        pytest.raises(NotServed, match=r"(?s)does not serve client.*client_onnx_32"),
        ScratchServer(triton_python, staged, tmp_path / "live"),
    ):
        pytest.fail("it opened")


def test_a_scratch_server_ends_with_the_process_that_started_it(tmp_path, triton_python, staged):
    """A killed flow run cannot clean up after itself."""
    script = (
        "import sys, time; from pathlib import Path; from tasks.scratch import ScratchServer\n"
        "with ScratchServer(*map(Path, sys.argv[1:4])) as s:\n    print(s.root, flush=True); time.sleep(600)"
    )
    flow = subprocess.Popen(
        [sys.executable, "-c", script, triton_python, staged, tmp_path / "live"], stdout=subprocess.PIPE, text=True
    )
    assert flow.stdout is not None
    root = flow.stdout.readline().strip()
    [launcher] = [p for p in psutil.Process(flow.pid).children() if root in p.cmdline()]
    family = [launcher, *launcher.children(recursive=True)]
    os.kill(flow.pid, signal.SIGKILL)
    flow.wait()
    deadline = time.monotonic() + 20
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family):
        assert time.monotonic() < deadline, "the scratch server outlived its flow run"
        time.sleep(0.1)


def test_roots_of_killed_flow_runs_are_removed_and_those_in_use_are_not(tmp_path):
    abandoned, held, young = (tmp_path / f"scratch-{name}" for name in ("abandoned", "held", "young"))
    for root in (abandoned, held, young):
        root.mkdir()
        (root / "server.lock").touch()
    for root in (abandoned, held):
        os.utime(root, (time.time() - 7200,) * 2)
    with (held / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == [held, young]
