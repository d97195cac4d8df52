from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.pending import Pending, PendingBatches
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


def test_a_batch_without_marker_is_due_only_after_silence(tmp_path: Path) -> None:
    pending = PendingBatches(tmp_path / "bridge.db")
    pending.saw_object(BATCH, "e1", now=100.0)
    pending.saw_object(BATCH, "e2", now=115.0)
    [waiting] = pending.every()
    assert not waiting.is_due(now=125.0, quiet_seconds=20)
    assert waiting.is_due(now=136.0, quiet_seconds=20)


def test_a_marker_makes_a_batch_due_at_once_and_closes_it(tmp_path: Path) -> None:
    pending = PendingBatches(tmp_path / "bridge.db")
    pending.saw_object(BATCH, "e1", now=100.0)
    due = pending.saw_marker(BATCH, "m", now=100.5)
    assert due.is_due(now=100.5, quiet_seconds=20)
    pending.saw_object(BATCH, "late webhook", now=103.0)
    assert pending.every() == [due]
    pending.published(due, now=104.0)
    assert pending.every() == []
    assert not pending.saw_object(BATCH, "e9", now=200.0)


def test_pending_batches_survive_a_restart(tmp_path: Path) -> None:
    first = PendingBatches(tmp_path / "bridge.db")
    first.saw_object(BATCH, "e1", now=100.0)
    first.saw_marker(Batch("tire", "b2"), "m", now=101.0)
    first.close()
    assert sorted(PendingBatches(tmp_path / "bridge.db").every(), key=lambda found: found.batch.name) == [
        Pending(BATCH, None, "e1", 100.0),
        Pending(Batch("tire", "b2"), "m", "m", 101.0),
    ]


def test_objects_that_come_while_a_quiet_batch_is_published_keep_it_pending(tmp_path: Path) -> None:
    pending = PendingBatches(tmp_path / "bridge.db")
    pending.saw_object(BATCH, "e1", now=100.0)
    [due] = pending.every()
    pending.saw_object(BATCH, "e2", now=130.0)
    pending.published(due, now=131.0)
    [again] = pending.every()
    assert again.seal != due.seal


def test_thousands_of_objects_are_not_thousands_of_commits(tmp_path: Path) -> None:
    pending = PendingBatches(tmp_path / "bridge.db")
    for index in range(3000):
        pending.saw_object(BATCH, f"e{index}", now=100.0 + index / 1000)
    assert pending._database.total_changes <= 4
    [waiting] = pending.every()
    assert waiting.last_seen >= 102.0
