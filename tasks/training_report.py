"""What a training run found, for people: one picture and one page. Pure: values in, bytes and text out."""

import io
from base64 import b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.evaluation import Evaluation
from tasks.recipe import TrainConfig

if TYPE_CHECKING:
    from tasks.training import Epoch, Trained


def picture(epochs: Sequence["Epoch"], best_epoch: int, validation: Evaluation) -> bytes:
    """Loss and accuracy over the epochs and the confusion matrix of the validation split, as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), dpi=80, layout="constrained")
    losses, accuracies, confusion = figure.subplots(1, 3)
    numbers = [epoch.number for epoch in epochs]
    for axes, title, train, val in (
        (losses, "loss", [e.train_loss for e in epochs], [e.validation_loss for e in epochs]),
        (accuracies, "accuracy", [e.train.accuracy for e in epochs], [e.validation.accuracy for e in epochs]),
    ):
        axes.plot(numbers, train, marker=".", label="train")
        axes.plot(numbers, val, marker=".", label="val")
        axes.axvline(best_epoch, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small")
    _draw_confusion(confusion, validation)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _draw_confusion(axes: Any, validation: Evaluation) -> None:
    axes.imshow(validation.confusion, cmap="Blues")
    axes.set(title="val: true row, decided column")
    ticks = range(len(validation.labels))
    names = [label[:10] for label in validation.labels]
    axes.set_xticks(ticks, names, fontsize="x-small", rotation=30)
    axes.set_yticks(ticks, names, fontsize="x-small")
    largest = max(max(row) for row in validation.confusion)
    for row, counts in enumerate(validation.confusion):
        for column, count in enumerate(counts):
            color = "white" if count > largest / 2 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize="small")


def page(
    title: str,
    config: TrainConfig,
    trained: "Trained",
    validation: Evaluation,
    test: Evaluation | None,
    reasons: Sequence[str],
    png: bytes,
) -> str:
    """The Markdown artifact of the run's page in the Prefect UI."""
    verdict = "Not registered: " + "; ".join(reasons) if reasons else "Reached the minimum quality."
    columns = [("validation", validation)] + ([("test", test)] if test else [])
    lines = [
        f"# {title}",
        verdict,
        "",
        f"{config.architecture}, {config.image_size} px, {trained.precision} on {trained.device}: best of "
        f"{len(trained.epochs)} epochs was number {trained.best_epoch}, in {trained.seconds:.0f} s; stopped because: "
        f"{trained.stopped}.",
        "",
        "| | " + " | ".join(f"{name} ({found.count})" for name, found in columns) + " |",
        "|---|" + "---|" * len(columns),
        *_rows([found for _, found in columns]),
        "",
        f"![training curve](data:image/png;base64,{b64encode(png).decode()})",
    ]
    return "\n".join(lines)


def _rows(found: Sequence[Evaluation]) -> list[str]:
    rows: dict[str, list[str]] = {
        "accuracy": [f"{each.figures.accuracy:.4f}" for each in found],
        "balanced accuracy": [f"{each.figures.balanced_accuracy:.4f}" for each in found],
        "precision": [f"{each.figures.precision:.4f}" for each in found],
        "recall": [f"{each.figures.recall:.4f}" for each in found],
        "F1": [f"{each.figures.f1:.4f}" for each in found],
        "AUC": [f"{each.auc:.4f}" for each in found],
        "Brier": [f"{each.brier:.4f}" for each in found],
        "calibration error": [f"{each.calibration_error:.4f}" for each in found],
    }
    points = [each.operating for each in found if each.operating is not None]
    if points:
        rows["threshold"] = [f"{point.threshold:.4f}" for point in points]
        rows["escapes"] = [_rate(point.escapes, point.defects, point.escape_upper) for point in points]
        rows["over-kill"] = [_rate(point.overkills, point.good, point.overkill_upper) for point in points]
    return [f"| {name} | {' | '.join(values)} |" for name, values in rows.items()]


def _rate(events: int, trials: int, upper: float) -> str:
    return f"{events} of {trials} (at most {upper:.1%})"


def summary_metrics(trained: "Trained", validation: Evaluation, test: Evaluation | None) -> dict[str, float]:
    """The final figures under the names that other flows and the demo read: test_accuracy, val_auc, train_seconds, ..."""
    splits = {"val": validation} | ({"test": test} if test else {})
    run = {
        "train_seconds": trained.seconds,
        "train_cpu_seconds": trained.cpu_seconds,
        "best_epoch": float(trained.best_epoch),
    }
    return run | {f"{name}_{key}": value for name, found in splits.items() for key, value in _metrics(found).items()}


def _metrics(found: Evaluation) -> dict[str, float]:
    metrics = {
        **vars(found.figures),
        "auc": found.auc,
        "brier": found.brier,
        "calibration_error": found.calibration_error,
    }
    if found.operating is not None:
        wanted = ("threshold", "escape_rate", "escape_upper", "overkill_rate", "overkill_upper")
        metrics |= {name: getattr(found.operating, name) for name in wanted}
    return metrics


def outcome(
    trained: "Trained", validation: Evaluation, test: Evaluation | None, reasons: Sequence[str]
) -> dict[str, Any]:
    """evaluation.json: everything that was found, for programs."""
    return {
        "stopped": trained.stopped,
        "best_epoch": trained.best_epoch,
        "epochs": len(trained.epochs),
        "precision": trained.precision,
        "device": trained.device,
        "not_registered": list(reasons),
        "validation": validation.as_dict(),
        "test": test.as_dict() if test else None,
    }
