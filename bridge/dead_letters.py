"""Messages that nobody understands, kept until a person has looked: they neither block a queue nor vanish."""

import sqlite3
import time
from dataclasses import dataclass
from typing import Final

MOST: Final = 10_000  # beyond it messages stay in their queue: the disk of the bridge is not for somebody else's flood


@dataclass(frozen=True)
class DeadLetter:
    """One message as it came. at: Unix time it was kept; receives: how often the queue had handed it out."""

    id: int
    message_id: str
    queue: str
    reason: str
    receives: int
    at: float
    body: str


class DeadLetters:
    """A table of messages. Every change is committed before the method returns."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def keep(self, message_id: str, queue: str, reason: str, receives: int, body: str) -> bool:
        """True once the message is on disk, also when it was before; False when the table is full."""
        if self.count() >= MOST:
            return False
        self._database.execute(
            "INSERT INTO dead_letters (message_id, queue, reason, receives, at, body) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (message_id) DO UPDATE SET receives = excluded.receives",
            (message_id, queue, reason, receives, time.time(), body),
        )
        return True

    def page(self, after: int, limit: int) -> list[DeadLetter]:
        """Oldest first, with ids above `after`."""
        rows = self._database.execute(
            "SELECT id, message_id, queue, reason, receives, at, body FROM dead_letters WHERE id > ? ORDER BY id LIMIT ?",
            (after, limit),
        )
        return [DeadLetter(*row) for row in rows.fetchall()]

    def remove(self, identity: int) -> bool:
        """Whether there was such a message."""
        return self._database.execute("DELETE FROM dead_letters WHERE id = ?", (identity,)).rowcount > 0

    def count(self) -> int:
        (found,) = self._database.execute("SELECT count(*) FROM dead_letters").fetchone()
        return int(found)
