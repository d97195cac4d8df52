"""tasks/batch_statistics.py: shifted batches and single outliers, by their numbers."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from monitoring.features import STATISTICS
from tasks.batch_statistics import outliers, picture, shifts
from tasks.summary import spread


def values(count: int, seed: int, **moved: float) -> dict[str, np.ndarray]:
    """Every statistic normal about 0.5 with deviation 0.1, moved by the given amounts."""
    random = np.random.default_rng(seed)
    return {name: random.normal(0.5 + moved.get(name, 0.0), 0.1, count) for name in STATISTICS}


def spreads(columns: dict[str, np.ndarray]):
    return {name: spread(column) for name, column in columns.items()}


def test_a_darker_batch_is_shifted_in_brightness_alone_and_says_by_how_much() -> None:
    [found] = shifts(spreads(values(2000, 0)), values(300, 1, brightness=-0.25))
    assert found.statistic == "brightness" and found.outside > 0.4
    assert found.before == pytest.approx(0.5, abs=0.02) and found.now == pytest.approx(0.25, abs=0.02)
    assert "brightness" in str(found) and "98 %" in str(found)


def test_batches_of_the_same_kind_are_not_called_shifted() -> None:
    alarms = 0
    for seed in range(300):
        alarms += bool(shifts(spreads(values(400, seed)), values(100, 10_000 + seed)))
    assert alarms <= 3, f"{alarms} of 300 unshifted batches were called shifted"


def test_few_photographs_are_not_judged() -> None:
    assert shifts(spreads(values(2000, 0)), values(19, 1, brightness=-0.5)) == ()
    assert shifts(spreads(values(19, 0)), values(300, 1, brightness=-0.5)) == ()
    assert outliers(None, values(10, 0)) == {}


def test_a_photograph_far_from_all_others_is_named_with_its_worst_statistic() -> None:
    columns = values(200, 3)
    columns["sharpness"][17] = 40.0
    columns["entropy"][17] = 3.0
    [(at, why)] = outliers(None, columns).items()
    assert at == 17 and why.startswith("sharpness 40 is") and "median 0.5" in why


def test_outliers_are_judged_by_the_dataset_where_there_is_one() -> None:
    known = spreads(values(500, 4))
    assert len(outliers(known, values(50, 5, red=3.0))) == 50
    assert outliers(None, values(50, 5, red=3.0)) == {}


def test_a_statistic_in_which_all_agree_makes_no_outliers() -> None:
    columns = values(100, 6)
    columns["aspect"] = np.ones(100)
    columns["aspect"][0] = 1.5
    assert outliers(None, columns) == {}


@settings(max_examples=25, deadline=None)
@given(st.floats(-3, 3), st.integers(20, 200))
def test_a_greater_shift_is_never_less_outside(moved: float, count: int) -> None:
    known = spreads(values(1000, 7))
    for found in shifts(known, values(count, 8, brightness=moved)):
        assert 0.1 <= found.outside <= 1 and found.low < found.high


def test_the_picture_is_a_png_with_and_without_a_dataset_before() -> None:
    for known in (None, spreads(values(200, 1))):
        drawn = Image.open(io.BytesIO(picture(known, spreads(values(50, 2)), ("brightness",))))
        assert drawn.format == "PNG" and drawn.size[0] > 500
