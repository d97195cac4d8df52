"""The batches that wait to be sealed, and the sealings Prefect has accepted, on disk: a restart forgets neither.

A store tells an object's creation more than once and in any order. So an accepted sealing is remembered: the same marker
(same ETag) seals nothing again, whenever its event returns; a marker with another content does. Where the store says
when an object was written (all of them do, in their own clock), two more cases are told apart:

- an object written before the sealing that is told after it is covered: whoever reads the batch lists it;
- an object written after the marker is late. It waits for a marker that is written after it, even if that has the same
  content (`_SUCCESS` is always empty), and then the batch is sealed again.

What is lost before it reaches this file (a store that gives up, a queue that expires) is found by the flow `sweep`, which
compares the bucket with what became of it; and a sealing told twice in spite of all this is harmless, because ingest claims
its batch by a conditional write.
"""

import sqlite3
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from bridge.sealing import Batch
from bridge.state import transaction

_WRITE_EVERY: Final = 1.0  # seconds; thousands of objects of one batch need not be thousands of commits


class Seen(StrEnum):
    """What an object was that made no batch due."""

    WAITING = "waiting"  # its batch waits for a marker or for silence
    REPEATED = "repeated"  # an accepted sealing covers it: told again, or out of order
    LATE = "late"  # written after the marker of its batch


@dataclass(frozen=True)
class Pending:
    """marker: what identifies the object that sealed the batch (its ETag); None while the quiet period runs.

    last_seen: Unix time of this machine. written: when, by the store's clock, the marker or the newest object was written.
    tried: its event was posted before and no answer came.
    """

    batch: Batch
    marker: str | None
    last_etag: str
    last_seen: float
    written: float | None = None
    tried: bool = False

    @property
    def seal(self) -> str:
        """What identifies this sealing: the marker, or the last object before the silence."""
        return self.marker if self.marker is not None else f"quiet {self.last_seen:.3f} {self.last_etag}"

    def due_at(self, quiet_seconds: float) -> float:
        """Unix time from which on the batch counts as complete."""
        return self.last_seen if self.marker is not None else self.last_seen + quiet_seconds + _WRITE_EVERY

    def is_due(self, now: float, quiet_seconds: float) -> bool:
        return self.marker is not None or now >= self.due_at(quiet_seconds)


@dataclass
class _Recent:
    """What came of a batch since its row was written. stored: when that was; written: the newest time of an object."""

    stored: float
    written: float | None
    in_row: float | None


class PendingBatches:
    """Pending batches and accepted sealings. Every change is committed before the method returns."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._recent: dict[Batch, _Recent] = {}

    def saw_object(self, batch: Batch, etag: str, now: float, written: float | None = None) -> Pending | Seen:
        """An object of the batch arrived: its quiet period begins anew, unless a sealing covers it or a marker closed it."""
        recent = self._recent.get(batch)
        if recent is not None and now < recent.stored + _WRITE_EVERY:
            recent.written = _later(recent.written, written)
            return Seen.WAITING
        sealed = self._sealed(batch)
        if sealed is not None:
            by_marker, until = sealed
            if written is not None and until is not None and written <= until:
                return Seen.REPEATED
            if by_marker:
                return self._late_object(batch, written, now)
        newest = _later(recent.written if recent else None, written)
        self._database.execute(
            "INSERT INTO pending VALUES (?, ?, NULL, ?, ?, ?, 0) ON CONFLICT DO UPDATE SET last_etag = excluded.last_etag, "
            "last_seen = excluded.last_seen, tried = 0, "
            "written = max(coalesce(written, excluded.written), coalesce(excluded.written, written)) WHERE marker IS NULL",
            (batch.dataset, batch.name, etag, now, newest),
        )
        self._recent[batch] = _Recent(now, newest, newest)
        return Seen.WAITING

    def saw_marker(self, batch: Batch, etag: str, now: float, written: float | None = None) -> Pending | Seen:
        """The marker of the batch arrived: it is due at once, unless this very sealing was accepted before."""
        if not self.was_accepted(batch, etag):
            return self._due(batch, etag, now, written)
        sealed = self._sealed(batch)
        until = sealed[1] if sealed else None
        if written is None or until is None or written <= until or self.was_accepted(batch, _again(etag, written)):
            return Seen.REPEATED
        self._database.execute(
            "INSERT INTO late VALUES (?, ?, NULL, ?, ?) ON CONFLICT DO UPDATE SET marker = excluded.marker, "
            "marker_written = excluded.marker_written WHERE marker_written IS NULL OR marker_written < excluded.marker_written",
            (batch.dataset, batch.name, etag, written),
        )
        return self._due_again(batch, now) or Seen.REPEATED

    def settle(self) -> None:
        """Writes down what the rows do not have yet because it came within a second of what they have."""
        for batch, recent in self._recent.items():
            if recent.written != recent.in_row:
                self._database.execute(
                    "UPDATE pending SET written = ? WHERE dataset = ? AND batch = ? AND marker IS NULL",
                    (recent.written, batch.dataset, batch.name),
                )
                recent.in_row = recent.written

    def trying(self, due: Pending) -> None:
        """Its event is about to be posted: whoever tries after this attempt asks first whether it arrived."""
        self._database.execute(
            "UPDATE pending SET tried = 1 WHERE dataset = ? AND batch = ? AND last_seen = ? AND marker IS ?",
            _row_of(due),
        )

    def published(self, done: Pending, now: float) -> None:
        """The event of this batch was accepted. Objects that came meanwhile keep the batch pending."""
        recent = self._recent.pop(done.batch, None)
        written = done.written if done.marker is not None or recent is None else _later(done.written, recent.written)
        with transaction(self._database):
            self._database.execute(
                "INSERT OR REPLACE INTO sealed VALUES (?, ?, ?, ?, ?, ?)",
                (done.batch.dataset, done.batch.name, done.seal, done.marker is not None, written, now),
            )
            self._database.execute(
                "DELETE FROM pending WHERE dataset = ? AND batch = ? AND last_seen = ? AND marker IS ?", _row_of(done)
            )
            self._database.execute(
                "DELETE FROM late WHERE dataset = ? AND batch = ? AND object_written <= ?",
                (done.batch.dataset, done.batch.name, written),
            )

    def waiting(self, batch: Batch) -> Pending | None:
        """What is known of the batch since its last sealing."""
        row = self._database.execute(
            "SELECT * FROM pending WHERE dataset = ? AND batch = ?", (batch.dataset, batch.name)
        ).fetchone()
        return _from_row(row) if row else None

    def was_accepted(self, batch: Batch, seal: str) -> bool:
        """Whether Prefect has accepted the event of this very sealing."""
        row = self._database.execute(
            "SELECT 1 FROM sealed WHERE dataset = ? AND batch = ? AND seal = ?", (batch.dataset, batch.name, seal)
        ).fetchone()
        return row is not None

    def knows(self, batch: Batch) -> bool:
        """Whether any object of the batch has been told before."""
        return self._sealed(batch) is not None or self.waiting(batch) is not None

    def forget(self, before: float) -> int:
        """Drops sealings that were accepted before this Unix time; how many. An event as old as that seals again."""
        with transaction(self._database):
            dropped = self._database.execute("DELETE FROM sealed WHERE at < ?", (before,)).rowcount
            self._database.execute(
                "DELETE FROM late WHERE NOT EXISTS "
                "(SELECT 1 FROM sealed WHERE sealed.dataset = late.dataset AND sealed.batch = late.batch)"
            )
        return dropped

    def every(self) -> list[Pending]:
        return [_from_row(row) for row in self._database.execute("SELECT * FROM pending").fetchall()]

    def _sealed(self, batch: Batch) -> tuple[bool, float | None] | None:
        """(a marker has sealed it, newest time by the store's clock that a sealing covers); None: never sealed."""
        by_marker, written, count = self._database.execute(
            "SELECT max(by_marker), max(written), count(*) FROM sealed WHERE dataset = ? AND batch = ?",
            (batch.dataset, batch.name),
        ).fetchone()
        return (bool(by_marker), written) if count else None

    def _late_object(self, batch: Batch, written: float | None, now: float) -> Pending | Seen:
        """The oldest late object is enough to know that a later marker means something: one write, not thousands."""
        if written is None:
            return Seen.LATE
        self._database.execute(
            "INSERT INTO late VALUES (?, ?, ?, NULL, NULL) ON CONFLICT DO UPDATE SET object_written = excluded.object_written "
            "WHERE object_written IS NULL OR object_written > excluded.object_written",
            (batch.dataset, batch.name, written),
        )
        return self._due_again(batch, now) or Seen.LATE

    def _due_again(self, batch: Batch, now: float) -> Pending | None:
        """The batch is due when its marker was written anew after a late object, in whatever order the two were told."""
        row = self._database.execute(
            "SELECT marker, marker_written FROM late WHERE dataset = ? AND batch = ? AND marker_written > object_written",
            (batch.dataset, batch.name),
        ).fetchone()
        return self._due(batch, _again(*row), now, row[1]) if row else None

    def _due(self, batch: Batch, marker: str, now: float, written: float | None) -> Pending:
        self._database.execute(
            "INSERT INTO pending VALUES (?, ?, ?, ?, ?, ?, 0) ON CONFLICT DO UPDATE SET marker = excluded.marker, "
            "last_etag = excluded.last_etag, last_seen = excluded.last_seen, written = excluded.written, tried = 0 "
            "WHERE marker IS NOT excluded.marker",  # told again while it waits: nothing changes
            (batch.dataset, batch.name, marker, marker, now, written),
        )
        found = self.waiting(batch)
        assert found is not None
        return found


def _row_of(pending: Pending) -> tuple[str, str, float, str | None]:
    return pending.batch.dataset, pending.batch.name, pending.last_seen, pending.marker


def _from_row(row: tuple[str, str, str | None, str, float, float | None, int]) -> Pending:
    dataset, name, marker, etag, seen, written, tried = row
    return Pending(Batch(dataset, name), marker, etag, seen, written, bool(tried))


def _again(etag: str, written: float) -> str:
    """The seal of a marker that was written anew with the same content."""
    return f"{etag} {written:.3f}"


def _later(first: float | None, second: float | None) -> float | None:
    known = [each for each in (first, second) if each is not None]
    return max(known, default=None)
