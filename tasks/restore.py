"""A serving root made again from S3: after a lost disk, on a new machine. The ledger says which version is champion and which
a rollback goes back to; their sealed files come from `tasks/version_store.py`.

Versions first, loaded explicitly and asked for their golden images; then the front door; the routing table last, so that a
killed restoration has put nothing half-made into service and goes on when it is run again. No champion changes, so neither
ledger nor alias nor event has anything to say.
"""

import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tasks.engine_stage import is_plan, make_answer, publish_twin, why_not_loaded
from tasks.ledger import PREFIX as LEDGER
from tasks.ledger import Entry, read_ledger
from tasks.model_repository import (
    FrontDoor,
    Runtime,
    install_front_door,
    list_versions,
    repository,
    routed_versions,
    version_directory,
)
from tasks.routing import Route, RoutingTable, read_routing, routing_file, write_routing
from tasks.sealed import InvalidVersion, SealedVersion, read_sealed, sync_directory
from tasks.serving import NotServed, TritonAddress, is_version_ready, load_model
from tasks.storage import Store, list_folders
from tasks.transaction import ROLLED_BACK, UNDONE, Place, newest_intention
from tasks.version_store import fetch_version, stored_golden, stored_networks


@dataclass(frozen=True)
class Server:
    """The server that is to answer again, and how networks and front doors run on it."""

    address: TritonAddress
    runtime: Runtime
    door: FrontDoor


@dataclass(frozen=True)
class Restored:
    """What was done for one model. fetched: versions that came from S3; golden: their golden images that the server decided as
    proven; loaded: versions it was told to load; routed: the routing table was made; notes: what people should know.
    """

    table: RoutingTable
    fetched: tuple[Route, ...] = ()
    golden: int = 0
    loaded: tuple[Route, ...] = ()
    routed: bool = False
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        return bool(self.fetched or self.loaded or self.routed or self.notes)


def restorable(store: Store) -> list[str]:
    """Models that ever had a champion."""
    return list_folders(store, LEDGER)


def restore(place: Place, server: Server) -> Restored:
    """Champion and previous version of the model on the server again, as they were; nothing is done where they are.

    Raises LookupError for a model that never had a champion, or whose champion S3 does not hold; InvalidVersion, NotServed and
    RuntimeError when what is there is not what was proven.
    """
    table = read_routing(place.root, place.model)
    notes: list[str] = []
    wanted = table or last_known(place, notes)
    there, fetched = _brought(place, server, wanted, notes)
    instead = {} if table else _twins(place.root, server, there, notes)
    loaded = _loaded(place.root, server, [instead.get(route, route) for route in there], fetched)
    golden = sum(_golden_held(place, server, route, instead.get(route, route)) for route in fetched)
    installed = (repository(place.root) / place.model / "config.pbtxt").exists()  # the last that installing writes
    if not installed:
        install_front_door(place.root, place.model, server.door)
    if not installed or loaded or not is_version_ready(server.address, place.model):
        load_model(server.address, place.model)
    written = table or _reveal(place.root, _of(wanted, there, instead))
    if why := make_answer(place.root, server.address, place.model, server.runtime):
        notes.append(why)
    return Restored(written, tuple(fetched), golden, tuple(loaded), table is None, tuple(notes))


def last_known(place: Place, notes: list[str]) -> RoutingTable:
    """The routing table that the ledger tells of. Its revision follows on the newest one that was announced: a switch that was
    announced before the loss cannot be made any more (`tasks/transaction.py`).
    """
    entries = read_ledger(place.store, place.model)
    if not entries:
        known = ", ".join(restorable(place.store)) or "no model had one"
        raise LookupError(f"{place.model} never had a champion: there is nothing to restore ({known})")
    champion, previous = standing(entries)
    last = newest_intention(place)
    table = RoutingTable(place.model, _route(place, champion), revision=(last.revision if last else 0) + 1)
    if previous is not None:
        try:
            return replace(table, previous=_route(place, previous))
        except LookupError as error:
            notes.append(f"a rollback has nothing to go back to: {error}")
    return table


def standing(entries: Sequence[Entry]) -> tuple[int, int | None]:
    """Champion and previous version after these entries: a rollback leaves nothing to go back to, and a switch that was taken
    back leaves what was before it.
    """
    states: list[tuple[int, int | None]] = []
    for entry in entries:
        before = states[-2] if len(states) > 1 else None
        if entry.action == UNDONE and before and before[0] == entry.version:
            states.append(before)
        else:
            states.append((entry.version, None if entry.action in (ROLLED_BACK, UNDONE) else entry.previous))
    return states[-1]


def _route(place: Place, version: int) -> Route:
    """A plan before the network it was built from: where it does not run, the network takes its place."""
    found = stored_networks(place.store, place.model, version)
    if not found:
        raise LookupError(
            f"{place.model} v{version} is not on S3: it was promoted before versions were kept there; promote it again"
        )
    return Route(next((name for name in found if "_trt_" in name), found[0]), version)


def _brought(place: Place, server: Server, wanted: RoutingTable, notes: list[str]) -> tuple[list[Route], list[Route]]:
    """(versions that are on disk now, those of them that had to be fetched). Without the champion nothing can be done; what
    else cannot be had is noted.
    """
    there, fetched = [], []
    for route in wanted.routes:
        try:
            if not _is_whole(place.root, route):
                fetch_version(place.store, place.root, route.network, route.version, server.runtime)
                fetched.append(route)
            there.append(route)
        except (LookupError, InvalidVersion, FileNotFoundError) as error:
            if route == wanted.champion:
                raise
            notes.append(f"{route.network} version {route.version} is not restored: {error}")
    return there, fetched


def _is_whole(root: Path, route: Route) -> bool:
    try:
        read_sealed(version_directory(root, route.network, route.version))
    except InvalidVersion:
        return False
    return True


def _twins(root: Path, server: Server, there: Sequence[Route], notes: list[str]) -> dict[Route, Route]:
    """The ONNX networks that take the places of the plans that this server refuses."""
    instead = {}
    for route in there:
        if not is_plan(root, route):
            continue
        _list(root, server, [route])
        if why := why_not_loaded(server.address, route):
            twin = publish_twin(root, version_directory(root, route.network, route.version), server.runtime)
            instead[route] = Route(twin.network, twin.version)
            notes.append(f"{route.network} version {route.version}: {why}; {twin.network} answers in its place")
    return instead


def _of(wanted: RoutingTable, there: Sequence[Route], instead: Mapping[Route, Route]) -> RoutingTable:
    """The table of what is there, with the twins in their places."""
    previous = wanted.previous if wanted.previous in there else None
    return replace(
        wanted,
        champion=instead.get(wanted.champion, wanted.champion),
        previous=instead.get(previous, previous) if previous else None,
    )


def _loaded(root: Path, server: Server, routes: Sequence[Route], fetched: Sequence[Route]) -> list[Route]:
    """Has the server load what it does not serve yet, or what was fetched anew; returns those versions."""
    due = [
        each for each in routes if each in fetched or not is_version_ready(server.address, each.network, each.version)
    ]
    _list(root, server, [each for each in routes if each.network in {route.network for route in due}])
    for route in due:
        refusal = why_not_loaded(server.address, route)
        if refusal and not is_plan(root, route):  # `make_answer` finds another answer for a plan
            raise NotServed(refusal)
    return due


def _list(root: Path, server: Server, routes: Sequence[Route]) -> None:
    """All these versions in the lists of their networks: publishing one after the other leaves the last one there."""
    for network in {route.network for route in routes}:
        versions = {each.version for each in routes if each.network == network}
        sealed = _sealed(root, Route(network, min(versions)))
        list_versions(root, network, versions | routed_versions(root, network), sealed.image_size, server.runtime)


def _sealed(root: Path, route: Route) -> SealedVersion:
    return read_sealed(version_directory(root, route.network, route.version), verify_files=False)


def _golden_held(place: Place, server: Server, stored: Route, served: Route) -> int:
    """How many golden images the server decided as proven; 0 where none were kept. RuntimeError when one differs."""
    from tasks.proof import check_golden

    golden = stored_golden(place.store, stored.network, stored.version)
    if golden is None or not is_version_ready(server.address, served.network, served.version):
        return 0
    check_golden(server.address, _sealed(place.root, served), golden)
    return len(golden.pixels)


def _reveal(root: Path, table: RoutingTable) -> RoutingTable:
    """The table in force, in one step and only where there is none: a promotion that came first stays."""
    folder = root / "staging" / f"routing-{table.model}-{uuid.uuid4().hex[:8]}"
    target = routing_file(root, table.model)
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"routing-{table.model}-*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        write_routing(folder, table)
        target.hardlink_to(routing_file(folder, table.model))
        sync_directory(target.parent)
    except FileExistsError:  # what it names answers, and nothing of ours is needed
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    written = read_routing(root, table.model)
    assert written is not None
    return written
