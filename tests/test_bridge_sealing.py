import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.s3_events import ObjectCreated
from bridge.sealing import Batch, Ignored, batch_of, event_id, is_marker, sealed_event

BATCH = Batch("tire", "b1")


def created(key: str, bucket: str = "tirewatch") -> ObjectCreated:
    return ObjectCreated(bucket, key, None, "etag", 1)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("datasets/tire.lance/data/1.lance", "not_incoming"),
        ("incoming/tire/loose.jpg", "not_incoming"),
        ("incoming/Tire/b1/a.jpg", "bad_name"),
        ("incoming/tire/../a.jpg", "bad_name"),
        ("incoming/tire/b 1/a.jpg", "bad_name"),
        ("incoming/tire/.b1/a.jpg", "bad_name"),
        ("incoming/tire/Fotos \u00e4/a.jpg", "bad_name"),
        ("incoming//b1/a.jpg", "bad_name"),
        ("incoming/-tire/b1/a.jpg", "bad_name"),
        (f"incoming/{'t' * 64}/b1/a.jpg", "bad_name"),
        ("incoming/tire/b1\n/a.jpg", "bad_name"),
        ("incoming/tire/b1/../../../etc/passwd", "bad_path"),
        ("incoming/tire/b1//a.jpg", "bad_path"),
        ("incoming/tire/b1/a\0.jpg", "bad_path"),
        ("incoming/tire/b1/good/", "folder"),
    ],
)
def test_what_is_no_photograph_of_a_batch_is_ignored_with_its_reason(key: str, reason: str) -> None:
    assert batch_of(created(key), "tirewatch") == Ignored(reason)


@pytest.mark.parametrize("name", ["Photographs", "2026.11.21", "b" * 100])
def test_a_batch_that_can_be_uploaded_is_announced(name: str) -> None:
    assert batch_of(created(f"incoming/tire/{name}/a.jpg"), "tirewatch") == Batch("tire", name)


def test_objects_of_another_bucket_are_ignored() -> None:
    assert batch_of(created("incoming/tire/b1/a.jpg", "other"), "tirewatch") == Ignored("other_bucket")


@given(st.text(max_size=80))
def test_no_key_leads_out_of_the_incoming_prefix_of_its_batch(key: str) -> None:
    found = batch_of(created(f"incoming/{key}"), "tirewatch")
    if isinstance(found, Batch):
        assert f"incoming/{key}".startswith(found.prefix)
        assert ".." not in found.prefix
        assert found.prefix.count("/") == 3


def test_only_a_marker_directly_below_the_batch_seals_it() -> None:
    assert is_marker(created("incoming/tire/b1/_SUCCESS"), BATCH)
    assert is_marker(created("incoming/tire/b1/annotations.json"), BATCH)
    assert not is_marker(created("incoming/tire/b1/good/_SUCCESS"), BATCH)
    assert not is_marker(created("incoming/tire/b1/my_SUCCESS"), BATCH)


def test_an_event_keeps_its_identity_until_the_marker_changes() -> None:
    first = event_id("tirewatch", BATCH, "e1")
    assert first == event_id("tirewatch", BATCH, "e1")
    others = {
        event_id("tirewatch", BATCH, "e2"),
        event_id("b", BATCH, "e1"),
        event_id("tirewatch", Batch("tire", "b"), "e1"),
    }
    assert len(others | {first}) == 4


def test_the_event_names_the_dataset_as_resource_and_the_prefix_to_read() -> None:
    event = sealed_event(BATCH, event_id("tirewatch", BATCH, "e1"), "2026-11-21T00:00:00+00:00")
    assert event["resource"] == {"prefect.resource.id": "tirewatch.dataset.tire", "prefect.resource.name": "tire"}
    assert event["payload"] == {"dataset": "tire", "batch": "b1", "prefix": "incoming/tire/b1/"}
