"""What is chosen on the validation split, and that the test split has no say in it: the flow's own steps on real data."""

import numpy as np
import pyarrow as pa
import pytest

from monitoring.features import STATISTICS
from tasks.decision import decide, score
from tasks.evaluation import choose_threshold
from tasks.judgement import Judged, judge_test, judge_validation, logits_of
from tasks.recipe import Augmentation, ThresholdRule, TrainConfig
from tasks.samples import Samples
from tasks.temperature import softmax
from tasks.training import Trained, train

CLASSES = ("plain", "spotted")
CONFIG = TrainConfig(
    **{"architecture": "cnn", "pretrained": False, "image_size": 16, "epochs": 5, "batch_size": 16},
    **{"learning_rate": 3e-3, "precision": "float32", "augmentation": Augmentation(brightness=0, contrast=0)},
    **{"defect_labels": ("spotted",), "threshold": ThresholdRule(rule="cost", miss_cost=3), "label_smoothing": 0.0},
)


def plates(count: int, seed: int) -> Samples:
    """Noisy grey plates, every second one with a spot so faint that some are missed."""
    random = np.random.default_rng(seed)
    images = random.normal(110, 12, (count, 16, 16, 3))
    labels = np.arange(count) % 2
    for number in np.flatnonzero(labels):
        y, x = random.integers(2, 10, 2)
        images[number, y : y + 4, x : x + 4] += random.uniform(0, 25)
    names = np.array([f"{seed:02}-{n:04}" for n in range(count)])
    return Samples(images.clip(0, 255).astype(np.uint8), labels.astype(np.int64), names)


def rows_of(samples: Samples) -> pa.Table:
    brightness = (samples.images.mean(axis=(1, 2, 3)) / 255).tolist()
    statistics = dict.fromkeys(STATISTICS, brightness)
    told = {"label": [CLASSES[label] for label in samples.labels], "line": [None] * len(samples)}
    return pa.table({"sha256": samples.sha256.tolist(), "batch": ["b"] * len(samples), **told, **statistics})


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train(plates(160, 1), plates(120, 2), CLASSES, CONFIG)


@pytest.fixture(scope="module")
def judged(trained) -> Judged:
    validation = plates(120, 2)
    return judge_validation(trained.network, validation, rows_of(validation), CLASSES, CONFIG)


def test_the_threshold_is_chosen_on_the_scores_that_are_served(judged):
    rule, labels = judged.rule, judged.validation.truth
    calibrated = score(judged.validation.probabilities, rule)
    assert rule.threshold == choose_threshold(calibrated, rule.defect_mask[labels], CONFIG.threshold)
    assert judged.calibration.temperature != 1.0, "otherwise this test shows nothing"
    bare = choose_threshold(score(judged.validation.uncalibrated, rule), rule.defect_mask[labels], CONFIG.threshold)
    assert bare != pytest.approx(rule.threshold, abs=1e-3)


def test_the_finding_is_what_the_served_network_answers(judged):
    import torch

    with torch.inference_mode():
        probabilities = judged.network(torch.from_numpy(plates(120, 2).images))[0].numpy()
    np.testing.assert_allclose(judged.validation.probabilities, probabilities, atol=1e-5)
    np.testing.assert_array_equal(judged.validation.decided, decide(probabilities, judged.rule))


def test_calibration_never_costs_likelihood_and_keeps_every_ranking(judged):
    assert judged.calibration.nll_after < judged.calibration.nll_before
    before, after = judged.validation.uncalibrated, judged.validation.probabilities
    np.testing.assert_array_equal(before.argmax(axis=1), after.argmax(axis=1))
    assert judged.validation.evaluation.auc == pytest.approx(_auc(before, judged), abs=1e-9)


def _auc(probabilities: np.ndarray, judged: Judged) -> float:
    from tasks.evaluation import rank_auc

    is_defect = judged.rule.defect_mask[judged.validation.truth]
    return rank_auc(score(probabilities, judged.rule), is_defect)


def test_the_test_split_is_judged_by_what_was_chosen_before(judged):
    test = plates(80, 3)
    found = judge_test(judged, test, rows_of(test))
    logits = logits_of(judged.network, _embedding(judged, test))
    np.testing.assert_allclose(found.probabilities, softmax(logits / judged.calibration.temperature), atol=1e-5)
    assert found.rule is judged.rule and found.evaluation.operating.threshold == judged.rule.threshold
    assert {part.column for part in found.slices} == {"label", *STATISTICS}


def _embedding(judged: Judged, samples: Samples) -> np.ndarray:
    from tasks.training import predict

    return predict(judged.network, samples.images)["embedding"]


def test_rows_of_other_photographs_are_refused(trained):
    validation = plates(120, 2)
    with pytest.raises(RuntimeError, match="not those of its photographs"):
        judge_validation(trained.network, validation, rows_of(plates(120, 9)), CLASSES, CONFIG)
