"""Which of several models is put forward: by each metric in its direction, and only among comparable ones."""

import numpy as np
import pytest

from tasks.candidates import (
    Candidate,
    Scenario,
    Trained,
    choose,
    comparable,
    configurations,
    evaluated_on,
    page,
    value_of,
)
from tasks.decision import DecisionRule
from tasks.evaluation import evaluate
from tasks.recipe import ThresholdRule, TrainConfig
from tasks.registry import Reference, TrainedModel

RULE = DecisionRule(("defective", "good"), ("defective",), 0.5)
CONFIG = TrainConfig(architecture="cnn", pretrained=False, defect_labels=("defective",))


def trained(name, value, evaluated="these", version=1):
    return Trained(name, "registered", 60.0, TrainedModel("tire", version, "run"), value, {}, evaluated)


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "precision", "recall", "f1"])
def test_of_what_is_good_the_highest_is_chosen(metric):
    assert choose([trained("a", 0.8), trained("b", 0.9), trained("c", 0.7)], metric).name == "b"


@pytest.mark.parametrize("metric", ["loss", "escape_bound", "cost"])
def test_of_what_is_bad_the_lowest_is_chosen(metric):
    assert choose([trained("a", 0.8), trained("b", 0.9), trained("c", 0.7)], metric).name == "c"


def test_of_equals_the_first_is_chosen_and_of_none_none():
    assert choose([trained("a", 0.8), trained("b", 0.8)], "accuracy").name == "a"
    assert choose([], "accuracy") is None
    assert choose([Trained("a", "below minimum")], "accuracy") is None


def test_only_candidates_on_the_same_photographs_and_labels_are_compared():
    odd, first, second = trained("odd", 0.99, "others"), trained("first", 0.8), trained("second", 0.9)
    assert comparable([odd, first, second]) == [first, second]
    assert choose([odd, first, second], "accuracy") is second
    told = page("Candidates", "accuracy", [odd, first, second], second, "")
    rows = [line for line in told.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0].strip("| *") for row in rows][:2] == ["second", "first"]
    assert rows[2].startswith("| odd (not compared: other photographs or labels, or no value)")


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_a_value_that_is_no_number_never_wins(metric):
    assert choose([trained("diverged", float("nan")), trained("b", 0.9)], metric).name == "b"


def test_each_metric_is_read_from_the_validation_split():
    """Ten defects of which one escapes, ten good pieces of which two are rejected."""
    truth = np.array([0] * 10 + [1] * 10)
    said = np.array([1] + [0] * 9 + [0] * 2 + [1] * 8)
    probabilities = np.where(np.arange(2) == said[:, None], 0.9, 0.1)
    evaluation = {
        "validation": evaluate(probabilities, truth, RULE).as_dict(),
        "calibration": {"nll_before": 0.7, "nll_after": 0.31},
    }
    costs = ThresholdRule(rule="cost", miss_cost=50, overkill_cost=2)
    expected = {
        "loss": 0.31,
        "accuracy": 17 / 20,
        "balanced_accuracy": (9 / 10 + 8 / 10) / 2,
        "precision": 9 / 11,
        "recall": 9 / 10,
        "f1": 18 / 21,
        "escape_bound": 0.39416,  # 1 of 10: the 95 % point of Beta(2, 9)
        "cost": 1 * 50 + 2 * 2,
    }
    for metric, value in expected.items():
        assert value_of(metric, evaluation, costs) == pytest.approx(value, abs=1e-5), metric


def test_a_metric_of_defects_needs_a_threshold():
    rule = DecisionRule(("a", "b"))
    evaluation = {"validation": evaluate(np.eye(2), np.array([0, 1]), rule).as_dict()}
    with pytest.raises(ValueError, match="the metric cost needs a threshold"):
        value_of("cost", evaluation, ThresholdRule())


def test_costs_are_compared_at_one_price():
    dear = Candidate(name="dear", overrides={"threshold.miss_cost": 99.0})
    scenario = Scenario(candidates=(Candidate(name="plain"), dear), metric="cost")
    with pytest.raises(ValueError, match=r"at one price .* \[\(10.0, 1.0\), \(99.0, 1.0\)\]"):
        configurations(scenario, CONFIG)
    assert len(configurations(scenario.model_copy(update={"metric": "recall"}), CONFIG)) == 2


def test_the_digest_of_an_evaluation_is_that_of_its_photographs_and_labels_in_any_order():
    def reference(sha256, labels):
        empty = np.zeros((len(labels), 1), np.float32)
        return Reference(empty, empty, np.array(labels), np.array(sha256), None)

    assert evaluated_on(reference(["a", "b"], [0, 1])) == evaluated_on(reference(["b", "a"], [1, 0]))
    assert evaluated_on(reference(["a", "b"], [0, 1])) != evaluated_on(reference(["a", "b"], [1, 1]))
    assert evaluated_on(reference(["a", "b"], [0, 1])) != evaluated_on(reference(["a", "c"], [0, 1]))
