from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.comparison import holm
from tasks.decision import DecisionRule
from tasks.evaluation import upper_bound
from tasks.gates import (
    CostLimit,
    Evidence,
    Limits,
    Suspects,
    decide_promotion,
    expected_cost,
    probability_of_no_loss,
    trials_to_show,
)
from tasks.parity import Rung

RULE = DecisionRule(("defective", "good"), ("defective",), 0.5)
DEFECTIVE, GOOD = 0, 1
SAME = Rung("served", 64, 1e-6, 1e-7, 0)
LIMITS = Limits(min_accuracy=0.9, max_escape_rate=0.05, max_overkill_rate=0.1, max_p99_ms=100)


def evidence(truth, served, offline=None, rungs=(SAME,), test_rung=SAME, p99_ms=20.0, champion=None):
    served = np.array(served)
    return Evidence(
        RULE,
        np.array(truth),
        served,
        served if offline is None else np.array(offline),
        rungs,
        test_rung,
        p99_ms,
        champion,
    )


def failed(decision):
    return {gate.name for gate in decision.gates if not gate.held}


PERFECT = [DEFECTIVE] * 100 + [GOOD] * 200


def test_a_perfect_candidate_with_enough_evidence_is_promoted():
    decision = decide_promotion(evidence(PERFECT, PERFECT), LIMITS)
    assert decision.promote
    assert decision.reasons == ()


@pytest.mark.parametrize(
    ("misses", "defects", "bound"),
    [(0, 20, 0.1391), (0, 60, 0.0487), (0, 59, 0.0495), (1, 100, 0.0466), (3, 1000, 0.0077)],
)
def test_the_escape_bound_is_the_exact_binomial_one(misses, defects, bound):
    assert upper_bound(misses, defects) == pytest.approx(bound, abs=5e-5)


def test_no_misses_in_twenty_defects_is_refused_at_five_percent_and_none_in_sixty_passes():
    few = [DEFECTIVE] * 20 + [GOOD] * 200
    enough = [DEFECTIVE] * 60 + [GOOD] * 200
    decision = decide_promotion(evidence(few, few), LIMITS)
    assert failed(decision) == {"escape rate", "defects in the test split"}
    assert any(
        "at least 59 (none wrong in 59 would just show an escape rate of 5.0%)" in each for each in decision.reasons
    )
    assert decide_promotion(evidence(enough, enough), LIMITS).promote


def test_nothing_is_known_without_trials():
    assert upper_bound(0, 0) == 1.0


@given(events=st.integers(0, 200), trials=st.integers(1, 400))
def test_the_bound_never_lies_below_the_observed_rate(events, trials):
    events = min(events, trials)
    assert upper_bound(events, trials) >= events / trials
    assert upper_bound(events, trials) <= upper_bound(min(events + 1, trials), trials)


def test_too_few_images_are_a_refusal_even_when_all_are_right():
    small = [DEFECTIVE] * 10 + [GOOD] * 20
    assert failed(decide_promotion(evidence(small, small), LIMITS)) >= {"test images", "defects in the test split"}


def test_every_failed_gate_is_named_not_only_the_first():
    served = [GOOD] * 100 + [GOOD] * 200
    decision = decide_promotion(evidence(PERFECT, served, p99_ms=500.0), LIMITS)
    assert failed(decision) == {"accuracy", "escape rate", "p99 latency"}
    assert any("100 of 100" in reason for reason in decision.reasons)


def test_an_image_without_an_answer_counts_as_an_escape_and_blocks():
    served = [-1] + [DEFECTIVE] * 99 + [GOOD] * 199 + [-1]
    names = failed(decide_promotion(evidence(PERFECT, served, offline=PERFECT), LIMITS))
    assert "every image answered" in names
    gates = {gate.name: gate for gate in decide_promotion(evidence(PERFECT, served, offline=PERFECT), LIMITS).gates}
    assert gates["escape rate"].measured.startswith("1 of 100")
    assert gates["over-kill rate"].measured.startswith("1 of 200")


def test_one_decision_that_differs_from_offline_blocks():
    offline = [*PERFECT[:-1], DEFECTIVE]
    assert failed(decide_promotion(evidence(PERFECT, PERFECT, offline=offline), LIMITS)) == {"served equals offline"}


def test_a_flip_on_a_golden_image_blocks_and_names_the_rung():
    onnx = Rung("PyTorch -> ONNX", 64, 0.3, 0.01, 1)
    assert failed(decide_promotion(evidence(PERFECT, PERFECT, rungs=(onnx, SAME)), LIMITS)) == {
        "parity PyTorch -> ONNX"
    }


def test_parity_without_golden_images_proves_nothing():
    empty = Rung("served", 0, 0.0, 0.0, 0)
    assert failed(decide_promotion(evidence(PERFECT, PERFECT, rungs=(empty,)), LIMITS)) == {"parity served"}


def test_flips_on_the_test_split_are_tolerated_up_to_their_share():
    assert decide_promotion(evidence(PERFECT, PERFECT, test_rung=Rung("test", 300, 0.1, 0.0, 3)), LIMITS).promote
    refused = decide_promotion(evidence(PERFECT, PERFECT, test_rung=Rung("test", 300, 0.1, 0.0, 4)), LIMITS)
    assert failed(refused) == {"flips against PyTorch, test split"}


def test_a_candidate_that_loses_significantly_against_the_champion_is_refused():
    served = np.array(PERFECT)
    served[100:110] = DEFECTIVE  # ten over-kills the champion did not make
    decision = decide_promotion(evidence(PERFECT, served, champion=np.array(PERFECT)), LIMITS)
    assert failed(decision) == {"not worse than the champion", "better than the champion"}


def test_an_equal_candidate_is_refused_unless_the_recipe_only_asks_for_no_worse():
    champion = np.array(PERFECT)
    assert failed(decide_promotion(evidence(PERFECT, PERFECT, champion=champion), LIMITS)) == {
        "better than the champion"
    }
    relaxed = LIMITS.model_copy(update={"must_beat_champion": False})
    assert decide_promotion(evidence(PERFECT, PERFECT, champion=champion), relaxed).promote


@pytest.mark.parametrize(("lost", "won", "p"), [(0, 0, 1.0), (5, 0, 1 / 32), (1, 4, 31 / 32), (8, 2, 56 / 1024)])
def test_the_paired_test_is_the_exact_sign_test(lost, won, p):
    assert probability_of_no_loss(lost, won) == pytest.approx(p)


def test_a_multi_class_candidate_is_judged_without_escape_and_overkill():
    rule = DecisionRule(("a", "b", "c"))
    truth = np.array([0, 1, 2] * 50)
    decision = decide_promotion(Evidence(rule, truth, truth, truth, (SAME,), SAME, 5.0), LIMITS)
    assert decision.promote
    assert not any("rate" in gate.name or "defect" in gate.name for gate in decision.gates)


# --- evidence enough --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "trials"), [(0.05, 59), (0.01, 299), (0.001, 2995), (0.35, 7), (0.95, 1), (1.0, 0)])
def test_the_fewest_trials_that_can_show_a_limit_are_computed(limit, trials):
    """By hand: 0.95 ** 58 = 0.0510 and 0.95 ** 59 = 0.0485."""
    assert trials_to_show(limit) == trials
    if trials > 1:
        assert upper_bound(0, trials) <= limit < upper_bound(0, trials - 1)


def test_fewer_good_pieces_than_can_show_the_over_kill_limit_are_no_evidence():
    truth = [DEFECTIVE] * 100 + [GOOD] * 28  # 0 of 28 is bounded by 0.1015
    decision = decide_promotion(evidence(truth, truth), LIMITS)
    assert failed(decision) == {"good pieces in the test split", "over-kill rate"}


# --- cost -------------------------------------------------------------------------------------------------------------

COST = CostLimit(escape=200, overkill=4, defect_share=0.02, at_most=3000)


def test_the_cost_of_ten_thousand_pieces_is_that_of_their_escapes_and_over_kills():
    # 200 defects of which 5 % escape: 10 x 200; 9,800 good pieces of which 10 % are rejected: 980 x 4.
    assert expected_cost(0.05, 0.1, COST) == pytest.approx(2000 + 3920)


def test_the_cost_is_judged_by_its_bound_and_both_are_told():
    # 1 of 100 escapes, bound 0.0545 at 97.5 %; 2 of 200 over-kills, bound 0.0357: 200 x 0.0545 x 200 + 9,800 x 0.0357 x 4.
    served = [GOOD, *[DEFECTIVE] * 99, *[GOOD] * 198, DEFECTIVE, DEFECTIVE]
    limits = LIMITS.model_copy(update={"cost": COST})
    decision = decide_promotion(evidence(PERFECT, served), limits)
    [gate] = [gate for gate in decision.gates if gate.name == "cost per 10,000 pieces"]
    bound = 200 * upper_bound(1, 100, 0.975) * 200 + 9800 * upper_bound(2, 200, 0.975) * 4
    assert bound == pytest.approx(40_000 * 0.05446 + 39_200 * 0.03566, rel=1e-3)
    assert gate.measured.startswith(f"792, upper 95 % bound {bound:,.0f}")  # 200 x 0.01 x 200 + 9,800 x 0.01 x 4
    assert not gate.held and failed(decision) == {"cost per 10,000 pieces"}
    dearer = limits.model_copy(update={"cost": COST.model_copy(update={"at_most": 3600})})
    assert decide_promotion(evidence(PERFECT, served), dearer).promote


def test_no_cost_is_judged_where_the_recipe_names_none():
    assert not any("cost" in gate.name for gate in decide_promotion(evidence(PERFECT, PERFECT), LIMITS).gates)


# --- calibration ------------------------------------------------------------------------------------------------------


def probabilities(truth, served, confidence):
    found = np.full((len(truth), 2), 1 - confidence, dtype=np.float32)
    found[np.arange(len(truth)), served] = confidence
    return found


@pytest.mark.parametrize(("confidence", "error"), [(0.99, 0.0), (0.9, 0.09), (0.6, 0.39)])
def test_probabilities_must_be_as_right_as_they_say_where_the_recipe_asks(confidence, error):
    """297 of 300 are right, so a confidence of 0.99 is just."""
    served = [GOOD, *PERFECT[1:-2], DEFECTIVE, DEFECTIVE]
    limits = LIMITS.model_copy(update={"max_calibration_error": 0.05})
    found = replace(evidence(PERFECT, served), probabilities=probabilities(PERFECT, served, confidence))
    decision = decide_promotion(found, limits)
    [gate] = [gate for gate in decision.gates if gate.name == "calibration error"]
    assert (float(gate.measured), gate.held) == (pytest.approx(error, abs=1e-4), error <= 0.05)
    assert not any(gate.name == "calibration error" for gate in decide_promotion(found, LIMITS).gates)


def test_calibration_that_was_not_measured_is_not_proven():
    limits = LIMITS.model_copy(update={"max_calibration_error": 0.05})
    assert failed(decide_promotion(evidence(PERFECT, PERFECT), limits)) == {"calibration error"}


# --- slices -----------------------------------------------------------------------------------------------------------


def test_holms_correction_is_that_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def sliced(lost, won, slices=10, size=60):
    """Every slice has `size` photographs; in the first the candidate loses and wins so many, elsewhere it wins enough to be
    better over all.
    """
    truth = np.array([DEFECTIVE, GOOD] * (slices * size // 2))
    served, champion = truth.copy(), truth.copy()
    served[:lost] = 1 - truth[:lost]
    champion[lost : lost + won] = 1 - truth[lost : lost + won]
    champion[size : size + 20] = 1 - truth[size : size + 20]
    places = np.arange(len(truth)) // size
    parts = {f"line L{number}": places == number for number in range(slices)}
    return replace(evidence(truth, served, champion=champion), parts=parts)


@pytest.mark.parametrize(
    ("lost", "won", "p", "held"),
    # One-sided exact p: 1/2**7 = 0.0078 and 1/2**8 = 0.0039; times ten slices.
    [(5, 0, 0.3125, True), (7, 0, 0.078125, True), (8, 0, 0.0390625, False), (9, 2, 0.327148, True)],
)
def test_a_slice_that_is_worse_beyond_the_chance_of_many_slices_is_refused(lost, won, p, held):
    decision = decide_promotion(sliced(lost, won), LIMITS.model_copy(update={"max_escape_rate": 0.1}))
    [gate] = [gate for gate in decision.gates if gate.name == "no slice worse than the champion"]
    assert gate.held is held and f"line L0: {lost} lost, {won} won, p {p:.2g}" in gate.measured
    assert failed(decision) == (set() if held else {"no slice worse than the champion"})


def test_slices_with_few_images_are_not_compared():
    decision = decide_promotion(sliced(8, 0), LIMITS.model_copy(update={"min_slice_images": 61}))
    [gate] = [gate for gate in decision.gates if gate.name == "no slice worse than the champion"]
    assert gate.held and gate.measured == "0 of 0 slices of at least 61 images are worse"


# --- doubted labels ---------------------------------------------------------------------------------------------------


def doubted(found, positions):
    return replace(found, suspects=Suspects(np.array(positions, dtype=np.int64), "by the labels flow"))


def test_a_verdict_that_rests_on_doubted_labels_is_refused_and_says_so():
    """The candidate beats the champion by two photographs, and just those are doubted."""
    champion = np.array(PERFECT)
    champion[[100, 101]] = DEFECTIVE
    found = evidence(PERFECT, PERFECT, champion=champion)
    assert decide_promotion(found, LIMITS).promote
    decision = decide_promotion(doubted(found, [100, 101]), LIMITS)
    assert failed(decision) == {"verdict without doubted labels"}
    assert decision.reasons[0].startswith(
        "verdict without doubted labels: without 2 of 2 doubted images (by the labels flow) they do not hold, with them they "
        "hold; better than the champion: 1.0000 against 1.0000"
    )


def test_a_refusal_that_rests_on_doubted_labels_says_so_too():
    served = np.array(PERFECT)
    served[:2] = GOOD  # two escapes in 100 are bounded by 0.0616, none in 98 by 0.0301
    decision = decide_promotion(doubted(evidence(PERFECT, served), [0, 1, 2]), LIMITS)
    assert failed(decision) == {"escape rate", "verdict without doubted labels"}
    assert any("they hold, with them they do not hold; escape rate: 0 of 97" in reason for reason in decision.reasons)


def test_only_the_stated_share_of_the_doubted_is_left_out_the_most_doubtful_first():
    served = np.array(PERFECT)
    served[:2] = GOOD
    limits = LIMITS.model_copy(update={"suspect_share": 0.01})  # 3 of 300
    decision = decide_promotion(doubted(evidence(PERFECT, served), [200, 201, 202, 0, 1]), limits)
    assert failed(decision) == {"escape rate"}
    [gate] = [gate for gate in decision.gates if gate.name == "verdict without doubted labels"]
    assert gate.measured.startswith("without 3 of 5 doubted images")


def test_doubts_that_change_nothing_are_told_and_no_share_asks_for_nothing():
    found = doubted(evidence(PERFECT, PERFECT), [0, 250])
    assert decide_promotion(found, LIMITS).promote
    none = decide_promotion(found, LIMITS.model_copy(update={"suspect_share": 0.0}))
    assert not any("doubted" in gate.name for gate in none.gates)
