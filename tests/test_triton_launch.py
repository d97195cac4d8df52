"""The launcher: refuses in one sentence, serves only what came back unchanged, and leaves nothing behind however it ends."""

import hashlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from deploy import services
from tasks import serving as client
from tasks.courtesy import ASIDE, may_return_to
from tasks.model_repository import install_front_door, publish_version, stage_version
from tasks.routing import Route, promoted, write_routing

LAUNCHER = Path(__file__).parents[1] / "triton" / "launch.py"


def load_module(path: Path):
    spec = importlib.util.spec_from_file_location(f"tested_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


preflight = load_module(LAUNCHER.with_name("preflight.py"))


bring_up = load_module(LAUNCHER.with_name("bring_up.py"))  # this environment's numpy does for what is asked of it here


def line(python: Path | str, root: Path, launcher: Path = LAUNCHER, flags: tuple[str, ...] = ()) -> list[str]:
    ports = zip(("http", "grpc", "metrics"), services.free_ports(3), strict=True)
    given = [part for name, port in ports for part in (f"--{name}-port", str(port))]
    return [str(python), *flags, str(launcher), "--root", str(root), *given]


def run(command: list[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def eventually(true: Callable[[], object], within: float = 15) -> None:
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline, "not true in time"
        time.sleep(0.05)


# --- what is missing is said in one sentence --------------------------------------------------------------------


def test_this_machine_can_serve():
    assert preflight.problems() == []


@pytest.mark.parametrize(
    ("machine", "sentence"),
    [
        (
            {"python": (3, 13)},
            "Python 3.13 cannot run the server's models, which need numpy < 2: install Python 3.11 or",
        ),
        ({"python": (3, 10)}, "Python 3.10 cannot run"),
        ({"glibc": (2, 31)}, "glibc 2.31 is older than 2.35, which the server needs: use Debian 12"),
        ({"machine": "aarch64"}, "is a Linux x86-64 program; this is linux aarch64: use the container"),
        ({"library": ""}, "The shared library of this Python is missing, which the server embeds: install libpython3"),
    ],
)
def test_what_is_missing_is_one_sentence_with_the_remedy(machine, sentence):
    [found] = preflight.problems(**machine)
    assert sentence in found
    assert "\n" not in found and found.endswith(".")


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line in which the launcher refused."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    [told] = [text for text in done.stderr.splitlines() if text.startswith("not serving: ")]
    return told


def test_an_environment_with_numpy_2_is_refused(tmp_path):
    """The environment of the flows, which this test runs in, is one."""
    done = run(line(sys.executable, tmp_path))
    assert done.stderr.count("\n") == 1
    told = refusal(done)
    assert "is installed and this server reads every input as garbage with numpy 2" in told
    assert "nvidia-pytriton is not installed" in told and "make install" in told
    assert list(tmp_path.iterdir()) == []


def test_an_environment_without_any_package_is_refused(tmp_path, triton_python):
    told = refusal(run(line(triton_python, tmp_path, flags=("-S",))))
    assert "numpy is not installed in this environment" in told and "nvidia-pytriton is not installed" in told


def test_a_machine_that_cannot_serve_is_refused_by_the_launcher_as_well(tmp_path, triton_python):
    other = tmp_path / "triton"
    shutil.copytree(LAUNCHER.parent, other)
    text = (other / "preflight.py").read_text()
    (other / "preflight.py").write_text(text.replace("PYTHONS = ((3, 11), (3, 12))", "PYTHONS = ((3, 14),)"))
    told = refusal(run(line(triton_python, tmp_path / "root", other / "launch.py")))
    assert "cannot run the server's models" in told


# --- known bytes must come back ---------------------------------------------------------------------------------

BYTE = "[out.__setitem__(tuple(0 for _ in out.shape), out.flat[0] + 1) for out in [array] if out.dtype == np.uint8]"
STRIDE = "array[...] = array.flat[0]"  # what numpy 2 does to this server's inputs


@pytest.mark.parametrize(("corruption", "kind"), [(BYTE, "UINT8"), (STRIDE, "UINT8")])
def test_a_server_that_changes_known_bytes_does_not_serve(tmp_path, triton_python, corruption, kind):
    other, root = tmp_path / "triton", tmp_path / "root"
    shutil.copytree(LAUNCHER.parent, other)
    (other / "selfcheck" / "1" / "model.py").write_text(
        "import numpy as np\nimport triton_python_backend_utils as pb_utils\n\n\n"
        "class TritonPythonModel:\n    def execute(self, requests):\n        answers = []\n        for request in requests:\n"
        "            for tensor in request.inputs():\n                array = np.array(tensor.as_numpy())\n"
        f"                {corruption}\n"
        "                answers.append(pb_utils.InferenceResponse([pb_utils.Tensor(tensor.name(), array)]))\n"
        "        return answers\n"
    )
    command = line(triton_python, root, other / "launch.py")
    told = refusal(run(command))
    assert re.search(rf"known ({kind}) values came back changed through the Python backend", told), told
    assert "run `make install`" in told
    assert left_of(root) == ([], [])
    port = int(command[command.index("--http-port") + 1])
    assert services.is_free(port)


def test_known_tensors_would_show_a_wrong_stride_a_wrong_order_and_a_wrong_width():
    import numpy as np

    for name, (_, tensor) in bring_up.known_tensors().items():
        flat = tensor.ravel()
        assert len(np.unique(flat)) > 1, name
        assert not np.array_equal(flat, flat[::-1]), name
        assert not np.array_equal(tensor.T.ravel(), flat) or tensor.ndim == 1, name


# --- nothing is left behind -------------------------------------------------------------------------------------


def prefix_of(root: Path) -> str:
    return f"tirewatch_{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]}_"


def left_of(root: Path) -> tuple[list[str], list[str]]:
    """(processes, shared-memory regions) of the server over this root."""
    prefix, processes = prefix_of(root), []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if any(prefix in word for word in words) or (str(LAUNCHER) in words and str(root) in words):
            processes.append(" ".join(words)[:200])
    return processes, [path.name for path in Path("/dev/shm").glob(f"{prefix}*")]


@pytest.fixture
def own(serve, tmp_path) -> Iterator[Callable[[], object]]:
    """Starts servers over one root of this test, and ends what is left of them."""
    started = []

    def start():
        started.append(serve(tmp_path / "root"))
        return started[-1]

    yield start
    for serving in started:
        serving.running.stop()


def server_of(serving) -> psutil.Process:
    [found] = [p for p in psutil.Process(serving.running.process.pid).children() if p.name() == "tritonserver"]
    return found


def test_a_stopped_server_leaves_nothing_and_is_not_held_up_by_an_idle_connection(own):
    serving = own()
    processes, regions = left_of(serving.root)
    assert len(processes) >= 3 and regions  # launcher, server, echo
    idle = http.client.HTTPConnection(serving.address.http)
    idle.request("GET", "/v2/health/live")
    idle.getresponse().read()
    began = time.monotonic()
    serving.running.process.terminate()
    assert serving.running.process.wait(20) == 0
    assert time.monotonic() - began < 15
    idle.close()
    assert left_of(serving.root) == ([], [])


def test_a_killed_server_takes_its_launcher_along_and_nothing_stays(own):
    serving = own()
    server_of(serving).kill()
    assert serving.running.process.wait(15) != 0
    eventually(lambda: left_of(serving.root) == ([], []))


def test_a_killed_launcher_takes_its_server_along(own):
    serving = own()
    serving.running.process.kill()
    eventually(lambda: not left_of(serving.root)[0])


def test_after_launcher_and_server_are_killed_at_once_the_next_start_clears_up_and_serves(own):
    first = own()
    victims = [server_of(first), psutil.Process(first.running.process.pid)]
    for victim in victims:
        victim.kill()
    first.running.process.wait(5)
    regions = left_of(first.root)[1]
    assert regions  # nobody was left to remove them
    second = own()
    assert not set(regions) & set(left_of(second.root)[1])
    assert client.is_version_ready(second.address, "selfcheck", 2)
    second.running.stop()
    assert left_of(second.root) == ([], [])


def test_a_server_that_hangs_on_after_its_launcher_is_ended_by_the_next_start(own):
    """Stopped by a signal it cannot obey, it would hold ports and memory."""
    first = own()
    server = server_of(first)
    server.suspend()
    first.running.process.kill()
    first.running.process.wait(5)
    second = own()
    assert not server.is_running()
    assert client.is_version_ready(second.address, "selfcheck", 2)


def test_a_second_server_over_the_same_root_is_refused_and_the_first_goes_on(triton, triton_python):
    told = refusal(run(line(triton_python, triton.root)))
    assert f"another server runs on {triton.root}" in told
    assert client.is_version_ready(triton.address, "selfcheck", 2)


def test_a_port_that_is_taken_is_a_refusal_and_no_half_server(triton, triton_python, tmp_path):
    command = line(triton_python, tmp_path / "other")
    command[command.index("--grpc-port") + 1] = str(triton.ports[1])
    assert "tritonserver" in refusal(run(command, timeout=90))
    assert left_of(tmp_path / "other") == ([], [])


def test_told_to_stop_while_it_starts_it_ends_in_order(triton_python, tmp_path):
    root = tmp_path / "root"
    for wait in (0.5, 1.4):
        process = subprocess.Popen(line(triton_python, root), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        time.sleep(wait)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        assert b"Traceback" not in said and b"not serving" not in said
        assert process.returncode in (0, -signal.SIGTERM)
        eventually(lambda: left_of(root) == ([], []))


# --- what is served ---------------------------------------------------------------------------------------------


def put(root: Path, model: str, file: Path, describe) -> None:
    sealed = publish_version(root, stage_version(root, file, describe(model)))
    install_front_door(root, model)
    write_routing(root, promoted(None, model, Route(sealed.network, 1)))


def test_what_is_routed_serves_after_a_restart_whatever_else_is_broken(
    serve, tmp_path, small_network, describe, photograph
):
    root = tmp_path / "root"
    for model in ("fine", "lost", "torn"):
        put(root, model, small_network(), describe)
    shutil.rmtree(root / "model_repository" / "lost_onnx_32")
    (root / "routing" / "torn.json").write_text('{"model": "torn", ')
    serving = serve(root)
    try:
        assert client.infer_front_door(serving.address, "fine", photograph(1)).model_version == 1
        assert re.search(r"lost_onnx_32 was not loaded \(HTTP \d+\): .*failed", serving.log)
        assert "torn.json is no routing table" in serving.log
        with pytest.raises(client.NotServed, match="lost"):
            client.infer_front_door(serving.address, "lost", photograph(1))
        with pytest.raises(client.NotServed, match="torn"):
            client.infer_front_door(serving.address, "torn", photograph(1))
    finally:
        serving.running.stop()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_model_control_needs_the_key_and_inference_does_not(triton, protocol, small_network, describe, photograph):
    from tritonclient.utils import InferenceServerException

    model = f"fenced_{protocol}"
    put(triton.root, model, small_network(), describe)
    module = client.module_of(protocol)
    with module.InferenceServerClient(getattr(triton.address, protocol)) as asked:
        header = client.ADMIN_HEADER if protocol == "http" else f"triton-grpc-protocol-{client.ADMIN_HEADER}"
        wrong = {header: "guess"}
        for headers in ({}, wrong):
            for call in (
                lambda h: asked.load_model(f"{model}_onnx_32", headers=h),
                lambda h: asked.unload_model("selfcheck", headers=h),
                lambda h: asked.get_model_config("selfcheck", headers=h),
                lambda h: asked.get_inference_statistics(headers=h),
                lambda h: asked.get_system_shared_memory_status(headers=h),
                lambda h: asked.get_log_settings(headers=h),
            ):
                with pytest.raises(
                    InferenceServerException, match=r"(?i)restricted|not have sufficient|expecting header"
                ):
                    call(headers)
        right = {header: triton.address.admin_key}
        asked.load_model(f"{model}_onnx_32", headers=right)
        asked.load_model(model, headers=right)
    assert client.infer_front_door(triton.address, model, photograph(2), protocol).model_version == 1


def test_every_port_is_bound_to_this_machine_only(triton):
    server = server_of(triton)
    bound = {(c.laddr.ip, c.laddr.port) for c in server.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert {port for _, port in bound} == set(triton.ports)
    assert {ip.removeprefix("::ffff:") for ip, _ in bound} == {"127.0.0.1"}


def test_loading_again_what_has_not_changed_starts_nothing_anew(triton, small_network, describe, photograph):
    """Bytecode that the interpreter writes beside `model.py` would count as a change and restart every front door."""
    put(triton.root, "unchanged", small_network(), describe)
    for model in ("unchanged_onnx_32", "unchanged"):
        client.load_model(triton.address, model)
    client.infer_front_door(triton.address, "unchanged", photograph(1))
    for model in ("unchanged_onnx_32", "unchanged"):
        client.load_model(triton.address, model)
    for model in ("unchanged_onnx_32", "unchanged"):
        assert triton.log.count(f'"loading: {model}:1"') == 1


def test_metrics_tell_what_is_served(triton):
    with urllib.request.urlopen(f"http://127.0.0.1:{triton.ports[2]}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    assert 'nv_inference_request_success{model="selfcheck"' in text


def test_a_load_that_failed_does_not_make_the_server_look_dead(triton):
    with pytest.raises(client.NotServed, match="nobody"):
        client.load_model(triton.address, "nobody")
    with urllib.request.urlopen(
        f"http://{triton.address.http}/v2/models/selfcheck/versions/2/ready", timeout=5
    ) as answer:
        assert answer.status == 200
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"http://{triton.address.http}/v2/models/nobody/ready", timeout=5)


def test_the_backend_files_are_copies_that_the_server_accepts(triton):
    files = [path for path in (triton.root / "backends").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.parent.name for path in files} - {"stub"} == {"python", "onnxruntime"}
    assert not any(path.is_symlink() for path in files)
    assert os.access(triton.root / "backends" / "python" / "triton_python_backend_stub", os.X_OK)


def test_the_process_of_a_network_begins_at_a_low_priority_and_answers_at_that_of_the_server(
    triton, small_network, describe
):
    if not may_return_to(os.getpriority(os.PRIO_PROCESS, 0)):
        pytest.skip("this account may not raise its priority again")
    put(triton.root, "aside", small_network(), describe)
    server, seen, loaded = server_of(triton), set(), threading.Event()

    def watch() -> None:
        while not loaded.is_set():
            for process in server.children():
                with suppress(psutil.Error):
                    if any("/aside_onnx_32/" in part for part in process.cmdline()[1:2]):
                        seen.add(process.nice())
            time.sleep(0.005)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        client.load_model(triton.address, "aside_onnx_32", 1)
    finally:
        loaded.set()
        watching.join()
    assert seen - {server.nice()} == {ASIDE}  # the server's: of the shell that becomes it, and at the end
    (process,) = [each for each in server.children() if "aside_onnx_32_0_0" in each.cmdline()]
    threads = [int(each.name) for each in Path(f"/proc/{process.pid}/task").iterdir()]
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {server.nice()}


def test_routed_models_are_networks_first_then_doors(tmp_path):
    for model in ("b", "a"):
        table = promoted(promoted(None, model, Route(f"{model}_onnx_32", 1)), model, Route(f"{model}_onnx_64", 2))
        write_routing(tmp_path, table)
    assert bring_up.routed_models(tmp_path) == ["a_onnx_32", "a_onnx_64", "b_onnx_32", "b_onnx_64", "a", "b"]
    assert json.loads((tmp_path / "routing" / "a.json").read_text())["previous"]["network"] == "a_onnx_32"
