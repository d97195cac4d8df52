"""What a training run found, for people and programs: its page, pictures and tables. Pure: values in, text and bytes out."""

import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from tasks.evaluation import Evaluation
from tasks.slices import Slice, as_csv, class_figures, smallest_chance, weak

if TYPE_CHECKING:
    from tasks.judgement import Finding, Judged
    from tasks.recipe import TrainConfig
    from tasks.training import Trained

WEAKEST_SHOWN: Final = 8
CLASSES_SHOWN: Final = 30
SLIGHT: Final = 0.005  # nats; a gain in likelihood below that is not worth a word of alarm


@dataclass(frozen=True)
class Outcome:
    """All that a training run ends with. test: None without a test split, or when the model is not registered.

    explanation: PNG of the heat maps, or why there is none.
    """

    title: str
    config: "TrainConfig"
    trained: "Trained"
    judged: "Judged"
    test: "Finding | None"
    reasons: tuple[str, ...]
    explanation: bytes | str

    @property
    def findings(self) -> tuple["Finding", ...]:
        return (self.judged.validation,) + ((self.test,) if self.test else ())

    @property
    def honest(self) -> "Finding":
        """The split that nothing was chosen on, where there is one."""
        return self.findings[-1]


def pictures(outcome: Outcome) -> dict[str, bytes]:
    """PNG by name: what the page shows (learning_curves, overview, explanation), then each drawing of each split."""
    from tasks.figures import learning_curves, overview, single

    shown = {
        "learning_curves": learning_curves(outcome.trained.epochs, outcome.trained.best_epoch),
        "overview": overview(outcome.honest),
    }
    if isinstance(outcome.explanation, bytes):
        shown["explanation"] = outcome.explanation
    each = {f"{name}_{found.split}": png for found in outcome.findings for name, png in single(found).items()}
    return shown | each


def files(outcome: Outcome, drawn: Mapping[str, bytes]) -> dict[str, bytes]:
    """What goes to MLflow, by path: pictures under figures/, a table of classes and one of slices for each split."""
    tables = {}
    for found in outcome.findings:
        tables[f"tables/classes_{found.split}.csv"] = as_csv(_classes(found.evaluation))
        tables[f"tables/slices_{found.split}.csv"] = as_csv(found.slices)
    return {f"figures/{name}.png": png for name, png in drawn.items()} | tables


def page(outcome: Outcome, drawn: Mapping[str, bytes], mlflow_page: str) -> str:
    """The Markdown artifact of the run's page in the Prefect UI."""
    judged, trained = outcome.judged, outcome.trained
    parts = [
        f"# {outcome.title}",
        _verdict(outcome),
        f"{outcome.config.architecture}, {outcome.config.image_size} px, {trained.precision} on {trained.device}: best of "
        f"{len(trained.epochs)} epochs was number {trained.best_epoch}, in {trained.seconds:.0f} s; stopped because: "
        f"{trained.stopped}. [All figures, tables and pictures in MLflow]({mlflow_page})",
        _figures_table(outcome.findings),
        _calibration(judged),
        _picture("overview", drawn["overview"]),
        "## Learning curves",
        _picture("learning curves", drawn["learning_curves"]),
        f"## Classes, {outcome.honest.split} split",
        _class_table(outcome.honest),
        f"## Where it is weak, {outcome.honest.split} split",
        _weak_table(outcome.honest.slices),
        "## What it looked at, validation split",
        *_explanation(outcome.explanation),
    ]
    return "\n\n".join(parts)


def _verdict(outcome: Outcome) -> str:
    if outcome.reasons:
        return f"**Not registered:** {'; '.join(outcome.reasons)}."
    return "Reached the minimum quality."


def _figures_table(findings: Sequence["Finding"]) -> str:
    found = [each.evaluation for each in findings]
    rows: dict[str, list[str]] = {
        "accuracy": [f"{each.figures.accuracy:.4f}" for each in found],
        "balanced accuracy": [f"{each.figures.balanced_accuracy:.4f}" for each in found],
        "precision": [f"{each.figures.precision:.4f}" for each in found],
        "recall": [f"{each.figures.recall:.4f}" for each in found],
        "F1": [f"{each.figures.f1:.4f}" for each in found],
        "AUC": [f"{each.auc:.4f}" for each in found],
        "average precision": [f"{each.average_precision:.4f}" for each in found],
        "Brier": [f"{each.brier:.4f}" for each in found],
        "calibration error": [f"{each.calibration_error:.4f}" for each in found],
        "calibration error at temperature 1": [f"{each.uncalibrated_error:.4f}" for each in findings],
    }
    points = [each.operating for each in found if each.operating is not None]
    if points:
        rows["threshold"] = [f"{point.threshold:.4f}" for point in points]
        rows["escapes"] = [_rate(point.escapes, point.defects, point.escape_upper) for point in points]
        rows["over-kill"] = [_rate(point.overkills, point.good, point.overkill_upper) for point in points]
    head = ("", *(f"{each.split} ({each.evaluation.count})" for each in findings))
    return _table(head, ((name, *values) for name, values in rows.items()))


def _calibration(judged: "Judged") -> str:
    found = judged.calibration
    if found.temperature == 1.0:
        return "Temperature 1: no other fits the validation split better; scores are served as the network gave them."
    direction = "too sure of itself" if found.temperature > 1 else "less sure than it may be"
    if found.nll_before - found.nll_after < SLIGHT:
        direction = f"hardly {direction}"
    return (
        f"The network was {direction}: its logits are divided by the temperature {found.temperature:.3f} before the softmax "
        f"(negative log-likelihood of the validation split {found.nll_before:.4f} -> {found.nll_after:.4f})."
        + (" The threshold is one on these calibrated scores." if judged.rule.threshold is not None else "")
    )


def _class_table(finding: "Finding") -> str:
    rows = sorted(_classes(finding.evaluation), key=lambda each: each.recall if each.count else 2.0)
    lines = [
        (
            *(each.label, str(each.count), str(each.decided), _number(each.precision)),
            *(f"{_number(each.recall)} (at least {each.recall_lower:.4f})", _number(each.f1)),
        )
        for each in rows[:CLASSES_SHOWN]
    ]
    left = len(rows) - len(lines)
    told = f"\n\n{left} more are in `tables/classes_{finding.split}.csv` of the MLflow run." if left else ""
    return _table(("class", "photographs", "decided", "precision", "recall", "F1"), lines) + told


def _classes(evaluation: Evaluation) -> Any:
    return class_figures(evaluation.confusion, evaluation.labels)


def _weak_table(found: Sequence[Slice]) -> str:
    """The parts that are worse beyond chance; without one, the least accurate ones, and that this may be chance."""
    if not found:
        return "Nothing tells the photographs apart: one class, one line, one batch."
    surely = weak(found)
    named = [each for each in found if each.column != "label"] or list(found)
    shown = surely or sorted(named, key=smallest_chance)
    defects = shown[0].operating is not None
    head = ["part", "errors", "accuracy", "p value", *(["escapes", "p value"] if defects else [])]
    lines = [
        (
            *(f"{each.column}: {each.value}", f"{each.errors} of {each.count}"),
            *(f"{each.accuracy:.4f} (at least {each.accuracy_lower:.4f})", f"{each.error_chance:.2g}", *_escapes(each)),
        )
        for each in shown[:WEAKEST_SHOWN]
    ]
    what = f"more errors{' or escapes' if defects else ''} than chance explains"
    told = (
        f"{len(surely)} of {len(found)} parts of the split have {what}:"
        if surely
        else f"None of {len(found)} parts of the split has {what}. The most suspicious ones:"
    )
    return f"{told}\n\n{_table(head, lines)}"


def _escapes(part: Slice) -> list[str]:
    """The cells of the columns that only tasks with defects have."""
    point = part.operating
    if point is None:
        return []
    if not point.defects:
        return ["no defects", ""]
    return [_rate(point.escapes, point.defects, point.escape_upper), f"{part.escape_chance:.2g}"]


def _explanation(explanation: bytes | str) -> list[str]:
    if isinstance(explanation, str):
        return [explanation]
    told = (
        "Grad-CAM: red is what spoke most for the decision. Heat beside the part is a reason to look at the photographs, for "
        "the network may have learned the background; heat on the part proves nothing."
    )
    return [told, _picture("heat maps", explanation)]


def _rate(events: int, trials: int, upper: float) -> str:
    return f"{events} of {trials} (at most {upper:.1%})"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _picture(name: str, png: bytes) -> str:
    return f"![{name}](data:image/png;base64,{b64encode(png).decode()})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    shown = [head, ["---"] * len(head), *([_escaped(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in shown)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def summary_metrics(outcome: Outcome) -> dict[str, float]:
    """The final figures under the names that other flows and the demo read: test_accuracy, val_auc, train_seconds, ..."""
    trained, calibration = outcome.trained, outcome.judged.calibration
    run = {
        "train_seconds": trained.seconds,
        "train_cpu_seconds": trained.cpu_seconds,
        "best_epoch": float(trained.best_epoch),
        "temperature": calibration.temperature,
        "val_nll": calibration.nll_after,
        "val_nll_uncalibrated": calibration.nll_before,
    }
    names = {"validation": "val"}
    for found in outcome.findings:
        prefix = names.get(found.split, found.split)
        run |= {f"{prefix}_{key}": value for key, value in _metrics(found).items()}
    return run


def _metrics(found: "Finding") -> dict[str, float]:
    evaluation = found.evaluation
    metrics = {
        **vars(evaluation.figures),
        "auc": evaluation.auc,
        "average_precision": evaluation.average_precision,
        "brier": evaluation.brier,
        "calibration_error": evaluation.calibration_error,
        "calibration_error_uncalibrated": found.uncalibrated_error,
    }
    if evaluation.operating is not None:
        wanted = ("threshold", "escape_rate", "escape_upper", "overkill_rate", "overkill_upper")
        metrics |= {name: getattr(evaluation.operating, name) for name in wanted}
    return metrics


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """evaluation.json: everything that was found, for programs."""
    trained = outcome.trained
    found = {
        "stopped": trained.stopped,
        "best_epoch": trained.best_epoch,
        "epochs": len(trained.epochs),
        "precision": trained.precision,
        "device": trained.device,
        "not_registered": list(outcome.reasons),
        "calibration": asdict(outcome.judged.calibration),
        "statistics_thirds": dict(outcome.judged.edges),
        "validation": _found(outcome.judged.validation),
        "test": _found(outcome.test) if outcome.test else None,
    }
    plain: dict[str, Any] = _plain(found)
    return plain


def _plain(value: Any) -> Any:
    """null for what is not a number, such as a rate of nothing: NaN is no JSON."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _found(finding: "Finding") -> dict[str, Any]:
    return {
        **finding.evaluation.as_dict(),
        "uncalibrated_error": finding.uncalibrated_error,
        "classes": [asdict(each) for each in _classes(finding.evaluation)],
        "slices": [asdict(each) for each in finding.slices],
    }


def note(outcome: Outcome) -> str:
    """The description of the MLflow run: the verdict, the figures, the temperature."""
    return "\n\n".join([_verdict(outcome), _figures_table(outcome.findings), _calibration(outcome.judged)])
