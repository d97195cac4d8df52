"""monitoring/calibration.py: distances against known ones, and the false-alarm rate by simulation."""

import numpy as np
import pytest
from scipy import stats

from monitoring.calibration import (
    DISTANCES,
    EMBEDDING,
    LABELS,
    LEAST_SHARE,
    Kernel,
    Sample,
    calibrate,
    distances,
    embedding_gap,
    label_gap,
    largest_gap,
)
from monitoring.features import STATISTICS

PROJECTION = np.random.default_rng(0).normal(size=(7, 48))


def population(rng: np.random.Generator, count: int) -> Sample:
    """Photographs as a factory takes them: statistics that move together, heavy tails, two formats, unequal classes."""
    hidden = rng.normal(size=(count, 6))
    truth = (rng.random(count) < 0.4).astype(np.int64)
    bright = hidden[:, 0] + 0.5 * truth
    statistics = np.column_stack(
        [
            bright,
            hidden[:, 1] + 0.5 * bright,
            np.exp(1.2 * hidden[:, 2]),
            hidden[:, 3],
            0.7 * bright + hidden[:, 4],
            bright + 0.2 * hidden[:, 4],
            bright + 0.2 * hidden[:, 5],
            bright + 0.2 * hidden[:, 1],
            np.where(rng.random(count) < 0.5, 4 / 3, 1.0),
        ]
    )
    embedding = np.maximum(0, np.column_stack([hidden, 2 * truth]) @ PROJECTION + 0.5 * rng.normal(size=(count, 48)))
    score = 1 / (1 + np.exp(-(3 * truth - 1.5 + rng.normal(size=count))))
    return Sample(
        statistics.astype(np.float32),
        embedding.astype(np.float32),
        score.astype(np.float32),
        (score > 0.5).astype(np.int64),
        ("good", "bad"),
        ("bad",),
        truth,
    )


def alarms(rng: np.random.Generator, rows: int, size: int, rate: float, references: int, each: int) -> int:
    """Drift-free windows that go beyond any threshold, of `references` x `each`."""
    count = 0
    for _ in range(references):
        reference = population(rng, rows)
        kernel = Kernel.of(reference.embedding)
        thresholds = calibrate(reference, size, rate, kernel, draws=800)
        for _ in range(each):
            found = distances(reference, population(rng, size), kernel)
            count += any(found[name] > thresholds[name] for name in DISTANCES)
    return count


@pytest.mark.parametrize(("rows", "size"), [(60, 150), (200, 60), (250, 150)])
def test_of_200_drift_free_windows_no_more_alarm_than_the_stated_rate(rows: int, size: int) -> None:
    rate, windows = 0.05, 200
    found = alarms(np.random.default_rng(rows + size), rows, size, rate, references=50, each=4)
    # A true rate of 0.05 leaves these bounds once in 500; without the correction for many distances it is 0.3 (below).
    least, most = stats.binom.ppf([0.001, 0.999], windows, rate)
    assert least <= found <= most, f"{found} of {windows} at a stated rate of {rate}"


def test_a_threshold_for_each_distance_alone_would_alarm_several_times_as_often() -> None:
    rng = np.random.default_rng(4)
    found = []
    for _ in range(300):
        reference = population(rng, 80)
        measured = distances(reference, population(rng, 80), Kernel.of(reference.embedding))
        found.append([measured[name] for name in DISTANCES])
    alone = np.quantile(found, 0.95, axis=0)
    assert (np.array(found) > alone).any(axis=1).mean() > 0.2
    together = calibrate(reference, 80, 0.05, Kernel.of(reference.embedding), 1000)
    assert (np.array(found) > [together[name] for name in DISTANCES]).any(axis=1).mean() < 0.09


def test_a_larger_window_has_lower_thresholds_and_a_smaller_rate_higher_ones() -> None:
    reference = population(np.random.default_rng(3), 400)
    kernel = Kernel.of(reference.embedding)
    small, large, strict = (
        calibrate(reference, size, rate, kernel, 1000) for size, rate in ((50, 0.05), (400, 0.05), (50, 0.005))
    )
    assert all(large[name] < small[name] < strict[name] for name in ("brightness", "sharpness", EMBEDDING))


def test_a_statistic_that_is_the_same_everywhere_needs_a_tenth_of_the_photographs_to_drift() -> None:
    reference = population(np.random.default_rng(5), 200)
    reference.statistics[:, STATISTICS.index("aspect")] = 1.0
    thresholds = calibrate(reference, 100, 0.01, Kernel.of(reference.embedding), 500)
    assert thresholds["aspect"] == LEAST_SHARE


def test_the_same_seed_gives_the_same_thresholds() -> None:
    reference = population(np.random.default_rng(6), 100)
    kernel = Kernel.of(reference.embedding)
    assert calibrate(reference, 80, 0.02, kernel, 500) == calibrate(reference, 80, 0.02, kernel, 500)


def test_the_largest_gap_is_the_kolmogorov_smirnov_statistic_with_and_without_ties() -> None:
    rng = np.random.default_rng(7)
    for decimals in (8, 1, 0):
        a, b = (
            np.round(rng.normal(shift, 1, size), decimals).astype(np.float32) for shift, size in ((0, 90), (0.4, 70))
        )
        assert largest_gap(a, b) == pytest.approx(stats.ks_2samp(a, b).statistic)


def test_weights_count_like_repeated_rows() -> None:
    rng = np.random.default_rng(8)
    reference, window = population(rng, 50), population(rng, 40)
    kernel = Kernel.of(reference.embedding)
    repeats = rng.integers(0, 4, 50)
    repeated = reference.rows(np.repeat(np.arange(50), repeats))
    assert distances(reference, window, kernel, repeats) == pytest.approx(distances(repeated, window, kernel), abs=1e-6)


def test_the_embedding_gap_is_zero_for_the_same_photographs_and_finds_what_no_single_dimension_shows() -> None:
    rng = np.random.default_rng(9)
    a = rng.normal(size=(300, 2)).astype(np.float32)
    kernel = Kernel.of(a)
    assert embedding_gap(kernel, a, a) == pytest.approx(0, abs=1e-6)
    together = np.repeat(rng.normal(size=(300, 1)), 2, axis=1).astype(np.float32)  # the same margins, wholly dependent
    alike = rng.normal(size=(300, 2)).astype(np.float32)
    assert embedding_gap(kernel, a, together) > 3 * embedding_gap(kernel, a, alike)


def test_the_label_gap_is_half_the_sum_of_the_differences() -> None:
    sample = population(np.random.default_rng(10), 100)
    before, after = (
        Sample(
            sample.statistics[:10],
            sample.embedding[:10],
            sample.score[:10],
            np.array([1] * ones + [0] * (10 - ones)),
            ("a", "b"),
        )
        for ones in (2, 7)
    )
    assert label_gap(before, after) == pytest.approx(0.5)
    found = distances(before, after, Kernel.of(before.embedding))
    assert tuple(found) == DISTANCES and found[LABELS] == pytest.approx(0.5)


@pytest.mark.parametrize("rate", [0, 1, -0.1])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    reference = population(np.random.default_rng(11), 40)
    with pytest.raises(ValueError, match="false-alarm rate"):
        calibrate(reference, 40, rate, Kernel.of(reference.embedding))


def test_rows_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="one row a photograph"):
        Sample(
            np.zeros((3, 9), np.float32),
            np.zeros((2, 4), np.float32),
            np.zeros(3, np.float32),
            np.zeros(3, int),
            ("a",),
        )
