"""A window of production against the training reference of the version that served it: the verdict, by name and number.

Three views, one verdict: statistics of the photographs, the embedding of the network, its answers. All are compared by the
same distances, against thresholds calibrated for exactly this reference and this window size (calibration.py).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from monitoring.calibration import (
    DISTANCES,
    EMBEDDING,
    LABELS,
    SCORE,
    Kernel,
    Sample,
    calibrate,
    distances,
    largest_gap,
)
from monitoring.causes import Cause, find_causes
from monitoring.features import STATISTICS

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["quiet", "drifted", "insufficient"]

MIN_REFERENCE: Final = 30  # rows; fewer cannot say what is usual


@dataclass(frozen=True)
class Measure:
    """One distance against its threshold. reference, window: medians of a number; None where there is none to give."""

    name: str
    score: float
    threshold: float
    drifted: bool
    reference: float | None = None
    window: float | None = None


@dataclass(frozen=True)
class DriftResult:
    """What was found about a window of `window` photographs against a reference of `reference`.

    false_alarm_rate: of the whole comparison. statistics: of the photographs, outputs: of the answers. Without enough
    photographs nothing is compared: `embedding` is None then, `reason` says what is missing.
    """

    verdict: Verdict
    window: int
    reference: int
    false_alarm_rate: float
    statistics: tuple[Measure, ...] = ()
    embedding: Measure | None = None
    outputs: tuple[Measure, ...] = ()
    causes: tuple[Cause, ...] = ()
    reason: str = ""

    @property
    def measures(self) -> tuple[Measure, ...]:
        """All of them, as far beyond their thresholds as they are, the farthest first."""
        found = (*self.statistics, *((self.embedding,) if self.embedding else ()), *self.outputs)
        return tuple(sorted(found, key=lambda each: -each.score / each.threshold))

    @property
    def score(self) -> float:
        """The greatest distance in units of its threshold: above 1 is drift; 0 where nothing was compared."""
        return max((each.score / each.threshold for each in self.measures), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "score": self.score}


def compare(reference: Sample, window: Sample, false_alarm_rate: float, minimum: int) -> DriftResult:
    """The verdict on a window; `insufficient`, and nothing else, when one side has too few photographs.

    Both sides of at most calibration.MAX_ROWS rows, the window in order of time.
    """
    missing = too_few(len(window), len(reference), minimum)
    if missing:
        return DriftResult("insufficient", len(window), len(reference), false_alarm_rate, reason=missing)
    kernel = Kernel.of(reference.embedding)
    thresholds = calibrate(reference, len(window), false_alarm_rate, kernel)
    found = distances(reference, window, kernel)
    measures = {name: _measure(name, reference, window, found[name], thresholds[name]) for name in DISTANCES}
    drifted = any(each.drifted for each in measures.values())
    return DriftResult(
        verdict="drifted" if drifted else "quiet",
        window=len(window),
        reference=len(reference),
        false_alarm_rate=false_alarm_rate,
        statistics=tuple(measures[name] for name in STATISTICS),
        embedding=measures[EMBEDDING],
        outputs=(measures[SCORE], measures[LABELS]),
        causes=find_causes(reference, window, thresholds, kernel) if drifted else (),
    )


def too_few(window: int, reference: int, minimum: int) -> str:
    """What is missing for a verdict, as a sentence; empty when nothing is."""
    if window < minimum:
        return f"{window} photographs were captured, {minimum} are needed."
    if reference < MIN_REFERENCE:
        return f"The training reference has {reference} photographs, {MIN_REFERENCE} are needed: enlarge the val split."
    return ""


def _measure(name: str, reference: Sample, window: Sample, score: float, threshold: float) -> Measure:
    before, after = (_typical(name, each) for each in (reference, window))
    return Measure(name, score, threshold, score > threshold, before, after)


def _typical(name: str, sample: Sample) -> float | None:
    if name in STATISTICS:
        return float(np.median(sample.statistics[:, STATISTICS.index(name)]))
    if name == SCORE:
        return float(np.median(sample.score))
    if name == LABELS and sample.defects:
        return float(np.isin(sample.labels, sample.defects)[sample.label].mean())
    return None


@dataclass(frozen=True)
class Exemplars:
    """Rows worth looking at, the most telling first: typical and unusual ones of both sides."""

    training_typical: NDArray[np.int64]
    training_unusual: NDArray[np.int64]
    production_typical: NDArray[np.int64]
    production_unusual: NDArray[np.int64]


def exemplars(reference: Sample, window: Sample, each: int = 8) -> Exemplars:
    """Typical: most similar to its own side. Unusual in training: least similar to it; in production: most similar to the
    window and least to training (the witness function of the mean discrepancy).
    """
    kernel = Kernel.of(reference.embedding)
    own = kernel(reference.embedding, reference.embedding).mean(axis=1)
    to_window = kernel(window.embedding, window.embedding).mean(axis=1)
    witness = to_window - kernel(window.embedding, reference.embedding).mean(axis=1)
    return Exemplars(*(np.argsort(values, kind="stable")[:each] for values in (-own, own, -to_window, -witness)))


def save_evidently(reference: Sample, window: Sample, result: DriftResult, path: Path) -> None:
    """Evidently's page about the statistics and answers, with our distances and thresholds: both say the same."""
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    _register_distances()
    numbers = [*STATISTICS, SCORE]
    definition = DataDefinition(numerical_columns=numbers, categorical_columns=[LABELS])
    current, before = (Dataset.from_pandas(_frame(each), data_definition=definition) for each in (window, reference))
    preset = DataDriftPreset(
        columns=[*numbers, LABELS],
        num_method="ks_distance",
        cat_method="share_distance",
        per_column_threshold={each.name: each.threshold for each in (*result.statistics, *result.outputs)},
    )
    with np.errstate(invalid="ignore"):  # Evidently correlates columns that may be constant, such as the format
        snapshot = Report([preset], include_tests=True).run(current, before)  # the window first
    snapshot.save_html(str(path))  # with a Path it writes nothing


def _frame(sample: Sample) -> "pd.DataFrame":
    import pandas as pd

    frame = pd.DataFrame(sample.statistics, columns=list(STATISTICS))
    return frame.assign(**{SCORE: sample.score, LABELS: np.array(sample.labels, dtype=object)[sample.label]})


def _register_distances() -> None:
    """Evidently's own methods compare p-values with fixed levels; ours compare distances with calibrated thresholds."""
    from evidently.legacy.calculations.stattests.registry import StatTest, register_stattest
    from evidently.legacy.core import ColumnType

    def by_shape(reference: Any, current: Any, _kind: Any, threshold: float) -> tuple[float, bool]:
        found = largest_gap(np.asarray(reference, np.float32), np.asarray(current, np.float32))
        return found, found > threshold

    def by_shares(reference: Any, current: Any, _kind: Any, threshold: float) -> tuple[float, bool]:
        shares = [each.value_counts(normalize=True) for each in (reference, current)]
        found = float(shares[0].subtract(shares[1], fill_value=0).abs().sum() / 2)
        return found, found > threshold

    register_stattest(StatTest("ks_distance", "K-S distance", [ColumnType.Numerical]), by_shape)
    register_stattest(StatTest("share_distance", "total variation", [ColumnType.Categorical]), by_shares)
