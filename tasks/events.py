"""Prefect events that must not get lost: sent synchronously, refused loudly, with an id that a repetition shares.

`prefect.events.emit_event` queues into a background thread and logs what goes wrong; a run that ends or is killed takes the
queue with it. The next stage of the line starts from these events, so they go through the API and the answer is awaited.
"""

import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_OID, "tirewatch.events")


class EventRefused(RuntimeError):
    """The Prefect API did not take the event."""


def event_id(event: str, resource_id: str, payload: Mapping[str, Any], occasion: str = "") -> uuid.UUID:
    """The same event about the same thing has the same id: Prefect's triggers skip an id they saw in the last 30 minutes."""
    told = json.dumps([event, resource_id, dict(payload), occasion], sort_keys=True, separators=(",", ":"))
    return uuid.uuid5(_NAMESPACE, told)


def emit(event: str, resource_id: str, payload: Mapping[str, Any], occasion: str = "") -> uuid.UUID:
    """Posts the event to the Prefect API that this process is configured for; its id. Raises EventRefused.

    `occasion` tells apart two events with the same payload that are both meant, such as two rollbacks to one version.
    Call it synchronously: inside a flow or task, or in any process with PREFECT_API_URL.
    """
    import httpx
    from prefect.client.orchestration import get_client

    identity = event_id(event, resource_id, payload, occasion)
    body = {
        "id": str(identity),
        # Now, and not when the cause happened: a trigger with `within` ignores what is older than its open bucket.
        "occurred": datetime.now(UTC).isoformat(),
        "event": event,
        "resource": {"prefect.resource.id": resource_id},
        "payload": dict(payload),
    }
    try:
        with get_client(sync_client=True) as client:
            client.request("POST", "/events", json=[body]).raise_for_status()
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:  # ValueError: no API address is configured
        raise EventRefused(
            f"the Prefect API did not take {event} for {resource_id} {dict(payload)}: {error}"
        ) from error
    return identity
