"""Which labels are probably wrong: confident learning on out-of-sample probabilities. Pure: arrays in, values out.

Northcutt, Jiang, Chuang: Confident Learning (JAIR 70, 2021), by their library cleanlab. What makes it honest is the cross
validation: a photograph is judged by models that saw neither it nor another photograph of its group.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float32]
Probabilities = NDArray[np.float64]
# judge(rest, held): learns from the rows `rest`, gives probabilities [len(held), C] of the rows `held`.
Judge = Callable[[NDArray[np.int64], NDArray[np.int64]], Probabilities]

STRENGTHS: Final = (1e-3, 1e-2, 1e-1)  # inverse strengths of the ridge that are tried
_DRAWS: Final = 20
_FLOOR: Final = 1e-9  # least probability in a log loss


@dataclass(frozen=True)
class NoisePair:
    """Photographs that are labelled `given` and probably are `likely`: how many, and their share of all labelled `given`."""

    given: str
    likely: str
    photographs: float
    share: float


@dataclass(frozen=True)
class Opinion:
    """What the probabilities say about each given label.

    order int [N]: rows, the most doubtful label first. quality float [N]: 0 (wrong) to 1 (right), for the order only.
    suspect bool [N]: beyond doubt by confident learning. suggested int [N]: the likeliest class but the given one.
    noise: class pairs by estimated photographs, most first; error_rate: their sum over all photographs.
    agreement: share of the labels that are the likeliest class.
    """

    order: NDArray[np.int64]
    quality: NDArray[np.float64]
    suspect: NDArray[np.bool_]
    suggested: NDArray[np.int64]
    noise: tuple[NoisePair, ...]
    error_rate: float
    agreement: float


def groups_needed(folds: int, left: int = 1) -> int:
    """The fewest groups of a class, spread evenly, of which `left` remain whichever of the folds is held out."""
    return next(groups for groups in count(left + 1) if groups - math.ceil(groups / folds) >= left)


def require_judgeable(
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    classes: Sequence[str],
    needed: int = 2,
    more_splits: bool = True,
) -> None:
    """ValueError, before any work, for labels that no cross validation can judge; it names the class and what is missing.

    needed: groups of each class. more_splits: whether the dataset has splits that are not reviewed.
    """
    if len(classes) < 2:
        raise ValueError(f"the only class is {list(classes)}: a label can only be doubted where there is another one")
    for number, name in enumerate(classes):
        found = len(np.unique(groups[labels == number]))
        if found < needed:
            remedies = ["add photographs of it"]
            remedies += ["review more splits"] if more_splits else []
            remedies += ["set judge to pretrained, which needs 2"] if found >= 2 else []
            raise ValueError(
                f"class {name!r} has photographs of {found} group(s): to judge a label by the others of its class needs "
                f"{needed} at least, so {', or '.join(remedies)}"
            )


def folds_of(
    labels: NDArray[np.int64], groups: NDArray[np.int64], folds: int, seed: int, left: int = 1
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(rest, held out) rows of each fold: whole groups, the classes in about equal shares, `left` groups at least of each class
    in every rest. ValueError where that cannot be.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    most = min(folds, len(np.unique(groups)), int(np.bincount(labels).max()))
    pairs = np.unique(np.stack([labels, groups], axis=1), axis=0)  # which class has photographs in which group

    def left_without(held: NDArray[np.int64]) -> int:
        rest = pairs[~np.isin(pairs[:, 1], groups[held]), 0]
        return min(int((rest == label).sum()) for label in np.unique(labels))

    for attempt in range(_DRAWS):  # all groups of a rare class may fall into one fold: then the folds are drawn anew
        cut = StratifiedGroupKFold(most, shuffle=True, random_state=seed + 1000 * attempt)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a class of fewer photographs than folds is no fault
            drawn = list(cut.split(np.zeros(len(labels)), labels, groups))
        if all(len(held) and left_without(held) >= left for _, held in drawn):
            return iter(drawn)
    fewest = min(np.unique(pairs[:, 0], return_counts=True)[1])
    raise ValueError(
        f"{len(np.unique(groups))} groups cannot be divided into {most} folds that leave {left} of every class to learn from; "
        f"the rarest class has {fewest}: add photographs of it" + (", or ask for more folds" if most == folds else "")
    )


def cross_validated(
    labels: NDArray[np.int64], groups: NDArray[np.int64], classes: int, folds: int, seed: int, judge: Judge
) -> Probabilities:
    """[N, C] out of sample: `judge(rest, held)` learns from the rows `rest` and gives probabilities of the rows `held`."""
    found = np.full((len(labels), classes), np.nan)
    for rest, held in folds_of(labels, groups, folds, seed):
        found[held] = judge(rest, held)
    return found


def by_features(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    classes: int,
    folds: int,
    rounds: int,
    seed: int,
) -> tuple[Probabilities, float]:
    """[N, C] out of sample by a ridge logistic regression on features [N, D], and the strength that was taken: the one with the
    least out-of-sample log loss. The mean over `rounds` draws of the folds.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    # Pooled activations are skewed: by their roots 1-3 points more planted flips are found (docs/labels.md).
    rooted = (np.sign(features) * np.sqrt(np.abs(features))).astype(np.float32)

    def probabilities(strength: float, draw: int) -> Probabilities:
        judge = _ridge(rooted, labels, classes, strength)
        return cross_validated(labels, groups, classes, folds, seed + draw, judge)

    with threadpool_limits(
        1
    ):  # the fits are small: on a busy machine threads that wait for each other took ten times as long
        first = {strength: probabilities(strength, 0) for strength in STRENGTHS}
        best = min(first, key=lambda strength: _log_loss(first[strength], labels))
        others = [probabilities(best, draw) for draw in range(1, rounds)]
    return np.mean([first[best], *others], axis=0), best


def _ridge(features: NDArray[np.float32], labels: NDArray[np.int64], classes: int, strength: float) -> Judge:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def judge(rest: NDArray[np.int64], held: NDArray[np.int64]) -> Probabilities:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=400))
        model.fit(features[rest], labels[rest])
        found = np.zeros((len(held), classes))
        found[:, model[-1].classes_] = model.predict_proba(features[held])
        return found

    return judge


def _log_loss(probabilities: Probabilities, labels: NDArray[np.int64]) -> float:
    own = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(own, _FLOOR)).mean())


def opinion(labels: NDArray[np.int64], probabilities: Probabilities, classes: Sequence[str]) -> Opinion:
    """What out-of-sample probabilities [N, C] say about labels [N], of which every class has some.

    Raises ValueError for probabilities that are none.
    """
    from cleanlab.count import compute_confident_joint, estimate_joint  # type: ignore[import-untyped]
    from cleanlab.filter import find_label_issues  # type: ignore[import-untyped]
    from cleanlab.rank import get_label_quality_scores  # type: ignore[import-untyped]

    if probabilities.shape != (len(labels), len(classes)) or not np.allclose(probabilities.sum(axis=1), 1, atol=1e-3):
        raise ValueError(
            f"probabilities of shape {probabilities.shape} that add up to 1 in every row were expected for {len(labels)} "
            f"labels of {len(classes)} classes"
        )
    confident = compute_confident_joint(labels, probabilities)
    joint = estimate_joint(labels, probabilities, confident_joint=confident)
    quality = get_label_quality_scores(labels, probabilities, method="self_confidence")
    suspect = find_label_issues(
        labels, probabilities, confident_joint=confident, filter_by="prune_by_noise_rate", n_jobs=1
    )
    others = probabilities.copy()
    others[np.arange(len(labels)), labels] = -1
    return Opinion(
        order=np.lexsort((np.arange(len(labels)), quality)),
        quality=quality,
        suspect=suspect,
        suggested=others.argmax(axis=1),
        noise=_noise(joint, len(labels), classes),
        error_rate=float(1 - np.trace(joint)),
        agreement=float((probabilities.argmax(axis=1) == labels).mean()),
    )


def _noise(joint: Probabilities, photographs: int, classes: Sequence[str]) -> tuple[NoisePair, ...]:
    """The pairs of different classes out of the joint distribution of given (rows) and true (columns) labels."""
    pairs = [
        NoisePair(given, likely, float(joint[row, column] * photographs), float(joint[row, column] / joint[row].sum()))
        for row, given in enumerate(classes)
        for column, likely in enumerate(classes)
        if row != column and joint[row, column] > 0
    ]
    return tuple(sorted(pairs, key=lambda pair: (-pair.photographs, pair.given, pair.likely)))
