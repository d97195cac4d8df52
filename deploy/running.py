"""One service by itself, without a stack around it: for tests and benchmarks."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy import services


@dataclass
class Running:
    service: services.Service
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(5)


def start(service: services.Service, log: Path, timeout: float = 60) -> Running:
    """The service, ready; its output goes to `log`."""
    service.directory.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            service.command,
            env=services.environment_of(service),
            cwd=service.directory,
            stdout=output,
            stderr=output,
            process_group=0,  # and not a session: its niceness would count among its own processes only (sched_autogroup)
        )
    if service.nice:
        os.setpriority(os.PRIO_PGRP, process.pid, os.getpriority(os.PRIO_PGRP, process.pid) + service.nice)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with services.LOOPBACK.open(service.ready_url, timeout=2) as answer:
                if answer.status < 300:
                    return Running(service, process)
        except OSError:
            time.sleep(0.1)
    Running(service, process).stop()
    raise RuntimeError(f"{service.name} was not ready in {timeout:.0f} s:\n{log.read_text()[-4000:]}")


@contextmanager
def running(service: services.Service, log: Path, timeout: float = 60) -> Iterator[Running]:
    """The service, ready, for the length of the block."""
    started = start(service, log, timeout)
    try:
        yield started
    finally:
        started.stop()
