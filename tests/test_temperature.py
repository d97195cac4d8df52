import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.evaluation import calibration_error
from tasks.model import build_model, image_network
from tasks.temperature import LEAST, MOST, fit_temperature, negative_log_likelihood, softmax


def world(count: int, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and truths drawn from exactly the probabilities that they mean at temperature 1."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (count, classes))
    odds = np.exp(logits)
    edges = np.cumsum(odds / odds.sum(axis=1, keepdims=True), axis=1)
    return logits, np.minimum((edges < random.random((count, 1))).sum(axis=1), classes - 1)


@pytest.mark.parametrize("distortion", [0.4, 1.0, 3.0])
def test_the_temperature_that_distorted_the_scores_is_found_again(distortion):
    logits, truth = world(4000)
    found = fit_temperature(logits * distortion, truth)
    assert found.temperature == pytest.approx(distortion, rel=0.05)
    assert found.nll_after == pytest.approx(negative_log_likelihood(logits, truth), abs=1e-3)


def test_an_overconfident_network_becomes_honest_on_photographs_it_was_not_fitted_on():
    logits, truth = world(3000, seed=1)
    unseen, unseen_truth = world(3000, seed=2)
    temperature = fit_temperature(logits * 4, truth).temperature
    before = calibration_error(softmax(unseen * 4), unseen_truth)
    after = calibration_error(softmax(unseen * 4 / temperature), unseen_truth)
    assert after < 0.25 * before, (before, after)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(2, 5), st.floats(0.01, 40), st.integers(0, 10_000))
def test_it_is_never_worse_than_temperature_one_by_likelihood(count, classes, scale, seed):
    random = np.random.default_rng(seed)
    logits, truth = random.normal(0, scale, (count, classes)), random.integers(0, classes, count)
    found = fit_temperature(logits, truth)
    assert LEAST <= found.temperature <= MOST
    assert found.nll_before == pytest.approx(negative_log_likelihood(logits, truth))
    assert found.nll_after == pytest.approx(negative_log_likelihood(logits / found.temperature, truth))
    assert found.nll_after <= found.nll_before


@pytest.mark.parametrize("count", [20, 60, 400])
def test_photographs_that_all_are_right_do_not_make_scores_of_exactly_one(count):
    truth = np.arange(count) % 2
    logits = 2.0 * np.eye(2)[truth]
    found = fit_temperature(logits, truth)
    sureness = softmax(logits / found.temperature).max()
    assert 1 / (2 * count) < 1 - sureness < 1 - softmax(logits).max() + 1e-6, "as sure as so many photographs allow"


def test_logits_far_apart_give_finite_likelihoods():
    found = fit_temperature(np.array([[2000.0, 0.0], [0.0, 2000.0], [900.0, 0.0]]), np.array([0, 1, 1]))
    assert found.temperature == pytest.approx(MOST, rel=0.01) and np.isfinite(found.nll_after)


def test_what_is_left_after_calibration_does_not_depend_on_how_sure_the_network_was():
    random = np.random.default_rng(0)
    truth = random.integers(3, size=300)
    logits = np.eye(3)[truth] + random.normal(0, 1, (300, 3))
    left = [fit_temperature(sureness * logits, truth).nll_after for sureness in (0.5, 1, 4)]
    assert left == pytest.approx([left[0]] * 3, rel=1e-4)
    assert negative_log_likelihood(4 * logits, truth) > 1.5 * left[0]


def test_a_weight_counts_a_photograph_as_often_as_it_says():
    random = np.random.default_rng(1)
    truth = random.integers(2, size=2000)
    logits, weights = 3 * random.normal(0, 1, (2000, 2)) + np.eye(2)[truth], 1 + 2 * truth
    weighted = fit_temperature(logits, truth, weights)
    repeated = fit_temperature(np.repeat(logits, weights, axis=0), np.repeat(truth, weights))
    assert weighted.temperature == pytest.approx(repeated.temperature, rel=0.01)
    assert weighted.nll_after == pytest.approx(repeated.nll_after, rel=1e-3)


def test_a_diverged_network_and_an_empty_split_are_named():
    with pytest.raises(ValueError, match="diverged"):
        fit_temperature(np.array([[np.nan, 1.0]]), np.array([0]))
    with pytest.raises(ValueError, match="needs photographs"):
        fit_temperature(np.zeros((0, 2)), np.zeros(0, dtype=int))


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(3)
    made = build_model("cnn", 3, pretrained=False)
    with torch.no_grad():
        made.head.weight *= 20
    return made


def test_the_served_graph_divides_its_logits_and_decides_nothing_else(classifier):
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        plain, embedding = image_network("cnn", classifier).eval()(images)
        warm, same_embedding = image_network("cnn", classifier, temperature=2.5).eval()(images)
        expected = torch.softmax(classifier.head(embedding) / 2.5, dim=1)
    assert torch.equal(embedding, same_embedding)
    torch.testing.assert_close(warm, expected)
    assert torch.equal(plain.argmax(1), warm.argmax(1))
    assert float(warm.max(1).values.mean()) < float(plain.max(1).values.mean()) - 0.01


def test_weights_fit_whatever_the_temperature(classifier):
    assert "temperature" not in image_network("cnn", classifier, temperature=2.5).state_dict()


def test_what_is_exported_for_serving_is_calibrated(classifier, tmp_path):
    import onnxruntime

    from tasks.onnx_export import export_onnx

    network = image_network("cnn", classifier, temperature=2.5).eval()
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    export_onnx(network, 32, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (served,) = session.run(["probabilities"], {"image": images.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(served, network(images)[0].numpy(), atol=1e-5)
        assert np.abs(served - image_network("cnn", classifier).eval()(images)[0].numpy()).max() > 0.01


def test_a_card_from_before_temperatures_means_one():
    import json

    from tasks.decision import DecisionRule
    from tasks.registry import ModelCard

    rule = DecisionRule(("good", "worn"), ("worn",), 0.37)
    card = ModelCard("cnn", 32, "resize-area-v1", (0.5,), (0.5,), rule, "tire", 3, "sha256:ab", "commit", 7, 1.7)
    assert ModelCard.from_json(card.to_json()) == card
    old = {key: value for key, value in json.loads(card.to_json()).items() if key != "temperature"}
    assert ModelCard.from_json(json.dumps(old)).temperature == 1.0
