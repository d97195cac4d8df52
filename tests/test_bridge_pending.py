import sqlite3
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.pending import Pending, PendingBatches, Seen
from bridge.sealing import Batch
from bridge.state import UnreadableState, open_state

BATCH = Batch("tire", "b1")
EMPTY = "d41d8cd98f00b204e9800998ecf8427e"  # ETag of every `_SUCCESS`


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "bridge.db"


@pytest.fixture
def pending(state: Path) -> PendingBatches:
    return PendingBatches(open_state(state))


def seal(pending: PendingBatches, etag: str, now: float, written: float | None = None) -> None:
    due = pending.saw_marker(BATCH, etag, now, written)
    assert isinstance(due, Pending)
    pending.published(due, now)


def test_a_batch_without_marker_is_due_only_after_silence(pending: PendingBatches) -> None:
    pending.saw_object(BATCH, "e1", now=100.0)
    pending.saw_object(BATCH, "e2", now=115.0)
    [waiting] = pending.every()
    assert not waiting.is_due(now=125.0, quiet_seconds=20)
    assert waiting.is_due(now=136.0, quiet_seconds=20)


def test_a_marker_makes_a_batch_due_at_once_and_closes_it(pending: PendingBatches) -> None:
    pending.saw_object(BATCH, "e1", now=100.0)
    due = pending.saw_marker(BATCH, "m", now=100.5)
    assert isinstance(due, Pending) and due.is_due(now=100.5, quiet_seconds=20)
    pending.saw_object(BATCH, "late webhook", now=103.0)
    assert pending.every() == [due]
    pending.published(due, now=104.0)
    assert pending.every() == []
    assert pending.saw_object(BATCH, "e9", now=200.0) is Seen.LATE
    assert pending.every() == []


def test_a_marker_told_again_seals_nothing_however_old_it_is(pending: PendingBatches) -> None:
    seal(pending, "first", now=100.0)
    seal(pending, "second", now=200.0)
    for etag in ("first", "second", "first"):
        assert pending.saw_marker(BATCH, etag, now=300_000.0) is Seen.REPEATED
    assert pending.every() == []


def test_a_marker_told_three_times_while_prefect_is_away_stays_one_sealing(pending: PendingBatches) -> None:
    first = pending.saw_marker(BATCH, "m", now=100.0)
    assert pending.saw_marker(BATCH, "m", now=101.0) == first
    assert pending.saw_marker(BATCH, "m", now=102.0) == first
    assert isinstance(first, Pending)
    pending.published(first, now=103.0)
    assert pending.every() == []


def test_a_marker_with_another_content_seals_again(pending: PendingBatches) -> None:
    seal(pending, "first", now=100.0)
    again = pending.saw_marker(BATCH, "second", now=200.0)
    assert isinstance(again, Pending) and again.seal == "second"


@pytest.mark.parametrize("order", list(permutations(["marker", "late", "marker again"])))
def test_a_late_photograph_and_a_newer_empty_marker_seal_again_in_whatever_order_they_are_told(
    pending: PendingBatches, order: tuple[str, ...]
) -> None:
    """Written at 10 (marker), 20 (photograph), 30 (the same empty marker); each event is told twice in this order."""
    seals: list[str] = []
    for moment, event in enumerate([*order, *order, *order], 1000):
        found = {
            "marker": lambda at: pending.saw_marker(BATCH, EMPTY, at, 10.0),
            "late": lambda at: pending.saw_object(BATCH, "e", at, 20.0),
            "marker again": lambda at: pending.saw_marker(BATCH, EMPTY, at, 30.0),
        }[event](float(moment))
        if isinstance(found, Pending):
            seals.append(found.seal)
            pending.published(found, float(moment))
    newer_first = order.index("marker again") < order.index("marker")  # it covers the photograph already
    assert seals == ([EMPTY] if newer_first else [EMPTY, f"{EMPTY} 30.000"])


def test_an_object_written_before_the_marker_but_told_after_it_is_not_late(pending: PendingBatches) -> None:
    seal(pending, EMPTY, now=1000.0, written=10.0)
    assert pending.saw_object(BATCH, "e", 1001.0, written=9.0) is Seen.REPEATED
    assert (
        pending.saw_marker(BATCH, EMPTY, 1002.0, written=30.0) is Seen.REPEATED
    )  # written twice, nothing came between
    assert pending.every() == []


def test_events_of_a_batch_that_silence_sealed_do_not_open_it_again_but_a_new_photograph_does(
    pending: PendingBatches,
) -> None:
    for index in range(5):
        pending.saw_object(BATCH, f"e{index}", now=1000.0 + index / 10, written=10.0 + index)
    [due] = pending.every()
    pending.published(due, now=1050.0)
    for index in range(5):
        assert pending.saw_object(BATCH, f"e{index}", now=1100.0 + index, written=10.0 + index) is Seen.REPEATED
    assert pending.every() == []
    assert pending.saw_object(BATCH, "new", now=1200.0, written=15.0) is Seen.WAITING
    assert len(pending.every()) == 1


def test_pending_batches_survive_a_restart(state: Path) -> None:
    first = PendingBatches(open_state(state))
    first.saw_object(BATCH, "e1", now=100.0)
    first.saw_marker(Batch("tire", "b2"), "m", now=101.0, written=5.0)
    assert sorted(PendingBatches(open_state(state)).every(), key=lambda found: found.batch.name) == [
        Pending(BATCH, None, "e1", 100.0),
        Pending(Batch("tire", "b2"), "m", "m", 101.0, 5.0),
    ]


def test_an_attempt_is_remembered_until_the_sealing_changes(state: Path, pending: PendingBatches) -> None:
    due = pending.saw_marker(BATCH, "m", now=100.0)
    assert isinstance(due, Pending) and not due.tried
    pending.trying(due)
    [after_restart] = PendingBatches(open_state(state)).every()
    assert after_restart.tried
    other = pending.saw_marker(BATCH, "other", now=101.0)
    assert isinstance(other, Pending) and not other.tried


def test_objects_that_come_while_a_quiet_batch_is_published_keep_it_pending(pending: PendingBatches) -> None:
    pending.saw_object(BATCH, "e1", now=100.0)
    [due] = pending.every()
    pending.saw_object(BATCH, "e2", now=130.0)
    pending.published(due, now=131.0)
    [again] = pending.every()
    assert again.seal != due.seal


def test_a_marker_that_comes_while_a_quiet_batch_is_published_seals_too(pending: PendingBatches) -> None:
    pending.saw_object(BATCH, "e1", now=100.0)
    [due] = pending.every()
    pending.saw_marker(BATCH, "m", now=130.0)
    pending.published(due, now=131.0)
    [again] = pending.every()
    assert again.seal == "m"


def test_thousands_of_objects_are_not_thousands_of_commits(pending: PendingBatches) -> None:
    before = pending._database.total_changes
    for index in range(3000):
        pending.saw_object(BATCH, f"e{index}", now=100.0 + index / 1000)
    assert pending._database.total_changes - before <= 4
    [waiting] = pending.every()
    assert waiting.last_seen >= 102.0
    [due] = pending.every()
    pending.published(due, now=200.0)
    seal(pending, "m", now=201.0, written=50.0)
    before = pending._database.total_changes
    for index in range(3000):
        assert pending.saw_object(BATCH, f"l{index}", now=300.0 + index, written=60.0 + index) is Seen.LATE
    assert pending._database.total_changes - before <= 1


def test_old_sealings_are_forgotten_and_then_their_events_seal_again(pending: PendingBatches) -> None:
    seal(pending, "m", now=100.0, written=10.0)
    pending.saw_object(BATCH, "late", now=101.0, written=20.0)
    pending.published(_marker(pending, Batch("tire", "b2"), now=500.0), now=500.0)
    assert pending.forget(before=400.0) == 1
    assert pending.saw_marker(Batch("tire", "b2"), "m", now=501.0) is Seen.REPEATED
    assert isinstance(pending.saw_marker(BATCH, "m", now=501.0), Pending)
    assert pending._database.execute("SELECT count(*) FROM late").fetchone() == (0,)


def _marker(pending: PendingBatches, batch: Batch, now: float) -> Pending:
    due = pending.saw_marker(batch, "m", now)
    assert isinstance(due, Pending)
    return due


def test_a_file_of_the_first_version_keeps_its_batches_and_sealings(state: Path) -> None:
    old = sqlite3.connect(state)
    old.executescript(
        """
        CREATE TABLE pending (
            dataset TEXT, batch TEXT, marker TEXT, last_etag TEXT, last_seen REAL NOT NULL, PRIMARY KEY (dataset, batch)
        );
        CREATE TABLE sealed (dataset TEXT, batch TEXT, at REAL NOT NULL, PRIMARY KEY (dataset, batch));
        INSERT INTO pending VALUES ('tire', 'b1', 'm', 'm', 100.0);
        INSERT INTO sealed VALUES ('tire', 'b0', 90.0);
        """
    )
    old.close()
    pending = PendingBatches(open_state(state))
    assert pending.every() == [Pending(BATCH, "m", "m", 100.0)]
    assert pending.saw_object(Batch("tire", "b0"), "e", now=200.0) is Seen.LATE
    assert PendingBatches(open_state(state)).every() == pending.every()


def test_a_file_of_a_newer_version_is_refused_with_what_to_do(state: Path) -> None:
    open_state(state).execute("PRAGMA user_version = 99")
    with pytest.raises(UnreadableState, match=r"version 99.*start the newer bridge"):
        open_state(state)


EVENTS = st.lists(
    st.tuples(st.sampled_from(["object", "marker", "restart", "publish"]), st.integers(0, 2), st.floats(0, 40)),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(EVENTS)
def test_no_sealing_is_accepted_twice_whatever_happens_in_whatever_order(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, int, float]]
) -> None:
    path = tmp_path_factory.mktemp("any") / "bridge.db"
    pending, accepted, now = PendingBatches(open_state(path)), [], 1000.0
    last_marker = None
    for event, which, pause in events:
        now += pause
        if event == "object":
            pending.saw_object(BATCH, f"e{which}", now)
        elif event == "marker":
            pending.saw_marker(BATCH, f"m{which}", now)
            last_marker = f"m{which}"
        elif event == "restart":
            pending = PendingBatches(open_state(path))
        else:
            for due in pending.every():
                if due.is_due(now, 20):
                    pending.published(due, now)
                    accepted.append(due.seal)
    assert len(accepted) == len(set(accepted))
    assert last_marker in {None, *accepted, *(each.marker for each in pending.every())}
