"""The switch of champion as one transaction: a crash anywhere leaves it before or after; the next reader completes it.

    switches/<model>/00000007.json   what is about to happen, by a conditional write, before anything changes
    routing/<model>.json             the commit point: one atomic replacement, and the other version answers
    ledger                           follows from the table: who intends the next switch brings it up to date first
    alias `champion`, event          follow from the ledger, in its order; they never hold up a switch
    switches/<model>/00000007.told   all of them are done; each is harmless to repeat

Threshold, preprocessing and drift reference travel with the sealed version that the table names. An intention whose revision
the table never reached did not happen. Whoever intends the next switch raises the revision first, so that one who is still
about to commit the former intention finds the table changed and gives up (`routing.replace_routing`).
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from tasks.events import emit
from tasks.ledger import Entry, append, read_ledger
from tasks.registry import CHAMPION, champion_version, set_alias
from tasks.routing import RoutingChanged, RoutingTable, read_routing, replace_routing
from tasks.storage import Store, list_folders, list_objects, read, write, write_if_absent

PREFIX: Final = "switches"
PROMOTED, ROLLED_BACK, UNDONE, FOUND = "promoted", "rolled-back", "undone", "found"
_ATTEMPTS: Final = 10


@dataclass(frozen=True)
class Place:
    """Where one model's champion is written down: routing table, ledger, alias."""

    root: Path
    store: Store
    tracking_uri: str
    model: str


@dataclass(frozen=True)
class Intention:
    """A switch that is about to be made. revision: of the routing table, once it is made."""

    model: str
    number: int
    action: str
    version: int
    previous: int | None
    revision: int
    who: str
    why: str
    at: str
    evidence: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{PREFIX}/{self.model}/{self.number:08d}.json"

    @property
    def told_key(self) -> str:
        return f"{PREFIX}/{self.model}/{self.number:08d}.told"

    def was_committed(self, table: RoutingTable) -> bool:
        """Whether the table in force is the one that this intention announced."""
        return table.revision >= self.revision and table.champion.version == self.version


def newest_intention(place: Place) -> Intention | None:
    """The last switch that was announced, whatever became of it."""
    found = [key for key in _keys(place) if key.endswith(".json")]
    return Intention(**json.loads(read(place.store, found[-1]))) if found else None


def _keys(place: Place) -> list[str]:
    return [each.key for each in list_objects(place.store, f"{PREFIX}/{place.model}/")]


def models_with_switches(store: Store) -> list[str]:
    """Models whose champion was ever about to change."""
    return list_folders(store, PREFIX)


def intend(place: Place, action: str, version: int, who: str, why: str, evidence: Mapping[str, Any]) -> Intention:
    """Announce a switch to `version`. What an earlier one left is entered first; an earlier one that was announced and not
    made cannot be made any more afterwards. Asks the disk and S3 only.
    """
    for _ in range(_ATTEMPTS):
        catch_up(place, who)
        table, last = read_routing(place.root, place.model), newest_intention(place)
        if table and last and table.revision < last.revision:
            with suppress(RoutingChanged):  # else it was made just now, and is settled
                replace_routing(place.root, replace(table, revision=table.revision + 1))
            continue
        intention = Intention(
            model=place.model,
            number=last.number + 1 if last else 1,
            action=action,
            version=version,
            previous=table.champion.version if table else None,
            revision=(table.revision if table else 0) + 1,
            who=who,
            why=why,
            at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            evidence=dict(evidence),
        )
        if write_if_absent(place.store, intention.key, json.dumps(asdict(intention), indent=1).encode()):
            return intention
    raise RoutingChanged(
        f"{_ATTEMPTS} attempts to announce a switch of {place.model} met those of others: look who else promotes it"
    )


def complete(place: Place, intention: Intention, written: RoutingTable, evidence: Mapping[str, Any] = {}) -> Entry:
    """Ledger, alias and event of a switch that was made. written: the table that made it."""
    entry = enter(place, intention, written, evidence)
    tell(place)
    return entry


def enter(place: Place, intention: Intention, written: RoutingTable, evidence: Mapping[str, Any] = {}) -> Entry:
    """The ledger's part of `complete`; the next `settle` does the rest."""
    return _enter(place, intention, written.changed_at, evidence)


def take_back(place: Place, intention: Intention, written: RoutingTable, back: RoutingTable, why: str) -> Entry:
    """The ledger of a switch that was made and taken back while it was watched: both, because some requests were answered by
    the version in between. The alias never moved, so nobody else is told.
    """
    _enter(place, intention, written.changed_at, {})
    version = back.champion.version
    entry = append(place.store, place.model, UNDONE, version, intention.who, why, {}, back.changed_at)
    write(place.store, intention.told_key, b"")
    return entry


def settle(place: Place, who: str) -> Entry | None:
    """Bring ledger, alias and event up to the routing table in force; the entry that was missing, or None.

    Harmless at any moment and however often. Without a table nothing is in production and nothing is changed.
    """
    entry = catch_up(place, who)
    if entry or read_routing(place.root, place.model):
        tell(place, entry)
    return entry


def catch_up(place: Place, who: str) -> Entry | None:
    """The ledger alone, up to the table in force: the entry that was missing, or None."""
    table = read_routing(place.root, place.model)
    if table is None:
        return None
    entries = read_ledger(place.store, place.model)
    if entries and entries[-1].version == table.champion.version:
        return None
    return _missing(place, table, entries, newest_intention(place), who)


def tell(place: Place, found: Entry | None = None) -> None:
    """Alias and events of everything in the ledger that nobody was told of. found: an entry that no switch belongs to, told now
    or never. The alias is that of the newest entry: somebody may have gone on meanwhile.
    """
    entries = read_ledger(place.store, place.model)
    if not entries:
        return
    due = _untold(place, entries)
    if due or found or champion_version(place.tracking_uri, place.model) != entries[-1].version:
        set_alias(place.tracking_uri, place.model, CHAMPION, entries[-1].version)
    for entry in [*due, *([found] if found and found.switch is None else [])]:
        if not _was_undone(entry, entries):
            event, payload = told_as(entry)
            emit(event, f"tirewatch.model.{place.model}", payload, occasion=str(entry.number))
        if entry.switch is not None:
            write(place.store, f"{PREFIX}/{place.model}/{entry.switch:08d}.told", b"")


def _untold(place: Place, entries: list[Entry]) -> list[Entry]:
    """Entries of switches after the last one that everybody knows of, the oldest first."""
    told = {int(Path(key).stem) for key in _keys(place) if key.endswith(".told")}
    switched = [entry for entry in entries if entry.switch is not None]
    return list(takewhile(lambda entry: entry.switch not in told, reversed(switched)))[::-1]


def _was_undone(entry: Entry, entries: list[Entry]) -> bool:
    """Whether it was taken back while it was watched: nobody but the ledger needs to know."""
    return any(after.action == UNDONE and after.number == entry.number + 1 for after in entries)


def _missing(place: Place, table: RoutingTable, entries: list[Entry], last: Intention | None, who: str) -> Entry:
    """The entry of a table that the ledger does not know yet."""
    made = last is not None and any(entry.switch == last.number for entry in entries)
    if last and not made and last.was_committed(table):
        return _enter(place, last, table.changed_at, {"completed_by": who})
    if last and made and table.champion.version == last.previous:
        action, why = UNDONE, f"the switch to v{last.version} was taken back while it was watched"
    else:
        action, why = FOUND, "the routing table names this version, and nobody had announced it"
    return append(place.store, place.model, action, table.champion.version, who, why, {}, table.changed_at)


def _enter(place: Place, intention: Intention, at: str, evidence: Mapping[str, Any]) -> Entry:
    return append(
        place.store,
        place.model,
        intention.action,
        intention.version,
        intention.who,
        intention.why,
        {**intention.evidence, **evidence},
        at,
        intention.number,
    )


def told_as(entry: Entry) -> tuple[str, dict[str, Any]]:
    """The event of an entry, and its payload."""
    payload: dict[str, Any] = {"model": entry.model, "version": entry.version}
    if entry.action in (PROMOTED, FOUND):
        return "tirewatch.model.promoted", {**payload, "reasons": []}
    return "tirewatch.model.rolled-back", {**payload, "withdrawn": entry.previous, "reasons": [entry.why]}
