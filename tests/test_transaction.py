"""The switch of champion: whatever is done, undone, raced or killed, the ledger names exactly one champion at every instant.

The store is obstore's own in-memory one and alias and event are recorded, so that thousands of writes can be interrupted; what
interrupts them on real S3, MLflow and Prefect, by SIGKILL, is in test_promote_killed.py.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore

from tasks import storage, transaction
from tasks.ledger import append, breaks, champion_at, read_ledger
from tasks.routing import Route, RoutingChanged, RoutingTable, promoted, read_routing, replace_routing, routing_file
from tasks.storage import Store
from tasks.transaction import (
    PROMOTED,
    ROLLED_BACK,
    UNDONE,
    Place,
    catch_up,
    complete,
    enter,
    intend,
    models_with_switches,
    newest_intention,
    settle,
    take_back,
    tell,
    told_as,
)


class Killed(BaseException):
    """What a SIGKILL is to the code: nothing catches it."""


class World:
    """One model on a disk, a store, a registry and an event log, each write of which can be the last."""

    def __init__(self, root: Path) -> None:
        self.place = Place(root, Store("memory"), "", "tire")
        self.memory = MemoryStore()
        self.alias: int | None = None
        self.events: list[tuple[str, dict[str, Any], str]] = []
        self.truth: list[tuple[str, int]] = []  # when the table named which version
        self.writes_left: int | None = None

    def write(self, act: Any) -> Any:
        """Dies before the write when none is left, or right after the last one."""
        if self.writes_left == 0:
            raise Killed
        answer = act()
        if self.writes_left is not None:
            self.writes_left -= 1
            if self.writes_left == 0:
                raise Killed
        return answer

    @property
    def table(self) -> RoutingTable | None:
        return read_routing(self.place.root, "tire")

    def promote(self, version: int, taken_back: bool = False) -> None:
        settle(self.place, "test")
        table = self.table
        if table and table.champion.version == version:
            return
        intention = intend(self.place, PROMOTED, version, "test", "all gates held", {"accuracy": 0.9})
        after = replace(promoted(self.table, "tire", Route("net", version)), revision=intention.revision)
        written = self.commit(after)
        if taken_back and table:
            back = self.commit(replace(table, revision=written.revision + 1))
            take_back(self.place, intention, written, back, "a request failed")
        else:
            complete(self.place, intention, written)

    def roll_back(self) -> None:
        made_good = catch_up(self.place, "test")  # as tasks/rollback.py: alias and event come last
        table = self.table
        if table is None or table.previous is None or (made_good and made_good.action == ROLLED_BACK):
            tell(self.place, made_good)
            return
        intention = intend(self.place, ROLLED_BACK, table.previous.version, "test", "it was wrong", {})
        written = self.commit(RoutingTable("tire", table.previous, revision=intention.revision))
        complete(self.place, intention, written)

    def commit(self, table: RoutingTable) -> RoutingTable:
        def act() -> RoutingTable:
            written = replace_routing(self.place.root, table)
            self.truth.append((written.changed_at, written.champion.version))
            return written

        written: RoutingTable = self.write(act)
        return written


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with made(tmp_path) as found:
        yield found


class made:  # noqa: N801  (reads as a function)
    """A world whose store, alias and events are the ones the code writes to."""

    def __init__(self, root: Path) -> None:
        self.world, self.patch = World(root), pytest.MonkeyPatch()

    def __enter__(self) -> World:
        world, put = self.world, storage.obstore.put
        self.patch.setattr(storage, "_client", lambda store: world.memory)
        self.patch.setattr(storage.obstore, "put", lambda *a, **k: world.write(lambda: put(*a, **k)))
        self.patch.setattr(transaction, "champion_version", lambda uri, model: world.alias)
        self.patch.setattr(transaction, "set_alias", lambda *a: world.write(lambda: setattr(world, "alias", a[-1])))
        self.patch.setattr(
            transaction,
            "emit",
            lambda event, resource, payload, occasion: world.write(
                lambda: world.events.append((event, payload, occasion))
            ),
        )
        return world

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def check(world: World) -> None:
    """What must be true once a reader has looked."""
    world.writes_left = None
    settle(world.place, "the next reader")
    entries, table = read_ledger(world.place.store, "tire"), world.table
    assert breaks(entries) == []
    assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
    assert all(before.version != after.version for before, after in pairwise(entries))
    if table is None:
        assert entries == [] and world.alias is None
        return
    assert entries[-1].version == table.champion.version == world.alias
    assert entries[0].previous is None
    for moment in {entry.at for entry in entries}:
        assert champion_at(entries, datetime.fromisoformat(moment)) is not None
    told = {(payload["version"], int(occasion)) for _, payload, occasion in world.events}
    for entry, after in zip_longest(entries, entries[1:]):
        if entry.switch is not None and not (after and after.action == UNDONE):
            assert (entry.version, entry.number) in told, "a switch that nobody was told of"


actions = st.one_of(
    st.tuples(st.just("promote"), st.integers(1, 4)),
    st.tuples(st.just("taken back"), st.integers(1, 4)),
    st.tuples(st.just("roll back"), st.just(0)),
)
steps = st.lists(st.tuples(actions, st.one_of(st.none(), st.integers(0, 12))), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=steps)
def test_any_sequence_of_promotions_rollbacks_and_crashes_leaves_one_champion_at_every_instant(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[tuple[str, int], int | None]]
) -> None:
    with made(tmp_path_factory.mktemp("world")) as world:
        for (action, version), writes in steps:
            world.writes_left = writes
            try:
                if action == "roll back":
                    world.roll_back()
                else:
                    world.promote(version, action == "taken back")
            except Killed:
                pass
            world.writes_left = None
        check(world)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=steps)
def test_the_ledger_says_who_answered_when_as_the_routing_table_did(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[tuple[str, int], int | None]]
) -> None:
    """With a reader after every crash: an instant later everybody reads in the ledger what the table said then."""
    with made(tmp_path_factory.mktemp("world")) as world:
        for (action, version), writes in steps:
            world.writes_left = writes if action != "taken back" else None
            try:
                if action == "roll back":
                    world.roll_back()
                else:
                    world.promote(version, action == "taken back")
            except Killed:
                pass
            check(world)
            time.sleep(0.002)  # times are in milliseconds
        entries = read_ledger(world.place.store, "tire")
        for (since, version), (until, _) in pairwise([*world.truth, ("", 0)]):
            if since != until:
                found = champion_at(entries, datetime.fromisoformat(since))
                assert found and found.version == version, (since, version, entries)


@pytest.mark.parametrize("action", ["promote", "roll back"])
def test_whichever_write_of_a_switch_is_the_last_one_the_next_reader_completes_or_forgets_it(tmp_path, action):
    for writes in range(12):
        with made(tmp_path / f"{writes}") as world:
            world.promote(1)
            world.promote(2)
            world.writes_left = writes
            before = world.table
            try:
                world.promote(3) if action == "promote" else world.roll_back()
            except Killed:
                changed = world.table != before
                wanted = 3 if action == "promote" else 1
                assert changed == (world.table.champion.version == wanted)
                check(world)
                assert read_ledger(world.place.store, "tire")[-1].version == (wanted if changed else 2)
            else:
                assert writes > 4, "intention, table, ledger, alias, event, note"
                return
    pytest.fail("never came to its end")


def test_an_interrupted_switch_is_entered_with_its_own_evidence_and_says_who_completed_it(world):
    world.promote(1)
    world.writes_left = 2  # intention and table
    with pytest.raises(Killed):
        world.promote(2)
    world.writes_left = None
    entry = settle(world.place, "flow-run/sweep")
    assert (entry.action, entry.version, entry.previous, entry.who) == (PROMOTED, 2, 1, "test")
    assert entry.evidence == {"accuracy": 0.9, "completed_by": "flow-run/sweep"}
    assert entry.at == world.table.changed_at
    assert settle(world.place, "again") is None


def test_one_that_announced_a_switch_and_fell_asleep_cannot_make_it_after_another_was_announced(world):
    world.promote(1)
    sleeper = intend(world.place, PROMOTED, 2, "sleeper", "all gates held", {})
    late = replace(promoted(world.table, "tire", Route("net", 2)), revision=sleeper.revision)
    other = intend(world.place, PROMOTED, 3, "other", "all gates held", {})
    with pytest.raises(RoutingChanged, match="another promotion or rollback came first"):
        replace_routing(
            world.place.root, late
        )  # made now and dead at once, nobody would know whose evidence allowed it
    complete(world.place, other, world.commit(replace(late, champion=Route("net", 3), revision=other.revision)))
    check(world)
    assert [entry.version for entry in read_ledger(world.place.store, "tire")] == [1, 3]


def test_a_rollback_while_a_promotion_is_watched_wins_and_is_not_promoted_over(world):
    world.promote(1)
    intention = intend(world.place, PROMOTED, 2, "watching", "all gates held", {})
    written = world.commit(replace(promoted(world.table, "tire", Route("net", 2)), revision=intention.revision))
    world.roll_back()
    complete(world.place, intention, written)  # the promotion's own end comes late
    check(world)
    entries = read_ledger(world.place.store, "tire")
    assert [(entry.action, entry.version) for entry in entries] == [(PROMOTED, 1), (PROMOTED, 2), (ROLLED_BACK, 1)]
    assert world.alias == 1


def test_a_switch_that_is_taken_back_is_entered_twice_because_it_answered_requests(world):
    world.promote(1)
    world.promote(2, taken_back=True)
    entries = read_ledger(world.place.store, "tire")
    assert [(entry.action, entry.version) for entry in entries] == [(PROMOTED, 1), (PROMOTED, 2), ("undone", 1)]
    assert world.alias == 1 and [payload["version"] for _, payload, _ in world.events] == [1]
    check(world)


def test_a_table_written_by_hand_is_found_and_entered_as_such(world):
    world.promote(1)
    replace_routing(world.place.root, promoted(world.table, "tire", Route("net", 9)))
    entry = settle(world.place, "flow-run/sweep")
    assert (entry.action, entry.version, entry.why) == (
        "found",
        9,
        "the routing table names this version, and nobody had announced it",
    )
    check(world)


def test_what_nobody_could_be_told_of_is_told_in_its_order_by_whoever_comes_next(world):
    world.promote(1)
    for version in (2, 3):
        intention = intend(world.place, PROMOTED, version, "test", "all gates held", {})
        after = replace(promoted(world.table, "tire", Route("net", version)), revision=intention.revision)
        enter(world.place, intention, world.commit(after))
    assert world.alias == 1 and len(world.events) == 1
    assert settle(world.place, "the next reader") is None
    assert world.alias == 3 and [payload["version"] for _, payload, _ in world.events] == [1, 2, 3]
    settle(world.place, "once more")
    assert len(world.events) == 3


def test_an_alias_that_was_moved_by_hand_comes_back(world):
    world.promote(1)
    world.alias = 7
    assert settle(world.place, "x") is None and world.alias == 1


def test_a_server_that_lost_its_table_promotes_again_without_a_new_entry(world):
    world.promote(1)
    routing_file(world.place.root, "tire").unlink()
    world.promote(1)
    check(world)
    assert len(read_ledger(world.place.store, "tire")) == 1
    assert newest_intention(world.place).number == 2
    assert models_with_switches(world.place.store) == ["tire"]


def test_entries_never_begin_before_the_one_they_follow(world):
    world.promote(1)
    entry = append(world.place.store, "tire", PROMOTED, 2, "test", "a slow clock", {}, "2020-01-01T00:00:00.000+00:00")
    assert entry.at == read_ledger(world.place.store, "tire")[0].at


def test_events_say_what_happened():
    from tasks.ledger import Entry

    back = Entry("tire", 3, ROLLED_BACK, 1, 2, "", "user/me", "it was wrong")
    assert told_as(back) == (
        "tirewatch.model.rolled-back",
        {"model": "tire", "version": 1, "withdrawn": 2, "reasons": ["it was wrong"]},
    )
    assert told_as(replace(back, action=PROMOTED)) == (
        "tirewatch.model.promoted",
        {"model": "tire", "version": 1, "reasons": []},
    )
