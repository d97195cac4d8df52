"""Hands a sealed batch to Prefect: posted until the server has accepted it."""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import httpx

from bridge.pending import Pending
from bridge.sealing import event_id, sealed_event
from bridge.settings import BridgeSettings

logger: Final = logging.getLogger(__name__)

FIRST_PAUSE: Final = 0.2
LONGEST_PAUSE: Final = 30.0


class NotAccepted(RuntimeError):
    """Prefect did not accept the event; it is safe to post it again, because its id is deterministic."""


def prefect_client(settings: BridgeSettings) -> httpx.AsyncClient:
    secret = settings.prefect_authorization
    headers = {"Authorization": secret.get_secret_value()} if secret else {}
    return httpx.AsyncClient(base_url=settings.prefect_api_url, headers=headers, timeout=10)


async def post_event(client: httpx.AsyncClient, bucket: str, pending: Pending) -> None:
    """One attempt. Raises NotAccepted for anything but 2xx."""
    batch = pending.batch
    # `occurred` is now: a trigger ignores events that are older than the bucket it is counting in.
    event = sealed_event(batch, event_id(bucket, batch, pending.seal), datetime.now(UTC).isoformat())
    try:
        answer = await client.post("/events", json=[event])
    except httpx.HTTPError as error:
        raise NotAccepted(f"{type(error).__name__} {error} at {client.base_url}") from None
    if not answer.is_success:
        raise NotAccepted(f"{answer.status_code} {answer.text[:200]} at {client.base_url}")


async def post_within(
    client: httpx.AsyncClient,
    bucket: str,
    pending: Pending,
    seconds: float,
    on_failure: Callable[[], None] = lambda: None,
) -> bool:
    """Attempts with growing pauses until the event is accepted (True) or the seconds are over (False)."""
    deadline, pause = time.monotonic() + seconds, FIRST_PAUSE
    while True:
        try:
            await asyncio.wait_for(post_event(client, bucket, pending), max(0.1, deadline - time.monotonic()))
            return True
        except (NotAccepted, TimeoutError) as error:
            on_failure()
            if time.monotonic() + pause >= deadline:
                logger.warning("%s is sealed, but Prefect has not accepted it yet: %s", pending.batch.prefix, error)
                return False
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
