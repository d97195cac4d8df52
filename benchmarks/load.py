"""Requests to a front door from a process of its own; each is written down with what came of it.

    python -m benchmarks.load SPEC.json     as benchmarks/swap.py starts it; asks until its standard input is closed

closed   so many requests in flight, each of `levels` in turn for `step` seconds: the next is sent when an answer came
open     `rate` requests a second at planned moments, whatever became of the others. A request counts from its planned
         moment: one that could not be sent in time would hide the very wait that held it up (coordinated omission)

gRPC and HTTP take turns. Where it runs on the server's own cores it costs what `Asked.share` says.
"""

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tasks.serving import ANSWER_WITHIN, TritonAddress, encoded_input, module_of, request_errors

LEVELS: Final = (1, 8, 32, 2, 16, 4)  # requests in flight, one after the other
STEP: Final = 0.5
PROTOCOLS: Final = ("grpc", "http")
# One request: moments in monotonic seconds, the place of its image and protocol, who answered with which score; error: place
# in `Asked.errors`, -1 for an answer.
ROW: Final = np.dtype([
    ("planned", "f8"), ("sent", "f8"), ("answered", "f8"),
    ("protocol", "i1"), ("image", "i4"), ("version", "i8"), ("score", "f4"), ("error", "i4"),
])  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """What to ask. images: folder of encoded photographs, asked about in the order of their names. rate: requests a second of
    an open loop; None for a closed one, which goes through `levels`.
    """

    http: str
    grpc: str
    model: str
    images: str
    out: str
    rate: float | None = None
    levels: tuple[int, ...] = LEVELS
    step: float = STEP


@dataclass(frozen=True)
class Asked:
    """Every request of a load (rows of `ROW`), what the failed ones were told, and the share of one core that asking took."""

    rows: NDArray[Any]
    errors: tuple[str, ...]
    share: float

    @property
    def failed(self) -> int:
        return int((self.rows["error"] >= 0).sum())

    @property
    def milliseconds(self) -> NDArray[np.float64]:
        """[N] from the planned moment to the end of each request."""
        waited: NDArray[np.float64] = (self.rows["answered"] - self.rows["planned"]) * 1000
        return waited


class Load:
    """`with Load(address, model, images, out) as load:` asks until the block ends; then `load.asked` holds every request.

    Raises RuntimeError where the asking process itself fails: no proof is better than half of one.
    """

    def __init__(
        self,
        address: TritonAddress,
        model: str,
        images: Path,
        out: Path,
        rate: float | None = None,
        levels: tuple[int, ...] = LEVELS,
    ) -> None:
        self._spec = Spec(address.http, address.grpc, model, str(images), str(out), rate, levels)
        self.asked: Asked

    def __enter__(self) -> "Load":
        out = Path(self._spec.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "spec.json").write_text(json.dumps(asdict(self._spec)))
        with (out / "load.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.load", str(out / "spec.json")],
                cwd=Path(__file__).parents[1],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != b"asking":
            self._end()
        return self

    def __exit__(self, *_: tuple[type[BaseException], BaseException, TracebackType]) -> None:
        self._end()

    def _end(self) -> None:
        out = Path(self._spec.out)
        try:
            self._process.communicate(timeout=ANSWER_WITHIN + 30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.returncode:
            raise RuntimeError(f"the load ended with {self._process.returncode}: {(out / 'load.log').read_text()}")
        said = json.loads((out / "said.json").read_text())
        self.asked = Asked(np.load(out / "rows.npy"), tuple(said["errors"]), said["share"])


class Asker:
    """Sends requests and keeps what became of them. Made inside a running event loop: its clients belong to that loop."""

    def __init__(self, spec: Spec) -> None:
        import tritonclient.grpc.aio as grpc
        import tritonclient.http.aio as http
        from aiohttp import ClientError

        self._model = spec.model
        self._clients: tuple[Any, ...] = (
            grpc.InferenceServerClient(spec.grpc),
            http.InferenceServerClient(spec.http, conn_timeout=ANSWER_WITHIN),
        )
        modules = [module_of("grpc"), module_of("http")]
        encoded = [path.read_bytes() for path in sorted(Path(spec.images).iterdir())]
        self._inputs = [[[encoded_input(module, image)] for image in encoded] for module in modules]
        self._wanted = [
            [module.InferRequestedOutput(name) for name in ("model_version", "score")] for module in modules
        ]
        self._failures: tuple[type[BaseException], ...] = (*request_errors(), TimeoutError, ClientError)
        self.rows: list[tuple[float, float, float, int, int, int, float, int]] = []
        self.errors: list[str] = []

    async def ask(self, number: int, planned: float | None = None) -> None:
        """The request of that number: its protocol and photograph follow from it."""
        protocol = number % len(PROTOCOLS)
        image = number // len(PROTOCOLS) % len(self._inputs[protocol])
        version, score, error = 0, float("nan"), -1
        sent = time.monotonic()
        try:
            result = await self._clients[protocol].infer(
                self._model,
                self._inputs[protocol][image],
                outputs=self._wanted[protocol],
                parameters={"probe": True},
                **({"client_timeout": ANSWER_WITHIN} if protocol == 0 else {}),
            )
            version, score = int(result.as_numpy("model_version").item()), float(result.as_numpy("score").item())
        except self._failures as failure:
            error = self._known(f"{PROTOCOLS[protocol]}: {failure or type(failure).__name__}")
        at = sent if planned is None else planned
        self.rows.append((at, sent, time.monotonic(), protocol, image, version, score, error))

    def _known(self, message: str) -> int:
        if message not in self.errors:
            self.errors.append(message)
        return self.errors.index(message)

    async def close(self) -> None:
        for client in self._clients:
            await client.close()


Stopped = Callable[[], bool]
Ask = Callable[..., Awaitable[None]]


async def closed_loop(ask: Ask, levels: tuple[int, ...], step: float, stopped: Stopped) -> None:
    """So many requests in flight as the level of the moment says."""
    began = time.monotonic()

    async def lane(lane_number: int) -> None:
        for turn in itertools.count(lane_number):
            elapsed = time.monotonic() - began
            if stopped():
                return
            if lane_number < levels[int(elapsed / step) % len(levels)]:
                await ask(turn)
            else:
                await asyncio.sleep(step - elapsed % step)

    await asyncio.gather(*(lane(number) for number in range(max(levels))))


async def open_loop(ask: Ask, rate: float, stopped: Stopped) -> None:
    """A request every 1/rate seconds, planned ahead."""
    running: set[asyncio.Task[None]] = set()
    began = time.monotonic()
    for number in itertools.count():
        planned = began + number / rate
        if (early := planned - time.monotonic()) > 0:
            await asyncio.sleep(early)
        if stopped():
            break
        task = asyncio.ensure_future(ask(number, planned))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)


async def run(spec: Spec) -> tuple[Asker, float]:
    """Asks until standard input is closed; the requests, and the share of one core that they took."""
    asker = Asker(spec)
    try:
        for number in range(4):  # connections
            await asker.ask(number)
        asker.rows.clear()
        print("asking", flush=True)
        until = asyncio.ensure_future(asyncio.to_thread(sys.stdin.buffer.read))
        began, cpu = time.monotonic(), time.process_time()
        if spec.rate is None:
            await closed_loop(asker.ask, spec.levels, spec.step, until.done)
        else:
            await open_loop(asker.ask, spec.rate, until.done)
        return asker, (time.process_time() - cpu) / (time.monotonic() - began)
    finally:
        await asker.close()


def main() -> None:
    body = json.loads(Path(sys.argv[1]).read_text())
    spec = Spec(**{**body, "levels": tuple(body["levels"])})
    asker, share = asyncio.run(run(spec))
    np.save(Path(spec.out) / "rows.npy", np.array(asker.rows, dtype=ROW))
    (Path(spec.out) / "said.json").write_text(json.dumps({"errors": asker.errors, "share": share}))


if __name__ == "__main__":
    main()
