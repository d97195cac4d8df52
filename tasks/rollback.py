"""The previous champion back, in one step: the routing table is replaced, everything else follows from it.

The table names a version, and with it its threshold, preprocessing and drift reference; the version is still loaded, so
nothing is copied or compiled. Alias, ledger and event are told afterwards and can be told again.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from tasks.events import emit
from tasks.ledger import Entry, append, read_ledger
from tasks.registry import CHAMPION, set_alias
from tasks.routing import RoutingTable, read_routing, write_routing
from tasks.serving import TritonAddress, is_version_ready
from tasks.storage import Store


class NothingToRollBack(LookupError):
    """There is no version to go back to; the message says what there is."""


@dataclass(frozen=True)
class RolledBack:
    """`version` answers again instead of `withdrawn`; completed: a rollback that was killed half-way was made good."""

    version: int
    withdrawn: int | None
    entry: Entry
    completed: bool = False


def back_to_previous(root: Path, address: TritonAddress, model: str) -> RoutingTable:
    """Replace the routing table by one with the previous champion; the table in force afterwards.

    Raises NothingToRollBack when no version of the model was replaced, or the previous one is not loaded any more.
    """
    table = read_routing(root, model)
    if table is None:
        raise NothingToRollBack(f"no version of {model} is in production: there is nothing to roll back")
    if table.previous is None:
        raise NothingToRollBack(
            f"{model} version {table.champion.version} has no predecessor to go back to: promote the version you want "
            f"(prefect deployment run 'promote/{model}' -p version=N)"
        )
    if not is_version_ready(address, table.previous.network, table.previous.version):
        raise NothingToRollBack(
            f"{table.previous.network} version {table.previous.version} is not loaded on {address.http}: "
            f"version {table.champion.version} goes on answering; read the server's log"
        )
    # The withdrawn version is not what a second rollback should bring back: it leaves the table.
    back = replace(
        table, champion=table.previous, previous=None, challenger=None, share=0.0, revision=table.revision + 1
    )
    return write_routing(root, back)


def tell(store: Store, tracking_uri: str, table: RoutingTable, who: str, why: str) -> Entry:
    """Alias, ledger and event for the champion of the table. Each is harmless to repeat."""
    version = table.champion.version
    entries = read_ledger(store, table.model)
    withdrawn = entries[-1].version if entries and entries[-1].version != version else None
    set_alias(tracking_uri, table.model, CHAMPION, version)
    entry = append(store, table.model, "rolled-back", version, withdrawn, who, why, {})
    emit(
        "tirewatch.model.rolled-back",
        f"tirewatch.model.{table.model}",
        {"model": table.model, "version": version, "withdrawn": withdrawn, "reasons": [why]},
        occasion=str(entry.number),
    )
    return entry


def roll_back(
    root: Path, address: TritonAddress, store: Store, tracking_uri: str, model: str, who: str, why: str
) -> RolledBack:
    """Answers first, records second: the previous champion answers as soon as the table is replaced.

    A run that was killed between the two is made good by the next one, which then changes nothing else.
    """
    table = read_routing(root, model)
    entries = read_ledger(store, model) if table else []
    if table and entries and entries[-1].version != table.champion.version:
        return RolledBack(table.champion.version, entries[-1].version, tell(store, tracking_uri, table, who, why), True)
    table = back_to_previous(root, address, model)
    withdrawn = entries[-1].version if entries else None
    return RolledBack(table.champion.version, withdrawn, tell(store, tracking_uri, table, who, why))
