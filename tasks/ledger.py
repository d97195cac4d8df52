"""Append-only history of who was champion, when and why: one immutable object an entry on S3, numbered without gaps."""

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from tasks.storage import Store, list_objects, read, write_if_absent

PREFIX: Final = "ledger"


@dataclass(frozen=True)
class Entry:
    """One change of the champion. `version` answers from `at` on; `previous` answered until then."""

    model: str
    number: int
    action: str  # promoted | rolled-back
    version: int
    previous: int | None
    at: str  # ISO 8601, UTC
    who: str
    why: str
    evidence: dict[str, Any] = field(default_factory=dict)


def key_of(model: str, number: int) -> str:
    return f"{PREFIX}/{model}/{number:08d}.json"


def read_ledger(store: Store, model: str) -> list[Entry]:
    """All entries in order. Raises ValueError when one is missing: an auditor must not read a gap as silence."""
    entries = [Entry(**json.loads(read(store, found.key))) for found in list_objects(store, f"{PREFIX}/{model}/")]
    entries.sort(key=lambda entry: entry.number)
    numbers = [entry.number for entry in entries]
    if numbers != list(range(1, len(entries) + 1)):
        raise ValueError(f"the ledger of {model} has a gap: entries {numbers} in {store.uri(f'{PREFIX}/{model}/')}")
    return entries


def append(
    store: Store,
    model: str,
    action: str,
    version: int,
    previous: int | None,
    who: str,
    why: str,
    evidence: dict[str, Any],
) -> Entry:
    """Adds the entry, or returns the newest one when that already names this version (a rerun after a crash): two
    entries in a row never name the same champion. Writers race safely: the number is taken by a conditional write.
    """
    while True:
        entries = read_ledger(store, model)
        if entries and entries[-1].version == version:
            return entries[-1]
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = Entry(model, len(entries) + 1, action, version, previous, now, who, why, evidence)
        if write_if_absent(store, key_of(model, entry.number), json.dumps(asdict(entry), indent=1).encode()):
            return entry


def champion_at(entries: list[Entry], moment: datetime) -> Entry | None:
    """The entry in force at the moment (which must carry a time zone); None before the first promotion."""
    in_force = [entry for entry in entries if datetime.fromisoformat(entry.at) <= moment]
    return in_force[-1] if in_force else None
