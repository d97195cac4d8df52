"""Which of several models trained on one dataset version is put forward: by a metric of the validation split."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.recipe import ThresholdRule, TrainConfig
from tasks.search_space import Scalar, with_overrides

if TYPE_CHECKING:
    from tasks.registry import Reference, TrainedModel

log = logging.getLogger(__name__)

Metric = Literal["loss", "accuracy", "balanced_accuracy", "precision", "recall", "f1", "escape_bound", "cost"]
_LOWER_IS_BETTER: Final = {"loss", "escape_bound", "cost"}


class Candidate(BaseModel):
    """One configuration of a scenario: what differs from the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9_.-]+$", description="What the tables call it")
    overrides: dict[str, Scalar] = Field(
        default={}, description="Field of the recipe (architecture, augmentation.shift) -> its value here"
    )


class Scenario(BaseModel):
    """Configurations that are trained on each new dataset version, and how one of them is chosen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidates: tuple[Candidate, ...] = Field(min_length=1, max_length=50, description="Trained in this order")
    metric: Metric = Field(
        default="balanced_accuracy",
        description="What decides, on the validation split; escape_bound is the upper 95 % bound of the escape rate, cost that "
        "of misses and over-kill by the recipe's threshold rule",
    )
    minutes: float = Field(
        default=120.0, gt=0, le=20_160, description="Time of all trainings; what does not begin within it is left out"
    )


@dataclass(frozen=True)
class Trained:
    """A candidate and what became of it. model: None where it was not registered; value: the metric; evaluated: what on."""

    name: str
    outcome: str
    seconds: float = 0.0
    model: "TrainedModel | None" = None
    value: float | None = None
    figures: Mapping[str, float] | None = None
    evaluated: str = ""


def configurations(scenario: Scenario, config: TrainConfig) -> dict[str, TrainConfig]:
    """Name -> configuration. ValueError, before any work, for one that is none, for a name that comes twice, and for two that
    are the same.
    """
    found: dict[str, TrainConfig] = {}
    for each in scenario.candidates:
        if each.name in found:
            raise ValueError(f"two candidates are called {each.name!r}")
        try:
            made = with_overrides(config, each.overrides)
        except ValueError as error:
            raise ValueError(f"candidate {each.name!r}: {error}") from error
        for name, other in found.items():
            if other == made:
                raise ValueError(f"the candidates {name!r} and {each.name!r} are the same configuration")
        found[each.name] = made
    if scenario.metric in ("escape_bound", "cost") and not config.defect_labels:
        raise ValueError(
            f"the metric {scenario.metric} needs defect_labels in the recipe: without them nothing can escape"
        )
    prices = {(each.threshold.miss_cost, each.threshold.overkill_cost) for each in found.values()}
    if scenario.metric == "cost" and len(prices) > 1:
        raise ValueError(
            f"the metric cost compares candidates at one price of a miss and of an over-kill, and they have {sorted(prices)}: "
            "take threshold.miss_cost and threshold.overkill_cost out of their overrides"
        )
    return found


def choose(trained: Sequence[Trained], metric: Metric) -> Trained | None:
    """The comparable candidate with the best value, the earlier of equals; None where there is none."""
    compared = comparable(trained)
    for left_out in (each for each in trained if each.model is not None and each not in compared):
        log.warning("%s was evaluated on other photographs or has no value: it is not compared", left_out.name)
    return min(compared, key=lambda each: _ordered(metric, each.value), default=None)


def comparable(trained: Sequence[Trained]) -> list[Trained]:
    """The registered candidates with a value that were evaluated on the same photographs and labels: those of the most
    candidates, of equally many the earlier ones.
    """
    valued = [each for each in trained if each.model is not None and each.value is not None and isfinite(each.value)]
    counts = Counter(each.evaluated for each in valued)  # in the order they came, which most_common keeps among equals
    most = counts.most_common(1)
    return [each for each in valued if each.evaluated == most[0][0]]


def value_of(metric: Metric, evaluation: Mapping[str, Any], threshold: ThresholdRule) -> float:
    """The metric from a version's evaluation.json, of its validation split. ValueError where it has none."""
    found = evaluation["validation"]
    if metric == "loss":
        return float(evaluation["calibration"]["nll_after"])
    if metric not in ("escape_bound", "cost"):
        return float(found["figures"][metric])
    point = found["operating"]
    if point is None:
        raise ValueError(
            f"the metric {metric} needs a threshold, and this model has none: it tells classes apart, not defects"
        )
    if metric == "escape_bound":
        return float(point["escape_upper"])
    return float(point["escapes"] * threshold.miss_cost + point["overkills"] * threshold.overkill_cost)


def evaluated_on(reference: "Reference") -> str:
    """Digest over the photographs and true classes of a validation split: equal, two evaluations can be compared."""
    rows = sorted(zip(reference.sha256.tolist(), reference.labels.tolist(), strict=True))
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def page(title: str, metric: Metric, trained: Sequence[Trained], chosen: Trained | None, note: str) -> str:
    """The Markdown artifact: every candidate, the chosen one named, and why others are missing."""
    direction = "lower" if metric in _LOWER_IS_BETTER else "higher"
    told = (
        f"**{chosen.name} is put forward** as {chosen.model.name} v{chosen.model.version}"
        if chosen and chosen.model
        else ""
    )
    head = ["candidate", "outcome", "version", metric.replace("_", " "), "accuracy", "balanced", "recall", "minutes"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    compared = comparable(trained)
    for each in sorted(trained, key=lambda one: (one not in compared, _ordered(metric, one.value))):
        name = f"**{each.name}**" if each is chosen else each.name
        if each.model and each not in compared:
            name += " (not compared: other photographs or labels, or no value)"
        version = f"v{each.model.version}" if each.model else ""
        figures = [(each.figures or {}).get(key) for key in ("accuracy", "balanced_accuracy", "recall")]
        cells = [name, each.outcome, version, _number(each.value), *map(_number, figures), f"{each.seconds / 60:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n\n".join(
        [
            f"# {title}",
            told or "**No candidate is put forward:** none reached its minimum quality.",
            f"Chosen by {metric.replace('_', ' ')} ({direction} is better) on the validation split; the test split has no say. "
            + note,
            "\n".join(lines),
        ]
    )


def _ordered(metric: Metric, value: float | None) -> float:
    return 0.0 if value is None else value if metric in _LOWER_IS_BETTER else -value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
