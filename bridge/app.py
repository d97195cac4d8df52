"""The bridge: object stores post here or to a queue, Prefect gets `tirewatch.batch.sealed`.

`uvicorn --factory bridge.app:create_app`, settings in the environment (bridge/settings.py). One process: it owns its
SQLite file. A store gets its answer only when the event is accepted (200) or the batch is safe on disk (202).
"""

import base64
import binascii
import ipaddress
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Final

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response

from bridge.intake import Bridge
from bridge.s3_events import UnknownBody, read
from bridge.settings import BridgeSettings

logger: Final = logging.getLogger(__name__)

_CHALLENGE: Final = {"WWW-Authenticate": "Bearer"}
_HANG_UP: Final = {"Connection": "close"}  # else the rest of the body is received and thrown away, however long it is


def create_app(settings: BridgeSettings | None = None) -> FastAPI:
    """The ASGI application; settings come from the environment when they are not given."""
    chosen = settings or BridgeSettings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        for library in ("httpx", "botocore", "boto3"):
            logging.getLogger(library).setLevel(logging.WARNING)
        app.state.bridge = bridge = Bridge(chosen)
        bridge.start()
        yield
        await bridge.close()

    app = FastAPI(title="tirewatch bridge", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    with_token = [Depends(require_token)]
    app.get("/health")(health)
    app.get("/metrics")(metrics)
    app.post("/s3", dependencies=with_token)(receive)
    app.get("/dead-letters", dependencies=with_token)(dead_letters)
    app.delete("/dead-letters/{identity}", dependencies=with_token)(remove_dead_letter)
    return app


async def bridge_of(request: Request) -> Bridge:
    found: Bridge = request.app.state.bridge
    return found


BridgeOf = Annotated[Bridge, Depends(bridge_of)]


async def require_token(request: Request, bridge: BridgeOf) -> None:
    """Before a byte of the body is read."""
    if not is_authorized(request.headers.get("authorization", ""), bridge.settings.token.get_secret_value()):
        raise refused(bridge, request, "token", HTTPException(401, "a bearer token is needed", _CHALLENGE))


def refused(bridge: Bridge, request: Request, reason: str, answer: HTTPException) -> HTTPException:
    """The answer, after it was counted and told."""
    bridge.metrics.count("refused", reason)
    sender = request.client.host if request.client else "an unknown address"
    logger.warning("refused %s %.100r from %s: %.300s", request.method, request.url.path, sender, answer.detail)
    return answer


async def health(bridge: BridgeOf, response: Response) -> dict[str, object]:
    """200 as long as the process works: a Prefect or a queue that is away is no reason to restart the bridge. 503 when nobody
    publishes any more, which is one.
    """
    response.status_code = 200 if bridge.publishes else 503
    return bridge.health()


async def metrics(request: Request, bridge: BridgeOf) -> Response:
    chosen = bridge.settings.open_metrics
    if not (came_over_loopback(request) if chosen is None else chosen):
        await require_token(request, bridge)
    return Response(bridge.metrics.text(bridge.gauges()), media_type="text/plain; version=0.0.4")


async def receive(request: Request, bridge: BridgeOf) -> Response:
    """200: done. 202: safe on disk, Prefect will get it. 400, 401, 413: refused, with a reason."""
    body = await _bounded_body(request, bridge)
    try:
        objects = read(body)
    except UnknownBody as error:
        raise refused(bridge, request, "unknown_body", HTTPException(400, f"not a storage event: {error}")) from None
    if request.headers.get("x-amz-sns-message-type") == "SubscriptionConfirmation":
        # Following it would let whoever has the token make the bridge call any address.
        logger.warning("SNS asks to confirm a subscription: open the SubscribeURL of %.3000r", body)
    return Response(status_code=200 if await bridge.take(objects) else 202)


async def dead_letters(
    bridge: BridgeOf, after: int = 0, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> dict[str, object]:
    """Messages that nobody understands, oldest first; the next page begins after the last id."""
    return {
        "count": bridge.dead_letters.count(),
        "messages": [asdict(each) for each in bridge.dead_letters.page(after, limit)],
    }


async def remove_dead_letter(identity: int, bridge: BridgeOf) -> Response:
    if not bridge.dead_letters.remove(identity):
        raise HTTPException(404, f"there is no dead letter {identity}")
    return Response(status_code=204)


def is_authorized(header: str, token: str) -> bool:
    """Bearer token, or basic authentication with the token as password (SNS can send nothing else)."""
    scheme, _, given = header.partition(" ")
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return secrets.compare_digest(given.strip().encode(), token.encode())


def came_over_loopback(request: Request) -> bool:
    """Whether the sender is on this machine and says nothing of having been asked by somebody else."""
    host, _ = request.scope.get("server") or ("", 0)
    if any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip")):
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _bounded_body(request: Request, bridge: Bridge) -> bytes:
    """The body, read no further than the limit, whatever its length header says."""
    chunks, size, limit = [], 0, bridge.settings.max_body_bytes
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            answer = HTTPException(413, f"the body is larger than {limit} bytes", _HANG_UP)
            raise refused(bridge, request, "too_large", answer)
        chunks.append(chunk)
    return b"".join(chunks)
