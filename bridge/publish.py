"""Hands a sealed batch to Prefect, and asks Prefect whether it has it."""

import json
import logging
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import httpx

from bridge.pending import Pending
from bridge.sealing import event_id, sealed_event
from bridge.settings import BridgeSettings

logger: Final = logging.getLogger(__name__)

_ASK_BACK: Final = timedelta(days=60)  # Prefect keeps events for a week by default, and answers for what it keeps


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
    await _ask(client, "/events", [event])


async def was_stored(client: httpx.AsyncClient, bucket: str, pending: Pending) -> bool:
    """Whether Prefect's database has the event of an earlier attempt. Its triggers recognise a repeated id for about half an
    hour and only until it restarts; its database does for as long as it keeps events. Raises NotAccepted.
    """
    now = datetime.now(UTC)
    wanted = {
        "id": {"id": [str(event_id(bucket, pending.batch, pending.seal))]},
        "occurred": {"since": (now - _ASK_BACK).isoformat(), "until": (now + timedelta(days=1)).isoformat()},
    }
    answer = await _ask(client, "/events/filter", {"filter": wanted, "limit": 1})
    if not isinstance(answer, dict) or not isinstance(answer.get("events"), list):
        raise NotAccepted(_not_prefect(client, "/events/filter", json.dumps(answer)))
    return bool(answer["events"])


async def _ask(client: httpx.AsyncClient, path: str, body: object) -> Any:
    try:
        answer = await client.post(path, json=body)
    except httpx.HTTPError as error:
        raise NotAccepted(f"{type(error).__name__} {error} at {client.base_url}") from None
    if not answer.is_success:
        raise NotAccepted(f"{answer.status_code} {answer.text[:200]} at {client.base_url}")
    try:
        return answer.json() if answer.content else None
    except ValueError:
        raise NotAccepted(_not_prefect(client, path, answer.text)) from None


def _not_prefect(client: httpx.AsyncClient, path: str, said: str) -> str:
    """What a login page, a proxy or another server answered with 200."""
    where = f"{str(client.base_url).rstrip('/')}{path}"
    return f"{where} answers {said[:200]!r}: TIREWATCH_BRIDGE_PREFECT_API_URL must name Prefect's API, such as .../api"
