"""The process supervisor of a stack: its configuration as text, and the calls to a running one."""

import http.client
import shlex
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from deploy.journal import LISTENED
from deploy.launch import write_definition
from deploy.services import Service
from deploy.stack import SERVICE_MARK, SOURCE, STACK_MARK, Stack, StackError, inherited_environment

_UNREACHABLE: Final = (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError)


@dataclass(frozen=True)
class ProgramState:
    """What supervisor knows of one service. state: RUNNING, STARTING, BACKOFF, STOPPED, FATAL, EXITED, ..."""

    name: str
    state: str
    pid: int
    uptime: float


def configuration(stack: Stack, programs: Iterable[Service]) -> str:
    """supervisord.conf of the stack. A service gets 10 attempts with growing pauses (55 s) before it is given up."""
    sections: list[tuple[str, dict[str, object]]] = [
        ("unix_http_server", {"file": stack.socket, "chmod": "0700"}),
        (
            "supervisord",
            {
                "logfile": stack.log("supervisord"),
                "logfile_maxbytes": "10MB",
                "logfile_backups": 2,
                "pidfile": stack.state / "supervisord.pid",
                "childlogdir": stack.state / "logs",
                "directory": stack.state,
                "umask": "077",
                "identifier": f"tirewatch-{stack.id}",
            },
        ),
        (
            "rpcinterface:supervisor",
            {"supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"},
        ),
        *((f"program:{service.name}", _program(stack, service)) for service in programs),
        ("eventlistener:journal", _journal(stack)),
    ]
    return "\n\n".join(
        "\n".join([f"[{name}]", *(f"{key} = {_escape(value)}" for key, value in options.items())])
        for name, options in sections
    )


def _program(stack: Stack, service: Service) -> dict[str, object]:
    command = (sys.executable, "-m", "deploy.launch", str(stack.state), service.name)
    # A worker ends alone: its flow runs may finish; `down` ends whatever is left by the stack's mark.
    group = "false" if service.adopts else "true"
    return {
        "command": shlex.join(command),
        "environment": f'{SERVICE_MARK}="{service.name}"',
        "directory": SOURCE,
        "autostart": "true",
        "autorestart": "true",
        "startsecs": 2,
        "startretries": 10,
        "stopwaitsecs": 15,
        "stopasgroup": group,
        "killasgroup": group,
        "redirect_stderr": "true",
        "stdout_logfile": _log(stack, service.name),
        "stdout_logfile_maxbytes": "10MB",
        "stdout_logfile_backups": 2,
    }


def _journal(stack: Stack) -> dict[str, object]:
    return {
        "command": shlex.join((sys.executable, "-m", "deploy.journal", str(stack.state))),
        "environment": f'{SERVICE_MARK}="journal"',
        "directory": SOURCE,
        "events": ",".join(LISTENED),
        "buffer_size": 200,
        "autorestart": "true",
        "stdout_logfile": "NONE",  # the protocol with supervisor
        "stderr_logfile": _log(stack, "journal"),
        "stderr_logfile_maxbytes": "1MB",
        "stderr_logfile_backups": 1,
    }


def _log(stack: Stack, name: str) -> str:
    """Relative to the state folder, where supervisord is started: it expands this value twice, so that no escaped percent
    sign in the path of the folder would survive.
    """
    return str(stack.log(name).relative_to(stack.state))


def _escape(value: object) -> str:
    return str(value).replace("%", "%%")


def start(stack: Stack, programs: list[Service]) -> None:
    """Writes the configuration and starts supervisord, which starts every service. Raises StackError."""
    for service in programs:
        write_definition(stack, service)
    path = stack.state / "supervisord.conf"
    path.write_text(configuration(stack, programs) + "\n")
    marks = {STACK_MARK: stack.id, SERVICE_MARK: "supervisord"}
    done = subprocess.run(
        [sys.executable, "-m", "supervisor.supervisord", "-c", str(path)],
        env={**inherited_environment(), **marks},
        cwd=stack.state,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    if done.returncode != 0:
        raise StackError(f"supervisord did not start: {(done.stderr or done.stdout).strip()[-500:]}")
    supervisor = Supervisor(stack)  # the command returns when its daemon is forked, not when that listens
    for _ in range(100):
        if supervisor.is_running():
            return
        time.sleep(0.1)
    raise StackError(f"supervisord does not answer at {stack.socket}: read {stack.log('supervisord')}")


class Supervisor:
    """Calls to the supervisord of one stack over its unix socket."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    @property
    def _rpc(self) -> Any:
        """A connection for one call: supervisor's transport cannot be used again after it failed once."""
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, f"unix://{self._stack.socket}")
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport).supervisor

    def is_running(self) -> bool:
        try:
            return str(self._rpc.getIdentification()) == f"tirewatch-{self._stack.id}"
        except _UNREACHABLE:
            return False

    def programs(self) -> dict[str, ProgramState]:
        """State of every service by name; empty when supervisord is not there."""
        try:
            found: list[dict[str, Any]] = self._rpc.getAllProcessInfo()
        except _UNREACHABLE:
            return {}
        return {
            info["name"]: ProgramState(
                info["name"], info["statename"], info["pid"], float(info["now"] - info["start"]) if info["pid"] else 0.0
            )
            for info in found
        }

    def start_program(self, name: str) -> None:
        """Starts a service that does not run; one that runs is left alone."""
        try:
            self._rpc.startProcess(name, False)
        except xmlrpc.client.Fault as fault:
            if "ALREADY_STARTED" not in fault.faultString:
                raise StackError(f"{name} cannot be started: {fault.faultString}") from None

    def restart_program(self, name: str) -> None:
        """Stops the service (its whole group) and starts it again."""
        try:
            self._rpc.stopProcess(name)
        except xmlrpc.client.Fault as fault:
            if "NOT_RUNNING" not in fault.faultString:
                raise StackError(f"{name} cannot be stopped: {fault.faultString}") from None
        self.start_program(name)

    def shutdown(self) -> None:
        """Asks supervisord to stop every service and itself; returns at once. All are signalled together: shutdown alone
        would stop them one after the other.
        """
        try:
            self._rpc.stopAllProcesses(False)
            self._rpc.shutdown()
        except _UNREACHABLE:
            return
