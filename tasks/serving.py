"""The client side of Triton: load and check versions, ask the front door, evaluate under load."""

import asyncio
import json
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.sealed import SealedVersion

Protocol = Literal["grpc", "http"]
ADMIN_HEADER: Final = "tirewatch-admin"
LOAD_WITHIN: Final = 300.0  # seconds; a load compiles the network once for every batch size
ANSWER_WITHIN: Final = (
    30.0  # seconds for everything else; gRPC without a deadline waits for ever for a network that hangs
)

log = logging.getLogger(__name__)


class NotServed(RuntimeError):
    """The server refused, failed or did not answer; the message says what was asked and what it said."""


@dataclass(frozen=True)
class TritonAddress:
    """Where a server listens (host:port), and the key of its restricted APIs."""

    http: str
    grpc: str
    admin_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Answer:
    """One answer of the front door. probabilities float32 [C]."""

    label: str
    score: float
    probabilities: NDArray[np.float32]
    model_version: int
    lineage: dict[str, Any]


@dataclass(frozen=True)
class ServedEvaluation:
    """N photographs through the front door. decisions [N]: label index, -1 without an answer; probabilities [N, C], NaN
    there; errors: index -> what the server said. Latencies in milliseconds, over the answered requests.
    """

    decisions: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    errors: dict[int, str]
    p50_ms: float
    p95_ms: float
    p99_ms: float
    throughput: float

    @property
    def requests(self) -> int:
        return len(self.decisions)


def load_model(address: TritonAddress, model: str, version: int | None = None) -> None:
    """Load what is on disk now, without unloading first: running requests finish on the old version.

    With a version, that very version must be ready afterwards: Triton skips a missing one silently. Raises NotServed.
    Over gRPC, whose server loads beside its other calls. The HTTP one loads on the thread that took the call, and every
    connection of that thread waits: a quarter of the clients, for as long as the load takes.
    """
    with _client(address, "grpc") as client:
        try:
            client.load_model(model, headers=_grpc_admin(address), client_timeout=LOAD_WITHIN)
            ready = version is None or client.is_model_ready(model, str(version), client_timeout=ANSWER_WITHIN)
        except request_errors() as error:
            raise NotServed(f"loading {model} on {address.grpc} failed: {error}") from error
    if not ready:
        raise NotServed(
            f"{model} was loaded on {address.grpc}, but version {version} is not ready: read the server's log"
        )


def unload_model(address: TritonAddress, model: str) -> None:
    """Take the model out of service. Raises NotServed."""
    with _client(address, "grpc") as client:
        try:
            client.unload_model(model, headers=_grpc_admin(address), client_timeout=LOAD_WITHIN)
        except request_errors() as error:
            raise NotServed(f"unloading {model} on {address.grpc} failed: {error}") from error


def is_version_ready(address: TritonAddress, model: str, version: int | None = None) -> bool:
    """Whether the version (any, without one) answers; False also where no server listens."""
    with _http(address) as client:
        try:
            return bool(client.is_model_ready(model, "" if version is None else str(version)))
        except request_errors():
            return False


def requests_answered(address: TritonAddress, models: Collection[str]) -> int:
    """How many requests these models have answered or refused since the server loaded them. Raises NotServed."""
    with _http(address) as client:
        try:
            found = client.get_inference_statistics(headers=_admin(address))["model_stats"]
        except request_errors() as error:
            raise NotServed(f"the statistics of {address.http} cannot be read: {error}") from error
    counts = [each["inference_stats"] for each in found if each["name"] in models]
    return sum(int(each["success"].get("count", 0)) + int(each["fail"].get("count", 0)) for each in counts)


def infer_front_door(
    address: TritonAddress,
    model: str,
    image: bytes,
    protocol: Protocol = "grpc",
    parameters: dict[str, str] | None = None,
) -> Answer:
    """Ask the public model about one encoded photograph. Raises NotServed with the server's reason."""
    client_module = module_of(protocol)
    with _client(address, protocol) as client:
        try:
            result = client.infer(
                model, [encoded_input(client_module, image)], parameters=parameters, **deadline(protocol)
            )
        except request_errors() as error:
            raise NotServed(str(error)) from error
    return answer_of(result)


def infer_network(address: TritonAddress, network: str, version: int, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Probabilities [N, C] of exactly this version of a network model for pixels uint8 [N, S, S, 3]. Raises NotServed."""
    import tritonclient.grpc as client_module

    tensor = client_module.InferInput("image", list(pixels.shape), "UINT8")
    tensor.set_data_from_numpy(np.ascontiguousarray(pixels))
    wanted = [client_module.InferRequestedOutput("probabilities")]
    with _client(address, "grpc") as client:
        try:
            result = client.infer(network, [tensor], model_version=str(version), outputs=wanted, **deadline("grpc"))
        except request_errors() as error:
            raise NotServed(f"{network} version {version} on {address.grpc}: {error}") from error
    probabilities: NDArray[np.float32] = result.as_numpy("probabilities")
    return probabilities


def answer_of(result: Any) -> Answer:
    """The front door's outputs as one value."""
    return Answer(
        label=result.as_numpy("label").ravel()[0].decode(),
        score=float(result.as_numpy("score").ravel()[0]),
        probabilities=result.as_numpy("probabilities").ravel(),
        model_version=int(result.as_numpy("model_version").ravel()[0]),
        lineage=json.loads(result.as_numpy("lineage").ravel()[0]),
    )


def evaluate_served(
    address: TritonAddress, model: str, images: Sequence[bytes], version: SealedVersion, concurrency: int = 4
) -> ServedEvaluation:
    """All encoded images through the front door over gRPC, `concurrency` in flight; decisions in the version's labels.

    An image the server refuses is an entry in `errors`; an answer from another version than the given one too.
    """
    if not images:
        raise ValueError(f"no images to evaluate {model} with")
    return asyncio.run(_evaluate(address, model, images, version, concurrency))


async def _evaluate(
    address: TritonAddress, model: str, images: Sequence[bytes], version: SealedVersion, concurrency: int
) -> ServedEvaluation:
    import tritonclient.grpc.aio as client_module

    probabilities = np.full((len(images), len(version.rule.labels)), np.nan, dtype=np.float32)
    labels = {label: index for index, label in enumerate(version.rule.labels)}
    decisions = np.full(len(images), -1, dtype=np.int64)
    errors: dict[int, str] = {}
    seconds: list[float] = []
    waiting = iter(range(len(images)))

    async def ask(client: Any, index: int) -> None:
        started = time.perf_counter()
        try:
            result = await client.infer(model, [encoded_input(client_module, images[index])], **deadline("grpc"))
        except request_errors() as error:
            errors[index] = str(error)
            return
        seconds.append(time.perf_counter() - started)
        answer = answer_of(result)
        if answer.model_version != version.version:
            errors[index] = f"version {answer.model_version} answered instead of {version.version}"
            return
        if answer.label not in labels:
            errors[index] = f"label {answer.label!r} is not among the version's {list(labels)}"
            return
        probabilities[index], decisions[index] = answer.probabilities, labels[answer.label]

    async def lane(client: Any) -> None:
        for index in waiting:  # shared: each lane takes the next image there is
            await ask(client, index)

    client = client_module.InferenceServerClient(address.grpc)
    try:
        began = time.perf_counter()
        await asyncio.gather(*(lane(client) for _ in range(concurrency)))
        elapsed = time.perf_counter() - began
    finally:
        await client.close()
    p50, p95, p99 = np.percentile(np.array(seconds) * 1000, [50, 95, 99]) if seconds else (float("inf"),) * 3
    return ServedEvaluation(
        decisions, probabilities, errors, float(p50), float(p95), float(p99), len(seconds) / elapsed
    )


def encoded_input(client_module: Any, image: bytes) -> Any:
    """The front door's `image` input for tritonclient.grpc or tritonclient.http."""
    encoded = np.frombuffer(image, dtype=np.uint8)[None]
    tensor = client_module.InferInput("image", list(encoded.shape), "UINT8")
    tensor.set_data_from_numpy(encoded)
    return tensor


def deadline(protocol: Protocol) -> dict[str, float]:
    """What an `infer` call needs to end in time. An HTTP client has its time-out from the beginning."""
    return {"client_timeout": ANSWER_WITHIN} if protocol == "grpc" else {}


def module_of(protocol: Protocol) -> Any:
    """tritonclient.grpc or tritonclient.http, imported when it is needed."""
    if protocol == "grpc":
        import tritonclient.grpc as module
    else:
        import tritonclient.http as module
    return module


@contextmanager
def _client(address: TritonAddress, protocol: Protocol) -> Iterator[Any]:
    """Closed at the end: an idle connection would hold the server's shutdown for its whole time-out."""
    if protocol == "grpc":
        client = module_of("grpc").InferenceServerClient(address.grpc)
    else:
        client = module_of("http").InferenceServerClient(
            address.http, connection_timeout=ANSWER_WITHIN, network_timeout=ANSWER_WITHIN
        )
    try:
        yield client
    finally:
        client.close()


def _http(address: TritonAddress) -> Any:
    return _client(address, "http")


def _admin(address: TritonAddress) -> dict[str, str]:
    return {ADMIN_HEADER: address.admin_key} if address.admin_key else {}


def _grpc_admin(address: TritonAddress) -> dict[str, str]:
    return {f"triton-grpc-protocol-{name}": key for name, key in _admin(address).items()}


def request_errors() -> tuple[type[BaseException], ...]:
    """What a client raises when the server refuses, or is not there."""
    from tritonclient.utils import InferenceServerException

    return (InferenceServerException, OSError)
