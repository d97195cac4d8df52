"""`.tirewatch/events.jsonl`: what happened to the services of a stack, one readable line an event.

Run by supervisor as its event listener (`python -m deploy.journal <state>`), it records every service that ended by
itself, came back or was given up; `up`, `down` and the watchdog add their own lines.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

ROTATE_AT: Final = 2 * 2**20
_EXITED, _BACKOFF, _FATAL, _RUNNING = (f"PROCESS_STATE_{state}" for state in ("EXITED", "BACKOFF", "FATAL", "RUNNING"))
LISTENED: Final = (_EXITED, _BACKOFF, _FATAL, _RUNNING)


@dataclass(frozen=True)
class Entry:
    """One line of the journal. event: up, down, ended, failed, given_up, running, restarted."""

    at: str
    service: str
    event: str
    text: str


def record(state: Path, service: str, event: str, text: str) -> None:
    """Appends one line; a single write, so several writers never mix."""
    entry = Entry(datetime.now(UTC).isoformat(timespec="milliseconds"), service, event, text)
    descriptor = os.open(state / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, (json.dumps(asdict(entry)) + "\n").encode())
    finally:
        os.close(descriptor)


def rotate(state: Path) -> None:
    """Keeps the journal and one before it."""
    path = state / "events.jsonl"
    if path.exists() and path.stat().st_size > ROTATE_AT:
        path.replace(state / "events.1.jsonl")


def entries(state: Path) -> list[Entry]:
    path = state / "events.jsonl"
    return [Entry(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def restarts(journal: list[Entry]) -> Counter[str]:
    """How often each service ended by itself, failed to start or was restarted since the last `up`."""
    since = max((index for index, entry in enumerate(journal) if entry.event == "up"), default=-1)
    return Counter(entry.service for entry in journal[since + 1 :] if entry.event in ("ended", "failed", "restarted"))


def describe(name: str, payload: dict[str, str], ended_before: bool) -> tuple[str, str] | None:
    """(event, text) of one supervisor notification; None for a first, ordinary start."""
    service, pid = payload["processname"], payload.get("pid", "")
    if name == _EXITED:
        return "ended", f"{service} (pid {pid}) ended by itself; it is started again"
    if name == _BACKOFF:
        return "failed", f"{service} ended right after its start (attempt {payload.get('tries', '?')}); see its log"
    if name == _FATAL:
        return "given_up", f"{service} is given up after repeated failures: read `tirewatch logs {service}`"
    return ("running", f"{service} runs again (pid {pid})") if ended_before else None


def listen(state: Path) -> None:
    """Supervisor's event-listener protocol on standard input and output, for as long as supervisor lives."""
    from supervisor import childutils

    ended: set[str] = set()
    while True:
        headers, body = childutils.listener.wait(sys.stdin, sys.stdout)
        payload: dict[str, Any] = childutils.get_headers(body)
        service = payload["processname"]
        described = describe(headers["eventname"], payload, service in ended)
        if described:
            record(state, service, *described)
        if headers["eventname"] == _RUNNING:
            ended.discard(service)
        else:
            ended.add(service)
        childutils.listener.ok(sys.stdout)


if __name__ == "__main__":
    listen(Path(sys.argv[1]))
