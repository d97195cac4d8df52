"""Starts one service of a stack: ends what a killed predecessor left, waits for what it needs, becomes the command.

Supervisor runs `python -m deploy.launch <state> <service>`; the definition lies in `<state>/services/<service>.json`.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploy.processes import end, processes_of
from deploy.services import LOOPBACK, Service
from deploy.stack import STACK_MARK, Stack, write_private


def write_definition(stack: Stack, service: Service) -> None:
    """The file the launcher reads; private, because the environment holds secrets."""
    folder = stack.state / "services"
    folder.mkdir(exist_ok=True)
    definition = {**asdict(service), "directory": str(service.directory)}
    write_private(folder / f"{service.name}.json", json.dumps(definition, indent=2))


def answers(url: str, timeout: float = 2.0) -> bool:
    """Whether a GET of the URL is answered with 2xx."""
    try:
        with LOOPBACK.open(url, timeout=timeout) as answer:
            return bool(200 <= answer.status < 300)
    except (OSError, ValueError):
        return False


def wait_for(urls: list[str]) -> None:
    """Returns when every URL answers; says every ten seconds what is still missing."""
    started = told = time.monotonic()
    while missing := [url for url in urls if not answers(url)]:
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"waiting for {', '.join(missing)} since {told - started:.0f} s", flush=True)
        time.sleep(0.2)


def main() -> None:
    state, name = Path(sys.argv[1]), sys.argv[2]
    definition: dict[str, Any] = json.loads((state / "services" / f"{name}.json").read_text())
    if not definition["adopts"]:
        leftovers = end(processes_of(os.environ[STACK_MARK], name))
        if leftovers:
            print(f"ended what an earlier {name} left behind: {leftovers}", flush=True)
    wait_for(definition["after"])
    directory = Path(definition["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    os.chdir(directory)
    os.nice(definition.get("nice", 0))  # not yet in what an earlier release wrote down
    command: list[str] = definition["command"]
    os.execve(command[0], command, {**os.environ, **definition["env"]})


if __name__ == "__main__":
    main()
