"""A scratch server: a Triton of its own for one candidate, same launch line and front door as the live one, gone afterwards.

No request ever gets an answer from a version that has not passed its gates: candidates are asked here.
"""

import fcntl
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final

import psutil

from tasks.inference import Accelerator
from tasks.model_repository import FrontDoor, Runtime, copy_version, install_front_door
from tasks.routing import Route, RoutingTable, write_routing
from tasks.sealed import SealedVersion
from tasks.serving import NotServed, TritonAddress, is_version_ready

_FRAME = re.compile(r"\s*\d+# ")
LAUNCHER: Final = Path(__file__).parents[1] / "triton" / "launch.py"


class ScratchServer:
    """A server of its own for one sealed version: same launch line, same front door, own root and ports.

    It stands beside the live serving root, on the same file system, and is gone with the `with` block.
    """

    def __init__(self, python: Path, version: Path, beside: Path, accelerator: Accelerator = "openvino") -> None:
        self._python = python
        self._version = version
        self._beside = beside
        self._accelerator = accelerator
        self._process: subprocess.Popen[bytes] | None = None
        self.root = Path()
        self.address = TritonAddress("", "")

    def __enter__(self) -> "ScratchServer":
        self._beside.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self._beside)
        self.root = Path(tempfile.mkdtemp(prefix="scratch-", dir=self._beside)).resolve()
        try:
            sealed = copy_version(self._version, self.root, Runtime(accelerator=self._accelerator))
            install_front_door(self.root, sealed.model, FrontDoor(capture_share=0.0))
            write_routing(self.root, RoutingTable(sealed.model, Route(sealed.network, sealed.version)))
            self._start()
            self._wait(sealed)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: tuple[type[BaseException], BaseException, TracebackType]) -> None:
        self.close()

    def _start(self) -> None:
        http, grpc, metrics = free_ports(3)
        self.address = TritonAddress(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}")
        line = [str(self._python), str(LAUNCHER), "--root", str(self.root), "--end-with", str(os.getpid())]
        for name, port in (("http", http), ("grpc", grpc), ("metrics", metrics)):
            line += [f"--{name}-port", str(port)]
        with (self.root / "server.log").open("wb") as output:
            self._process = subprocess.Popen(line, stdout=output, stderr=output, process_group=0)

    def _wait(self, sealed: SealedVersion, within: float = 90.0) -> None:
        assert self._process is not None
        deadline = time.monotonic() + within
        while time.monotonic() < deadline and self._process.poll() is None:
            if is_version_ready(self.address, "selfcheck", 2):
                if is_version_ready(self.address, sealed.network, sealed.version) and is_version_ready(
                    self.address, sealed.model
                ):
                    return
                break
            time.sleep(0.1)
        raise NotServed(f"the scratch server does not serve {sealed.model}: {last_words(self.log())}")

    def cpu_seconds(self) -> float:
        """Processor time that the server and its model processes have used so far."""
        assert self._process is not None
        times = [process.cpu_times() for process in psutil.Process(self._process.pid).children(recursive=True)]
        return sum(each.user + each.system for each in times)

    @property
    def is_running(self) -> bool:
        """Whether the server's process lives."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """What the server has said so far."""
        return (self.root / "server.log").read_text(errors="replace")

    def close(self) -> None:
        """End the server and remove its root."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        shutil.rmtree(self.root, ignore_errors=True)


def last_words(log: str, characters: int = 2000) -> str:
    """The end of a server's log without the addresses of a stack, which would push what went wrong out of it."""
    told = [line for line in log.splitlines() if not _FRAME.match(line)]
    return "\n".join(told)[-characters:]


def remove_abandoned(beside: Path, older_than: float = 3600.0) -> None:
    """Remove the roots of scratch servers whose flow run was killed: old, and no launcher holds their lock."""
    for root in beside.glob("scratch-*"):
        lock = root / "server.lock"
        try:
            if time.time() - root.stat().st_mtime < older_than:
                continue
            if lock.exists():
                with lock.open("r") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # it runs, or somebody else has just removed it
            continue
        shutil.rmtree(root, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Distinct loopback ports nobody listens on now, below the range the kernel gives to outgoing connections: a port from
    that range may be somebody's client connection by the time the server binds it.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 12_000):
        if len(found) == count:
            break
        with socket.socket() as opened:
            try:
                opened.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    return found
