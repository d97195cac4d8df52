"""What object stores tell when an object is created, as one value. Pure.

Understood: SeaweedFS filer webhook, the `Records[]` of AWS S3 and MinIO, EventBridge, and any of these in an SNS envelope.
Whatever else arrives, however it is damaged, is an UnknownBody: nothing of a body is trusted before its type is known.
"""

import base64
import binascii
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import unquote_plus

_VERSIONS: Final = ".versions"  # SeaweedFS keeps the versions of `key` as files `<key>.versions/v_<id>`


class UnknownBody(ValueError):
    """The body is none of the shapes above."""


@dataclass(frozen=True)
class ObjectCreated:
    """One new object, or one new version of it. etag without quotes; empty where the store does not say.

    written: Unix time by the store's clock (milliseconds from AWS and MinIO, seconds from EventBridge and SeaweedFS).
    """

    bucket: str
    key: str
    version_id: str | None
    etag: str
    size: int
    written: float | None = None


def read(body: bytes | str) -> list[ObjectCreated]:
    """A body as it was sent -> the objects it says were created. Raises UnknownBody."""
    try:
        decoded = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UnknownBody(f"no JSON: {error}"[:200]) from None
    return parse(decoded)


def parse(body: object) -> list[ObjectCreated]:
    """JSON body -> the objects it says were created, in its order; other events give nothing. Raises UnknownBody."""
    if not isinstance(body, dict):
        raise UnknownBody(f"expected a JSON object, got {type(body).__name__}")
    try:
        return _parse(body)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, UnknownBody):
            raise
        raise UnknownBody(f"{type(error).__name__} {error!s:.80} in a body with {_names(body)}") from None


def _parse(body: dict[str, Any]) -> list[ObjectCreated]:
    if isinstance(body.get("Message"), str) and "Type" in body:
        return _sns(body)
    if "Records" in body:
        return _records(body["Records"])
    if body.get("Event") == "s3:TestEvent":  # AWS sends it when a notification is configured
        return []
    if "detail-type" in body:
        return _event_bridge(body)
    if "event_type" in body and "message" in body:
        created = _seaweedfs(body)
        return [created] if created else []
    raise UnknownBody(f"no storage event: a body with {_names(body)}")


def _sns(envelope: dict[str, Any]) -> list[ObjectCreated]:
    """One envelope; SNS never sends one inside another. A request to confirm a subscription is for people to answer."""
    if envelope["Type"] in ("SubscriptionConfirmation", "UnsubscribeConfirmation"):
        return []
    if envelope["Type"] != "Notification":
        raise UnknownBody(f"an SNS envelope of the type {envelope['Type']!r:.80}")
    body = json.loads(envelope["Message"])
    if not isinstance(body, dict) or "Message" in body:
        raise UnknownBody("an SNS envelope without a storage event in it")
    return _parse(body)


def _records(records: object) -> list[ObjectCreated]:
    if not isinstance(records, list):
        raise UnknownBody(f"Records is {type(records).__name__}, not a list")
    return [created for record in records if (created := _record(record))]


def _record(record: dict[str, Any]) -> ObjectCreated | None:
    """AWS S3 and MinIO. Keys are URL-encoded; `versionId` is absent in a bucket without versions."""
    if not _string(record["eventName"]).removeprefix("s3:").startswith("ObjectCreated"):
        return None
    found = record["s3"]["object"]
    return ObjectCreated(
        bucket=_string(record["s3"]["bucket"]["name"]),
        key=unquote_plus(_string(found["key"])),
        version_id=_string(found.get("versionId") or "") or None,
        etag=_string(found.get("eTag") or "").strip('"'),
        size=_size(found.get("size")),
        written=_time(record.get("eventTime")),
    )


def _event_bridge(body: dict[str, Any]) -> list[ObjectCreated]:
    """EventBridge. Keys are plain here."""
    if body["detail-type"] != "Object Created":
        return []
    detail = body["detail"]
    found = detail["object"]
    return [
        ObjectCreated(
            bucket=_string(detail["bucket"]["name"]),
            key=_string(found["key"]),
            version_id=_string(found.get("version-id") or "") or None,
            etag=_string(found.get("etag") or found.get("eTag") or "").strip('"'),  # moto's server writes eTag
            size=_size(found.get("size")),
            written=_time(body.get("time")),
        )
    ]


def _seaweedfs(body: dict[str, Any]) -> ObjectCreated | None:
    """A filer entry below /buckets/<bucket>/. Folders, uploads in parts and delete markers are no objects; a version that
    stops being the newest is only updated, so `update` counts for plain keys alone.
    """
    entry = body["message"].get("new_entry") or {}
    if body["event_type"] not in ("create", "update") or not entry or entry.get("is_directory"):
        return None
    root, buckets, bucket, *parts = _string(body["key"]).split("/")
    if root or buckets != "buckets" or not parts or ".uploads" in parts:
        return None
    extended = {name.lower(): value for name, value in (entry.get("extended") or {}).items()}
    version_id = None
    if len(parts) > 1 and parts[-2].endswith(_VERSIONS) and parts[-1].startswith("v_"):
        if body["event_type"] == "update" or "seaweed-x-amz-delete-marker" in extended:
            return None
        version_id = _text(extended.get("seaweed-x-amz-version-id")) or parts[-1].removeprefix("v_")
        parts = [*parts[:-2], parts[-2].removesuffix(_VERSIONS)]
    attributes = entry.get("attributes") or {}
    etag = _text(extended.get("seaweed-x-amz-etag")) or _bytes(attributes.get("md5")).hex()
    return ObjectCreated(
        bucket=bucket,
        key="/".join(parts),
        version_id=version_id,
        etag=etag.strip('"'),
        size=_size(attributes.get("file_size")),
        written=_seconds(attributes.get("mtime")),
    )


def _string(value: object) -> str:
    """Text that can be stored and logged: JSON can also spell halves of characters, which no store has in its keys."""
    if not isinstance(value, str):
        raise UnknownBody(f"{type(value).__name__} where text belongs")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UnknownBody("text that is not Unicode") from None
    return value


def _size(value: object) -> int:
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UnknownBody(f"{type(value).__name__} where a size in bytes belongs")
    return value


def _time(value: object) -> float | None:
    """ISO 8601 -> Unix time; None for anything else, for an event is an event without its time too."""
    if not isinstance(value, str):
        return None
    try:
        found = datetime.fromisoformat(value)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def _seconds(value: object) -> float | None:
    return float(value) if isinstance(value, int) and 0 < value < 10**11 else None


def _text(encoded: object) -> str:
    return _bytes(encoded).decode()


def _bytes(encoded: object) -> bytes:
    try:
        return base64.b64decode(_string(encoded), validate=True) if encoded else b""
    except binascii.Error as error:
        raise UnknownBody(f"no base64: {error}") from None


def _names(body: dict[str, Any]) -> str:
    return f"{sorted(body)[:8]!r:.150}"
