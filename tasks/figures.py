"""Pictures of an evaluation: learning curves, confusion matrix, ROC, precision-recall, reliability. Values in, PNG out."""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tasks.evaluation import Evaluation, curves, reliability

if TYPE_CHECKING:
    from tasks.judgement import Finding
    from tasks.training import Epoch

_DPI: Final = 80
_SIDE: Final = 3.6  # inches
_COUNTS_SHOWN: Final = 20  # classes; more numbers than that in a matrix are not readable
_POINTS: Final = 500  # of a drawn curve

Draw = Callable[[Any, "Finding"], None]


def learning_curves(epochs: Sequence["Epoch"], best_epoch: int) -> bytes:
    """Loss and accuracy of both splits, and the learning rate, over the epochs."""
    figure = _figure(3, 2.8)
    losses, accuracies, rate = figure.subplots(1, 3)
    numbers = [epoch.number for epoch in epochs]
    for axes, title, train, val in (
        (losses, "loss", [e.train_loss for e in epochs], [e.validation_loss for e in epochs]),
        (accuracies, "accuracy", [e.train.accuracy for e in epochs], [e.validation.accuracy for e in epochs]),
    ):
        axes.plot(numbers, train, marker=".", label="train")
        axes.plot(numbers, val, marker=".", label="val")
        axes.set(title=title)
        axes.legend(fontsize="small")
    losses.plot(
        numbers, [e.refined_loss for e in epochs], marker=".", color="tab:orange", linestyle=":", label="val, refined"
    )
    losses.legend(fontsize="small")
    rate.plot(numbers, [e.learning_rate for e in epochs], marker=".", color="tab:green")
    rate.set(title="learning rate", ylim=(0, None))
    for axes in (losses, accuracies, rate):
        axes.axvline(best_epoch, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel="epoch; dotted: the best")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _png(figure)


def overview(finding: "Finding") -> bytes:
    """Confusion matrix, ROC, precision-recall and reliability of one split in a square."""
    figure = _figure(2, 2 * _SIDE, _SIDE)
    for axes, draw in zip(figure.subplots(2, 2).flat, DRAWINGS.values(), strict=True):
        draw(axes, finding)
    return _png(figure)


def single(finding: "Finding") -> dict[str, bytes]:
    """Each of these as a picture of its own, by name."""
    found = {}
    for name, draw in DRAWINGS.items():
        figure = _figure(1, _SIDE * 1.2, _SIDE * 1.3)
        draw(figure.subplots(), finding)
        found[name] = _png(figure)
    return found


def draw_confusion(axes: Any, finding: "Finding") -> None:
    """Rows: true class, coloured by their share; the numbers are photographs."""
    _draw_matrix(axes, finding.evaluation)
    axes.set(title=f"{finding.split}: photographs", xlabel="decided", ylabel="true")


def _draw_matrix(axes: Any, evaluation: Evaluation) -> None:
    counts = np.asarray(evaluation.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    few = len(evaluation.labels) <= _COUNTS_SHOWN
    ticks = range(len(evaluation.labels)) if few else []
    names = [label if len(label) <= 14 else f"{label[:13]}…" for label in evaluation.labels] if few else []
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(names) > 3 else {}
    axes.set_xticks(ticks, names, fontsize="small", **slanted)
    axes.set_yticks(ticks, names, fontsize="small", rotation=90 if not slanted else 0, va="center")
    size = "medium" if len(names) <= 4 else "xx-small"
    for row, column in np.ndindex(counts.shape) if few else ():
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=size)


def draw_roc(axes: Any, finding: "Finding") -> None:
    """Share of defects caught over share of good parts rejected; the operating point as a dot."""
    from sklearn.metrics import roc_curve

    for name, scores, positive in curves(finding.probabilities, finding.truth, finding.rule):
        if 0 < positive.sum() < len(positive):
            false, true, _ = roc_curve(positive, scores)
            axes.plot(*_thinned(false, true), linewidth=1.2, label=name)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    point = finding.evaluation.operating
    if point is not None:
        _dot(axes, point.overkill_rate, 1 - point.escape_rate, f"threshold {point.threshold:.3f}")
    found = "caught" if point else "true positives"
    wrong = "good parts rejected" if point else "false positives"
    axes.set(title=f"{finding.split}: ROC, area {finding.evaluation.auc:.3f}", xlabel=wrong, ylabel=found)
    axes.legend(fontsize="x-small", loc="lower right")


def draw_precision_recall(axes: Any, finding: "Finding") -> None:
    """Precision over recall; the operating point as a dot."""
    from sklearn.metrics import precision_recall_curve

    for name, scores, positive in curves(finding.probabilities, finding.truth, finding.rule):
        if positive.any():
            precision, recall, _ = precision_recall_curve(positive, scores)
            axes.plot(*_thinned(recall, precision), linewidth=1.2, label=name)
    if finding.evaluation.operating is not None:
        figures = finding.evaluation.figures
        _dot(axes, figures.recall, figures.precision, "at the threshold")
    average = finding.evaluation.average_precision
    axes.set(title=f"{finding.split}: precision, average {average:.3f}", xlabel="recall", ylabel="precision")
    axes.set(xlim=(0, 1.03), ylim=(0, 1.03))
    axes.legend(fontsize="x-small", loc="lower left")


def draw_reliability(axes: Any, finding: "Finding") -> None:
    """Share of right answers over the probability given, before and after the temperature; the diagonal is honest."""
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    before = finding.uncalibrated_error, finding.uncalibrated, "tab:orange"
    after = finding.evaluation.calibration_error, finding.probabilities, "tab:blue"
    for name, (error, probabilities, color) in {"temperature 1": before, "as served": after}.items():
        bins = reliability(probabilities, finding.truth)
        sizes = 8 + 120 * bins.count / bins.count.sum()
        axes.plot(bins.confidence, bins.right, color=color, linewidth=1, label=f"{name}: error {error:.3f}")
        axes.scatter(bins.confidence, bins.right, sizes, color=color, alpha=0.6)
    low = 1 / len(finding.evaluation.labels)
    axes.set(title=f"{finding.split}: reliability", xlabel="probability of the answer", ylabel="share that is right")
    axes.set(xlim=(low - 0.03, 1.03), ylim=(0, 1.05))
    axes.legend(fontsize="x-small", loc="lower right")


DRAWINGS: Final[dict[str, Draw]] = {
    "confusion": draw_confusion,
    "roc": draw_roc,
    "precision_recall": draw_precision_recall,
    "reliability": draw_reliability,
}


def _dot(axes: Any, x: float, y: float, label: str) -> None:
    axes.plot([x], [y], marker="o", color="black", markersize=5, linestyle="none", label=label)


def _thinned(x: Any, y: Any) -> tuple[Any, Any]:
    """At most so many points, evenly by place in the curve: a split of 100,000 photographs would draw for seconds."""
    kept = np.unique(np.linspace(0, len(x) - 1, _POINTS).astype(int)) if len(x) > _POINTS else slice(None)
    return x[kept], y[kept]


def _figure(columns: int, height: float, width: float = 3.0) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(columns * width, height), dpi=_DPI, layout="constrained")


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
