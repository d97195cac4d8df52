"""Append-only history of who was champion, when and why: one immutable object an entry on S3, numbered without gaps."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

from tasks.storage import CONCURRENCY, Store, list_objects, read, write_if_absent

PREFIX: Final = "ledger"


@dataclass(frozen=True)
class Entry:
    """One change of the champion. `version` answers from `at` on; `previous` answered until then.

    action: promoted, rolled-back, undone (a switch was taken back while it was watched), or found (the routing table named a
    version that nobody had announced). switch: number of the intention that it completes.
    """

    model: str
    number: int
    action: str
    version: int
    previous: int | None
    at: str  # ISO 8601, UTC
    who: str
    why: str
    evidence: dict[str, Any] = field(default_factory=dict)
    switch: int | None = None


def key_of(model: str, number: int) -> str:
    return f"{PREFIX}/{model}/{number:08d}.json"


def read_ledger(store: Store, model: str) -> list[Entry]:
    """All entries in order. Raises ValueError when one is missing: an auditor must not read a gap as silence."""
    listed = list_objects(store, f"{PREFIX}/{model}/")
    with ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="ledger") as pool:
        bodies = pool.map(lambda found: _body(store, found.key, found.etag, found.modified), listed)
        entries = [Entry(**json.loads(body)) for body in bodies]
    entries.sort(key=lambda entry: entry.number)
    numbers = [entry.number for entry in entries]
    if numbers != list(range(1, len(entries) + 1)):
        raise ValueError(f"the ledger of {model} has a gap: entries {numbers} in {store.uri(f'{PREFIX}/{model}/')}")
    return entries


@lru_cache(maxsize=4096)
def _body(store: Store, key: str, etag: str, modified: datetime | None) -> bytes:
    """One entry as it lies there, read once in a process: a switch looks at all of them three times, and they never change.
    Whoever did change one would change its etag and its time too, and it would be read again.
    """
    return read(store, key)


def append(
    store: Store,
    model: str,
    action: str,
    version: int,
    who: str,
    why: str,
    evidence: dict[str, Any],
    at: str | None = None,
    switch: int | None = None,
) -> Entry:
    """Adds the entry, or returns the one that is there: the newest when it already names this version (two entries in a row
    never name the same champion), or that of this switch. Writers race safely: the number is taken by a conditional write.

    at: when the version began to answer, ISO 8601; now when left out, and never earlier than the entry before it.
    """
    while True:
        entries = read_ledger(store, model)
        same_switch = [entry for entry in entries if switch is not None and entry.switch == switch]
        if same_switch:
            return same_switch[-1]
        newest = entries[-1] if entries else None
        if newest and newest.version == version:
            return newest
        since = at or datetime.now(UTC).isoformat(timespec="milliseconds")
        if newest:  # clocks of two machines differ: an entry that began before its predecessor would hide it
            since = max(since, newest.at, key=datetime.fromisoformat)
        previous = newest.version if newest else None
        entry = Entry(model, len(entries) + 1, action, version, previous, since, who, why, evidence, switch)
        if write_if_absent(store, key_of(model, entry.number), json.dumps(asdict(entry), indent=1).encode()):
            return entry


def breaks(entries: list[Entry]) -> list[str]:
    """Where the history does not join: an entry that follows on another version than the one before it named, or came
    before it. Empty for a ledger in which every instant since the first entry has exactly one champion.
    """
    found = []
    for before, after in pairwise(entries):
        if after.previous != before.version:
            found.append(
                f"entry {after.number} follows on v{after.previous}, entry {before.number} names v{before.version}"
            )
        if datetime.fromisoformat(after.at) < datetime.fromisoformat(before.at):
            found.append(f"entry {after.number} begins at {after.at}, entry {before.number} at {before.at}")
    return found


def ended_reign(entries: list[Entry], version: int, since: datetime) -> tuple[Entry, Entry] | None:
    """(the entry with which the version became champion, the one that ended it), the last such pair since the moment, which
    must carry a time zone; None when it never was champion since, or still is.
    """
    pairs = [(before, after) for before, after in pairwise(entries) if before.version == version]
    found = [pair for pair in pairs if datetime.fromisoformat(pair[0].at) >= since]
    return found[-1] if found and entries[-1].version != version else None


def champion_at(entries: list[Entry], moment: datetime) -> Entry | None:
    """The entry in force at the moment (which must carry a time zone); None before the first promotion."""
    in_force = [entry for entry in entries if datetime.fromisoformat(entry.at) <= moment]
    return in_force[-1] if in_force else None
