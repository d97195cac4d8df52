"""The benchmark of switches: what it counts is counted, and a short run of it on the real services."""

import asyncio
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.load import ROW, Asked, Load, closed_loop, open_loop
from benchmarks.swap import growth, latencies, measure, misrouted, verdicts
from benchmarks.switching import Switch, prepared, switch
from tasks.ledger import read_ledger
from tasks.routing import Route, promoted, read_routing, replace_routing
from tasks.transaction import Place

SCORES = np.array([[np.nan, np.nan], [0.1, 0.2], [0.6, 0.7], [0.8, 0.9]], dtype=np.float32)  # [version, image]
SWITCHES = [Switch(1, 2, 9, 10, 10.1, 11, {}), Switch(2, 3, 19, 20, 20.1, 21, {})]


def row(sent: float, answered: float, version: int, image: int = 0, planned: float | None = None) -> tuple:
    at = sent if planned is None else planned
    return (at, sent, answered, 0, image, version, SCORES[version, image], -1)


def failure(sent: float, answered: float) -> tuple:
    return (sent, sent, answered, 0, 0, 0, np.nan, 0)


def rows(*each: tuple) -> np.ndarray:
    return np.array(list(each), dtype=ROW)


# --- counting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "answered", "version"),
    [(0, 1, 1), (9.9, 10.05, 1), (9.9, 10.05, 2), (10.2, 12, 2), (9.5, 30, 3), (9.5, 30, 1), (20.2, 20.3, 3)],
)
def test_an_answer_by_a_version_that_was_routed_while_it_was_asked_is_right(sent, answered, version):
    assert misrouted(rows(row(sent, answered, version)), SWITCHES, SCORES) == 0


@pytest.mark.parametrize(
    ("sent", "answered", "version"),
    [(0, 1, 2), (9, 9.99, 2), (10.2, 12, 1), (10.2, 12, 3), (20.2, 20.3, 2), (0, 30, 0)],
)
def test_an_answer_by_a_version_that_was_not_is_counted(sent, answered, version):
    assert misrouted(rows(row(0, 1, 1), row(sent, answered, version)), SWITCHES, SCORES) == 1


def test_an_answer_with_the_score_of_another_version_is_counted_and_a_failure_is_counted_as_failed_only():
    swapped = list(row(0, 1, 1))
    swapped[6] = SCORES[2, 0]
    asked = Asked(rows(tuple(swapped), failure(0, 1), row(0, 1, 1, image=1)), ("grpc: no",), 0.1)
    assert (asked.failed, misrouted(asked.rows, SWITCHES, SCORES)) == (1, 1)


def test_a_request_counts_from_its_planned_moment_and_belongs_to_every_window_that_it_touches():
    steady = [row(at, at + 0.01, 1) for at in np.arange(0, 8, 0.1)]
    held_up = [row(12.0, 12.01, 2, planned=11.2), row(8.5, 9.2, 1)]  # a window ends at 11.5, and one begins at 9
    found = latencies(Asked(rows(*steady, *held_up), (), 0.1), SWITCHES[:1])
    assert found["requests_in_windows"] == 2 and found["steady_p99_ms"] == pytest.approx(10, abs=0.5)
    assert found["swap_p99_ms"] > 700 and found["p99_ratio"] > 50 and found["sent_late_p99_ms"] > 0


def test_latencies_without_a_request_outside_of_the_windows_are_no_comparison():
    with pytest.raises(ValueError, match="1 of 1 requests lie in the windows"):
        latencies(Asked(rows(row(9.5, 9.6, 1)), (), 0.1), SWITCHES)


def test_memory_is_compared_after_the_warm_up_and_only_with_the_usual_number_of_versions():
    warm = [50 + number for number in range(20)]
    assert growth([*warm, *[100] * 90])["memory_growth"] == 0
    assert growth([*warm, *[None, 100, 100, 100] * 30, *[106] * 8])["memory_growth"] == 0.06
    with pytest.raises(ValueError, match="1 samples"):
        growth([100, None, 100])


GOOD = {
    "swaps": 5, "requests": {"closed": 10, "open": 10}, "failed": 0, "misrouted": 0, "p99_ratio": 1.5, "swap_p99_ms": 1.5,
    "steady_p99_ms": 1.0, "memory_growth": 0.05, "memory_first_mb": 100, "memory_last_mb": 105, "ledger_entries": 5,
    "ledger_differs": 0, "ledger_breaks": 0, "tables": 5, "alias_follows": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"failed": 1}, {"misrouted": 1}, {"p99_ratio": 1.51}, {"memory_growth": 0.051}, {"ledger_entries": 6},
        {"ledger_differs": 1}, {"ledger_breaks": 1}, {"tables": 4}, {"alias_follows": False},
    ],
)  # fmt: skip
def test_each_bound_that_is_passed_is_told(changed):
    assert all(held for *_, held in verdicts(GOOD))
    assert sum(not held for *_, held in verdicts({**GOOD, **changed})) == 1


# --- the load ---------------------------------------------------------------------------------------------------


def test_an_open_loop_plans_on_while_an_answer_is_awaited():
    seen = []

    async def ask(number, planned):
        seen.append((number, planned, time.monotonic()))
        if number == 0:
            time.sleep(0.3)  # nothing else can be sent meanwhile: the next ones are late, and say so

    asyncio.run(open_loop(ask, 50, lambda: len(seen) >= 20))
    planned = np.array([each[1] for each in seen])
    assert np.allclose(np.diff(planned), 1 / 50)
    assert max(sent - at for _, at, sent in seen) > 0.2


def test_a_closed_loop_keeps_as_many_in_flight_as_the_level_says():
    now, most, began = 0, {}, time.monotonic()

    async def ask(number):
        nonlocal now
        now += 1
        step = int((time.monotonic() - began) / 0.2)
        most[step] = max(most.get(step, 0), now)
        await asyncio.sleep(0.01)
        now -= 1

    asyncio.run(closed_loop(ask, (1, 6), 0.2, lambda: time.monotonic() - began > 0.8))
    assert min(most.values()) < 6 and max(most.values()) in (6, 7)  # one of the level before may still be on its way


# --- on real services -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(store, mlflow_uri, prefect_server, triton, tmp_path_factory):
    place = Place(triton.root, store, mlflow_uri, "swapped")
    return prepared(place, triton.address, triton.running.process.pid, tmp_path_factory.mktemp("bench"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_few_switches_under_both_loads_fail_nobody_and_are_all_written_down(bench, tmp_path):
    figures = measure(bench, swaps=5, watched=2, seconds=1.0, folder=tmp_path)
    held = {name: (held, measured) for name, measured, _, held in verdicts(figures)}
    for name in ("failed requests", "misrouted answers", "ledger entries", "routing tables"):
        assert held[name][0], (name, held[name][1], figures["errors"])
    assert figures["swaps"] == 7 and min(figures["requests"].values()) > 50
    assert figures["requests_in_windows"] > 0 and figures["memory_first_mb"] > 50
    assert [entry.version for entry in read_ledger(bench.place.store, "swapped")] == [1, 2, 3, 4, 1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_photograph_nobody_can_read_and_a_switch_nobody_announced_are_counted(bench, tmp_path):
    place, images = bench.place, tmp_path / "images"
    images.mkdir()
    for path in sorted(bench.images.iterdir())[:3]:
        shutil.copy(path, images)
    (images / "zzz.jpg").write_bytes(b"no photograph")
    scores = bench.scores[:, [0, 1, 2, 0]]
    if read_routing(place.root, place.model).previous is None:
        switch(bench, 1)
    with Load(bench.address, place.model, images, tmp_path / "load", levels=(4,)) as load:
        back = switch(bench, 10)
        time.sleep(1)
        unannounced = time.monotonic()
        table = read_routing(place.root, place.model)
        other = promoted(table, place.model, Route(table.champion.network, back.old))
        replace_routing(place.root, replace(other, revision=table.revision + 1))
        time.sleep(1)
    asked = load.asked
    assert 0 < asked.failed == int((asked.rows["image"] == 3).sum())
    assert {error[:4] for error in asked.errors} == {"grpc", "http"}
    before = asked.rows[asked.rows["answered"] < unannounced]
    assert len(before) > 10 and misrouted(before, [back], scores) == 0
    assert misrouted(asked.rows, [back], scores) > 0
    assert misrouted(before, [back], scores[[0, 2, 3, 4, 1]]) > 0, "the scores of the versions are told apart"
