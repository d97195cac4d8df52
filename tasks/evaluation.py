"""How good a model is, with exact bounds, and where its operating threshold lies. Pure: arrays in, numbers out."""

from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tasks.decision import DecisionRule, decide, score
from tasks.recipe import ThresholdRule

Truth = NDArray[np.int64]
Curve = tuple[str, NDArray[np.float32], NDArray[np.bool_]]
CONFIDENCE: Final = 0.95
RELIABILITY_BINS: Final = 15  # those of Guo et al. 2017
MOST_CURVES: Final = 12  # one each; more classes than that are drawn and counted as one pooled curve


@dataclass(frozen=True)
class Figures:
    """Quality of decided labels. precision, recall and f1 are those of finding defects, or class means without defects."""

    accuracy: float
    balanced_accuracy: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class OperatingPoint:
    """What the line feels: defects let through (escapes) and good parts rejected (over-kill).

    The upper values are exact one-sided 95 % bounds (Clopper and Pearson 1934).
    """

    threshold: float
    defects: int
    escapes: int
    escape_rate: float
    escape_upper: float
    good: int
    overkills: int
    overkill_rate: float
    overkill_upper: float


@dataclass(frozen=True)
class Evaluation:
    """One model on one split. confusion[i][j]: photographs of class i decided as class j, classes in order of labels."""

    count: int
    labels: tuple[str, ...]
    figures: Figures
    auc: float
    average_precision: float
    brier: float
    calibration_error: float
    confusion: tuple[tuple[int, ...], ...]
    operating: OperatingPoint | None

    def as_dict(self) -> dict[str, Any]:
        """For evaluation.json."""
        return asdict(self)


def evaluate(probabilities: NDArray[Any], truth: Truth, rule: DecisionRule) -> Evaluation:
    """[N, C] probabilities and [N] true label indices -> the evaluation under the rule.

    auc and average_precision are those of the defect score, or the means over the classes that occur, each against the rest;
    nan where a side has no photograph.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    _check(probabilities, truth, len(rule.labels))
    decided = decide(probabilities, rule)
    confusion = np.zeros((len(rule.labels), len(rule.labels)), dtype=int)
    np.add.at(confusion, (truth, decided), 1)
    return Evaluation(
        count=len(truth),
        labels=rule.labels,
        figures=figures(truth, decided, rule.defect_mask),
        auc=_auc(probabilities, truth, rule),
        average_precision=_average_precision(probabilities, truth, rule),
        brier=float(((probabilities - np.eye(len(rule.labels))[truth]) ** 2).sum(axis=1).mean()),
        calibration_error=calibration_error(probabilities, truth),
        confusion=tuple(tuple(int(n) for n in row) for row in confusion),
        operating=operating_point(truth, decided, rule),
    )


def figures(truth: Truth, decided: Truth, defect_mask: NDArray[np.bool_]) -> Figures:
    """Accuracy, balanced accuracy (mean recall of the classes that occur), precision, recall and F1."""
    if len(truth) == 0:
        raise ValueError("there is not one photograph to evaluate: the split is empty")
    recalls = [float(np.mean(decided[truth == label] == label)) for label in np.unique(truth)]
    if defect_mask.any():
        precision, recall, f1 = _detection(defect_mask[truth], defect_mask[decided])
    else:
        per_class = [_detection(truth == label, decided == label) for label in np.unique(truth)]
        precision, recall, f1 = (float(value) for value in np.mean(per_class, axis=0))
    return Figures(
        accuracy=float(np.mean(truth == decided)),
        balanced_accuracy=float(np.mean(recalls)),
        precision=precision,
        recall=recall,
        f1=f1,
    )


def _detection(truth: NDArray[np.bool_], decided: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Precision, recall and F1 of one side; 0 where a denominator is 0."""
    hits = int((truth & decided).sum())
    precision = hits / max(int(decided.sum()), 1)
    recall = hits / max(int(truth.sum()), 1)
    return precision, recall, 2 * hits / max(int(decided.sum() + truth.sum()), 1)


def upper_bound(events: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """Exact one-sided upper bound of a rate (Clopper and Pearson 1934): 0 of 60 gives 0.049, 0 of 0 gives 1."""
    from scipy.stats import beta

    if not 0 <= events <= trials:
        raise ValueError(f"{events} events in {trials} trials cannot be")
    return 1.0 if events == trials else float(beta.ppf(confidence, events + 1, trials - events))


@dataclass(frozen=True)
class Reliability:
    """The top probability in equal bins: photographs, mean probability and share of right answers of each bin that has any."""

    count: NDArray[np.int64]
    confidence: NDArray[np.float64]
    right: NDArray[np.float64]


def reliability(probabilities: NDArray[Any], truth: Truth, bins: int = RELIABILITY_BINS) -> Reliability:
    """What a reliability diagram draws (Guo et al. 2017)."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == truth
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    sums = (np.bincount(bin_of, weights=values, minlength=bins) for values in (confidence, right))
    mean_confidence, mean_right = (total[count > 0] / count[count > 0] for total in sums)
    return Reliability(count[count > 0], mean_confidence, mean_right)


def calibration_error(probabilities: NDArray[Any], truth: Truth) -> float:
    """Expected calibration error: how far the bins' right answers are from their probabilities, weighed by photographs."""
    found = reliability(probabilities, truth)
    return float(np.average(np.abs(found.right - found.confidence), weights=found.count))


def rank_auc(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve by the rank sum, ties counting half; nan without both sides."""
    from scipy.stats import rankdata

    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return float("nan")
    rank_sum = float(rankdata(scores)[positive].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def curves(probabilities: NDArray[Any], truth: Truth, rule: DecisionRule) -> tuple[Curve, ...]:
    """What ROC and precision-recall are drawn of: the defect score, or each class against the rest; name, scores, positive."""
    if rule.defect_labels:
        return (("defect", score(probabilities, rule), rule.defect_mask[truth]),)
    if len(rule.labels) > MOST_CURVES:
        pooled = np.eye(len(rule.labels), dtype=bool)[truth]
        return (("all classes pooled", np.asarray(probabilities, dtype=np.float32).ravel(), pooled.ravel()),)
    scores = np.asarray(probabilities, dtype=np.float32)
    return tuple((rule.labels[label], scores[:, label], truth == label) for label in np.unique(truth))


def _average_precision(probabilities: NDArray[Any], truth: Truth, rule: DecisionRule) -> float:
    """Area under the precision-recall curve, summed without interpolation."""
    from sklearn.metrics import average_precision_score

    if rule.defect_labels:
        is_defect = rule.defect_mask[truth]
        if not is_defect.any():
            return float("nan")
        return float(average_precision_score(is_defect, score(probabilities, rule)))
    present = np.unique(truth)
    return float(np.mean([average_precision_score(truth == label, probabilities[:, label]) for label in present]))


def _auc(probabilities: NDArray[Any], truth: Truth, rule: DecisionRule) -> float:
    if rule.defect_labels:
        return rank_auc(score(probabilities, rule), rule.defect_mask[truth])
    present = np.unique(truth)
    return float(np.mean([rank_auc(probabilities[:, label], truth == label) for label in present]))


def operating_point(truth: Truth, decided: Truth, rule: DecisionRule) -> OperatingPoint | None:
    """Escapes and over-kill of decided label indices; None for a rule without defects."""
    if rule.threshold is None:
        return None
    is_defect, rejected = rule.defect_mask[truth], rule.defect_mask[decided]
    defects, good = int(is_defect.sum()), int((~is_defect).sum())
    escapes, overkills = int((is_defect & ~rejected).sum()), int((~is_defect & rejected).sum())
    return OperatingPoint(
        threshold=rule.threshold,
        defects=defects,
        escapes=escapes,
        escape_rate=escapes / defects if defects else float("nan"),
        escape_upper=upper_bound(escapes, defects),
        good=good,
        overkills=overkills,
        overkill_rate=overkills / good if good else float("nan"),
        overkill_upper=upper_bound(overkills, good),
    )


def require_both_sides(is_defect: NDArray[np.bool_]) -> tuple[int, int]:
    """Defects and good parts of the validation split. Raises ValueError when one side is missing: without defects any threshold
    looks perfect, and picking the lowest would reject everything (anomalib#2433).
    """
    defects, good = int(is_defect.sum()), int((~is_defect).sum())
    if not defects or not good:
        raise ValueError(
            f"the validation split holds {defects} defects and {good} good parts: an operating threshold needs both; "
            "add labelled photographs of the missing side"
        )
    return defects, good


def choose_threshold(scores: NDArray[Any], is_defect: NDArray[np.bool_], rule: ThresholdRule) -> float:
    """Operating threshold in (0, 1) for [N] defect scores of the validation split.

    Candidates lie half-way between neighbouring scores, so no photograph sits on the threshold; among equally good ones the
    one nearest to 0.5. For both accuracy rules "equally good" means within one standard error of the best (Breiman et al.
    1984): the peak over a few hundred photographs is mostly noise, and on the test splits of our recipes the plain maximum
    lost up to 6 points of accuracy against this choice. A recall that no threshold reaches (defects whose score is 0) gives
    the one that misses least. Raises ValueError when one side is missing.
    """
    defects, good = require_both_sides(is_defect)
    candidates = _candidates(scores)
    missed = np.searchsorted(np.sort(scores[is_defect]), candidates, side="left")
    overkills = good - np.searchsorted(np.sort(scores[~is_defect]), candidates, side="left")
    cost = _cost(rule, missed, overkills, defects, good)
    least = int(cost.argmin())
    tolerance = _standard_error(rule, int(missed[least]), int(overkills[least]), defects, good)
    best = candidates[cost <= cost[least] + tolerance + 1e-12]
    return float(best[np.argmin(np.abs(best - 0.5))])


def _standard_error(rule: ThresholdRule, missed: int, overkills: int, defects: int, good: int) -> float:
    """Of the cost at its minimum, for the rules whose cost is a rate of errors; the others keep their word exactly."""
    if rule.rule == "accuracy":
        errors, count = missed + overkills, defects + good
        return float(np.sqrt(errors * (count - errors) / count))
    if rule.rule == "balanced_accuracy":
        return float(np.sqrt(missed * (defects - missed) / defects**3 + overkills * (good - overkills) / good**3))
    return 0.0


def _candidates(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Thresholds that split the scores in every possible way and stay exact when stored as float32."""
    edges = np.unique(np.concatenate([[0.0], np.asarray(scores, dtype=np.float64), [1.0]]))
    middles = ((edges[:-1] + edges[1:]) / 2).astype(np.float32).astype(np.float64)
    inside = middles[(middles > 0) & (middles < 1)]
    return np.unique(np.concatenate([inside, [0.5]]))


def _cost(
    rule: ThresholdRule, missed: NDArray[Any], overkills: NDArray[Any], defects: int, good: int
) -> NDArray[np.float64]:
    """What each candidate costs under the rule; the least is chosen."""
    if rule.rule == "accuracy":
        return np.asarray(missed + overkills, dtype=np.float64)
    if rule.rule == "balanced_accuracy":
        return np.asarray(missed / defects + overkills / good, dtype=np.float64)
    if rule.rule == "cost":
        return np.asarray(rule.miss_cost * missed + rule.overkill_cost * overkills, dtype=np.float64)
    too_many = (defects - missed) / defects < rule.recall
    return np.where(too_many, (good + 1.0) * missed, overkills)


def _check(probabilities: NDArray[Any], truth: Truth, classes: int) -> None:
    if probabilities.shape != (len(truth), classes):
        raise ValueError(
            f"{len(truth)} labels of {classes} classes do not fit probabilities of shape {probabilities.shape}"
        )
    if not np.isfinite(probabilities).all():
        raise ValueError("the probabilities hold values that are not finite: the model has diverged")
