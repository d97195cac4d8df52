import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.decision import DecisionRule
from tasks.evaluation import upper_bound
from tasks.gates import Evidence, Limits, decide_promotion, probability_of_no_loss
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
    assert failed(decide_promotion(evidence(few, few), LIMITS)) == {"escape rate"}
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
