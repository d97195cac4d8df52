import numpy as np
import pytest

from tasks.decision import DecisionRule
from tasks.parity import compare, golden_indices

RULE = DecisionRule(("defective", "good"), ("defective",), 0.5)


def binary(scores):
    scores = np.asarray(scores, dtype=np.float32)
    return np.stack([scores, 1 - scores], axis=1)


def test_differences_and_flips_are_counted():
    rung = compare("onnx", binary([0.2, 0.49, 0.9]), binary([0.2, 0.51, 0.8]), RULE)
    assert (rung.flips, rung.images) == (1, 3)
    assert rung.largest_difference == pytest.approx(0.1, abs=1e-6)
    assert rung.flip_share == pytest.approx(1 / 3)


def test_a_rung_that_answers_with_nan_is_an_error_not_a_pass():
    with pytest.raises(ValueError, match="not finite"):
        compare("onnx", binary([0.2]), binary([float("nan")]), RULE)


def test_a_rung_with_other_images_is_an_error():
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(2, 2\)"):
        compare("onnx", binary([0.2]), binary([0.2, 0.3]), RULE)


def test_golden_images_are_clear_stratified_and_the_same_every_time():
    scores = np.concatenate([np.linspace(0.5, 0.56, 20), np.linspace(0.6, 1.0, 300), np.linspace(0.0, 0.4, 40)])
    labels = ["defective"] * 320 + ["good"] * 40
    chosen = golden_indices(binary(scores), labels, RULE)
    assert len(chosen) == 128
    assert np.array_equal(chosen, golden_indices(binary(scores), labels, RULE))
    assert (np.abs(scores[chosen] - 0.5) >= 0.05 - 1e-6).all()
    assert sum(labels[i] == "good" for i in chosen) == 40  # all of the scarce label, the rest from the other


def test_golden_images_of_a_multi_class_rule_have_a_clear_winner():
    rule = DecisionRule(("a", "b", "c"))
    probabilities = np.array([[0.34, 0.33, 0.33], [0.8, 0.1, 0.1], [0.1, 0.5, 0.4]])
    assert golden_indices(probabilities, ["a", "a", "b"], rule).tolist() == [1, 2]
