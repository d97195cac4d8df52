"""Finds the processes of a stack by the marks in their environment, and ends them."""

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

import psutil

from deploy.stack import SERVICE_MARK, STACK_MARK

FLOW_RUN_MARK: Final = "PREFECT__FLOW_RUN_ID"  # as Prefect's workers mark the processes they start


def processes_of(stack_id: str, service: str | None = None) -> list[psutil.Process]:
    """Living processes that carry the stack's mark (and the service's), without the caller and its ancestors."""
    me = psutil.Process()
    excluded = {me.pid, *(parent.pid for parent in me.parents())}
    return [
        process
        for process in psutil.process_iter()
        if process.pid not in excluded and _carries(process, stack_id, service)
    ]


def flow_runs_of(stack_id: str) -> set[str]:
    """Ids of the flow runs that have a living process of this stack."""
    found = set()
    for process in processes_of(stack_id):
        with suppress(psutil.Error):  # gone meanwhile
            found.add(process.environ().get(FLOW_RUN_MARK, ""))
    return found - {""}


def _carries(process: psutil.Process, stack_id: str, service: str | None) -> bool:
    try:
        if process.uids().real != os.getuid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        environment = process.environ()
    except psutil.Error:  # gone meanwhile, or not ours to read
        return False
    return environment.get(STACK_MARK) == stack_id and service in (None, environment.get(SERVICE_MARK))


def end(processes: Iterable[psutil.Process], grace: float = 5.0) -> list[int]:
    """Asks the processes to stop, kills what is left after `grace` seconds; the pids that were there."""
    asked = list(processes)
    for process in asked:
        _signal(process, terminate=True)
    _, stubborn = psutil.wait_procs(asked, timeout=grace)
    for process in stubborn:
        _signal(process, terminate=False)
    psutil.wait_procs(stubborn, timeout=5)
    return [process.pid for process in asked]


def _signal(process: psutil.Process, terminate: bool) -> None:
    try:
        if terminate:
            process.terminate()
        else:
            process.kill()
    except psutil.NoSuchProcess:
        return
