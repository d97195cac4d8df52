"""Run the Triton server of the wheel `nvidia-pytriton` on one serving root, without docker: prove it first, then serve.

    .venv-triton/bin/python triton/launch.py --root DIR --http-port N --grpc-port N --metrics-port N --admin-key-file FILE

It checks the machine, echoes known bytes through the server (with numpy 2 this server reads every input as garbage,
without any error), loads what `routing/*.json` names, and stays as the server's parent. `/v2/models/selfcheck/versions/2/ready`
answers 200 once all of that is done. Loopback only. Standard library and numpy only; exit code 78: this machine cannot
serve, 70: the server failed.
"""

import argparse
import ctypes
import ctypes.util
import fcntl
import hashlib
import http.client
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ADMIN_HEADER = "tirewatch-admin"
RESTRICTED = "model-repository,model-config,shared-memory,statistics,trace,logging"
READY = "/v2/models/selfcheck/versions/2/ready"
START_TIMEOUT = 60.0
EXIT_TIMEOUT = 10
CANNOT_SERVE, SERVER_FAILED = 78, 70  # EX_CONFIG and EX_SOFTWARE of sysexits.h
_SHM = Path("/dev/shm")
_PR_SET_PDEATHSIG = 1


class CannotServe(RuntimeError):
    """This machine cannot serve correctly; the message is one sentence for the user."""


class ServerFailed(RuntimeError):
    """The server ended or did not start."""


@dataclass(frozen=True)
class Launch:
    """One serving root and where it listens."""

    root: Path
    http_port: int
    grpc_port: int
    metrics_port: int
    admin_key: str

    @property
    def run_directory(self) -> Path:
        return self.root / "run"

    @property
    def prefix(self) -> str:
        """Prefix of this root's shared-memory regions: what is left behind can be told from another server's."""
        return "tirewatch_" + hashlib.sha256(str(self.root).encode()).hexdigest()[:10]


# --- Can this machine serve? ----------------------------------------------------------------------------------------


def check_python(version: Sequence[int]) -> None:
    if tuple(version[:2]) not in ((3, 11), (3, 12)):
        found = ".".join(map(str, version[:2]))
        raise CannotServe(f"Python {found} cannot run the server, which needs 3.11 or 3.12: make .venv-triton with one of them")


def check_numpy(version: str) -> None:
    if int(version.split(".")[0]) >= 2:
        raise CannotServe(
            f"numpy {version} is installed, with which this server reads every input as garbage: install triton/requirements.lock"
        )


def check_glibc(version: str) -> None:
    """version: as `os.confstr("CS_GNU_LIBC_VERSION")` gives it, for example `glibc 2.36`."""
    name, _, number = version.partition(" ")
    if name != "glibc" or tuple(int(part) for part in number.split(".")[:2]) < (2, 35):
        raise CannotServe(f"{version or 'no glibc'} found, the server needs glibc 2.35 or newer: use Debian 12, Ubuntu 22.04 or newer")


def libpython_directory(directories: Sequence[str], version: Sequence[int]) -> Path:
    """Where the shared libpython lies which the server's model processes load."""
    name = f"libpython{version[0]}.{version[1]}.so.1.0"
    for directory in directories:
        if directory and (Path(directory) / name).exists():
            return Path(directory)
    raise CannotServe(
        f"{name} was not found in {', '.join(filter(None, directories))}: install libpython{version[0]}.{version[1]} "
        "(Debian), or use a Python built with --enable-shared"
    )


def server_directory() -> Path:
    """`site-packages` with the server of nvidia-pytriton in it."""
    spec = importlib.util.find_spec("pytriton")
    site = Path(spec.origin).parents[1] if spec and spec.origin else None
    if site is None or not (site / "pytriton" / "tritonserver" / "bin" / "tritonserver").exists():
        raise CannotServe("nvidia-pytriton, which carries the server, is not installed: install triton/requirements.lock")
    return site


def preflight() -> tuple[Path, Path]:
    """(site-packages of the server, directory of libpython). Raises CannotServe with one sentence."""
    check_python(sys.version_info)
    check_glibc(os.confstr("CS_GNU_LIBC_VERSION") or "")
    if importlib.util.find_spec("numpy") is None:
        raise CannotServe("numpy is not installed here: install triton/requirements.lock")
    import numpy

    check_numpy(numpy.__version__)
    if importlib.util.find_spec("tasks") is None:
        raise CannotServe("tirewatch itself is not installed here: run `make install`, or pip install --no-deps of the project")
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    places = [sysconfig.get_config_var("LIBDIR") or "", f"/usr/lib/{multiarch}", f"/lib/{multiarch}", "/usr/lib64", "/usr/lib"]
    return server_directory(), libpython_directory(places, sys.version_info)


# --- What the server finds ------------------------------------------------------------------------------------------


def assemble(launch: Launch, site: Path, sources: Path) -> None:
    """Make `run/`: the backend directory and the self-check model. Copies, because the server refuses symbolic links."""
    wheel = site / "pytriton" / "tritonserver"
    backends = launch.run_directory / "backends"
    shutil.rmtree(backends, ignore_errors=True)
    shutil.copytree(wheel / "backends" / "python", backends / "python", symlinks=False)
    stub = wheel / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}" / "triton_python_backend_stub"
    (backends / "python" / stub.name).unlink(missing_ok=True)
    shutil.copy(stub, backends / "python" / stub.name)
    (backends / "python" / stub.name).chmod(0o755)
    for backend in (sources / "backends").iterdir():
        shutil.copytree(backend, backends / backend.name, ignore=shutil.ignore_patterns("__pycache__"))
    proof = launch.run_directory / "models"
    shutil.rmtree(proof, ignore_errors=True)
    shutil.copytree(sources / "selfcheck", proof / "selfcheck", ignore=shutil.ignore_patterns("__pycache__"))
    (launch.root / "model_repository").mkdir(parents=True, exist_ok=True)


def server_command(launch: Launch, site: Path) -> list[str]:
    wheel = site / "pytriton" / "tritonserver"
    flags = {
        "model-control-mode": "explicit",
        "load-model": "selfcheck",
        "backend-directory": launch.run_directory / "backends",
        "strict-readiness": "false",  # the strict one is false during every load, and for ever after a failed one
        "exit-on-error": "false",
        "exit-timeout-secs": EXIT_TIMEOUT,  # idle keep-alive connections hold the exit until then
        "http-address": "127.0.0.1",
        "grpc-address": "127.0.0.1",
        "metrics-address": "127.0.0.1",
        "http-port": launch.http_port,
        "grpc-port": launch.grpc_port,
        "metrics-port": launch.metrics_port,
        "http-thread-count": 2,
        "model-load-thread-count": 1,  # a load must not take both cores from the serving
        "allow-sagemaker": "false",
        "allow-vertex-ai": "false",
        "allow-gpu-metrics": "false",
        # The server has no other way in for these keys than its arguments: other users of the machine can read them.
        "http-restricted-api": f"{RESTRICTED}:{ADMIN_HEADER}={launch.admin_key}",
        "grpc-restricted-protocol": f"{RESTRICTED}:{ADMIN_HEADER}={launch.admin_key}",
    }
    repositories = (launch.root / "model_repository", launch.run_directory / "models")
    backend = {
        "shm-region-prefix-name": launch.prefix,
        "shm-default-byte-size": 4 * 2**20,
        "shm-growth-byte-size": 4 * 2**20,
        "stub-timeout-seconds": 60,
    }
    return [
        str(wheel / "bin" / "tritonserver"),
        *(f"--model-repository={path}" for path in repositories),
        *(f"--{flag}={value}" for flag, value in flags.items()),
        *(f"--backend-config=python,{key}={value}" for key, value in backend.items()),
    ]


def server_environment(site: Path, libpython: Path) -> dict[str, str]:
    """Only what the server needs: the credentials of the stack around it stay outside."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "LC_ALL", "TMPDIR", "TZ") if name in os.environ}
    return kept | {
        # The model processes embed the `python3` found first here; PYTHONPATH would not replace its site-packages.
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        "LD_LIBRARY_PATH": f"{site / 'nvidia_pytriton.libs'}:{libpython}",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


# --- Leftovers ------------------------------------------------------------------------------------------------------


def processes_of(prefix: str) -> list[int]:
    """Servers and model processes that carry the prefix in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:  # it ended while we looked
            continue
        program = command.split(b"\0", 1)[0]
        if program.endswith((b"/tritonserver", b"/triton_python_backend_stub")) and prefix.encode() in command:
            found.append(int(entry.name))
    return found


def clean_up(prefix: str) -> None:
    """End what a former run of this root left behind, and remove its shared memory."""
    for pid in processes_of(prefix):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + 5
    while processes_of(prefix) and time.monotonic() < deadline:
        time.sleep(0.02)
    for region in _SHM.glob(f"*{prefix}*"):
        region.unlink(missing_ok=True)


# --- Talking to the server ------------------------------------------------------------------------------------------


def post(port: int, path: str, body: bytes = b"", headers: dict[str, str] | None = None, timeout: float = 60) -> tuple[int, dict[str, str], bytes]:
    """(status, lower-case headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", path, body, {"Connection": "close"} | (headers or {}))
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def is_ready(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def known_tensors() -> Iterator[tuple[str, object]]:
    """(input name, array): bytes, shapes and types as the real models exchange them, none of them constant."""
    import numpy as np

    for length in (1, 5, 4097, 70001):
        yield "bytes", (np.arange(length, dtype=np.int64) * 37 % 251).astype(np.uint8)
    for shape in ((1, 2, 2, 3), (2, 33, 17, 3), (3, 64, 64, 3)):
        yield "pixels", (np.arange(np.prod(shape), dtype=np.int64) * 91 % 256).astype(np.uint8).reshape(shape)
    yield "floats", np.linspace(-1e6, 1e6, 21, dtype=np.float32).reshape(3, 7)
    yield "integers", np.array([1, -2, 2**62, -(2**62), 3], dtype=np.int64)


def echo(port: int, name: str, array: object, timeout: float = 20) -> object:
    """The array as it came back from the server. Raises CannotServe when the answer is not even of the same size."""
    import numpy as np

    types = {"uint8": "UINT8", "float32": "FP32", "int64": "INT64"}
    data = array.tobytes()
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": name,
                    "shape": list(array.shape),
                    "datatype": types[array.dtype.name],
                    "parameters": {"binary_data_size": len(data)},
                }
            ],
            "outputs": [{"name": name, "parameters": {"binary_data": True}}],
        }
    ).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    status, answered, body = post(port, "/v2/models/selfcheck/infer", head + data, headers, timeout)
    returned = body[int(answered.get("inference-header-content-length", len(body))) :]
    if status != 200 or len(returned) != len(data):
        raise CannotServe(
            f"the server answered {status} with {len(returned)} of {len(data)} bytes to the self-check: it would corrupt every "
            "input; check that its environment is made from triton/requirements.lock"
        )
    return np.frombuffer(returned, dtype=array.dtype).reshape(array.shape)


def prove(port: int) -> None:
    """Echo known bytes through the server. Raises CannotServe when any come back changed."""
    import numpy as np

    for name, sent in known_tensors():
        received = echo(port, name, sent)
        if not np.array_equal(sent, received):
            changed = int(np.count_nonzero(sent != received))
            raise CannotServe(
                f"{changed} of {sent.size} known {name} came back changed ({sent.dtype} {list(sent.shape)}): the server would "
                "corrupt every input; check that its environment is made from triton/requirements.lock"
            )


def load(launch: Launch, model: str) -> str | None:
    """Load or reload the model; None when it worked, else what the server said."""
    headers = {ADMIN_HEADER: launch.admin_key, "Content-Type": "application/json"}
    status, _, body = post(launch.http_port, f"/v2/repository/models/{model}/load", b"{}", headers, timeout=300)
    return None if status == 200 else body.decode(errors="replace").strip()


def load_everything(launch: Launch) -> None:
    """Load what the routing tables name, then the front doors. What fails is reported; the rest is served."""
    from tasks.model_repository import front_doors
    from tasks.routing import read_routing

    doors = front_doors(launch.root)
    routes = []
    for model in doors:
        try:
            table = read_routing(launch.root, model)
        except ValueError as error:
            say(f"{model} has no usable routing: {error}")
            continue
        routes += table.routes if table else ()
    for name in [*dict.fromkeys(route.network for route in routes), *doors]:
        if problem := load(launch, name):
            say(f"{name} could not be loaded: {problem}")
    for route in routes:
        if not is_ready(launch.http_port, f"/v2/models/{route.network}/versions/{route.version}/ready"):
            say(f"{route.network} version {route.version} is routed but not ready: see above, or roll back")


# --- One life -------------------------------------------------------------------------------------------------------


def start_server(launch: Launch, site: Path, libpython: Path) -> subprocess.Popen[bytes]:
    """Start tritonserver so that it ends when this process does, however that ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)

    return subprocess.Popen(
        server_command(launch, site),
        env=server_environment(site, libpython),
        cwd=launch.run_directory,
        preexec_fn=die_with_parent,  # noqa: PLW1509  (no other thread runs here)
        start_new_session=True,  # a signal to our process group reaches the server once, through us
    )


def wait_until_ready(process: subprocess.Popen[bytes], port: int, path: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not is_ready(port, path):
        if process.poll() is not None:
            raise ServerFailed(f"tritonserver ended with {process.returncode} while it started: its own lines above say why")
        if time.monotonic() > deadline:
            raise ServerFailed(f"{path} was not ready in {START_TIMEOUT:.0f} s: the server's own lines above say why")
        time.sleep(0.05)


def reveal_readiness(launch: Launch) -> None:
    """Load version 2 of the self-check, the last thing to become ready."""
    directory = launch.run_directory / "models" / "selfcheck"
    (directory / "1").rename(directory / "2")
    if problem := load(launch, "selfcheck"):
        raise ServerFailed(f"the self-check model could not be loaded again: {problem}")


def dead_model_processes(server: int) -> list[int]:
    """Model processes that died under the server: nobody waits for them and they never come back (server#7347)."""
    try:
        children = [
            child for task in Path(f"/proc/{server}/task").iterdir() for child in (task / "children").read_text().split()
        ]
        return [int(child) for child in children if _state(child) == "Z"]
    except OSError:  # the server is ending
        return []


def _state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def watch(process: subprocess.Popen[bytes]) -> None:
    """Return when the server ends. Raises ServerFailed when a model process of it died, which it does not notice itself."""
    suspects: set[int] = set()
    while process.poll() is None:
        dead = set(dead_model_processes(process.pid))
        if dead & suspects:  # seen twice: one that is being unloaded is a zombie for a moment only
            raise ServerFailed(f"model process {min(dead & suspects)} died and does not come back: the server must be started again")
        suspects = dead
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            continue
    if process.returncode != 0:
        raise ServerFailed(f"tritonserver ended with {process.returncode}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server, gently if it can."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=EXIT_TIMEOUT + 3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def hold(launch: Launch) -> object:
    """The lock of this root, held as long as the returned file is open. Raises CannotServe when another holds it."""
    launch.run_directory.mkdir(parents=True, exist_ok=True)
    lock = (launch.run_directory / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise CannotServe(f"process {lock.read().strip() or '?'} already serves {launch.root}: stop it first") from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def admin_key(path: Path) -> str:
    """The key in the file; a new one is made where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as output:
            output.write(secrets.token_hex(24) + "\n")
    key = path.read_text().strip()
    if not key.isalnum():
        raise CannotServe(f"the admin key in {path} must be letters and digits only: remove the file to get a new one")
    return key


def serve(launch: Launch, sources: Path) -> int:
    """Everything from the checks to the end of the server. Returns the exit code."""
    site, libpython = preflight()
    lock = hold(launch)
    clean_up(launch.prefix)
    assemble(launch, site, sources)
    process = start_server(launch, site, libpython)
    try:
        wait_until_ready(process, launch.http_port, "/v2/models/selfcheck/versions/1/ready")
        prove(launch.http_port)
        load_everything(launch)
        reveal_readiness(launch)
        say(f"serving {launch.root}: http 127.0.0.1:{launch.http_port}, grpc 127.0.0.1:{launch.grpc_port}")
        watch(process)
    except SystemExit:  # SIGTERM or SIGINT, see `main`
        say("stopping")
    finally:
        stop(process)
        clean_up(launch.prefix)
        lock.close()
    return 0


def say(sentence: str) -> None:
    print(f"launch: {sentence}", file=sys.stderr, flush=True)


def _exit_on_signal(signum: int, _: object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the stop that follows is not to be interrupted
    raise SystemExit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="serving root: model_repository/, routing/, spool/")
    for name in ("http", "grpc", "metrics"):
        parser.add_argument(f"--{name}-port", type=int, required=True)
    parser.add_argument("--admin-key-file", type=Path, required=True, help="key of model control; made if absent")
    given = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit_on_signal)
    try:
        key = admin_key(given.admin_key_file)
        launch = Launch(given.root.resolve(), given.http_port, given.grpc_port, given.metrics_port, key)
        return serve(launch, Path(__file__).resolve().parent)
    except CannotServe as error:
        say(str(error))
        return CANNOT_SERVE
    except (ServerFailed, http.client.HTTPException, OSError) as error:
        say(str(error))
        return SERVER_FAILED


if __name__ == "__main__":
    sys.exit(main())
