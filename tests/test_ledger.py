"""The ledger on a real S3: nothing is overwritten, nothing is missing, nobody is lost."""

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

import pytest

from tasks import storage
from tasks.ledger import Entry, append, breaks, champion_at, ended_reign, key_of, read_ledger


@pytest.fixture
def model() -> str:
    return f"m{uuid.uuid4().hex[:8]}"


def enter(store, model, version, action="promoted", **evidence):
    return append(store, model, action, version, "flow-run/x", "all gates held", evidence)


def test_nobody_was_champion_of_a_new_model(store, model):
    assert read_ledger(store, model) == []


def test_entries_come_back_in_order_as_they_were_written(store, model):
    written = [enter(store, model, version, accuracy=0.9, run="r") for version in range(1, 13)]
    assert read_ledger(store, model) == written
    assert [entry.number for entry in written] == list(range(1, 13))
    assert [entry.previous for entry in written] == [None, *range(1, 12)] and breaks(written) == []
    assert written[4].evidence == {"accuracy": 0.9, "run": "r"} and written[4].why == "all gates held"


def test_a_rerun_adds_no_second_entry_for_the_same_champion(store, model):
    first = enter(store, model, 1, accuracy=0.9)
    assert enter(store, model, 1, accuracy=0.1) == first
    assert len(read_ledger(store, model)) == 1


def test_a_champion_that_comes_back_is_entered_again(store, model):
    for version, action in ((1, "promoted"), (2, "promoted"), (1, "rolled-back")):
        enter(store, model, version, action)
    assert [(e.version, e.previous, e.action) for e in read_ledger(store, model)][-1] == (1, 2, "rolled-back")


def test_a_switch_is_entered_once_even_when_others_followed(store, model):
    def made():
        return append(store, model, "promoted", 2, "flow-run/x", "all gates held", {}, switch=7)

    enter(store, model, 1)
    first = made()
    enter(store, model, 1, "rolled-back")
    assert made() == first and len(read_ledger(store, model)) == 3


def test_models_have_ledgers_of_their_own_also_where_names_begin_alike(store, model):
    enter(store, model, 1)
    enter(store, f"{model}_night", 5)
    assert [entry.version for entry in read_ledger(store, model)] == [1]
    assert [entry.version for entry in read_ledger(store, f"{model}_night")] == [5]


@pytest.mark.parametrize("missing", [1, 2])
def test_a_missing_entry_is_an_error_and_not_silence(store, model, missing):
    for version in (1, 2, 3):
        enter(store, model, version)
    storage.delete(store, [key_of(model, missing)])
    with pytest.raises(ValueError, match=rf"the ledger of {model} has a gap: entries \[\d, 3\] in s3://"):
        read_ledger(store, model)
    with pytest.raises(ValueError, match="has a gap"):
        enter(store, model, 4)


def test_an_entry_that_was_read_before_and_then_changed_is_read_as_it_lies_there_now(store, model):
    enter(store, model, 1)
    [entry] = read_ledger(store, model)
    changed = replace(entry, who="somebody else")
    storage.write(store, key_of(model, 1), json.dumps(asdict(changed)).encode())
    assert read_ledger(store, model) == [changed]
    storage.delete(store, [key_of(model, 1)])
    assert read_ledger(store, model) == []


def test_writers_at_the_same_time_lose_nothing_and_overwrite_nothing(store, model):
    with ThreadPoolExecutor(8) as pool:
        returned = list(pool.map(lambda version: enter(store, model, version), range(1, 17)))
    entries = read_ledger(store, model)
    assert sorted(entry.version for entry in entries) == list(range(1, 17))
    assert [entry.number for entry in entries] == list(range(1, 17))
    assert sorted(returned, key=lambda entry: entry.number) == entries
    assert breaks(entries) == []


def test_writers_of_the_same_champion_agree_on_one_entry(store, model):
    with ThreadPoolExecutor(8) as pool:
        returned = list(pool.map(lambda _: enter(store, model, 7), range(8)))
    assert read_ledger(store, model) == returned[:1] and {entry.number for entry in returned} == {1}


def at(number: int, version: int, moment: datetime) -> Entry:
    return Entry("tire", number, "promoted", version, None, moment.isoformat(timespec="milliseconds"), "who", "why")


def test_who_was_champion_then():
    march = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
    entries = [at(1, 4, march), at(2, 5, march + timedelta(days=10)), at(3, 4, march + timedelta(days=11))]
    assert champion_at(entries, march - timedelta(milliseconds=1)) is None
    assert champion_at(entries, march) == entries[0]
    assert champion_at(entries, march + timedelta(days=10, hours=-1)).version == 4
    assert champion_at(entries, march + timedelta(days=10)).version == 5
    assert champion_at(entries, march + timedelta(days=400)).number == 3
    assert champion_at([], march) is None


def test_a_history_that_does_not_join_is_told():
    march = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
    entries = [at(1, 4, march), at(2, 5, march - timedelta(seconds=1))]
    assert breaks(entries) == [
        "entry 2 follows on vNone, entry 1 names v4",
        "entry 2 begins at 2026-03-01T11:59:59.000+00:00, entry 1 at 2026-03-01T12:00:00.000+00:00",
    ]


def test_a_moment_without_a_time_zone_is_refused():
    with pytest.raises(TypeError):
        champion_at([at(1, 4, datetime(2026, 3, 1, tzinfo=UTC))], datetime(2026, 3, 2))


def test_a_reign_that_ended_is_found_with_what_ended_it_and_not_that_of_a_namesake_of_before():
    begin = datetime(2026, 3, 1, tzinfo=UTC)
    versions = ((1, "promoted"), (8, "promoted"), (1, "rolled-back"), (9, "promoted"))
    entries = [
        Entry("tire", day, action, version, None, (begin + timedelta(days=day)).isoformat(), "x", "y")
        for day, (version, action) in enumerate(versions, 1)
    ]
    assert ended_reign(entries, 8, begin) == (entries[1], entries[2])
    assert ended_reign(entries, 1, begin) == (entries[2], entries[3]), "its last one"
    assert ended_reign(entries, 8, begin + timedelta(days=3)) is None, "that was another version 8"
    assert ended_reign(entries, 9, begin) is None, "it is champion"
    assert ended_reign(entries, 5, begin) is ended_reign([], 5, begin) is None
