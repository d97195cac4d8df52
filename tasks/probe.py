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

from tasks.serving import (
    ANSWER_WITHIN,
    Protocol,
    TritonAddress,
    answer_of,
    deadline,
    encoded_input,
    module_of,
    request_errors,
)

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
    """What the probes saw of a switch. failed: without an answer, of the requests that the switch can have disturbed;
    failed_before: of all others, which the former champion owes. late: answered, but slower than the limit. misrouted: answered
    by a version that was not routed at any moment of the request. taken_over: answers of the new version to what was asked
    after the switch. The p99s are None where nobody answered: before the load of the new version, and from it to the end.
    """

    requests: int
    failed: int
    failed_before: int
    late: int
    misrouted: int
    taken_over: int
    steady_p99_ms: float | None
    swap_p99_ms: float | None
    answers: dict[int, int]
    errors: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the new version may stay: it answers, and nobody paid for it."""
        return not self.failed and not self.misrouted and self.taken_over > 0

    @property
    def ratio(self) -> float | None:
        """How much slower the requests were from the load of the new version on."""
        if self.steady_p99_ms is None or self.swap_p99_ms is None:
            return None
        return self.swap_p99_ms / self.steady_p99_ms

    @property
    def figures(self) -> dict[str, float]:
        """Under the names they have in MLflow, in the report and in the ledger."""
        found = {
            "swap_requests": float(self.requests),
            "swap_failed_requests": float(self.failed),
            "swap_failed_before": float(self.failed_before),
            "swap_late_requests": float(self.late),
            "swap_misrouted_requests": float(self.misrouted),
            "swap_p99_ratio": self.ratio,
            "swap_p99_ms": self.swap_p99_ms,
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def measured(self) -> str:
        """For the table of gates."""
        compared = (
            "no answer before it to compare with"
            if self.ratio is None
            else f"p99 {self.ratio:.2f} times the steady one"
        )
        told = [f"{self.failed} failed, {self.late} late, {self.misrouted} misrouted of {self.requests}, {compared}"]
        if self.failed_before:
            told.append(f"{self.failed_before} that the former champion did not answer are not counted")
        if not self.taken_over:
            told.append("the new version answered nothing")
        return "; ".join((*told, *self.errors))


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
        # A daemon: a request that hangs must not keep a process alive that has nothing else to do.
        self._thread = threading.Thread(target=self._run, name="probe-load", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, raised: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(ANSWER_WITHIN + 10)
        if raised is None:
            self._require_alive()

    def wait_for(self, requests: int, within: float = 60.0) -> None:
        """Returns when that many more requests were answered or failed, or the time is over. RuntimeError when the load itself
        has died: nobody is asking any more.
        """
        target, deadline = len(self.probes) + requests, time.monotonic() + within
        while len(self.probes) < target and time.monotonic() < deadline:
            self._require_alive()
            time.sleep(0.02)
        self._require_alive()

    def _require_alive(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"the probe load itself failed: {self._failure}") from self._failure

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

        spoken: Protocol = "grpc" if protocol == "grpc" else "http"
        module = module_of(spoken)
        failures: tuple[type[BaseException], ...] = (*request_errors(), TimeoutError, ClientError)
        while not self._stop.is_set():
            inputs = [encoded_input(module, next(images))]
            sent = time.monotonic()
            try:
                asked = client.infer(self.model, inputs, parameters={"probe": True}, **deadline(spoken))
                answer = answer_of(await asked)
                self.probes.append(Probe(sent, time.monotonic(), protocol, answer.model_version))
            except failures as error:
                self.probes.append(Probe(sent, time.monotonic(), protocol, error=str(error) or type(error).__name__))
            await asyncio.sleep(self.pause)


def judge_swap(
    probes: Sequence[Probe], old: int, new: int, began: float, switched: tuple[float, float], late_ms: float
) -> SwapProof:
    """The probes of a switch from version `old` to `new`. began: the load of the new version started; switched: just
    before and just after the routing table was replaced (all monotonic seconds).

    A switch answers for every request from `began` on. Where the former champion failed before that, nobody can tell whose
    the failures during the load are: then it answers for what was asked after the table was replaced, and nothing else.
    """
    before, after = switched
    answered = [probe for probe in probes if not probe.error]
    is_steady = all(not probe.error for probe in probes if probe.answered <= began)
    judged = {probe for probe in probes if (probe.answered > began if is_steady else probe.sent > after)}
    milliseconds = {probe: (probe.answered - probe.sent) * 1000 for probe in answered}
    wrong = [
        probe
        for probe in answered
        if probe in judged
        and (
            probe.version not in (old, new)
            or (probe.answered < before and probe.version != old)
            or (probe.sent > after and probe.version != new)
        )
    ]
    failures = [probe for probe in probes if probe.error]
    failed = [probe for probe in failures if probe in judged]
    return SwapProof(
        requests=len(probes),
        failed=len(failed),
        failed_before=len(failures) - len(failed),
        late=sum(value > late_ms for value in milliseconds.values()),
        misrouted=len(wrong),
        taken_over=sum(probe.sent > after and probe.version == new for probe in answered),
        steady_p99_ms=_p99([milliseconds[probe] for probe in answered if probe.answered <= began]),
        swap_p99_ms=_p99([milliseconds[probe] for probe in answered if probe.answered > began]),
        answers=dict(Counter(probe.version for probe in answered if probe.version is not None)),
        errors=tuple(sorted({probe.error for probe in failed}))[:5],
    )


def _p99(milliseconds: Sequence[float]) -> float | None:
    return float(np.percentile(milliseconds, 99)) if milliseconds else None


def _aio_client(address: TritonAddress, protocol: str) -> Any:
    if protocol == "grpc":
        import tritonclient.grpc.aio as grpc

        return grpc.InferenceServerClient(address.grpc)
    import tritonclient.http.aio as http

    return http.InferenceServerClient(address.http, conn_timeout=ANSWER_WITHIN)
