"""monitoring/alerts.py: which verdicts become news."""

from dataclasses import replace

import pytest

from monitoring.alerts import AlarmRule, Finding, decide_announcement, open_alarm

DEFAULT = AlarmRule()


def told(verdicts: str, rule: AlarmRule = DEFAULT, step: float = 60.0) -> list[str | None]:
    """What each of a row of runs announces: q quiet, c camera, p product, i insufficient; each with a window of its own."""
    meaning = {
        "q": ("quiet", ""),
        "c": ("drifted", "camera"),
        "p": ("drifted", "product_mix"),
        "i": ("insufficient", ""),
    }
    history: list[Finding] = []
    for number, letter in enumerate(verdicts):
        verdict, cause = meaning[letter]
        latest = Finding(number * step, 1, verdict, f"window {number}", cause)
        history.append(replace(latest, announced=decide_announcement(history, latest, rule)))
    return [each.announced for each in history]


def test_quiet_is_no_news() -> None:
    assert told("qqiq") == [None] * 4


def test_the_first_drifted_window_alarms_and_the_first_quiet_one_clears() -> None:
    assert told("qccqq") == [None, "detected", None, "cleared", None]


def test_one_odd_window_is_forgiven_when_two_of_three_must_drift() -> None:
    assert told("cqqqcqc", AlarmRule(2, 3)) == [None] * 6 + ["detected"]


def test_an_alarm_stays_open_while_enough_windows_drift() -> None:
    assert told("ccqqq", AlarmRule(2, 3)) == [None, "detected", None, "cleared", None]


def test_the_same_alarm_is_repeated_after_the_cool_down_only() -> None:
    assert told("ccccc", AlarmRule(cool_down=120)) == ["detected", None, "detected", None, "detected"]


def test_another_cause_is_news_but_two_causes_in_turn_do_not_shout_each_time() -> None:
    assert told("cpcpcp") == ["detected", "detected", None, None, None, None]


def test_a_cause_that_comes_back_after_all_was_well_is_news_within_the_cool_down() -> None:
    assert told("cqc") == ["detected", "cleared", "detected"]


def test_a_run_without_a_verdict_neither_alarms_nor_clears_nor_votes() -> None:
    assert told("ciic", AlarmRule(2, 2)) == [None, None, None, "detected"]
    assert told("ciq") == ["detected", None, "cleared"]


def test_looking_twice_at_the_same_window_is_one_vote() -> None:
    first = Finding(0, 1, "drifted", "same", "camera")
    again = replace(first, at=60)
    assert decide_announcement([first], again, AlarmRule(2, 2)) is None
    assert decide_announcement([first], replace(again, window="other"), AlarmRule(2, 2)) == "detected"


def test_windows_of_the_former_version_do_not_vote_but_its_alarm_is_cleared_by_the_next_one() -> None:
    former = Finding(0, 1, "drifted", "a", "camera", "detected")
    assert decide_announcement([former], Finding(60, 2, "drifted", "b", "camera"), AlarmRule(2, 2)) is None
    assert decide_announcement([former], Finding(60, 2, "drifted", "b", "camera"), AlarmRule()) == "detected"
    assert decide_announcement([former], Finding(60, 2, "quiet", "b"), AlarmRule()) == "cleared"
    assert open_alarm([former, Finding(60, 2, "quiet", "b", announced="cleared")]) is None


@pytest.mark.parametrize(("drifted", "of"), [(0, 1), (3, 2)])
def test_a_rule_that_can_never_hold_is_refused(drifted: int, of: int) -> None:
    with pytest.raises(ValueError, match=f"after {drifted} of {of}"):
        AlarmRule(drifted, of)
