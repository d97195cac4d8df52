"""From a trained network to what is known about it: calibrated, its threshold chosen, each split judged under both.

Everything that is chosen is chosen in `judge_validation`, which is never given a test split.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.decision import DecisionRule, decide, score
from tasks.evaluation import Evaluation, calibration_error, choose_threshold, evaluate
from tasks.recipe import TrainConfig
from tasks.slices import Edges, Slice, slices, thirds
from tasks.temperature import Calibration, fit_temperature, softmax

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.model import ImageNetwork
    from tasks.samples import Samples

Outputs = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Finding:
    """One split, judged as it will be served; photographs in the order of the split's rows.

    probabilities, uncalibrated [N, C]: with the temperature, and as they were without it. decided, truth [N]: label indices.
    """

    split: str
    rule: DecisionRule
    truth: NDArray[np.int64]
    decided: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    uncalibrated: NDArray[np.float32]
    evaluation: Evaluation
    slices: tuple[Slice, ...]

    @property
    def uncalibrated_error(self) -> float:
        """The calibration error that temperature 1 would have had."""
        return calibration_error(self.uncalibrated, self.truth)


@dataclass(frozen=True)
class Judged:
    """A network as it will be served, and what the validation split says about it.

    network: with the temperature inside. outputs: its `probabilities` and `embedding` of the validation split, whose rows
    (every column but the photograph) are `rows`. edges: where the thirds of the image statistics meet.
    """

    network: "ImageNetwork"
    calibration: Calibration
    rule: DecisionRule
    validation: Finding
    outputs: Outputs
    rows: "pa.Table"
    edges: Edges


def judge_validation(
    network: "ImageNetwork", validation: "Samples", rows: "pa.Table", classes: tuple[str, ...], config: TrainConfig
) -> Judged:
    """The temperature first, then the threshold on calibrated scores, then the figures under both."""
    from tasks.model import image_network
    from tasks.training import predict

    outputs = predict(network, validation.images)
    logits = logits_of(network, outputs["embedding"])
    calibration = fit_temperature(logits, validation.labels)
    served = image_network(config.architecture, network.classifier, calibration.temperature).eval()
    outputs["probabilities"] = softmax(logits / calibration.temperature)
    rule = operating_rule(outputs["probabilities"], validation.labels, classes, config)
    edges = thirds(rows)
    finding = _finding("validation", rule, validation, rows, edges, outputs["probabilities"], softmax(logits))
    return Judged(served, calibration, rule, finding, outputs, rows, edges)


def judge_test(judged: Judged, test: "Samples", rows: "pa.Table") -> Finding:
    """The one look at the test split, when network, temperature and threshold are final."""
    from tasks.training import predict

    outputs = predict(judged.network, test.images)
    uncalibrated = softmax(logits_of(judged.network, outputs["embedding"]))
    return _finding("test", judged.rule, test, rows, judged.edges, outputs["probabilities"], uncalibrated)


def _finding(
    split: str,
    rule: DecisionRule,
    samples: "Samples",
    rows: "pa.Table",
    edges: Edges,
    probabilities: NDArray[np.float32],
    uncalibrated: NDArray[np.float32],
) -> Finding:
    if rows.column("sha256").to_pylist() != samples.sha256.tolist():
        raise RuntimeError(
            f"the rows of the {split} split are not those of its photographs: the version was read twice"
        )
    decided = decide(probabilities, rule)
    return Finding(
        split=split,
        rule=rule,
        truth=samples.labels,
        decided=decided,
        probabilities=probabilities,
        uncalibrated=uncalibrated,
        evaluation=evaluate(probabilities, samples.labels, rule),
        slices=slices(decided, samples.labels, rule, rows, edges),
    )


def operating_rule(
    probabilities: NDArray[Any], truth: NDArray[np.int64], classes: tuple[str, ...], config: TrainConfig
) -> DecisionRule:
    """How this version decides: the threshold by the recipe's rule where there are defects, else the likeliest class."""
    if not config.defect_labels:
        return DecisionRule(classes)
    half = DecisionRule(classes, config.defect_labels, 0.5)
    threshold = choose_threshold(score(probabilities, half), half.defect_mask[truth], config.threshold)
    return DecisionRule(classes, config.defect_labels, threshold)


def logits_of(network: "ImageNetwork", embedding: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, D] embeddings -> [N, C] logits, before any temperature. From probabilities they would be lost where those are 0."""
    import torch

    with torch.inference_mode():
        logits: NDArray[np.float32] = network.classifier.head(torch.from_numpy(embedding)).numpy()
    return logits
