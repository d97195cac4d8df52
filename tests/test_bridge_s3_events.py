import base64
import json
import random
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.s3_events import ObjectCreated, UnknownBody, parse, read


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
        {"Records": {"a": RECORD}},
        {"Message": "hello"},
        {"Type": "Surprise", "Message": "{}"},
        {"Records": [{**RECORD, "s3": {"bucket": {"name": "b"}, "object": {"key": "half a character \ud800"}}}]},
        {"Records": [{**RECORD, "s3": {"bucket": {"name": {"b": 1}}, "object": {"key": "k"}}}]},
        {"Records": [{**RECORD, "s3": {"bucket": {"name": "b"}, "object": {"key": "k", "size": float("inf")}}}]},
        {"Records": [{**RECORD, "s3": {"bucket": {"name": "b"}, "object": {"key": "k", "size": -1}}}]},
        {"Records": [{**RECORD, "s3": {"bucket": {"name": "b"}, "object": {"key": "k", "size": "many"}}}]},
        {"Type": "Notification", "Message": "not json"},
        {"event_type": "create", "key": "/buckets/b/k", "message": "no"},
        seaweedfs("/buckets/b/k", extended={"Seaweed-X-Amz-ETag": "***"}),
    ],
)
def test_anything_else_is_named_as_unknown(body: object) -> None:
    with pytest.raises(UnknownBody):
        parse(body)


def test_the_time_of_writing_is_read_where_the_store_tells_it() -> None:
    stamp = "2026-11-21T07:00:00.250Z"
    assert parse({"Records": [{**RECORD, "eventTime": stamp}]})[0].written == 1795244400.25
    assert parse({**EVENT_BRIDGE, "time": "2026-11-21T07:00:00Z"})[0].written == 1795244400.0
    body = seaweedfs("/buckets/b/k", attributes={"file_size": 1, "mtime": 1795244400})
    assert parse(body)[0].written == 1795244400.0
    for nonsense in ("yesterday", 5, None, "0001-01-01T00:00:00", {}):
        assert parse({"Records": [{**RECORD, "eventTime": nonsense}]})[0].key.startswith("incoming/")


def test_an_envelope_inside_an_envelope_is_unknown() -> None:
    inner = {"Type": "Notification", "Message": json.dumps({"Records": [RECORD]})}
    with pytest.raises(UnknownBody):
        parse({"Type": "Notification", "Message": json.dumps(inner)})


VALID = (
    {"Records": [RECORD, {**RECORD, "eventTime": "2026-11-21T07:00:00.000Z"}]},
    {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "tirewatch"},
    EVENT_BRIDGE,
    {"Type": "Notification", "MessageId": "1", "Message": json.dumps({"Records": [RECORD]})},
    seaweedfs("/buckets/tirewatch/incoming/tire/b1/a.jpg", extended={"Seaweed-X-Amz-ETag": encoded("e1")}),
    seaweedfs("/buckets/tirewatch/incoming/tire/b1/a.jpg.versions/v_1", attributes={"mtime": 1795244400}),
)


def nested(depth: int) -> Any:
    body: Any = "x"
    for level in range(depth):
        body = [body] if level % 2 else {"Records": body}
    return body


STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**4000),
    st.floats(),
    st.text(st.characters(), max_size=20),  # half characters too
    st.sampled_from(
        ["\ud800", "k" * 10_240, "%zz%ff+%00", "../" * 50, "s3:ObjectCreated:*", "a\nb", "", "==", "0001-01-01"]
    ),
    st.builds(nested, st.sampled_from([1, 5, 200])),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    ),
)


def places(body: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) of a JSON value."""
    if not isinstance(body, dict | list):
        return []
    keys = list(body) if isinstance(body, dict) else list(range(len(body)))
    return [*((body, key) for key in keys), *(place for key in keys for place in places(body[key]))]


def mutated(draw: st.DrawFn) -> bytes:
    body = json.loads(json.dumps(draw(st.sampled_from(VALID))))
    for _ in range(draw(st.integers(0, 3))):
        found = places(body)
        if not found:
            break
        container, key = found[draw(st.integers(0, len(found) - 1))]
        if isinstance(container, dict) and draw(st.integers(0, 4)) == 0:
            del container[key]
        else:
            container[key] = draw(STRANGE)
    text = json.dumps(body).encode()
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(max_size=3)) + text[at + draw(st.integers(0, 3)) :]
    return text


@settings(max_examples=2000, deadline=None)
@given(st.composite(mutated)())
def test_a_damaged_body_is_a_list_of_objects_or_unknown_and_nothing_else(body: bytes) -> None:
    started = time.process_time()
    try:
        found = read(body)
    except UnknownBody as error:
        assert len(str(error)) < 1000
    else:
        for created in found:
            assert isinstance(created, ObjectCreated)
            assert isinstance(created.size, int) and created.size >= 0
            for text in (created.bucket, created.key, created.etag, created.version_id or ""):
                text.encode()  # can be logged and stored
            assert created.written is None or isinstance(created.written, float)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 2_000_000,
        b'{"Records":' * 150_000,
        b'{"Records":[' + b"{}," * 600_000 + b"{}]}",
        b'{"a":' + b"9" * 2_000_000 + b"}",
        b'{"a":' + b"9" * 4000 + b"e" + b"9" * 4000 + b"}",
        json.dumps({"Records": [RECORD] * 6000}).encode(),
        json.dumps({"Records": [nested(900)]}).encode(),
        json.dumps({"k" * 2_000_000: 1}).encode(),
        bytes(random.Random(0).randbytes(2_000_000)),
    ],
    ids=[
        "deep lists",
        "deep objects",
        "many",
        "long number",
        "huge exponent",
        "real",
        "deep record",
        "long name",
        "noise",
    ],
)
def test_a_body_of_two_megabytes_is_answered_in_a_second_with_bounded_memory(body: bytes) -> None:
    tracemalloc.start()
    started = time.process_time()
    try:
        read(body)
    except UnknownBody as error:
        assert len(str(error)) < 1000
    took, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < 5  # tracing slows the parser several times
    assert peak < 200 * 2**20
