import csv
import io

import numpy as np
import pyarrow as pa
import pytest

from monitoring.features import STATISTICS
from tasks.decision import DecisionRule
from tasks.evaluation import upper_bound
from tasks.slices import MOST_VALUES, REST, THIRDS, as_csv, class_figures, slices, thirds, weak

RULE = DecisionRule(("good", "worn"), ("worn",), 0.5)
GOOD, WORN = 0, 1


def rows(count: int, **columns: list[object]) -> pa.Table:
    """A split of one class, line and batch, whose statistics are all alike, but for the given columns."""
    alike = {"label": ["good"] * count, "line": ["a"] * count, "batch": ["b"] * count}
    statistics = {name: [0.5] * count for name in STATISTICS}
    return pa.table({**alike, **statistics, **columns})


def found(table: pa.Table, decided: list[int], truth: list[int], rule: DecisionRule = RULE) -> dict:
    parts = slices(np.array(decided), np.array(truth), rule, table, thirds(table))
    return {(part.column, part.value): part for part in parts}


def test_each_part_has_its_own_figures_with_exact_bounds():
    table = rows(6, line=["north", "north", "north", "south", "south", "south"])
    parts = found(table, decided=[0, 0, 1, 0, 0, 1], truth=[0, 1, 1, 0, 0, 0])
    assert set(parts) == {("line", "north"), ("line", "south")}, (
        "one class, one batch and equal statistics tell nothing"
    )
    north, south = parts["line", "north"], parts["line", "south"]
    assert (north.count, north.errors, north.accuracy) == (3, 1, pytest.approx(2 / 3))
    assert north.accuracy_lower == pytest.approx(1 - upper_bound(1, 3))
    assert north.operating is not None and south.operating is not None
    assert (north.operating.escapes, north.operating.defects, north.operating.escape_upper) == (1, 2, upper_bound(1, 2))
    assert (south.operating.defects, south.operating.overkills, south.operating.escape_upper) == (0, 1, 1.0)


def test_the_parts_of_a_column_together_are_the_split():
    random = np.random.default_rng(5)
    values = random.normal(0, 1, 91).astype(np.float32)
    table = rows(91, brightness=values.tolist(), batch=[f"b{n % 4}" for n in range(91)])
    decided, truth = random.integers(0, 2, 91), random.integers(0, 2, 91)
    parts = slices(decided, truth, RULE, table, thirds(table))
    for column in ("brightness", "batch"):
        of_column = [part for part in parts if part.column == column]
        assert sum(part.count for part in of_column) == 91
        assert sum(part.errors for part in of_column) == int((decided != truth).sum())
    counts = [part.count for part in parts if part.column == "brightness"]
    assert max(counts) - min(counts) <= 1, "thirds are thirds"


def test_dark_means_the_same_on_every_split_of_a_version():
    validation = rows(30, brightness=np.linspace(0.2, 0.8, 30).tolist())
    edges = thirds(validation)
    test = rows(4, brightness=[0.1, 0.39, 0.41, 0.9])
    parts = slices(np.zeros(4, int), np.zeros(4, int), RULE, test, edges)
    assert [(part.value, part.count) for part in parts] == [(THIRDS[0], 2), (THIRDS[1], 1), (THIRDS[2], 1)]


def test_a_value_that_was_not_told_belongs_to_no_part():
    table = rows(5, line=["north", None, "south", None, "south"])
    parts = found(table, [0] * 5, [0] * 5)
    assert parts["line", "north"].count == 1 and parts["line", "south"].count == 2
    assert sum(part.count for (column, _), part in parts.items() if column == "line") == 3


def test_rare_batches_are_counted_together():
    names = [f"often-{n % MOST_VALUES:02}" for n in range(3 * MOST_VALUES)] + [f"rare-{n}" for n in range(15)]
    parts = found(rows(len(names), batch=names), [0] * len(names), [0] * len(names))
    assert len(parts) == MOST_VALUES + 1 and parts["batch", REST].count == 15


def test_a_planted_weakness_is_pointed_out_and_luck_is_not():
    random = np.random.default_rng(1)
    lines = [("good lamp", "broken lamp")[n % 10 == 0] for n in range(400)]
    brightness = random.normal(0.5, 0.1, 400)
    truth = random.integers(0, 2, 400)
    error = np.where([line == "broken lamp" for line in lines], random.random(400) < 0.4, random.random(400) < 0.05)
    table = rows(400, line=lines, brightness=brightness.tolist(), batch=[f"b{n % 20}" for n in random.permutation(400)])
    parts = slices(np.where(error, 1 - truth, truth), truth, RULE, table, thirds(table))
    assert [(part.column, part.value) for part in weak(parts)] == [("line", "broken lamp")]


def test_escapes_are_pointed_out_where_the_accuracy_hides_them():
    truth = np.array([WORN] * 20 + [GOOD] * 60 + [WORN] * 80)
    wall = ["white"] * 80 + ["dark"] * 80  # as many errors before both; before the white wall all of them are escapes
    decided = truth.copy()
    decided[:14] = GOOD
    decided[146:] = GOOD
    table = rows(160, line=wall)
    parts = slices(decided, truth, RULE, table, thirds(table))
    (part,) = weak(parts)
    assert part.value == "white" and part.error_chance > 0.5 > 1000 * part.escape_chance


def test_errors_spread_at_random_are_seldom_called_a_weakness():
    alarms = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        table = rows(200, **{name: random.normal(0, 1, 200).tolist() for name in STATISTICS})
        truth = random.integers(0, 2, 200)
        decided = np.where(random.random(200) < 0.1, 1 - truth, truth)
        alarms += bool(weak(slices(decided, truth, RULE, table, thirds(table))))
    assert alarms <= 8, f"{alarms} of 60 splits without any weakness; 3 are expected"


def test_without_defects_parts_have_no_escapes():
    parts = found(rows(4, line=["a", "a", "b", "b"]), [0, 1, 1, 1], [0, 0, 1, 1], DecisionRule(("good", "worn")))
    assert {part.operating for part in parts.values()} == {None}


def test_rows_of_another_split_are_refused():
    with pytest.raises(ValueError, match="5 rows do not fit 4 decisions"):
        slices(np.zeros(4, int), np.zeros(4, int), RULE, rows(5), {})


def test_class_figures_agree_with_scikit_learn():
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    random = np.random.default_rng(2)
    truth = random.integers(0, 4, 300)
    decided = np.where(random.random(300) < 0.7, truth, random.integers(0, 4, 300))
    figures = class_figures(confusion_matrix(truth, decided).tolist(), ("a", "b", "c", "d"))
    precision, recall, f1, count = precision_recall_fscore_support(truth, decided)
    for i, one in enumerate(figures):
        told = (one.precision, one.recall, one.f1, one.count)
        assert told == pytest.approx((precision[i], recall[i], f1[i], count[i]))
        assert one.recall_lower < one.recall


def test_a_class_nobody_has_or_chooses_has_no_figures_but_bounds():
    absent = class_figures([[5, 0, 0], [0, 5, 0], [0, 0, 0]], ("a", "b", "absent"))[2]
    assert np.isnan([absent.precision, absent.recall, absent.f1]).all() and absent.recall_lower == 0.0


def test_the_table_for_mlflow_has_a_line_for_each_part_and_the_operating_point_in_columns():
    parts = slices(np.array([0, 1, 0]), np.array([0, 1, 1]), RULE, rows(3, line=["a", "b", "b, too"]), {})
    lines = list(csv.DictReader(io.StringIO(as_csv(parts).decode())))
    assert [line["value"] for line in lines] == ["a", "b", "b, too"]
    assert lines[2]["escapes"] == "1" and float(lines[2]["escape_rate"]) == 1.0
    assert as_csv([]).decode().startswith("column,value")
