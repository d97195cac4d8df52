"""A probe load that runs across a change of the server, over gRPC and HTTP at once, and the count of what went wrong.

The load is paced, not a stress test: it asks whether anyone noticed the change, and must not be the disturbance itself.
"""

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

import numpy as np

from tasks.serving import ANSWER_WITHIN, TritonAddress, answer_of, encoded_input, module_of, request_errors

LANES: Final = ("grpc", "http", "grpc", "http")  # requests in flight, at most
PAUSE: Final = 0.02  # seconds between an answer and the next request of its lane


@dataclass(frozen=True)
class Probe:
    """One request: when it was sent and answered (monotonic seconds), by which version, or with which error."""

    sent: float
    answered: float
    protocol: str
    version: int | None = None
    error: str = ""


@dataclass(frozen=True)
class SwapProof:
    """What the probes saw of a switch. late: answered, but slower than the limit. misrouted: answered by a version that
    was not routed at any moment of the request. ratio: p99 from the load of the new version to the end, over p99 before.
    """

    requests: int
    failed: int
    late: int
    misrouted: int
    steady_p99_ms: float
    swap_p99_ms: float
    answers: dict[int, int]
    errors: tuple[str, ...]

    @property
    def ratio(self) -> float:
        return self.swap_p99_ms / self.steady_p99_ms

    @property
    def figures(self) -> dict[str, float]:
        """Under the names they have in MLflow, in the report and in the ledger."""
        return {
            "swap_requests": float(self.requests),
            "swap_failed_requests": float(self.failed),
            "swap_late_requests": float(self.late),
            "swap_misrouted_requests": float(self.misrouted),
            "swap_p99_ratio": self.ratio,
            "swap_p99_ms": self.swap_p99_ms,
        }


@dataclass
class ProbeLoad:
    """`with ProbeLoad(address, model, images) as load:` asks without pause until the block ends; then `load.probes` holds
    every request. images: encoded photographs, asked about in turn.
    """

    address: TritonAddress
    model: str
    images: Sequence[bytes]
    lanes: Sequence[str] = LANES
    pause: float = PAUSE
    probes: list[Probe] = field(default_factory=list)

    def __enter__(self) -> "ProbeLoad":
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="probe-load")
        self._thread.start()
        return self

    def __exit__(self, *_: tuple[type[BaseException], BaseException, TracebackType]) -> None:
        self._stop.set()
        self._thread.join(ANSWER_WITHIN + 10)
        if self._failure is not None:
            raise RuntimeError(f"the probe load itself failed: {self._failure}") from self._failure

    def wait_for(self, requests: int, within: float = 60.0) -> None:
        """Returns when that many more requests were answered or failed, or the time is over."""
        target, deadline = len(self.probes) + requests, time.monotonic() + within
        while len(self.probes) < target and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.02)

    def _run(self) -> None:
        try:
            asyncio.run(self._ask_until_stopped())
        except BaseException as failure:  # noqa: BLE001  (handed to the thread that entered the block)
            self._failure = failure

    async def _ask_until_stopped(self) -> None:
        images = itertools.cycle(self.images)
        clients = {protocol: _aio_client(self.address, protocol) for protocol in set(self.lanes)}
        try:
            await asyncio.gather(*(self._lane(clients[protocol], protocol, images) for protocol in self.lanes))
        finally:
            for client in clients.values():
                await client.close()

    async def _lane(self, client: Any, protocol: str, images: "itertools.cycle[bytes]") -> None:
        from aiohttp import ClientError  # a server that dies cuts the connection; not every such error is an OSError

        module = module_of("grpc" if protocol == "grpc" else "http")
        failures: tuple[type[BaseException], ...] = (*request_errors(), TimeoutError, ClientError)
        while not self._stop.is_set():
            inputs = [encoded_input(module, next(images))]
            sent = time.monotonic()
            try:
                answer = answer_of(await client.infer(self.model, inputs, parameters={"probe": True}))
                self.probes.append(Probe(sent, time.monotonic(), protocol, answer.model_version))
            except failures as error:
                self.probes.append(Probe(sent, time.monotonic(), protocol, error=str(error) or type(error).__name__))
            await asyncio.sleep(self.pause)


def judge_swap(
    probes: Sequence[Probe], old: int, new: int, began: float, switched: tuple[float, float], late_ms: float
) -> SwapProof:
    """The probes of a switch from version `old` to `new`. began: the load of the new version started; switched: just
    before and just after the routing table was replaced (all monotonic seconds).
    """
    answered = [probe for probe in probes if not probe.error]
    milliseconds = {probe: (probe.answered - probe.sent) * 1000 for probe in answered}
    steady = [milliseconds[probe] for probe in answered if probe.answered <= began]
    during = [milliseconds[probe] for probe in answered if probe.answered > began]
    if not steady or not during:
        raise ValueError(f"{len(steady)} answers before the load and {len(during)} after it are no proof of a swap")
    before, after = switched
    wrong = [
        probe
        for probe in answered
        if probe.version not in (old, new)
        or (probe.answered < before and probe.version != old)
        or (probe.sent > after and probe.version != new)
    ]
    return SwapProof(
        requests=len(probes),
        failed=len(probes) - len(answered),
        late=sum(value > late_ms for value in milliseconds.values()),
        misrouted=len(wrong),
        steady_p99_ms=float(np.percentile(steady, 99)),
        swap_p99_ms=float(np.percentile(during, 99)),
        answers=dict(Counter(probe.version for probe in answered if probe.version is not None)),
        errors=tuple(sorted({probe.error for probe in probes if probe.error}))[:5],
    )


def _aio_client(address: TritonAddress, protocol: str) -> Any:
    if protocol == "grpc":
        import tritonclient.grpc.aio as grpc

        return grpc.InferenceServerClient(address.grpc)
    import tritonclient.http.aio as http

    return http.InferenceServerClient(address.http, conn_timeout=ANSWER_WITHIN)
