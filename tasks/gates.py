"""Evidence in, decision out. Pure: every gate says what it measured, what it demands, and holds or does not.

Insufficient evidence is a refusal, not a pass. Bounds are one-sided exact binomial (Clopper and Pearson 1934).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from tasks.comparison import against_champion, in_slices, probability_of_no_loss, without_suspects
from tasks.evaluation import CONFIDENCE, calibration_error, upper_bound
from tasks.evidence import CostLimit, Decision, Evidence, Gate, Limits, Suspects, accuracy

__all__ = [
    "CostLimit",
    "Decision",
    "Evidence",
    "Gate",
    "Limits",
    "Suspects",
    "accuracy",
    "as_markdown",
    "decide_promotion",
    "expected_cost",
    "list_of",
    "probability_of_no_loss",
    "table_of",
    "trials_to_show",
]

PIECES: Final = 10_000  # what costs are told for


def decide_promotion(evidence: Evidence, limits: Limits) -> Decision:
    """All gates, always: a refusal names everything that failed, not the first."""
    gates = [
        *_enough_evidence(evidence, limits),
        *_performance(evidence, limits),
        *_calibration(evidence, limits),
        *_sameness(evidence, limits),
        _latency(evidence, limits),
        *in_slices(evidence, limits),
        *without_suspects(evidence, limits, _performance),
    ]
    return Decision(tuple(gates))


def as_markdown(title: str, decision: Decision, figures: Mapping[str, float]) -> str:
    """The verdict, every gate with its numbers, and the figures they came from, for people."""
    verdict = "promoted" if decision.promote else "refused"
    lines = [f"# {title}: {verdict}", ""]
    if not decision.promote:
        lines += ["Nothing changed for anybody. What it did not prove:", ""]
        lines += [*(f"- {reason}" for reason in decision.reasons), ""]
    lines += [table_of(decision), "", "| figure | value |", "| --- | --- |"]
    lines += [f"| {name} | {value:.4g} |" for name, value in figures.items()]
    return "\n".join(lines) + "\n"


def table_of(decision: Decision) -> str:
    """Every gate with its numbers as a Markdown table. The longest column last: the Prefect UI cuts a line, it breaks none."""
    lines = ["| gate | held | demanded | measured |", "| --- | --- | --- | --- |"]
    lines += [f"| {g.name} | {'yes' if g.held else '**no**'} | {g.demanded} | {g.measured} |" for g in decision.gates]
    return "\n".join(lines)


def list_of(decision: Decision) -> str:
    """The same as a list, for the narrow form of an approval."""
    return "\n".join(f"- **{g.name}**: {g.measured} (demanded: {g.demanded})" for g in decision.gates)


def trials_to_show(limit: float) -> int:
    """The fewest trials that can show a rate of at most `limit`: as many without a single event. 0.05 takes 59."""
    if limit >= 1:
        return 0
    fewest = math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-limit))
    return fewest if upper_bound(0, fewest) <= limit else fewest + 1  # rounding of the logarithms


def _enough_evidence(evidence: Evidence, limits: Limits) -> list[Gate]:
    count = len(evidence.truth)
    gates = [Gate("test images", count >= limits.min_test_images, str(count), f"at least {limits.min_test_images}")]
    if not evidence.rule.defect_labels:
        return gates
    defects = int(evidence.rule.defect_mask[evidence.truth].sum())
    for name, found, least, limit, what in (
        ("defects in the test split", defects, limits.min_defects, limits.max_escape_rate, "escape rate"),
        ("good pieces in the test split", count - defects, 1, limits.max_overkill_rate, "over-kill rate"),
    ):
        shows = trials_to_show(limit)
        gates.append(
            Gate(
                name,
                found >= max(least, shows),
                str(found),
                f"at least {max(least, shows)} (none wrong in {shows} would just show an {what} of {limit:.1%})",
            )
        )
    return gates


@dataclass(frozen=True)
class Events:
    """Of one side of the decisions: what went wrong, among how many."""

    wrong: int
    count: int


def escapes_and_overkills(evidence: Evidence) -> tuple[Events, Events]:
    """Escapes among the defects, over-kills among the good pieces. No answer is an error on either side."""
    is_defect = np.append(evidence.rule.defect_mask, False)  # index -1 (no answer) counts as not caught
    truth, called = evidence.rule.defect_mask[evidence.truth], is_defect[evidence.served]
    answered = evidence.served >= 0
    return (
        Events(int((truth & ~called).sum()), int(truth.sum())),
        Events(int((~truth & (called | ~answered)).sum()), int((~truth).sum())),
    )


def _performance(evidence: Evidence, limits: Limits) -> list[Gate]:
    """What depends on the labels of the test split being right."""
    right = accuracy(evidence.served, evidence.truth)
    gates = [Gate("accuracy", right >= limits.min_accuracy, f"{right:.4f}", f"at least {limits.min_accuracy:.4f}")]
    if evidence.rule.defect_labels:
        escapes, overkills = escapes_and_overkills(evidence)
        gates.append(_rate("escape rate", escapes, limits.max_escape_rate))
        gates.append(_rate("over-kill rate", overkills, limits.max_overkill_rate))
        if limits.cost:
            gates.append(_cost(escapes, overkills, limits.cost))
    return [*gates, *against_champion(evidence, limits)]


def _rate(name: str, events: Events, limit: float) -> Gate:
    bound = upper_bound(events.wrong, events.count)
    measured = f"{events.wrong} of {events.count}, upper 95 % bound {bound:.4f}"
    return Gate(name, bound <= limit, measured, f"upper 95 % bound at most {limit:.4f}")


def expected_cost(escape_rate: float, overkill_rate: float, cost: CostLimit) -> float:
    """What 10,000 pieces of the production cost at these rates."""
    escaping, rejected = cost.defect_share * escape_rate, (1 - cost.defect_share) * overkill_rate
    return PIECES * (escaping * cost.escape + rejected * cost.overkill)


def _cost(escapes: Events, overkills: Events, cost: CostLimit) -> Gate:
    """Both rates at their upper 97.5 % bounds: together they hold in 95 of 100 cases (Bonferroni)."""
    each = 1 - (1 - CONFIDENCE) / 2
    upper = [upper_bound(side.wrong, side.count, each) for side in (escapes, overkills)]
    rates = [side.wrong / side.count if side.count else 1.0 for side in (escapes, overkills)]
    bound = expected_cost(upper[0], upper[1], cost)
    return Gate(
        f"cost per {PIECES:,} pieces",
        bound <= cost.at_most,
        f"{expected_cost(rates[0], rates[1], cost):,.0f}, upper 95 % bound {bound:,.0f}, with {cost.defect_share:.1%} defects, "
        f"{cost.escape:g} an escape, {cost.overkill:g} an over-kill",
        f"upper 95 % bound at most {cost.at_most:,.0f}",
    )


def _calibration(evidence: Evidence, limits: Limits) -> list[Gate]:
    if limits.max_calibration_error is None:
        return []
    demanded = f"at most {limits.max_calibration_error:.3f}"
    answered = evidence.served >= 0
    if evidence.probabilities is None or not answered.any():
        return [Gate("calibration error", False, "no served probabilities", demanded)]
    found = calibration_error(evidence.probabilities[answered], evidence.truth[answered])
    return [Gate("calibration error", found <= limits.max_calibration_error, f"{found:.4f}", demanded)]


def _sameness(evidence: Evidence, limits: Limits) -> list[Gate]:
    unanswered = int((evidence.served < 0).sum())
    differing = int(((evidence.served != evidence.offline) & (evidence.served >= 0)).sum())
    gates = [
        Gate("every image answered", unanswered == 0, f"{unanswered} without an answer", "0"),
        Gate("served equals offline", differing == 0, f"{differing} of {len(evidence.truth)} decisions differ", "0"),
        Gate(
            "flips against PyTorch, test split",
            evidence.test_rung.flip_share <= limits.max_flip_share,
            f"{evidence.test_rung.flips} of {evidence.test_rung.images}",
            f"at most {limits.max_flip_share:.2%}",
        ),
    ]
    for rung in evidence.rungs:
        gates.append(
            Gate(
                f"parity {rung.name}",
                rung.held,
                rung.measured,
                rung.demanded,
            )
        )
    return gates


def _latency(evidence: Evidence, limits: Limits) -> Gate:
    return Gate(
        "p99 latency",
        evidence.p99_ms <= limits.max_p99_ms,
        f"{evidence.p99_ms:.1f} ms",
        f"at most {limits.max_p99_ms:.0f} ms",
    )
