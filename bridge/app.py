"""The bridge: object stores post here, Prefect gets `tirewatch.batch.sealed`.

`uvicorn --factory bridge.app:create_app`, settings in the environment (bridge/settings.py). One process: it owns its
SQLite file. A store gets its answer only when the event is accepted (200) or the batch is safe on disk (202).
"""

import asyncio
import base64
import binascii
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Final

import httpx
from fastapi import Depends, FastAPI, HTTPException, Request, Response

from bridge.pending import Pending, PendingBatches
from bridge.publish import LONGEST_PAUSE, post_within, prefect_client
from bridge.s3_events import ObjectCreated, UnknownBody, parse
from bridge.sealing import Batch, Ignored, batch_of, is_marker
from bridge.settings import BridgeSettings

logger: Final = logging.getLogger(__name__)


class Bridge:
    """What the endpoints share: settings, pending batches, the client of Prefect and the counters of /metrics."""

    def __init__(self, settings: BridgeSettings) -> None:
        self.settings = settings
        self.pending = PendingBatches(settings.state)
        self.client: httpx.AsyncClient = prefect_client(settings)
        self.counts: Counter[tuple[str, str]] = Counter()

    async def take(self, created: ObjectCreated) -> bool:
        """One created object. True when nothing about it is left to be done, False when its batch waits on disk."""
        batch = batch_of(created, self.settings.bucket)
        if isinstance(batch, Ignored):
            self.counts["ignored", batch.reason] += 1
            logger.info("ignored s3://%s/%s: %s", created.bucket, created.key[:300], batch.reason)
            return True
        self.counts["objects", batch.dataset] += 1
        if is_marker(created, batch):
            return await self.publish(self.pending.saw_marker(batch, created.etag, time.time()))
        if not self.pending.saw_object(batch, created.etag, time.time()):
            self.counts["ignored", "after_marker"] += 1
            logger.info("ignored %s: a marker has sealed %s before", created.key[:300], batch.prefix)
        return True

    async def publish(self, due: Pending) -> bool:
        accepted = await post_within(
            self.client, self.settings.bucket, due, self.settings.answer_within, on_failure=self._count_failure
        )
        if accepted:
            self.pending.published(due, time.time())
            self.counts["sealed", "marker" if due.marker is not None else "quiet"] += 1
            logger.info("sealed %s (%s)", due.batch.prefix, due.seal)
        return accepted

    def _count_failure(self) -> None:
        self.counts["publish_failures", ""] += 1

    async def publish_due(self) -> None:
        """For ever: publishes what a marker or silence made due, each batch with its own growing pause after a failure."""
        retry_at: dict[Batch, tuple[float, float]] = {}
        while True:
            await asyncio.sleep(0.5)
            now = time.time()
            for pending in self.pending.every():
                at, pause = retry_at.get(pending.batch, (0.0, 0.5))
                if not pending.is_due(now, self.settings.quiet_seconds) or now < at:
                    continue
                if await self.publish(pending):
                    retry_at.pop(pending.batch, None)
                else:
                    retry_at[pending.batch] = (time.time() + pause, min(2 * pause, LONGEST_PAUSE))

    def metrics(self) -> str:
        """Prometheus text."""
        labels = {"objects": "dataset", "ignored": "reason", "sealed": "by", "publish_failures": ""}
        lines = []
        for family, label in labels.items():
            lines.append(f"# TYPE tirewatch_bridge_{family}_total counter")
            for (name, value), count in sorted(self.counts.items()):
                if name == family:
                    lines.append(
                        f"tirewatch_bridge_{family}_total" + (f'{{{label}="{value}"}}' if label else "") + f" {count}"
                    )
        lines += ["# TYPE tirewatch_bridge_pending gauge", f"tirewatch_bridge_pending {len(self.pending.every())}"]
        return "\n".join(lines) + "\n"


def create_app(settings: BridgeSettings | None = None) -> FastAPI:
    """The ASGI application; settings come from the environment when they are not given."""
    chosen = settings or BridgeSettings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        app.state.bridge = bridge = Bridge(chosen)
        loop = asyncio.create_task(bridge.publish_due())
        yield
        loop.cancel()
        with suppress(asyncio.CancelledError):
            await loop
        await bridge.client.aclose()
        bridge.pending.close()

    app = FastAPI(title="tirewatch bridge", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.get("/health")(health)
    app.get("/metrics")(metrics)
    app.post("/s3")(receive)
    return app


def bridge_of(request: Request) -> Bridge:
    found: Bridge = request.app.state.bridge
    return found


BridgeOf = Annotated[Bridge, Depends(bridge_of)]


async def health(bridge: BridgeOf) -> dict[str, object]:
    return {"status": "ok", "pending": len(bridge.pending.every())}


async def metrics(bridge: BridgeOf) -> Response:
    return Response(bridge.metrics(), media_type="text/plain; version=0.0.4")


async def receive(request: Request, bridge: BridgeOf) -> Response:
    """200: done. 202: safe on disk, Prefect will get it. 400, 401, 413: refused, with a reason."""
    if not is_authorized(request.headers.get("authorization", ""), bridge.settings.token.get_secret_value()):
        raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
    body = await _bounded_body(request, bridge.settings.max_body_bytes)
    try:
        objects = parse(json.loads(body))
    except (UnknownBody, ValueError, RecursionError) as error:
        raise HTTPException(400, f"not a storage event: {error}") from None
    done = [await bridge.take(created) for created in objects]
    return Response(status_code=200 if all(done) else 202)


def is_authorized(header: str, token: str) -> bool:
    """Bearer token, or basic authentication with the token as password (SNS can send nothing else)."""
    scheme, _, given = header.partition(" ")
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return secrets.compare_digest(given.strip().encode(), token.encode())


async def _bounded_body(request: Request, limit: int) -> bytes:
    """The body, read no further than the limit, whatever its length header says."""
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise HTTPException(413, f"the body is larger than {limit} bytes")
        chunks.append(chunk)
    return b"".join(chunks)
