"""How far apart two samples are, and how far apart two samples of one population get by chance.

A distance means nothing by itself: between 50 photographs and 400 it is large without any drift. So the thresholds come from
the training reference alone: windows of the production size are drawn from it, compared with references drawn from it, and the
distances that so few of them exceed as the stated false-alarm rate allows are the thresholds (a bootstrap of the two-sample
null; Efron and Tibshirani 1993, chapter 16). The rate holds for a whole comparison, not for each of its distances: they are
drawn together, so that what moves together (brightness, red, green, blue) is not paid for several times (min-p of Westfall
and Young 1993).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from monitoring.features import STATISTICS

Floats = NDArray[np.float32]

SCORE, LABELS, EMBEDDING = "score", "labels", "embedding"
DISTANCES: Final = (*STATISTICS, SCORE, LABELS, EMBEDDING)
DRAWS: Final = 4000  # at a rate of 0.01 and a dozen distances, each threshold still stands on several draws above it
LEAST_SHARE: Final = 0.1  # a shift of less than a tenth of the photographs is never called drift, however certain it is
MAX_ROWS: Final = 1000  # of either side: bounds the kernel (8 MB) and the draws (seconds)
_CHUNK: Final = 500  # draws at once


@dataclass(frozen=True)
class Sample:
    """Photographs as numbers, one row each: the training reference, or a window of production.

    Rows of a window stand in order of time. statistics: float32 [N, len(STATISTICS)]. embedding: float32 [N, D].
    score: float32 [N], the defect probability (the top one where no class is a defect). label: int64 [N], the decided class,
    an index of `labels`. truth: int64 [N], the class a person gave; None for production. defects: labels that are defects.
    """

    statistics: Floats
    embedding: Floats
    score: Floats
    label: NDArray[np.int64]
    labels: tuple[str, ...]
    defects: tuple[str, ...] = ()
    truth: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        rows = {len(self.statistics), len(self.embedding), len(self.score), len(self.label)}
        if len(rows) != 1 or self.statistics.shape[1:] != (len(STATISTICS),):
            raise ValueError(
                f"a sample has one row a photograph: statistics {self.statistics.shape}, embedding {self.embedding.shape}, "
                f"score {self.score.shape}, label {self.label.shape}"
            )

    def __len__(self) -> int:
        return len(self.label)

    @property
    def numbers(self) -> Floats:
        """[N, K]: the statistics and the score, each compared by its own distribution."""
        return np.column_stack([self.statistics, self.score]).astype(np.float32)

    def rows(self, which: NDArray[Any]) -> "Sample":
        """Some of the rows, by index or mask."""
        arrays = ("statistics", "embedding", "score", "label", "truth")
        return replace(self, **{name: value[which] for name in arrays if (value := getattr(self, name)) is not None})


def largest_gap(reference: Floats, window: Floats, weights: NDArray[Any] | None = None) -> float:
    """Kolmogorov-Smirnov distance [0, 1]: the greatest difference between the shares below any value.

    weights [N] of the reference rows, any scale; None: equal.
    """
    both = np.concatenate([reference, window])
    mass = np.ones(len(reference)) if weights is None else np.asarray(weights, dtype=np.float64)
    steps = np.concatenate([-mass / mass.sum(), np.full(len(window), 1 / len(window))])
    order = np.argsort(both, kind="stable")
    return float(np.abs(np.cumsum(steps[order])[_ends(both[order])]).max())


def label_gap(reference: Sample, window: Sample, weights: NDArray[Any] | None = None) -> float:
    """Total variation distance [0, 1] between the shares of the decided labels."""
    before = np.bincount(reference.label, weights, minlength=len(reference.labels))
    after = np.bincount(window.label, minlength=len(reference.labels))
    return float(np.abs(before / before.sum() - after / after.sum()).sum() / 2)


@dataclass(frozen=True)
class Kernel:
    """A Gaussian kernel on embeddings; its width is the median distance within the reference.

    In all dimensions: a projection fitted on the reference would flatter the reference and make every window look strange.
    """

    gamma: float

    @classmethod
    def of(cls, reference: Floats) -> "Kernel":
        squared = _squared_distances(reference, reference)[np.triu_indices(len(reference), 1)]
        median = float(np.median(squared)) if len(squared) else 0.0
        return cls(1 / median if median > 0 else 1.0)

    def __call__(self, left: Floats, right: Floats) -> NDArray[np.float64]:
        """[N, D], [M, D] -> [N, M] similarities in (0, 1]."""
        return np.asarray(np.exp(-self.gamma * _squared_distances(left, right)))


def embedding_gap(kernel: Kernel, reference: Floats, window: Floats, weights: NDArray[Any] | None = None) -> float:
    """Maximum mean discrepancy (Gretton et al., JMLR 2012), its biased estimate; 0 where both samples are the same."""
    mass = np.ones(len(reference)) if weights is None else np.asarray(weights, dtype=np.float64)
    mass = mass / mass.sum()
    squared = (
        kernel(window, window).mean()
        - 2 * (kernel(window, reference) @ mass).mean()
        + mass @ kernel(reference, reference) @ mass
    )
    return float(np.sqrt(max(0.0, float(squared))))


def distances(
    reference: Sample, window: Sample, kernel: Kernel, weights: NDArray[Any] | None = None
) -> dict[str, float]:
    """One number for each of DISTANCES. weights [N] of the reference rows; None: equal."""
    before, after = reference.numbers, window.numbers
    found = {
        name: largest_gap(before[:, column], after[:, column], weights)
        for column, name in enumerate((*STATISTICS, SCORE))
    }
    found[LABELS] = label_gap(reference, window, weights)
    found[EMBEDDING] = embedding_gap(kernel, reference.embedding, window.embedding, weights)
    return found


def calibrate(
    reference: Sample, size: int, rate: float, kernel: Kernel, draws: int = DRAWS, seed: int = 0
) -> dict[str, float]:
    """Threshold for each of DISTANCES: a window of `size` photographs without drift exceeds any of them at `rate`."""
    if not 0 < rate < 1:
        raise ValueError(f"false-alarm rate {rate} is outside (0, 1)")
    if len(reference) < 2 or size < 1:
        raise ValueError(f"{len(reference)} reference rows and a window of {size} tell nothing: see MIN_REFERENCE")
    null = np.concatenate(list(_null_distances(reference, size, kernel, draws, seed)))
    thresholds = np.quantile(null, 1 - _per_distance_rate(null, rate), axis=0, method="higher")
    found = dict(zip(DISTANCES, map(float, thresholds), strict=True))
    # Samples drawn from one reference step at the same values, samples of production between them: half a step of each,
    # without which 60 reference photographs gave 0.071 alarms instead of 0.05 (900 simulated windows of 300).
    half_steps = (1 / len(reference) + 1 / size) / 2
    found |= {name: found[name] + half_steps for name in (*STATISTICS, SCORE)}
    return {name: value if name == EMBEDDING else max(value, LEAST_SHARE) for name, value in found.items()}


def _per_distance_rate(null: NDArray[np.float64], rate: float) -> float:
    """The rate for each distance alone at which they have `rate` together."""
    ranks = np.empty(null.shape)
    for column in range(null.shape[1]):
        values = np.sort(null[:, column])
        ranks[:, column] = 1 - np.searchsorted(values, null[:, column], side="left") / len(values)
    return float(np.quantile(ranks.min(axis=1), rate, method="lower"))


def _null_distances(
    reference: Sample, size: int, kernel: Kernel, draws: int, seed: int
) -> Iterator[NDArray[np.float64]]:
    """Chunks [draws, len(DISTANCES)] of distances between two samples drawn from the reference, with replacement."""
    rng, count = np.random.default_rng(seed), len(reference)
    similarity = kernel(reference.embedding, reference.embedding)
    one_hot = np.eye(len(reference.labels))[reference.label]
    numbers = reference.numbers
    orders = [np.argsort(column, kind="stable") for column in numbers.T]
    ends = [_ends(column[order]) for column, order in zip(numbers.T, orders, strict=True)]
    # Drawn with replacement, a photograph meets itself; two samples of production do not share any.
    meeting_oneself = count / (count - 1)
    for start in range(0, draws, _CHUNK):
        some = min(_CHUNK, draws - start)
        window = _drawn(rng, some, size, count)
        other = _drawn(rng, some, count, count)
        difference = window - other
        found = np.empty((some, len(DISTANCES)))
        for column, (order, end) in enumerate(zip(orders, ends, strict=True)):
            found[:, column] = np.abs(np.cumsum(difference[:, order], axis=1)[:, end]).max(axis=1)
        found[:, -2] = np.abs(difference @ one_hot).sum(axis=1) / 2
        squared = np.einsum("ij,ij->i", difference @ similarity, difference) * meeting_oneself
        found[:, -1] = np.sqrt(np.maximum(squared, 0))
        yield found


def _drawn(rng: np.random.Generator, draws: int, size: int, count: int) -> NDArray[np.float64]:
    """[draws, count]: share of each of `count` rows in samples of `size` drawn with replacement."""
    rows = rng.integers(0, count, (draws, size)) + np.arange(draws)[:, None] * count
    counts = np.bincount(rows.ravel(), minlength=draws * count).reshape(draws, count)
    return np.asarray(counts / size, dtype=np.float64)


def _ends(ordered: NDArray[Any]) -> NDArray[np.bool_]:
    """Mask of the last of each run of equal values."""
    return np.append(ordered[1:] != ordered[:-1], True)


def _squared_distances(left: Floats, right: Floats) -> NDArray[np.float64]:
    a, b = left.astype(np.float64), right.astype(np.float64)  # in float32 equal rows come out apart
    squares: NDArray[np.float64] = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T
    return np.maximum(squares, 0)
