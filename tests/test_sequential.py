import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.evaluation import upper_bound
from tasks.sequential import ALPHA, bounds, evidence_against, trials_until_above, watched

LOOKS = np.unique(np.geomspace(1, 2000, 60).astype(int))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_the_true_rate_stays_inside_at_every_look_in_19_of_20_sequences(rate):
    random = np.random.default_rng(0)
    ever_refuted = 0
    for _ in range(400):
        events = (random.random(LOOKS[-1]) < rate).cumsum()
        ever_refuted += any(evidence_against(rate, int(events[n - 1]), int(n)) > np.log(1 / ALPHA) for n in LOOKS)
    # 400 sequences, true share at most 0.05: more than 34 would happen once in five hundred times.
    assert ever_refuted <= 34


def test_an_ordinary_bound_looked_at_as_often_is_wrong_much_more_often():
    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        events = (random.random(LOOKS[-1]) < 0.1).cumsum()
        wrong += any(upper_bound(int(events[n - 1]), int(n)) < 0.1 for n in LOOKS)
    assert wrong > 30


@settings(max_examples=60, deadline=None)
@given(trials=st.integers(1, 5000), share=st.floats(0, 1), alpha=st.sampled_from((0.01, 0.05, 0.2)))
def test_the_bounds_lie_around_what_was_seen_and_are_where_the_evidence_says(trials, share, alpha):
    events = round(trials * share)
    lower, upper = bounds(events, trials, alpha)
    assert 0 <= lower <= events / trials <= upper <= 1
    for bound, is_real in ((lower, lower > 0), (upper, upper < 1)):
        if is_real:
            assert evidence_against(bound, events, trials) == pytest.approx(np.log(1 / alpha), abs=1e-3)
    assert bounds(events, trials, alpha / 2)[0] <= lower and bounds(events, trials, alpha / 2)[1] >= upper


def test_nothing_seen_is_nothing_known():
    assert bounds(0, 0) == (0.0, 1.0) and watched(0, 0, 0.5).settled is None


@pytest.mark.parametrize(
    ("events", "trials", "settled"), [(0, 400, "below"), (0, 20, None), (30, 300, "above"), (3, 300, None)]
)
def test_a_limit_of_two_percent_is_settled_when_enough_was_seen(events, trials, settled):
    assert watched(events, trials, 0.02).settled == settled


def test_how_long_a_plain_fault_stays_unnoticed_is_known_beforehand():
    # A challenger that calls every piece good contradicts the champion on every defect: one in ten here, one in fifty allowed.
    needed = trials_until_above(0.1, 0.02)
    assert 50 < needed < 150
    assert watched(needed // 10, needed, 0.02).settled == "above"
    assert trials_until_above(1.0, 0.02) <= 3
    assert trials_until_above(0.03, 0.02) > 10 * needed


@pytest.mark.parametrize(
    "call", [lambda: bounds(3, 2), lambda: evidence_against(1.5, 1, 2), lambda: trials_until_above(0.01, 0.02)]
)
def test_impossible_counts_and_rates_are_named(call):
    with pytest.raises(ValueError, match=r"3 events in 2|1\.5|0\.01"):
        call()
