"""Does a batch look like its dataset? Its image statistics against the ranges inferred from the version before it. Pure.

A schema nobody has to write: what 98 % of the version's photographs do is the range, and a batch that leaves it far more often
than chance explains is shifted. Single photographs far outside of everything are outliers. Neither refuses anything: the
batch may be right and the dataset poor. Both are shown with the numbers and a picture.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from monitoring.features import STATISTICS
from tasks.summary import QUANTILES, Spread, spread

Values = NDArray[np.floating[Any]]

MINIMUM: Final = 20  # photographs in a batch or version that say anything about a distribution
FALSE_ALARMS: Final = 0.001  # chance that an unshifted batch is called shifted, over all statistics together
LEAST_SHARE: Final = 0.1  # of a batch outside the range: fewer are no shift, however certain
OUTLIER: Final = 8.0  # robust standard deviations
_NORMAL_IQR: Final = 1.349  # interquartile range of the normal distribution in standard deviations


@dataclass(frozen=True)
class Shift:
    """One statistic that the batch has elsewhere. low, high: between them lie 98 % of the version's photographs.

    outside: share of the batch's photographs that lie beyond them. before, now: medians.
    """

    statistic: str
    low: float
    high: float
    outside: float
    before: float
    now: float

    def __str__(self) -> str:
        return (
            f"{self.statistic}: {self.outside:.0%} of the batch lies outside {self.low:.4g} to {self.high:.4g}, where 98 % of "
            f"the dataset is; median {self.now:.4g}, before {self.before:.4g}"
        )


def shifts(known: Mapping[str, Spread], batch: Mapping[str, Values]) -> tuple[Shift, ...]:
    """Statistics in which the batch differs from what is known: exact binomial test on the share outside the 98 % range.

    known: the version's spread of each statistic. batch: statistic -> [N] values. Small sets are not judged.
    """
    from scipy.special import bdtrc  # scipy.stats has it as binom.sf, and takes a second to import

    found = []
    level = FALSE_ALARMS / len(STATISTICS)
    for name in STATISTICS:
        before, values = known.get(name), batch[name]
        if before is None or before.count < MINIMUM or len(values) < MINIMUM:
            continue
        low, high = before.quantiles[0], before.quantiles[-1]
        outside = int(((values < low) | (values > high)).sum())
        # The range itself is an estimate: with `count` photographs behind it, its true share outside may be this much.
        expected = 2 * (QUANTILES[0] + 2 * np.sqrt(QUANTILES[0] * (1 - QUANTILES[0]) / before.count))
        certain = outside > 0 and bdtrc(outside - 1, len(values), expected) < level
        if certain and outside / len(values) >= LEAST_SHARE:
            median = before.quantiles[QUANTILES.index(0.5)]
            found.append(Shift(name, low, high, outside / len(values), median, float(np.median(values))))
    return tuple(found)


def outliers(known: Mapping[str, Spread] | None, batch: Mapping[str, Values]) -> dict[int, str]:
    """Position in the batch -> why, for photographs more than OUTLIER robust deviations from the median of a statistic.

    known: the version's spreads; None: the batch is judged by itself.
    """
    worst: dict[int, tuple[float, str]] = {}
    for name in STATISTICS:
        values = np.asarray(batch[name], np.float64)
        base = (known or {}).get(name) or spread(values)
        if base.count < MINIMUM:
            continue
        quarter, median, three_quarters = (base.quantiles[QUANTILES.index(at)] for at in (0.25, 0.5, 0.75))
        deviation = (three_quarters - quarter) / _NORMAL_IQR
        if deviation <= 0:  # most photographs agree to the digit: distance has no unit
            continue
        distance = np.abs(values - median) / deviation
        for at in np.flatnonzero(distance > OUTLIER):
            why = f"{name} {values[at]:.4g} is {distance[at]:.0f} deviations from the median {median:.4g}"
            worst[int(at)] = max(worst.get(int(at), (0.0, "")), (float(distance[at]), why))
    return {at: why for at, (_, why) in sorted(worst.items())}


def picture(known: Mapping[str, Spread] | None, batch: Mapping[str, Spread], shifted: Sequence[str] = ()) -> bytes:
    """PNG: for each statistic where the dataset lies (grey) and where the batch lies (blue, red where it is shifted).

    Bars span 98 % of the photographs, boxes the middle half; each row is scaled by what is shown in it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, name in enumerate(reversed(STATISTICS)):
        shown = [each for each in ((known or {}).get(name), batch.get(name)) if each is not None and each.count]
        if not shown:
            continue
        low = min(each.quantiles[0] for each in shown)
        scale = max(each.quantiles[-1] for each in shown) - low or 1.0
        colours = ["0.6"] * (len(shown) - 1) + ["tab:red" if name in shifted else "tab:blue"]
        for lane, (each, colour) in enumerate(zip(shown, colours, strict=True)):
            height = row + (0.16 if lane == 0 and len(shown) > 1 else -0.16)
            ends = [(value - low) / scale for value in each.quantiles]
            axes.plot([ends[0], ends[-1]], [height, height], color=colour, linewidth=1.5)
            axes.plot([ends[2], ends[4]], [height, height], color=colour, linewidth=6, solid_capstyle="butt")
            axes.plot([ends[3]], [height], color="white", marker="|", markersize=7)
    axes.set_yticks(range(len(STATISTICS)), list(reversed(STATISTICS)))
    axes.set_xticks([])
    axes.set_title("grey: the dataset so far; blue: this batch" if known else "this batch", fontsize=9, loc="left")
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
