"""tasks/claims.py against a real S3."""

from concurrent.futures import ThreadPoolExecutor

from tasks.claims import Subject, Verdict, claim, claimant, read_verdict, verdicts, write_verdict
from tasks.storage import Store

ALIVE = {"one", "two"}.__contains__


def test_of_many_runs_at_once_exactly_one_may_work(store: Store) -> None:
    subject = Subject("train/crowd", "crowd/v00000001")
    runs = [f"run-{number}" for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        told = list(pool.map(lambda run: claim(store, subject, run, lambda _: True), runs))
    assert told.count(True) == 1
    assert claimant(store, subject) == runs[told.index(True)]


def test_a_run_that_asks_again_keeps_its_claim(store: Store) -> None:
    subject = Subject("train/again", "again/v00000001")
    assert claim(store, subject, "one", ALIVE)
    assert claim(store, subject, "one", ALIVE)
    assert not claim(store, subject, "two", ALIVE)


def test_the_claim_of_a_dead_run_passes_to_one_of_those_who_ask(store: Store) -> None:
    subject = Subject("train/dead", "dead/v00000001")
    assert claim(store, subject, "killed", ALIVE)
    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(lambda run: claim(store, subject, run, ALIVE), ("one", "two")))
    assert sorted(told) == [False, True]
    assert claimant(store, subject) == ("one", "two")[told.index(True)]


def test_subjects_and_stages_do_not_meet(store: Store) -> None:
    assert claim(store, Subject("train/apart", "apart/v00000001"), "one", ALIVE)
    assert claim(store, Subject("train/apart", "apart/v00000002"), "two", ALIVE)
    assert claim(store, Subject("train/apart-large", "apart/v00000001"), "two", ALIVE)


def test_a_verdict_is_read_as_it_was_written_and_a_later_one_replaces_it(store: Store) -> None:
    subject = Subject("promote/verdict", "verdict/v00000007")
    assert read_verdict(store, subject) is None
    write_verdict(store, subject, Verdict("refused", "one", figures={"reasons": ["too slow"]}))
    found = read_verdict(store, subject)
    assert found is not None and (found.outcome, found.run, found.figures) == (
        "refused",
        "one",
        {"reasons": ["too slow"]},
    )
    write_verdict(store, subject, Verdict("promoted", "two"))
    assert {name: found.outcome for name, found in verdicts(store, "promote/verdict").items()} == {
        "verdict/v00000007": "promoted"
    }
