"""The drift page of the Prefect UI: what happened, how sure, what to do, and the pictures. Pure: values in, text and PNG out.

That page shows Markdown and pictures as data URIs, each in a block of its own; no HTML frames, no script.
"""

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from monitoring.calibration import EMBEDDING, LABELS, SCORE, Sample
from monitoring.drift import DriftResult, Measure
from monitoring.features import STATISTICS

TILE: Final = 72
PER_ROW: Final = 4
MAX_PLOTS: Final = 3

_GAP: Final = 2
_MARGIN: Final = 16
_CAPTION: Final = 16

HEADLINES: Final = {
    "camera": "the camera changed",
    "product_mix": "other products than in training",
    "defect_rate": "the defect rate moved",
    "unknown": "something moved, cause unknown",
}
MEANINGS: Final = {
    "brightness": "mean brightness, 0 to 1",
    "contrast": "spread of brightness, 0 to 1",
    "sharpness": "variance of the Laplacian: low is blurred",
    "saturation": "strength of colour, 0 to 1",
    "entropy": "information in the greys, bits",
    "red": "mean of red, 0 to 1",
    "green": "mean of green, 0 to 1",
    "blue": "mean of blue, 0 to 1",
    "aspect": "width / height",
    SCORE: "score of the model",
    LABELS: "shares of the answers",
    EMBEDDING: "what the network sees",
}


@dataclass(frozen=True)
class Subject:
    """What the page is about. Times: Unix seconds of the first and last photograph of the window."""

    model: str
    version: int
    dataset: str
    started: float
    ended: float


def page(subject: Subject, result: DriftResult, sheet: bytes | None, plot: bytes | None, archive: str | None) -> str:
    """The Markdown artifact. sheet, plot: PNG. archive: address of Evidently's page."""
    parts = [f"# {headline(subject, result)}", _what_happened(subject, result)]
    if result.verdict == "insufficient":
        return "\n\n".join([*parts, "## What to do\n\nNothing: the next run looks again when more has been captured."])
    parts += [
        "## What to do\n\n" + _what_to_do(result),
        "## How sure\n\n" + _how_sure(result),
        "## What was compared\n\n" + _table(result.measures),
    ]
    if sheet:
        parts += ["## Photographs", _picture("training and production side by side", sheet)]
    if plot:
        parts += ["## Distributions", _picture("distributions in training and production", plot)]
    if archive:
        parts.append(
            f"[Every distribution, interactively (Evidently, kept with the model version in MLflow)]({archive})"
        )
    return "\n\n".join(parts)


def headline(subject: Subject, result: DriftResult) -> str:
    """One line: whether, and why."""
    of = f"{subject.model} version {subject.version}"
    if result.verdict == "drifted":
        return f"Drift: {HEADLINES[result.causes[0].name]} ({of})"
    return f"No drift ({of})" if result.verdict == "quiet" else f"Too few photographs for a verdict ({of})"


def _what_happened(subject: Subject, result: DriftResult) -> str:
    if result.verdict == "insufficient":
        return result.reason
    span = f"{_clock(subject.started)} to {_clock(subject.ended)} UTC"
    compared = (
        f"The newest {result.window} photographs that production judged with {subject.model} version {subject.version} "
        f"({span}) were compared with {result.reference} photographs that this version was validated on "
        f"(dataset {subject.dataset})."
    )
    if result.verdict == "quiet":
        return f"{compared} They look alike."
    return "\n\n".join(
        [compared, *(f"**{HEADLINES[each.name].capitalize()}.** {each.evidence}" for each in result.causes)]
    )


def _what_to_do(result: DriftResult) -> str:
    if result.verdict == "quiet":
        return "Nothing."
    return "\n".join(f"{number}. {each.action}" for number, each in enumerate(result.causes, 1))


def _how_sure(result: DriftResult) -> str:
    moved = sum(each.drifted for each in result.measures)
    sure = (
        f"{moved} of {len(result.measures)} distances are beyond their thresholds; the greatest is "
        f"{result.score:.1f} times its threshold. "
        if moved
        else f"No distance is beyond its threshold; the greatest reaches {result.score:.0%} of it. "
    )
    every = 1 / result.false_alarm_rate
    return (
        f"{sure}The thresholds were measured on the training photographs themselves, for windows of exactly "
        f"{result.window}: without any change about 1 comparison in {every:.0f} would go beyond one of them "
        f"(false-alarm rate {result.false_alarm_rate:.1%})."
    )


def _table(measures: Sequence[Measure]) -> str:
    rows = [
        "| | training | production | distance | threshold | |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for each in measures:
        moved = "**moved**" if each.drifted else "as before"
        numbers = f"{_number(each.reference)} | {_number(each.window)} | {each.score:.3f} | {each.threshold:.3f}"
        rows.append(f"| {each.name}: {MEANINGS[each.name]} | {numbers} | {moved} |")
    told = (
        "Training and production: medians; of the answers the share judged defective. Distance: the largest difference "
        "between the shares of photographs below any value (0: the same, 1: nothing in common); for the answers half the "
        "sum of the differences of their shares; for the network the mean discrepancy of its embeddings."
    )
    return "\n".join(rows) + f"\n\n{told}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _picture(what: str, png: bytes) -> str:
    return f"![{what}](data:image/png;base64,{b64encode(png).decode()})"


def contact_sheet(
    training: Sequence[NDArray[np.uint8]], production: Sequence[NDArray[np.uint8]], captions: Sequence[str]
) -> bytes:
    """PNG of two columns, training and production. Each side is one array of tiles [K, TILE, TILE, 3] for each caption.

    At most one byte a pixel (a palette), so that even photographs of noise stay small.
    """
    from PIL import Image, ImageDraw

    half = PER_ROW * (TILE + _GAP)
    heights = [_block_height(max(len(left), len(right))) for left, right in zip(training, production, strict=True)]
    sheet = Image.new("RGB", (2 * half + _MARGIN, sum(heights) + _CAPTION), "white")
    pen = ImageDraw.Draw(sheet)
    top = _CAPTION
    for left, right, caption, height in zip(training, production, captions, heights, strict=True):
        for start, side, tiles in ((0, "training", left), (half + _MARGIN, "production", right)):
            pen.text((start, top - _CAPTION + 2), f"{side}: {caption}", fill="black")
            for place, tile in enumerate(tiles):
                column, row = place % PER_ROW, place // PER_ROW
                sheet.paste(Image.fromarray(tile), (start + column * (TILE + _GAP), top + row * (TILE + _GAP)))
        top += height
    out = io.BytesIO()
    sheet.quantize(256).save(out, "PNG", optimize=True)
    return out.getvalue()


def _block_height(tiles: int) -> int:
    rows = -(-tiles // PER_ROW)
    return rows * (TILE + _GAP) + _CAPTION


def distribution_plot(reference: Sample, window: Sample, result: DriftResult) -> bytes:
    """PNG: the numbers that are farthest beyond their thresholds, training against production."""
    from matplotlib.figure import Figure

    names = [each.name for each in result.measures if each.name in (*STATISTICS, SCORE)][:MAX_PLOTS]
    figure = Figure(figsize=(3 * len(names), 2.4), dpi=80, layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        _draw(axes, name, _values(name, reference), _values(name, window))
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _values(name: str, sample: Sample) -> NDArray[np.float32]:
    return sample.score if name == SCORE else sample.statistics[:, STATISTICS.index(name)]


def _draw(axes: Any, name: str, before: NDArray[np.float32], after: NDArray[np.float32]) -> None:
    # Without the outermost hundredth: one extreme photograph would squeeze everything else into one bar.
    low, high = np.percentile(np.concatenate([before, after]), [1, 99])
    bins = np.linspace(low, high if high > low else low + 1, 31)
    for values, label, color in ((before, "training", "tab:blue"), (after, "production", "tab:orange")):
        shares = np.full(len(values), 1 / len(values))
        axes.hist(
            np.clip(values, bins[0], bins[-1]), bins, weights=shares, histtype="stepfilled", alpha=0.5, color=color
        )
        axes.axvline(float(np.median(values)), color=color, linewidth=1)
        axes.plot([], [], color=color, label=label)
    axes.set(title=name, yticks=[])
    axes.legend(fontsize="x-small")
