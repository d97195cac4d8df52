"""Where a model is weak: one split cut by class, line, batch and image statistics, each part with its own figures. Pure.

A part is pointed out only when its errors, or its escapes among its defects, are more than chance explains (Fisher's exact test
against the rest of the split), because among forty parts some look bad by luck. Escapes are tested by themselves:
before a plain background 11 of 19 defective tires passed as good where the accuracy was an ordinary 0.78 (docs/evaluation.md).
"""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from monitoring.features import STATISTICS
from tasks.decision import DecisionRule
from tasks.evaluation import CONFIDENCE, OperatingPoint, Truth, operating_point, upper_bound

if TYPE_CHECKING:
    import pyarrow as pa

CATEGORIES: Final = ("label", "line", "batch")
COLUMNS: Final = (*CATEGORIES, *STATISTICS)
MOST_VALUES: Final = 20  # of one column, the most frequent ones: there may be a batch for every day of a year
THIRDS: Final = ("low third", "middle third", "high third")
REST: Final = "(all others)"

Edges = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Slice:
    """One part of a split under the operating rule.

    accuracy_lower: exact one-sided 95 % bound (Clopper and Pearson 1934). error_chance: probability of at least as many errors
    here, were the errors of the split spread at random; escape_chance: the same for the escapes among its defects.
    """

    column: str
    value: str
    count: int
    errors: int
    accuracy: float
    accuracy_lower: float
    error_chance: float
    escape_chance: float
    operating: OperatingPoint | None


@dataclass(frozen=True)
class ClassFigures:
    """One class: how many photographs have it, how many were decided to have it, and how well that agrees."""

    label: str
    count: int
    decided: int
    precision: float
    recall: float
    recall_lower: float
    f1: float


def thirds(rows: "pa.Table") -> dict[str, tuple[float, float]]:
    """Where the lower, middle and upper third of each image statistic meet; without statistics that hardly vary.

    Taken once, from the validation split, so that "dark" means the same on every split of a version.
    """
    found = {}
    for name in STATISTICS:
        low, high = np.quantile(np.asarray(rows.column(name), dtype=np.float64), [1 / 3, 2 / 3])
        if low < high:
            found[name] = (float(low), float(high))
    return found


def slices(decided: Truth, truth: Truth, rule: DecisionRule, rows: "pa.Table", edges: Edges) -> tuple[Slice, ...]:
    """[N] decided and true label indices and the N rows of the same photographs -> every part, column by column.

    Raises ValueError when rows and labels do not belong together. A column that tells nothing apart gives no part.
    """
    if not len(rows) == len(decided) == len(truth):
        raise ValueError(f"{len(rows)} rows do not fit {len(decided)} decisions about {len(truth)} labels")
    return tuple(_slice(*each, decided, truth, rule) for each in parts(rows, edges))


def parts(rows: "pa.Table", edges: Edges) -> list[tuple[str, str, NDArray[np.bool_]]]:
    """Every part of N rows, column by column: the column, its value, and bool [N]."""
    found: list[tuple[str, str, NDArray[np.bool_]]] = []
    for column in COLUMNS:
        values = _values(rows, column, edges)
        names = [name for name in dict.fromkeys(_order(column, values)) if name is not None]
        if len(names) < 2:
            continue
        told = np.array([value if value is not None else "" for value in values], dtype=object)
        found += [(column, name, np.asarray(told == name, dtype=bool)) for name in names]
    return found


def _values(rows: "pa.Table", column: str, edges: Edges) -> list[str | None]:
    """The part each row belongs to; None where its value is not known or the column is not cut."""
    if column in CATEGORIES:
        told: list[str | None] = rows.column(column).to_pylist()
        frequent = {name for name, _ in Counter(v for v in told if v is not None).most_common(MOST_VALUES)}
        return [None if value is None else value if value in frequent else REST for value in told]
    if column not in edges:
        return [None] * len(rows)
    numbers = np.asarray(rows.column(column), dtype=np.float64)
    return [THIRDS[place] for place in np.searchsorted(np.array(edges[column]), numbers, side="left")]


def _order(column: str, values: Sequence[str | None]) -> list[str | None]:
    present = set(values)
    if column in CATEGORIES:
        return [*sorted(name for name in present if name is not None and name != REST), *({REST} & present)]
    return [name for name in THIRDS if name in present]


def _slice(
    column: str, value: str, inside: NDArray[np.bool_], decided: Truth, truth: Truth, rule: DecisionRule
) -> Slice:
    wrong, is_defect = decided != truth, rule.defect_mask[truth]
    escaped = is_defect & ~rule.defect_mask[decided]
    count, errors = int(inside.sum()), int(wrong[inside].sum())
    return Slice(
        column=column,
        value=value,
        count=count,
        errors=errors,
        accuracy=1 - errors / count,
        accuracy_lower=1 - upper_bound(errors, count),
        error_chance=_chance(wrong, inside),
        escape_chance=_chance(escaped[is_defect], inside[is_defect]),
        operating=operating_point(truth[inside], decided[inside], rule),
    )


def _chance(event: NDArray[np.bool_], inside: NDArray[np.bool_]) -> float:
    """One-sided p value of Fisher's exact test; 1 where there is nothing to test."""
    from scipy.stats import hypergeom

    return float(hypergeom.sf(int(event[inside].sum()) - 1, len(event), int(event.sum()), int(inside.sum())))


def weak(found: Sequence[Slice]) -> tuple[Slice, ...]:
    """The parts that are worse than the rest beyond chance, the surest first; Bonferroni's correction over all tests."""
    tests = sum(2 if each.operating else 1 for each in found)
    surely = [each for each in found if smallest_chance(each) < (1 - CONFIDENCE) / tests]
    return tuple(sorted(surely, key=smallest_chance))


def smallest_chance(part: Slice) -> float:
    """The p value of whatever speaks loudest against the part."""
    return min(part.error_chance, part.escape_chance)


def class_figures(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> tuple[ClassFigures, ...]:
    """Precision, recall (with its exact lower 95 % bound) and F1 of each class; nan where nothing was there to count."""
    counts = np.asarray(confusion)
    hits, present, decided = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    return tuple(
        ClassFigures(
            label=label,
            count=int(present[i]),
            decided=int(decided[i]),
            precision=_share(int(hits[i]), int(decided[i])),
            recall=_share(int(hits[i]), int(present[i])),
            recall_lower=1 - upper_bound(int(present[i] - hits[i]), int(present[i])),
            f1=_share(2 * int(hits[i]), int(present[i] + decided[i])),
        )
        for i, label in enumerate(labels)
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def as_csv(rows: Sequence[Slice] | Sequence[ClassFigures]) -> bytes:
    """One line each with a head, the operating point's figures as columns of their own; MLflow shows it as a table."""
    lines = [_flat(asdict(row)) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else ["column", "value"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().encode()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    point = row.pop("operating", None) or {}
    numbers = {**row, **point}
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in numbers.items()}
