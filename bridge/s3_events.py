"""What object stores post when an object is created, as one value. Pure.

Understood: SeaweedFS filer webhook, the `Records[]` of AWS S3 and MinIO, EventBridge, and any of these in an SNS envelope.
"""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote_plus

_VERSIONS: Final = ".versions"  # SeaweedFS keeps the versions of `key` as files `<key>.versions/v_<id>`


class UnknownBody(ValueError):
    """The body is none of the shapes above."""


@dataclass(frozen=True)
class ObjectCreated:
    """One new object, or one new version of it. etag without quotes; empty where the store does not say."""

    bucket: str
    key: str
    version_id: str | None
    etag: str
    size: int


def parse(body: object) -> list[ObjectCreated]:
    """JSON body -> the objects it says were created, in its order; other events give nothing. Raises UnknownBody."""
    if not isinstance(body, dict):
        raise UnknownBody(f"expected a JSON object, got {type(body).__name__}")
    try:
        return _parse(body)
    except (KeyError, TypeError, AttributeError, ValueError, binascii.Error) as error:
        if isinstance(error, UnknownBody):
            raise
        raise UnknownBody(f"{type(error).__name__} {error} in a body with {sorted(map(str, body))[:8]}") from None


def _parse(body: dict[str, Any]) -> list[ObjectCreated]:
    if "Records" in body:
        return [created for record in body["Records"] if (created := _record(record))]
    if body.get("Event") == "s3:TestEvent":  # AWS sends it when a notification is configured
        return []
    if "detail-type" in body:
        return _event_bridge(body)
    if isinstance(body.get("Message"), str):
        return parse(json.loads(body["Message"])) if body.get("Type") == "Notification" else []
    if "event_type" in body and "message" in body:
        created = _seaweedfs(body)
        return [created] if created else []
    raise UnknownBody(f"no storage event: a body with {sorted(map(str, body))[:8]}")


def _record(record: dict[str, Any]) -> ObjectCreated | None:
    """AWS S3 and MinIO. Keys are URL-encoded; `versionId` is absent in a bucket without versions."""
    if not str(record["eventName"]).removeprefix("s3:").startswith("ObjectCreated"):
        return None
    found = record["s3"]["object"]
    return ObjectCreated(
        bucket=str(record["s3"]["bucket"]["name"]),
        key=unquote_plus(found["key"]),
        version_id=found.get("versionId"),
        etag=str(found.get("eTag", "")).strip('"'),
        size=int(found.get("size", 0)),
    )


def _event_bridge(body: dict[str, Any]) -> list[ObjectCreated]:
    """EventBridge. Keys are plain here."""
    if body["detail-type"] != "Object Created":
        return []
    detail = body["detail"]
    found = detail["object"]
    return [
        ObjectCreated(
            bucket=str(detail["bucket"]["name"]),
            key=str(found["key"]),
            version_id=found.get("version-id"),
            etag=str(found.get("etag", "")).strip('"'),
            size=int(found.get("size", 0)),
        )
    ]


def _seaweedfs(body: dict[str, Any]) -> ObjectCreated | None:
    """A filer entry below /buckets/<bucket>/. Folders, uploads in parts and delete markers are no objects; a version that
    stops being the newest is only updated, so `update` counts for plain keys alone.
    """
    entry = body["message"].get("new_entry") or {}
    if body["event_type"] not in ("create", "update") or not entry or entry.get("is_directory"):
        return None
    root, buckets, bucket, *parts = str(body["key"]).split("/")
    if root or buckets != "buckets" or not parts or ".uploads" in parts:
        return None
    extended = {name.lower(): value for name, value in entry.get("extended", {}).items()}
    version_id = None
    if len(parts) > 1 and parts[-2].endswith(_VERSIONS) and parts[-1].startswith("v_"):
        if body["event_type"] == "update" or "seaweed-x-amz-delete-marker" in extended:
            return None
        version_id = _text(extended.get("seaweed-x-amz-version-id")) or parts[-1].removeprefix("v_")
        parts = [*parts[:-2], parts[-2].removesuffix(_VERSIONS)]
    attributes = entry.get("attributes", {})
    etag = (
        _text(extended.get("seaweed-x-amz-etag")) or base64.b64decode(attributes.get("md5") or "", validate=True).hex()
    )
    return ObjectCreated(bucket, "/".join(parts), version_id, etag.strip('"'), int(attributes.get("file_size", 0)))


def _text(encoded: str | None) -> str:
    return base64.b64decode(encoded, validate=True).decode() if encoded else ""
