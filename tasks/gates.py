"""Evidence in, decision out. Pure: every gate says what it measured, what it demands, and holds or does not.

Insufficient evidence is a refusal, not a pass. Bounds are one-sided exact binomial (Clopper and Pearson 1934); the
comparison with the champion is the exact form of McNemar's test on the same images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from tasks.decision import DecisionRule
from tasks.evaluation import CONFIDENCE, upper_bound
from tasks.parity import Rung


class Limits(BaseModel):
    """What a candidate must prove before it may answer anybody. The defaults are cautious; a recipe sets its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_accuracy: float = Field(
        0.8, ge=0, le=1, description="Served accuracy on the test split, at the operating threshold"
    )
    max_escape_rate: float = Field(
        0.05, gt=0, le=1, description="Defects that pass as good: the upper 95 % bound must stay at or below this"
    )
    max_overkill_rate: float = Field(
        0.2, gt=0, le=1, description="Good pieces called defective: the upper 95 % bound must stay at or below this"
    )
    min_test_images: int = Field(100, ge=1, description="Fewer test images than this are no evidence")
    min_defects: int = Field(20, ge=1, description="Fewer defects in the test split than this are no evidence")
    max_p99_ms: float = Field(500.0, gt=0, description="Served p99 latency in milliseconds under the evaluation load")
    max_flip_share: float = Field(
        0.01, ge=0, le=1, description="Share of test images on which the served decision may differ from PyTorch's"
    )
    must_beat_champion: bool = Field(
        True, description="Demand a higher accuracy than the champion's on the same images, not merely no worse"
    )
    evaluation_concurrency: int = Field(4, ge=1, le=64, description="Requests in flight during the served evaluation")


@dataclass(frozen=True)
class Gate:
    """One demand. `held` is the verdict; `measured` and `demanded` are what a person reads."""

    name: str
    held: bool
    measured: str
    demanded: str


@dataclass(frozen=True)
class Evidence:
    """What was measured on the served candidate. Decisions and truth: label indices [N] of the same N test images."""

    rule: DecisionRule
    truth: NDArray[np.int64]
    served: NDArray[np.int64]  # -1 where the server answered with an error
    offline: NDArray[np.int64]
    rungs: Sequence[Rung]  # on the golden images; the last rung is the server's answer
    test_rung: Rung  # PyTorch against the sealed artifact, on the whole test split
    p99_ms: float
    champion: NDArray[np.int64] | None = None  # the champion's decisions on the same images, in this rule's label order


@dataclass(frozen=True)
class Decision:
    """promoted or refused, with every gate that led to it."""

    gates: tuple[Gate, ...]

    @property
    def promote(self) -> bool:
        return all(gate.held for gate in self.gates)

    @property
    def reasons(self) -> tuple[str, ...]:
        """One sentence for each gate that did not hold."""
        return tuple(f"{gate.name}: {gate.measured}; demanded {gate.demanded}" for gate in self.gates if not gate.held)


def as_markdown(title: str, decision: Decision, figures: Mapping[str, float]) -> str:
    """The verdict, every gate with its numbers, and the figures they came from, for people."""
    verdict = "promoted" if decision.promote else "refused"
    lines = [f"# {title}: {verdict}", ""]
    if not decision.promote:
        lines += ["Nothing changed for anybody. What it did not prove:", ""]
        lines += [*(f"- {reason}" for reason in decision.reasons), ""]
    lines += ["| gate | held | measured | demanded |", "| --- | --- | --- | --- |"]
    lines += [f"| {g.name} | {'yes' if g.held else '**no**'} | {g.measured} | {g.demanded} |" for g in decision.gates]
    lines += ["", "| figure | value |", "| --- | --- |"]
    lines += [f"| {name} | {value:.4g} |" for name, value in figures.items()]
    return "\n".join(lines) + "\n"


def probability_of_no_loss(lost: int, won: int) -> float:
    """One-sided exact McNemar p value: the chance of losing at least `lost` of the `lost + won` images on which the two
    differ, were both equally good. Small means the candidate is worse.
    """
    from scipy.stats import binom

    if lost + won == 0:
        return 1.0
    return float(binom.sf(lost - 1, lost + won, 0.5))


def decide_promotion(evidence: Evidence, limits: Limits) -> Decision:
    """All gates, always: a refusal names everything that failed, not the first."""
    gates = [
        *_enough_evidence(evidence, limits),
        *_quality(evidence, limits),
        *_sameness(evidence, limits),
        _latency(evidence, limits),
        *_against_champion(evidence, limits),
    ]
    return Decision(tuple(gates))


def accuracy(decisions: NDArray[Any], truth: NDArray[Any]) -> float:
    """Share of right decisions; NaN for none."""
    return float((decisions == truth).mean()) if len(truth) else float("nan")


def _enough_evidence(evidence: Evidence, limits: Limits) -> list[Gate]:
    count = len(evidence.truth)
    gates = [Gate("test images", count >= limits.min_test_images, str(count), f"at least {limits.min_test_images}")]
    if evidence.rule.defect_labels:
        defects = int(evidence.rule.defect_mask[evidence.truth].sum())
        gates.append(
            Gate(
                "defects in the test split",
                defects >= limits.min_defects,
                str(defects),
                f"at least {limits.min_defects}",
            )
        )
    return gates


def _quality(evidence: Evidence, limits: Limits) -> list[Gate]:
    right = accuracy(evidence.served, evidence.truth)
    gates = [Gate("accuracy", right >= limits.min_accuracy, f"{right:.4f}", f"at least {limits.min_accuracy:.4f}")]
    if evidence.rule.defect_labels:
        is_defect = np.append(
            evidence.rule.defect_mask, False
        )  # index -1 (no answer) counts as not caught, not cleared
        truth, called = evidence.rule.defect_mask[evidence.truth], is_defect[evidence.served]
        answered = evidence.served >= 0
        gates.append(_rate("escape rate", int((truth & ~called).sum()), int(truth.sum()), limits.max_escape_rate))
        gates.append(
            _rate(
                "over-kill rate",
                int((~truth & (called | ~answered)).sum()),
                int((~truth).sum()),
                limits.max_overkill_rate,
            )
        )
    return gates


def _rate(name: str, events: int, trials: int, limit: float) -> Gate:
    bound = upper_bound(events, trials)
    measured = f"{events} of {trials}, upper 95 % bound {bound:.4f}"
    return Gate(name, bound <= limit, measured, f"upper 95 % bound at most {limit:.4f}")


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
                rung.flips == 0 and rung.images > 0,
                f"{rung.flips} of {rung.images} golden decisions flip, differences to {rung.largest_difference:.0e}",
                "0 flips",
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


def _against_champion(evidence: Evidence, limits: Limits) -> list[Gate]:
    if evidence.champion is None:
        return []
    right, was_right = evidence.served == evidence.truth, evidence.champion == evidence.truth
    won, lost = int((right & ~was_right).sum()), int((~right & was_right).sum())
    chance = probability_of_no_loss(lost, won)
    gates = [
        Gate(
            "not worse than the champion",
            chance >= 1 - CONFIDENCE,
            f"{lost} images lost, {won} won, exact McNemar p {chance:.3f}",
            f"p at least {1 - CONFIDENCE:.2f}",
        )
    ]
    if limits.must_beat_champion:
        mine, theirs = accuracy(evidence.served, evidence.truth), accuracy(evidence.champion, evidence.truth)
        gates.append(
            Gate("better than the champion", mine > theirs, f"{mine:.4f} against {theirs:.4f}", "higher accuracy")
        )
    return gates
