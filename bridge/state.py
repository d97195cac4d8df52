"""The bridge's SQLite file: opened, and brought to the shape that this version writes."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

# Step n brings a file from `user_version` n - 1 to n; a step that was once released is never edited.
_STEPS: Final = (
    """
    CREATE TABLE IF NOT EXISTS pending (
        dataset TEXT, batch TEXT, marker TEXT, last_etag TEXT, last_seen REAL NOT NULL, PRIMARY KEY (dataset, batch)
    );
    CREATE TABLE IF NOT EXISTS sealed (dataset TEXT, batch TEXT, at REAL NOT NULL, PRIMARY KEY (dataset, batch));
    """,
    """
    ALTER TABLE pending ADD COLUMN written REAL;
    ALTER TABLE pending ADD COLUMN tried INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE sealed RENAME TO sealed_without_seal;
    CREATE TABLE sealed (
        dataset TEXT, batch TEXT, seal TEXT, by_marker INTEGER NOT NULL, written REAL, at REAL NOT NULL,
        PRIMARY KEY (dataset, batch, seal)
    );
    INSERT INTO sealed SELECT dataset, batch, 'version 1', 1, NULL, at FROM sealed_without_seal;
    DROP TABLE sealed_without_seal;
    CREATE INDEX sealed_at ON sealed (at);
    CREATE TABLE late (
        dataset TEXT, batch TEXT, object_written REAL, marker TEXT, marker_written REAL, PRIMARY KEY (dataset, batch)
    );
    CREATE TABLE dead_letters (
        id INTEGER PRIMARY KEY AUTOINCREMENT, message_id TEXT NOT NULL UNIQUE, queue TEXT NOT NULL, reason TEXT NOT NULL,
        receives INTEGER NOT NULL, at REAL NOT NULL, body TEXT NOT NULL
    );
    """,
)


class UnreadableState(RuntimeError):
    """The file was written by another version of the bridge."""


def open_state(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode; every commit is on disk when it returns. Raises UnreadableState."""
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    (done,) = database.execute("PRAGMA user_version").fetchone()
    if done > len(_STEPS):
        database.close()
        raise UnreadableState(
            f"{path} has version {done}, this bridge reads up to {len(_STEPS)}: start the newer bridge, or move the file away "
            f"(batches that wait in it are then found by the sweep)"
        )
    for number, step in enumerate(_STEPS[done:], done + 1):
        database.executescript(f"BEGIN IMMEDIATE; {step} PRAGMA user_version = {number}; COMMIT;")
    return database


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Everything inside is committed together, or not at all."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")
