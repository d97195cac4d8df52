"""The one rule that turns probabilities into a label: used by training, gates, drift and the served front door alike.

numpy only, because the serving environment imports it too.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class DecisionRule:
    """How one model version decides.

    labels: class names in the order of the network's outputs.
    defect_labels: those among them that count as a defect; empty for a plain multi-class task.
    threshold: operating point on the defect score in (0, 1); None exactly when there are no defect labels.
    """

    labels: tuple[str, ...]
    defect_labels: tuple[str, ...] = ()
    threshold: float | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.defect_labels) - set(self.labels))
        if unknown:
            raise ValueError(f"defect labels {unknown} are not among the labels {list(self.labels)}")
        if self.defect_labels and set(self.defect_labels) == set(self.labels):
            raise ValueError(f"every label of {list(self.labels)} is a defect: nothing would be left to pass as good")
        if bool(self.defect_labels) != (self.threshold is not None):
            raise ValueError("a threshold belongs to a rule with defect labels, and only to such a rule")
        if self.threshold is not None and not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold {self.threshold} is outside (0, 1)")

    @property
    def defect_mask(self) -> NDArray[np.bool_]:
        """[C] bool: which outputs are defects."""
        return np.array([label in self.defect_labels for label in self.labels], dtype=bool)


def score(probabilities: NDArray[Any], rule: DecisionRule) -> NDArray[np.float32]:
    """[N, C] probabilities -> [N] score: the defect probability, or the top probability where nothing is a defect."""
    probabilities = np.asarray(probabilities, dtype=np.float32)
    if rule.threshold is None:
        top: NDArray[np.float32] = probabilities.max(axis=1)
        return top
    defect: NDArray[np.float32] = probabilities[:, rule.defect_mask].sum(axis=1, dtype=np.float32)
    return defect


def decide(probabilities: NDArray[Any], rule: DecisionRule) -> NDArray[np.int64]:
    """[N, C] -> [N] label index: from the threshold on the likeliest defect, below it the likeliest good."""
    probabilities = np.asarray(probabilities, dtype=np.float32)
    if rule.threshold is None:
        likeliest: NDArray[np.int64] = probabilities.argmax(axis=1)
        return likeliest
    is_defect = rule.defect_mask
    defective = score(probabilities, rule) >= np.float32(rule.threshold)
    among_defects = np.where(is_defect, probabilities, -1.0).argmax(axis=1)
    among_good = np.where(is_defect, -1.0, probabilities).argmax(axis=1)
    chosen: NDArray[np.int64] = np.where(defective, among_defects, among_good)
    return chosen
