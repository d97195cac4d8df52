"""What the rows of a dataset version look like, in a few hundred numbers: the version's record keeps them.

Schema and statistics of the next batch are judged against these, without reading a photograph of the version again.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from monitoring.features import STATISTICS

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MAX_BATCHES: Final = 50  # of a version that are counted one by one; a factory sends several a day for years
_ROWS: Final = 65536  # read at a time


@dataclass(frozen=True)
class Spread:
    """How the values of one statistic are distributed. quantiles: of QUANTILES, in their order.."""

    count: int
    mean: float
    deviation: float
    least: float
    greatest: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """Rows of all splits together.

    statistics: one spread for each of `monitoring.features.STATISTICS`. classes: label -> split -> rows. formats: format ->
    rows. batches: batch -> rows, of the MAX_BATCHES largest; other_batches: rows of the rest. width, height: least and
    greatest, in pixels. columns: name -> Arrow type.
    """

    rows: int
    statistics: dict[str, Spread]
    classes: dict[str, dict[str, int]]
    formats: dict[str, int]
    batches: dict[str, int]
    other_batches: int
    width: tuple[int, int]
    height: tuple[int, int]
    columns: dict[str, str]


def summary_from(told: Mapping[str, Any]) -> Summary:
    """A summary out of the JSON of a record."""
    statistics = {
        name: Spread(**{**spread, "quantiles": tuple(spread["quantiles"])})
        for name, spread in told["statistics"].items()
    }
    sides = {"width": tuple(told["width"]), "height": tuple(told["height"])}
    return Summary(**{**told, **sides, "statistics": statistics})


def summarised(table: "lance.LanceDataset") -> Summary:
    """The summary of a Lance table of dataset rows: reads the narrow columns only, in pieces, one statistic at a time."""
    labels: Counter[tuple[str, str]] = Counter()
    formats: Counter[str] = Counter()
    batches: Counter[str] = Counter()
    sides: list[list[int]] = []
    for rows in _pieces(table, ["label", "split", "format", "batch", "width", "height"]):
        labels.update(zip(rows["label"].to_pylist(), rows["split"].to_pylist(), strict=True))
        formats.update(rows["format"].to_pylist())
        batches.update(rows["batch"].to_pylist())
        for name in ("width", "height"):
            values = rows[name].to_numpy()
            sides.append([int(values.min()), int(values.max())])
    largest = dict(sorted(batches.most_common(MAX_BATCHES)))
    total = sum(formats.values())
    return Summary(
        rows=total,
        statistics={name: spread(_values(table, name)) for name in STATISTICS},
        classes=_nested(labels),
        formats=dict(sorted(formats.items())),
        batches=largest,
        other_batches=total - sum(largest.values()),
        width=_range(sides[0::2]),
        height=_range(sides[1::2]),
        columns={column.name: str(column.type) for column in table.schema},
    )


def spread(values: NDArray[np.floating[Any]]) -> Spread:
    """The distribution of the finite values, to six digits; of none at all: count 0 and zeros."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return Spread(0, 0.0, 0.0, 0.0, 0.0, (0.0,) * len(QUANTILES))
    return Spread(
        count=int(finite.size),
        mean=_short(finite.mean()),
        deviation=_short(finite.std()),
        least=_short(finite.min()),
        greatest=_short(finite.max()),
        quantiles=tuple(_short(value) for value in np.quantile(finite, QUANTILES)),
    )


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _pieces(table: "lance.LanceDataset", columns: list[str]) -> "Iterator[pa.RecordBatch]":
    return (rows for rows in table.to_batches(columns=columns, batch_size=_ROWS) if rows.num_rows)


def _values(table: "lance.LanceDataset", name: str) -> NDArray[np.float32]:
    """One statistic of all rows, 4 bytes each: exact quantiles of a million rows cost 4 MB."""
    pieces = [rows[name].to_numpy() for rows in _pieces(table, [name])]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def _nested(counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    nested: dict[str, dict[str, int]] = {}
    for (outer, inner), count in sorted(counts.items()):
        nested.setdefault(outer, {})[inner] = count
    return nested


def _range(sides: Iterable[list[int]]) -> tuple[int, int]:
    ends = [end for side in sides for end in side]
    return (min(ends), max(ends)) if ends else (0, 0)
