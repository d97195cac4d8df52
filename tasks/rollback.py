"""The previous champion back, in one step: the routing table is replaced, everything else follows from it.

The table names a version, and with it its threshold, preprocessing and drift reference; the version is still loaded, so
nothing is copied or compiled. MLflow and Prefect are told afterwards, and only if they listen at once: while the wrong version
answers, nobody waits for them.
"""

import contextvars
import logging
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tasks.ledger import Entry
from tasks.routing import RoutingTable, read_routing, replace_routing, unchallenged
from tasks.serving import TritonAddress, is_version_ready
from tasks.storage import Store
from tasks.transaction import ROLLED_BACK, Place, catch_up, enter, intend, tell

TELL_WITHIN: Final = 15.0  # seconds; a client of an MLflow that is away goes on trying for minutes

log = logging.getLogger(__name__)


class NothingToRollBack(LookupError):
    """There is no version to go back to; the message says what there is."""


@dataclass(frozen=True)
class RolledBack:
    """`version` answers again instead of `withdrawn`; completed: a rollback that was killed half-way was made good."""

    version: int
    withdrawn: int | None
    entry: Entry
    completed: bool = False


def back_to_previous(table: RoutingTable | None, model: str) -> RoutingTable:
    """The table with the previous champion instead of the present one. Raises NothingToRollBack where none was replaced."""
    if table is None:
        raise NothingToRollBack(f"no version of {model} is in production: there is nothing to roll back")
    if table.previous is None:
        raise NothingToRollBack(
            f"{model} version {table.champion.version} has no predecessor to go back to: promote the version you want "
            f"(prefect deployment run 'promote/{model}' -p version=N)"
        )
    # The withdrawn version is not what a second rollback should bring back: it leaves the table.
    return replace(unchallenged(table), champion=table.previous, previous=None)


def roll_back(
    root: Path, address: TritonAddress, store: Store, tracking_uri: str, model: str, who: str, why: str
) -> RolledBack:
    """The previous champion answers as soon as the table is replaced; the ledger follows, and alias and event if they can be
    had in a few seconds: else a warning says so, and the next `settle` sees to them.

    A rollback that was killed before the ledger knew is made good by the next one, which then changes nothing else. Raises
    NothingToRollBack, and RoutingChanged when another switch came first.
    """
    place = Place(root, store, tracking_uri, model)
    made_good = catch_up(place, who)
    if made_good and made_good.action == ROLLED_BACK:
        tell_soon(place)
        return RolledBack(made_good.version, made_good.previous, made_good, completed=True)
    wanted = back_to_previous(read_routing(root, model), model).champion
    if not is_version_ready(address, wanted.network, wanted.version):
        raise NothingToRollBack(
            f"{wanted.network} version {wanted.version} is not loaded on {address.http}: the version in force goes on "
            "answering; read the server's log"
        )
    intention = intend(place, ROLLED_BACK, wanted.version, who, why, {})
    back = replace(back_to_previous(read_routing(root, model), model), champion=wanted, revision=intention.revision)
    entry = enter(place, intention, replace_routing(root, back))
    tell_soon(place, made_good)
    return RolledBack(wanted.version, intention.previous, entry)


def tell_soon(place: Place, found: Entry | None = None) -> None:
    """`tell`, for a few seconds at most; a warning where that was not enough."""
    failed: list[str] = [f"no answer within {TELL_WITHIN:g} seconds"]

    def try_to() -> None:
        try:
            tell(place, found)
            failed.clear()
        except Exception as error:  # noqa: BLE001  (whatever it is, the routing is back; the warning tells it)
            failed[:] = [str(error) or type(error).__name__]

    thread = threading.Thread(target=contextvars.copy_context().run, args=(try_to,), name="tell", daemon=True)
    thread.start()
    thread.join(TELL_WITHIN)
    if failed:
        log.warning(
            "the routing of %s is changed and in the ledger; its alias in MLflow (%s) and its event are not done (%s): "
            "the next promotion, rollback or run of sweep/line sees to them",
            *(place.model, place.tracking_uri, failed[0]),
        )
