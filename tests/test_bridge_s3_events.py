import base64
import json
from typing import Any

import pytest

from bridge.s3_events import ObjectCreated, UnknownBody, parse


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def seaweedfs(key: str, event_type: str = "create", **entry: Any) -> dict[str, Any]:
    """A filer webhook as `weed` 4.48 posts it."""
    new = {"name": key.rsplit("/", 1)[-1], "attributes": {"file_size": 11, "md5": "R9crMrjcvjE3OkyF4LPHxg=="}, **entry}
    return {"event_type": event_type, "key": key, "message": {"new_entry": new, "signatures": [1]}}


RECORD = {
    "eventName": "ObjectCreated:Put",
    "s3": {
        "bucket": {"name": "tirewatch"},
        "object": {"key": "incoming/tire/b1/cracked+tyre/a%2Bb.jpg", "size": 45, "eTag": "abc", "versionId": "v9"},
    },
}
EVENT_BRIDGE = {
    "detail-type": "Object Created",
    "detail": {
        "bucket": {"name": "tirewatch"},
        "object": {"key": "incoming/tire/b1/a+b%20c.jpg", "size": 3, "etag": "abc", "version-id": "v1"},
    },
}


def test_an_aws_record_gives_the_decoded_key() -> None:
    assert parse({"Records": [RECORD]}) == [
        ObjectCreated("tirewatch", "incoming/tire/b1/cracked tyre/a+b.jpg", "v9", "abc", 45)
    ]


def test_a_minio_record_without_version_is_understood() -> None:
    record = {
        "eventName": "s3:ObjectCreated:CompleteMultipartUpload",
        "s3": {"bucket": {"name": "b"}, "object": {"key": "k", "eTag": '"e-2"'}},
    }
    assert parse({"EventName": "s3:ObjectCreated:Put", "Key": "b/k", "Records": [record]}) == [
        ObjectCreated("b", "k", None, "e-2", 0)
    ]


def test_removed_objects_and_test_events_give_nothing() -> None:
    assert parse({"Records": [{**RECORD, "eventName": "ObjectRemoved:Delete"}]}) == []
    assert parse({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "tirewatch"}) == []
    assert parse({**EVENT_BRIDGE, "detail-type": "Object Deleted"}) == []


def test_an_eventbridge_key_is_taken_as_it_is() -> None:
    assert parse(EVENT_BRIDGE) == [ObjectCreated("tirewatch", "incoming/tire/b1/a+b%20c.jpg", "v1", "abc", 3)]


def test_an_sns_envelope_is_opened_and_its_confirmation_is_not_followed() -> None:
    envelope = {"Type": "Notification", "MessageId": "1", "Message": json.dumps({"Records": [RECORD]})}
    assert parse(envelope) == parse({"Records": [RECORD]})
    assert parse({"Type": "SubscriptionConfirmation", "Message": "You have chosen", "SubscribeURL": "https://x"}) == []


def test_seaweedfs_gives_key_etag_and_size_of_a_plain_object() -> None:
    extended = {"Seaweed-X-Amz-ETag": encoded("47d72b32b8dcbe31373a4c85e0b3c7c6")}
    assert parse(seaweedfs("/buckets/tirewatch/incoming/tire/b1/a.jpg", extended=extended)) == [
        ObjectCreated("tirewatch", "incoming/tire/b1/a.jpg", None, "47d72b32b8dcbe31373a4c85e0b3c7c6", 11)
    ]


def test_seaweedfs_md5_stands_in_for_a_missing_etag() -> None:
    [created] = parse(seaweedfs("/buckets/tirewatch/incoming/tire/b1/a.jpg"))
    assert created.etag == "47d72b32b8dcbe31373a4c85e0b3c7c6"


def test_a_seaweedfs_version_is_an_object_under_its_own_key() -> None:
    extended = {"Seaweed-X-Amz-ETag": encoded("e1"), "Seaweed-X-Amz-Version-Id": encoded("67160c")}
    body = seaweedfs("/buckets/tirewatch/incoming/tire/b1/a b.jpg.versions/v_67160c", extended=extended)
    assert parse(body) == [ObjectCreated("tirewatch", "incoming/tire/b1/a b.jpg", "67160c", "e1", 11)]


@pytest.mark.parametrize(
    "body",
    [
        seaweedfs("/buckets/tirewatch/incoming/tire/b1", is_directory=True),
        seaweedfs("/buckets/tirewatch/incoming/tire/b1/a.jpg.versions", is_directory=True),
        seaweedfs("/buckets/tirewatch/incoming/tire/b1/a.jpg.versions/v_1", event_type="update"),
        seaweedfs("/buckets/tirewatch/.uploads/0123/0001.part"),
        seaweedfs("/buckets/tirewatch/a.jpg.versions/v_1", extended={"Seaweed-X-Amz-Delete-Marker": encoded("true")}),
        seaweedfs("/topics/x/y"),
        {"event_type": "delete", "key": "/buckets/tirewatch/a.jpg", "message": {"old_entry": {"name": "a.jpg"}}},
    ],
)
def test_folders_upload_parts_older_versions_and_deletions_are_no_objects(body: dict[str, Any]) -> None:
    assert parse(body) == []


@pytest.mark.parametrize(
    "body",
    [
        [],
        "text",
        None,
        {},
        {"Records": [{"eventName": "ObjectCreated:Put"}]},
        {"Records": 5},
        {"Records": [{**RECORD, "s3": {"bucket": {"name": "b"}, "object": {"key": "k", "size": "many"}}}]},
        {"Type": "Notification", "Message": "not json"},
        {"event_type": "create", "key": "/buckets/b/k", "message": "no"},
        seaweedfs("/buckets/b/k", extended={"Seaweed-X-Amz-ETag": "***"}),
    ],
)
def test_anything_else_is_named_as_unknown(body: object) -> None:
    with pytest.raises(UnknownBody):
        parse(body)
