"""Asks every front door for an inference of a known image and restarts a server that does not give it.

Needed because a killed Python stub of the embedded Triton never comes back while every readiness endpoint stays true.
`python -m deploy.watchdog <state>`, run by supervisor. It asks over HTTP, as a client would.
"""

import json
import logging
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from deploy import journal
from deploy.services import LOOPBACK
from deploy.stack import Stack, StackError, read_stack
from deploy.supervisor import ProgramState, Supervisor

log: Final = logging.getLogger("watchdog")

EVERY: Final = 5.0
TIMEOUT: Final = 5.0
FAILURES: Final = 3  # in a row
PROBES: Final = 4  # at once, so that every process of a front door gets one
LOADING: Final = 300.0  # seconds a started server may take until its first answer
FIRST_PAUSE: Final = 60.0  # between two restarts that did not help; doubled up to LONGEST_PAUSE
LONGEST_PAUSE: Final = 1800.0


@dataclass(frozen=True)
class Watch:
    """What the watchdog remembers from one look to the next. Times are monotonic seconds."""

    pid: int = 0
    answered: bool = False  # this process has answered before
    failures: int = 0
    restart_after: float = float("-inf")
    pause: float = FIRST_PAUSE


def look(watch: Watch, program: ProgramState | None, problem: str | None, now: float) -> tuple[Watch, bool]:
    """(what to remember, whether to restart) after one look. problem: None when every front door answered.

    A server that supervisor is starting, or that is still loading, is left alone. Restarts that do not help come at
    growing distances: a broken version must not take the healthy ones down every quarter of a minute.
    """
    if program is None or program.state != "RUNNING":
        return replace(watch, pid=0, answered=False, failures=0), False
    if program.pid != watch.pid:
        watch = replace(watch, pid=program.pid, answered=False, failures=0)
    if problem is None:
        return replace(watch, answered=True, failures=0, pause=FIRST_PAUSE), False
    if not watch.answered and program.uptime < LOADING:
        return watch, False
    watch = replace(watch, failures=watch.failures + 1)
    if watch.failures < FAILURES or now < watch.restart_after:
        return watch, False
    later = replace(watch, failures=0, restart_after=now + watch.pause, pause=min(2 * watch.pause, LONGEST_PAUSE))
    return later, True


def known_image() -> bytes:
    """A 64x48 JPEG with a gradient: any front door decodes it."""
    import numpy as np
    import simplejpeg

    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    pixels = np.stack([np.tile(ramp, (48, 1)), np.tile(ramp[::-1], (48, 1)), np.full((48, 64), 96, np.uint8)], axis=2)
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=90))


def front_doors(serving_root: Path) -> list[str]:
    """Models that have a routing table, and so must answer."""
    return sorted(path.stem for path in (serving_root / "routing").glob("*.json"))


def find_problem(http: str, models: list[str], image: bytes, timeout: float = TIMEOUT) -> str | None:
    """The first thing that is wrong with the server at host:port, in words; None when everything answered."""
    try:
        with LOOPBACK.open(f"http://{http}/v2/models/selfcheck/versions/2/ready", timeout=timeout):
            pass
        with ThreadPoolExecutor(PROBES) as pool:
            for model in models:
                list(pool.map(lambda _, name=model: _infer(http, name, image, timeout), range(PROBES)))
    except urllib.error.HTTPError as error:
        return f"{error.url} answers {error.code}: {error.read(300).decode(errors='replace')}"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__} {error} at {http}"
    return None


def _infer(http: str, model: str, image: bytes, timeout: float) -> None:
    body: dict[str, Any] = {
        "id": "watchdog",
        "parameters": {"request_id": "watchdog", "probe": True},
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, len(image)], "data": list(image)}],
        "outputs": [{"name": "label"}],
    }
    request = urllib.request.Request(
        f"http://{http}/v2/models/{model}/infer", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with LOOPBACK.open(request, timeout=timeout) as answer:
        label = json.load(answer)["outputs"][0]["data"]
    if not label or not label[0]:
        raise ValueError(f"{model} answered without a label")


def watch_for_ever(stack: Stack) -> None:
    supervisor, image, watch = Supervisor(stack), known_image(), Watch()
    http = f"127.0.0.1:{stack.ports['triton_http']}"
    while True:
        started = time.monotonic()
        problem = find_problem(http, front_doors(stack.serving_root), image)
        watch, restart = look(watch, supervisor.programs().get("triton"), problem, time.monotonic())
        if problem and watch.failures:
            log.warning("%d of %d: %s", watch.failures, FAILURES, problem)
        if restart:
            text = f"triton is restarted: {FAILURES} known images in a row were not answered ({problem})"
            log.error("%s", text)
            journal.record(stack.state, "triton", "restarted", text)
            try:
                supervisor.restart_program("triton")
            except StackError as error:
                log.error("%s", error)
        time.sleep(max(0.0, EVERY - (time.monotonic() - started)))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    watch_for_ever(read_stack(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
