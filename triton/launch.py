"""Starts the embedded Triton server over one serving root, and stays its parent.

    .venv-triton/bin/python triton/launch.py --root ROOT --http-port P --grpc-port P --metrics-port P --admin-key-file F

Order: what is missing on this machine is said in one sentence; what a killed predecessor left is removed; the server starts
with nothing but an echo; then `bring_up.py` proves that known bytes pass and has everything loaded. The standard
library and `tasks.courtesy` only.
"""

import argparse
import ctypes
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from bring_up import ADMIN_HEADER, SELFCHECK, Refusal, bring_up, np
from preflight import problems, shared_library

SOURCE = Path(__file__).resolve().parent
RESTRICTED = "model-repository,model-config,shared-memory,statistics,trace,logging"
BYTECODE = shutil.ignore_patterns("__pycache__")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    for port in ("http", "grpc", "metrics"):
        parser.add_argument(f"--{port}-port", type=int, required=True)
    parser.add_argument("--admin-key-file", type=Path)
    parser.add_argument(
        "--end-with", type=int, help="process id of the parent with which this server ends, however that goes"
    )
    chosen = parser.parse_args()
    try:
        sys.exit(serve(chosen))
    except Refusal as refusal:
        print(f"not serving: {refusal}", file=sys.stderr, flush=True)
        sys.exit(1)


def serve(chosen):
    """Runs the server until it ends or this process is told to; its exit code."""
    check_machine()
    end_with_parent(chosen.end_with)
    root = chosen.root.resolve()
    prefix = shm_prefix(root)
    held = hold(root)
    clean(prefix)
    key = read_key(chosen.admin_key_file)
    line = command(root, chosen, prefix, key)
    server = subprocess.Popen(line, env=environment(), preexec_fn=_die_with_parent)  # noqa: PLW1509  (one thread here)
    told = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: (told.append(True), server.terminate()))
    try:
        bring_up(server, root, chosen.http_port, key)
        print("serving", flush=True)
        code = server.wait()
        return 0 if told else code  # with an idle connection open, the server itself ends with 1
    except (Refusal, OSError) as error:
        if told:  # the server went because we were told to stop: nothing failed
            return 0
        raise error if isinstance(error, Refusal) else Refusal(f"tritonserver stopped answering ({error}).") from error
    finally:
        end(server)
        clean(prefix)
        held.close()


def hold(root):
    """An open, locked file: one server a root. The kernel lets go of it however this process ends."""
    (root / "model_repository").mkdir(parents=True, exist_ok=True)  # without it the server loads nothing at all
    file = (root / "server.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Refusal(f"another server runs on {root}: stop it first, or give another --root.") from None
    return file


def read_key(file):
    """The admin key in the file; None without one. Raises Refusal for a file that cannot be read or is empty."""
    if file is None:
        return None
    try:
        key = file.read_text().strip()
    except OSError as error:
        raise Refusal(
            f"the admin key file {file} cannot be read ({error.strerror}): give another with --admin-key-file."
        ) from None
    if not key:
        raise Refusal(f"the admin key file {file} is empty: write a key into it.")
    return key


def check_machine():
    """Raises Refusal for a machine or an environment that would not serve right."""
    missing = problems()
    if np is None:
        missing.append("numpy is not installed in this environment: run `make install`.")
    elif int(np.__version__.split(".")[0]) >= 2:
        missing.append(
            f"numpy {np.__version__} is installed and this server reads every input as garbage with numpy 2: "
            "install triton/requirements.lock into the serving environment (make install)."
        )
    for needed in ("nvidia-pytriton", "tirewatch"):
        try:
            distribution(needed)
        except PackageNotFoundError:
            missing.append(f"{needed} is not installed here: run `make install`.")
    if missing:
        raise Refusal(" ".join(missing))


def installed():
    """The folder of the server's files inside the nvidia-pytriton wheel."""
    return Path(str(distribution("nvidia-pytriton").locate_file("pytriton"))) / "tritonserver"


def command(root, chosen, prefix, key):
    """The launch line; a scratch server has the same one."""
    line = [
        str(installed() / "bin" / "tritonserver"),
        f"--model-repository={root / 'model_repository'}",
        f"--model-repository={selfcheck_repository(root)}",
        f"--backend-directory={backends(root)}",
        "--model-control-mode=explicit",
        f"--load-model={SELFCHECK}",
        "--strict-readiness=false",  # else false during every load, and for ever after a failed one
        "--exit-on-error=false",
        "--exit-timeout-secs=10",  # an idle keep-alive connection would hold it for 30
        "--model-load-thread-count=1",  # a load must not take both cores from those who are served
        "--http-thread-count=4",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        "--metrics-address=127.0.0.1",
        f"--http-port={chosen.http_port}",
        f"--grpc-port={chosen.grpc_port}",
        f"--metrics-port={chosen.metrics_port}",
        "--metrics-config=summary_latencies=true",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        "--backend-config=python,shm-default-byte-size=4194304",
        "--backend-config=python,stub-timeout-seconds=60",
        "--allow-gpu-metrics=false",
    ]
    if key:
        # Anyone on this machine can read it in the process list: a fence, not authentication.
        line.append(f"--http-restricted-api={RESTRICTED}:{ADMIN_HEADER}={key}")
        line.append(f"--grpc-restricted-protocol={RESTRICTED}:{ADMIN_HEADER}={key}")
    return line


def environment():
    """The stub embeds the `python3` that is first on PATH, and links the shared libpython."""
    libraries = [
        str(Path(str(distribution("nvidia-pytriton").locate_file("nvidia_pytriton.libs")))),
        str(Path(shared_library()).parent),
        os.environ.get("LD_LIBRARY_PATH", ""),
    ]
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        "LD_LIBRARY_PATH": ":".join(folder for folder in libraries if folder and folder != "."),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def backends(root):
    """The backend directory, assembled anew: copies, because the server refuses symlinks that lead out of it."""
    directory = root / "backends"
    unfinished = root / f".backends-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    files = installed()
    python = unfinished / "python"
    python.mkdir(parents=True)
    for file in (files / "backends" / "python").iterdir():
        if file.is_file():
            shutil.copy2(file, python / file.name)
    install_stub(python)
    shutil.copytree(SOURCE / "backends" / "onnxruntime", unfinished / "onnxruntime", ignore=BYTECODE)
    shutil.rmtree(directory, ignore_errors=True)
    unfinished.rename(directory)
    return directory


def install_stub(folder):
    """The process of a Python model. One that brings a network up begins at a low priority, before its interpreter starts:
    its last argument is the folder of its backend, where other models have DEFAULT.
    """
    from tasks.courtesy import ASIDE, may_return_to

    name, version = "triton_python_backend_stub", f"{sys.version_info[0]}.{sys.version_info[1]}"
    own = os.getpriority(os.PRIO_PROCESS, 0)
    lowered = own < ASIDE and may_return_to(own)
    stub = folder / "stub" / name if lowered else folder / name
    stub.parent.mkdir(exist_ok=True)
    shutil.copy2(installed() / "python_backend_stubs" / version / name, stub)
    stub.chmod(0o755)
    if lowered:
        wrapper = folder / name
        begin = f'exec nice -n {ASIDE - own} "${{0%/*}}/stub/{name}" "$@"'
        last = "for last; do :; done"
        wrapper.write_text(f'#!/bin/sh\n{last}\n[ "$last" = DEFAULT ] || {begin}\nexec "${{0%/*}}/stub/{name}" "$@"\n')
        wrapper.chmod(0o755)


def selfcheck_repository(root):
    """A repository of its own for the echo, version 1 only; version 2 appears when all is loaded."""
    directory = root / "selfcheck"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(SOURCE / "selfcheck", directory / SELFCHECK, ignore=BYTECODE)
    return directory


def shm_prefix(root):
    """Prefix of this root's shared-memory regions; the stubs carry it in their command line."""
    return f"tirewatch_{hashlib.sha256(str(root).encode()).hexdigest()[:12]}_"


def clean(prefix):
    """Ends the server and the stubs that a killed launcher of the same root left behind, and removes their regions."""
    left = leftovers(prefix)
    for process in left:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + 10
    while any(process in left for process in leftovers(prefix)) and time.monotonic() < deadline:
        time.sleep(0.02)  # until they are gone they hold the ports
    for region in Path("/dev/shm").glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def leftovers(prefix):
    """Process ids of tritonserver and its stubs that carry the prefix in their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            program, *arguments = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended meanwhile
            continue
        ours = Path(program).name in ("tritonserver", "triton_python_backend_stub")
        if ours and any(prefix in argument for argument in arguments):
            found.append(int(file.parent.name))
    return found


def end(server):
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def end_with_parent(parent):
    """A scratch server must not outlive the flow run that asked for it."""
    if parent is None:
        return
    _die_with_parent()
    if os.getppid() != parent:
        raise Refusal(f"process {parent}, for which this server was started, is gone.")


def _die_with_parent():
    """Linux: this process gets SIGTERM when its parent is gone, however it went."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


if __name__ == "__main__":
    main()
