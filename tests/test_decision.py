"""tasks/decision.py: the rule from probabilities to a label."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from tasks.decision import DecisionRule, decide, score

RULE = DecisionRule(("crack", "good", "scratch", "stained"), defect_labels=("crack", "scratch"), threshold=0.4)
Rows = NDArray[np.float32]


def rows_of(classes: int) -> st.SearchStrategy[Rows]:
    raw = hnp.arrays(
        np.float32, st.tuples(st.integers(1, 6), st.just(classes)), elements=st.floats(1 / 128, 1, width=32)
    )
    return raw.map(lambda some: (some / some.sum(axis=1, keepdims=True)).astype(np.float32))


def test_the_score_is_the_probability_of_any_defect() -> None:
    np.testing.assert_allclose(score(np.array([[0.3, 0.5, 0.15, 0.05]]), RULE), [0.45], rtol=1e-6)


def test_at_the_threshold_it_is_a_defect() -> None:
    binary = DecisionRule(("bad", "good"), ("bad",), 0.25)
    assert decide(np.array([[0.25, 0.75], [0.2499, 0.7501]]), binary).tolist() == [0, 1]


def test_a_part_is_refused_though_its_likeliest_single_class_is_good() -> None:
    assert RULE.labels[decide(np.array([[0.22, 0.5, 0.25, 0.03]]), RULE)[0]] == "scratch"


def test_without_defects_the_likeliest_class_wins_and_is_the_score() -> None:
    plain = DecisionRule(("a", "b", "c"))
    probabilities = np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])
    assert decide(probabilities, plain).tolist() == [1, 0]
    np.testing.assert_allclose(score(probabilities, plain), [0.5, 0.6], rtol=1e-6)


@given(rows_of(4))
def test_a_defect_is_said_exactly_when_the_score_reaches_the_threshold(probabilities: Rows) -> None:
    says_defect = np.isin(decide(probabilities, RULE), [0, 2])
    np.testing.assert_array_equal(says_defect, score(probabilities, RULE) >= np.float32(0.4))


@given(rows_of(4))
def test_each_photograph_is_judged_by_itself(probabilities: Rows) -> None:
    together = decide(probabilities, RULE)
    alone = np.concatenate([decide(row[None], RULE) for row in probabilities])
    np.testing.assert_array_equal(together, alone)


@given(rows_of(3), st.floats(0.05, 0.9), st.floats(0.01, 0.09))
def test_a_higher_threshold_never_refuses_more(probabilities: Rows, low: float, step: float) -> None:
    def refused(threshold: float) -> NDArray[np.bool_]:
        rule = DecisionRule(("x", "y", "z"), ("y",), threshold)
        return np.asarray(decide(probabilities, rule) == 1)

    assert not (refused(low + step) & ~refused(low)).any()


@pytest.mark.parametrize(
    ("labels", "defects", "threshold", "message"),
    [
        (("a", "b"), ("c",), 0.5, r"\['c'\]"),
        (("a", "b"), ("a", "b"), 0.5, "nothing would be left"),
        (("a", "b"), ("a",), None, "threshold belongs"),
        (("a", "b"), (), 0.5, "threshold belongs"),
        (("a", "b"), ("a",), 1.0, r"1.0 is outside \(0, 1\)"),
    ],
)
def test_a_rule_that_cannot_decide_is_refused(
    labels: tuple[str, ...], defects: tuple[str, ...], threshold: float | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DecisionRule(labels, defects, threshold)
