"""monitoring/drift.py: the verdict, its fields, and Evidently's page that says the same."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from monitoring.calibration import LABELS, SCORE, Sample
from monitoring.drift import MIN_REFERENCE, DriftResult, compare, exemplars, save_evidently
from monitoring.features import STATISTICS

RATE = 0.01


def sample(seed: int, count: int, **shifts: float) -> Sample:
    """Half good, half bad; `shifts` moves a statistic by that many of its deviations, embedding=... every dimension."""
    rng = np.random.default_rng(seed)
    truth = (np.arange(count) % 2).astype(np.int64)
    statistics = rng.normal(5, 1, (count, len(STATISTICS)))
    for name, by in shifts.items():
        if name in STATISTICS:
            statistics[:, STATISTICS.index(name)] += by
    statistics[:, STATISTICS.index("aspect")] = 1.0
    embedding = rng.normal(shifts.get("embedding", 0), 1, (count, 16)) + 2 * truth[:, None]
    score = np.clip(0.2 + 0.6 * truth + rng.normal(0, 0.1, count), 0, 1)
    return Sample(
        statistics.astype(np.float32),
        embedding.astype(np.float32),
        score.astype(np.float32),
        (score > 0.5).astype(np.int64),
        ("good", "bad"),
        ("bad",),
        truth,
    )


REFERENCE = sample(0, 300)


def test_a_window_of_the_same_population_is_quiet_and_without_cause() -> None:
    result = compare(REFERENCE, sample(1, 200), RATE, 100)
    assert (result.verdict, result.causes, result.window, result.reference) == ("quiet", (), 200, 300)
    assert 0 < result.score <= 1 and result.false_alarm_rate == RATE


@pytest.mark.parametrize("name", ["brightness", "sharpness", "entropy", "embedding"])
def test_whatever_moves_is_named_and_only_that(name: str) -> None:
    result = compare(REFERENCE, sample(2, 200, **{name: 1.0}), RATE, 100)
    assert result.verdict == "drifted" and result.causes
    assert [each.name for each in result.measures if each.drifted] == [name]
    assert result.measures[0].name == name and result.score > 1


def test_medians_of_both_sides_stand_beside_the_score() -> None:
    result = compare(REFERENCE, sample(2, 200, brightness=1.0), RATE, 100)
    brightness = next(each for each in result.statistics if each.name == "brightness")
    assert brightness.reference == pytest.approx(5, abs=0.2) and brightness.window == pytest.approx(6, abs=0.2)
    labels = next(each for each in result.outputs if each.name == LABELS)
    assert labels.reference == pytest.approx(0.5, abs=0.05), "the share judged defective"
    assert [each.name for each in result.statistics] == list(STATISTICS)
    assert [each.name for each in result.outputs] == [SCORE, LABELS]


def test_too_few_photographs_give_no_verdict_however_strange_they_are() -> None:
    result = compare(REFERENCE, sample(3, 99, brightness=50, embedding=50), RATE, 100)
    assert (result.verdict, result.measures, result.score) == ("insufficient", (), 0.0)
    assert result.reason == "99 photographs were captured, 100 are needed."


def test_a_reference_that_is_too_small_says_what_to_enlarge() -> None:
    result = compare(sample(0, MIN_REFERENCE - 1), sample(1, 200), RATE, 100)
    assert result.verdict == "insufficient" and "enlarge the val split" in result.reason


def test_the_result_is_plain_values_for_json() -> None:
    result = compare(REFERENCE, sample(2, 200, brightness=1.0), RATE, 100)
    read = json.loads(json.dumps(result.as_dict()))
    assert read["verdict"] == "drifted" and read["score"] == pytest.approx(result.score)
    assert read["causes"][0]["name"] == result.causes[0].name
    assert read["embedding"]["threshold"] == result.embedding.threshold  # type: ignore[union-attr]


def test_the_most_unusual_photographs_are_the_new_ones() -> None:
    window = sample(4, 100)
    window.embedding[40:48] += 6
    chosen = exemplars(REFERENCE, window, 8)
    assert set(chosen.production_unusual) == set(range(40, 48))
    assert not set(chosen.production_typical) & set(range(40, 48))
    lone = replace(REFERENCE, embedding=REFERENCE.embedding.copy())
    lone.embedding[17] += 30
    assert exemplars(lone, window, 8).training_unusual[0] == 17


def test_evidently_s_page_calls_drifted_exactly_what_we_do(tmp_path: Path) -> None:
    window = sample(5, 200, brightness=0.9, sharpness=0.35)
    window.label[:60] = 1
    result = compare(REFERENCE, window, RATE, 100)
    save_evidently(REFERENCE, window, result, tmp_path / "drift.html")
    html = (tmp_path / "drift.html").read_text()
    ours = {each.name: each.drifted for each in (*result.statistics, *result.outputs)}
    assert True in ours.values() and False in ours.values()
    assert evidently_verdicts(html, result) == ours


def evidently_verdicts(html: str, result: DriftResult) -> dict[str, bool]:
    """Column -> drifted, from the rows of the table inside the page."""
    found = {}
    for each in (*result.statistics, *result.outputs):
        row = re.search(
            rf'"column_name": ?"{each.name}".{{0,2000}}?"data_drift": ?"(Detected|Not Detected)"', html, re.DOTALL
        )
        assert row, f"Evidently's page has no row about {each.name}"
        found[each.name] = row[1] == "Detected"
    return found


def test_evidently_copes_with_columns_that_never_change(tmp_path: Path) -> None:
    still = sample(6, 120)
    still.statistics[:] = 1.0
    still.label[:] = 0
    result = compare(still, still, RATE, 50)
    save_evidently(still, still, result, tmp_path / "drift.html")
    assert result.verdict == "quiet" and (tmp_path / "drift.html").stat().st_size > 10_000
