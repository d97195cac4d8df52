"""The batches that wait to be sealed, on disk: a restart of the bridge forgets none."""

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bridge.sealing import Batch

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS pending (
    dataset TEXT, batch TEXT, marker TEXT, last_etag TEXT, last_seen REAL NOT NULL, PRIMARY KEY (dataset, batch)
);
CREATE TABLE IF NOT EXISTS sealed (dataset TEXT, batch TEXT, at REAL NOT NULL, PRIMARY KEY (dataset, batch));
"""
_WRITE_EVERY: Final = 1.0  # seconds; thousands of objects of one batch need not be thousands of commits


@dataclass(frozen=True)
class Pending:
    """marker: ETag of the object that sealed the batch; None while the quiet period runs. last_seen: Unix time."""

    batch: Batch
    marker: str | None
    last_etag: str
    last_seen: float

    @property
    def seal(self) -> str:
        """What identifies this sealing: the marker, or the last object before the silence."""
        return self.marker if self.marker is not None else f"quiet {self.last_seen:.3f} {self.last_etag}"

    def is_due(self, now: float, quiet_seconds: float) -> bool:
        return self.marker is not None or now >= self.last_seen + quiet_seconds + _WRITE_EVERY


class PendingBatches:
    """A table of pending batches. Every change is committed before the method returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.executescript(_SCHEMA)
        self._written: dict[Batch, float] = {}

    def close(self) -> None:
        self._database.close()

    def saw_object(self, batch: Batch, etag: str, now: float) -> bool:
        """An object of the batch arrived: its quiet period begins anew. False when a marker sealed the batch already."""
        if now < self._written.get(batch, float("-inf")) + _WRITE_EVERY:
            return True
        if self.was_sealed(batch):
            return False
        self._database.execute(
            "INSERT INTO pending VALUES (?, ?, NULL, ?, ?) ON CONFLICT DO UPDATE SET last_etag = ?, last_seen = ? "
            "WHERE marker IS NULL",
            (batch.dataset, batch.name, etag, now, etag, now),
        )
        self._written[batch] = now
        return True

    def saw_marker(self, batch: Batch, etag: str, now: float) -> Pending:
        """The marker of the batch arrived: it is due at once."""
        self._database.execute(
            "INSERT INTO pending VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET marker = ?, last_etag = ?, last_seen = ?",
            (batch.dataset, batch.name, etag, etag, now, etag, etag, now),
        )
        return Pending(batch, etag, etag, now)

    def published(self, done: Pending, now: float) -> None:
        """The event of this batch was accepted. Objects that came meanwhile keep the batch pending."""
        self._written.pop(done.batch, None)
        self._database.execute("BEGIN")
        self._database.execute(
            "DELETE FROM pending WHERE dataset = ? AND batch = ? AND last_seen = ? AND marker IS ?",
            (done.batch.dataset, done.batch.name, done.last_seen, done.marker),
        )
        if done.marker is not None:
            self._database.execute(
                "INSERT OR REPLACE INTO sealed VALUES (?, ?, ?)", (done.batch.dataset, done.batch.name, now)
            )
        self._database.execute("COMMIT")

    def was_sealed(self, batch: Batch) -> bool:
        """Whether a marker has sealed the batch and its event was accepted."""
        row = self._database.execute(
            "SELECT 1 FROM sealed WHERE dataset = ? AND batch = ?", (batch.dataset, batch.name)
        ).fetchone()
        return row is not None

    def every(self) -> list[Pending]:
        rows = self._database.execute("SELECT dataset, batch, marker, last_etag, last_seen FROM pending").fetchall()
        return [Pending(Batch(dataset, name), marker, etag, seen) for dataset, name, marker, etag, seen in rows]
