import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from tasks.decision import DecisionRule, score
from tasks.evaluation import (
    MOST_CURVES,
    RELIABILITY_BINS,
    calibration_error,
    choose_threshold,
    curves,
    evaluate,
    rank_auc,
    reliability,
    upper_bound,
)
from tasks.recipe import ThresholdRule

RULE = DecisionRule(("crack", "good", "stain"), ("crack", "stain"), 0.4)


def some(count: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that lean towards the truth, and the truth."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, 3, count)
    logits = random.normal(0, 1, (count, 3)) + 1.2 * np.eye(3)[truth]
    odds = np.exp(logits)
    return odds / odds.sum(axis=1, keepdims=True), truth


def test_detection_figures_agree_with_scikit_learn():
    probabilities, truth = some(400)
    found = evaluate(probabilities, truth, RULE)
    is_defect, rejected = RULE.defect_mask[truth], score(probabilities, RULE) >= 0.4
    assert found.figures.precision == pytest.approx(metrics.precision_score(is_defect, rejected))
    assert found.figures.recall == pytest.approx(metrics.recall_score(is_defect, rejected))
    assert found.figures.f1 == pytest.approx(metrics.f1_score(is_defect, rejected))
    assert found.auc == pytest.approx(metrics.roc_auc_score(is_defect, score(probabilities, RULE)))
    assert found.average_precision == pytest.approx(
        metrics.average_precision_score(is_defect, score(probabilities, RULE))
    )


def test_several_classes_without_a_defect_are_class_means_and_agree_with_scikit_learn():
    probabilities, truth = some(400)
    found = evaluate(probabilities, truth, DecisionRule(RULE.labels))
    decided = probabilities.argmax(axis=1)
    assert found.figures.accuracy == pytest.approx(metrics.accuracy_score(truth, decided))
    assert found.figures.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(truth, decided))
    assert found.figures.f1 == pytest.approx(metrics.f1_score(truth, decided, average="macro"))
    assert found.auc == pytest.approx(metrics.roc_auc_score(truth, probabilities, multi_class="ovr"))
    one_hot = np.eye(3)[truth]
    assert found.average_precision == pytest.approx(metrics.average_precision_score(one_hot, probabilities))
    assert found.operating is None
    assert np.array_equal(found.confusion, metrics.confusion_matrix(truth, decided))


def test_the_brier_score_is_the_squared_distance_to_the_truth():
    found = evaluate(np.array([[0.5, 0.5, 0.0]]), np.array([0]), RULE)
    assert found.brier == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("events", "trials", "bound"), [(0, 60, 0.0487), (0, 20, 0.1391), (5, 100, 0.1023), (0, 0, 1.0)]
)
def test_bounds_of_rates_are_exact(events, trials, bound):
    assert upper_bound(events, trials) == pytest.approx(bound, abs=1e-4)


def test_an_impossible_rate_is_refused():
    with pytest.raises(ValueError, match="5 events in 3 trials"):
        upper_bound(5, 3)


def test_escapes_and_overkills_are_counted_at_the_threshold():
    crack, good = [0.5, 0.5, 0.0], [0.3, 0.7, 0.0]
    found = evaluate(np.array([crack, good, crack, good]), np.array([0, 0, 1, 1]), RULE).operating
    assert found is not None
    assert (found.defects, found.escapes, found.good, found.overkills) == (2, 1, 2, 1)
    assert found.escape_upper == pytest.approx(upper_bound(1, 2))


def test_a_defect_taken_for_another_defect_is_no_escape():
    found = evaluate(np.array([[0.8, 0.1, 0.1]]), np.array([2]), RULE)
    assert found.operating is not None and found.operating.escapes == 0
    assert found.figures.accuracy == 0.0 and found.figures.recall == 1.0


def test_confident_and_right_is_calibrated_and_confident_and_wrong_is_not():
    sure = np.array([[0.99, 0.01]] * 50)
    assert calibration_error(sure, np.zeros(50, dtype=int)) == pytest.approx(0.01)
    assert calibration_error(sure, np.ones(50, dtype=int)) == pytest.approx(0.99)


def test_the_reliability_bins_hold_every_photograph_and_agree_with_the_error():
    probabilities, truth = some(500)
    bins = reliability(probabilities, truth)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    assert bins.count.sum() == 500 and len(bins.count) <= RELIABILITY_BINS and bins.count.min() > 0
    assert np.dot(bins.count, bins.confidence) == pytest.approx(confidence.sum())
    assert np.dot(bins.count, bins.right) == pytest.approx(right.sum())
    gaps = 0.0
    for low in np.arange(RELIABILITY_BINS) / RELIABILITY_BINS:  # the definition, bin by bin
        inside = (confidence >= low) & (confidence < low + 1 / RELIABILITY_BINS)
        gaps += abs(right[inside].sum() - confidence[inside].sum())
    assert calibration_error(probabilities, truth) == pytest.approx(gaps / 500)


def test_a_split_without_a_defect_has_no_area_and_no_precision():
    found = evaluate(np.array([[0.3, 0.7, 0.0]] * 4), np.full(4, 1), RULE)
    assert np.isnan(found.auc) and np.isnan(found.average_precision)


def test_curves_are_of_the_defect_score_of_each_class_or_of_all_classes_together():
    probabilities, truth = some(50)
    ((name, scores, positive),) = curves(probabilities, truth, RULE)
    assert name == "defect" and np.array_equal(positive, truth != 1)
    np.testing.assert_allclose(scores, probabilities[:, 0] + probabilities[:, 2], rtol=1e-6)
    assert [name for name, _, _ in curves(probabilities, truth, DecisionRule(RULE.labels))] == list(RULE.labels)
    many = DecisionRule(tuple(str(n) for n in range(MOST_CURVES + 1)))
    ((_, scores, positive),) = curves(np.full((4, MOST_CURVES + 1), 1 / (MOST_CURVES + 1)), np.arange(4), many)
    assert len(scores) == 4 * (MOST_CURVES + 1) and positive.sum() == 4


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auc_counts_ties_half_and_is_nothing_without_both_sides(pairs):
    scores, positive = np.array([float(s) for s, _ in pairs]), np.array([p for _, p in pairs])
    if positive.all() or not positive.any():
        assert np.isnan(rank_auc(scores, positive))
    else:
        assert rank_auc(scores, positive) == pytest.approx(metrics.roc_auc_score(positive, scores))


def test_a_validation_split_without_defects_is_refused_instead_of_rejecting_everything():
    with pytest.raises(ValueError, match="0 defects and 3 good parts"):
        choose_threshold(np.array([0.1, 0.2, 0.3]), np.zeros(3, dtype=bool), ThresholdRule())
    with pytest.raises(ValueError, match="3 defects and 0 good parts"):
        choose_threshold(np.array([0.1, 0.2, 0.3]), np.ones(3, dtype=bool), ThresholdRule())


SCORES = np.array([0.1, 0.2, 0.3, 0.6, 0.25, 0.7, 0.8, 0.9])
DEFECT = np.array([0, 0, 0, 0, 1, 1, 1, 1], dtype=bool)


@pytest.mark.parametrize(
    ("rule", "threshold"),
    [
        (ThresholdRule(rule="accuracy"), 0.65),  # one miss, no over-kill
        (ThresholdRule(rule="recall", recall=1.0), 0.225),  # every defect caught, two over-kills
        (ThresholdRule(rule="recall", recall=0.75), 0.65),
        (ThresholdRule(rule="cost", miss_cost=10), 0.225),  # a miss costs more than two over-kills
        (ThresholdRule(rule="cost", miss_cost=1, overkill_cost=3), 0.65),
    ],
)
def test_each_rule_chooses_its_operating_point(rule, threshold):
    assert choose_threshold(SCORES, DEFECT, rule) == pytest.approx(threshold)


def test_balanced_accuracy_gives_the_rare_side_its_weight():
    scores = np.array([0.3, 0.9] + [0.2] * 20 + [0.4] * 3)
    defect = np.array([True, True] + [False] * 23)
    assert choose_threshold(scores, defect, ThresholdRule(rule="accuracy")) == pytest.approx(0.5)  # one miss of 25
    assert choose_threshold(scores, defect, ThresholdRule(rule="balanced_accuracy")) == pytest.approx(0.25)


def test_gains_that_could_be_chance_hardly_move_the_threshold_from_the_middle():
    defect, grid = np.arange(200) < 60, np.linspace(0, 1, 201)
    chosen, peaks = [], []
    for seed in range(30):  # the truth of this world is 0.54, and 200 photographs cannot tell it from 0.5
        scores = (np.random.default_rng(seed).normal(0, 0.2, 200) + np.where(defect, 0.7, 0.3)).clip(0, 1)
        chosen.append(choose_threshold(scores, defect, ThresholdRule()))
        peaks.append(grid[np.argmax([np.mean((scores >= t) == defect) for t in grid])])
    assert np.std(chosen) < 0.7 * np.std(peaks)
    assert np.mean(np.abs(np.array(chosen) - 0.5) < 0.01) > 0.5


def test_a_gain_beyond_chance_moves_it():
    scores = np.concatenate([np.full(100, 0.3), np.full(300, 0.1)])
    defect = np.arange(400) < 100
    assert choose_threshold(scores, defect, ThresholdRule()) == pytest.approx(0.2)


@given(
    st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=2, max_size=60),
    st.floats(0.05, 1),
)
def test_the_recall_rule_keeps_its_promise_on_the_split_it_saw(pairs, recall):
    scores, defect = np.array([s for s, _ in pairs], dtype=np.float32), np.array([d for _, d in pairs])
    if defect.all() or not defect.any() or scores[defect].min() < 1e-6:
        return
    threshold = choose_threshold(scores, defect, ThresholdRule(rule="recall", recall=recall))
    assert 0 < threshold < 1
    assert np.mean(scores[defect] >= np.float32(threshold)) >= recall - 1e-9


def test_a_recall_that_no_threshold_reaches_gives_the_one_that_misses_least():
    scores, defect = np.array([0.0, 0.9, 0.1, 0.2]), np.array([True, True, False, False])
    threshold = choose_threshold(scores, defect, ThresholdRule(rule="recall", recall=1.0))
    assert (scores[defect] >= threshold).sum() == 1 and threshold > 0.2


def test_probabilities_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="diverged"):
        evaluate(np.array([[np.nan, 0.5, 0.5]]), np.array([0]), RULE)


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="empty"):
        evaluate(np.zeros((0, 3)), np.zeros(0, dtype=int), RULE)
