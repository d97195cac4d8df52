"""How a proven version is let into production by degrees, and when it is withdrawn: what a recipe declares, and the judgement.

First in the shadow: the candidate answers photographs of production, nobody gets its answers. Then as a canary: it answers a
share of the requests, or some lines. Every captured photograph is answered by both versions, and rates are watched with bounds
that hold at every look (`tasks/sequential.py`): the first rate that is settled to lie above its limit withdraws the candidate.
Values and judgement only; `tasks/shadow.py` measures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tasks.evidence import Gate
from tasks.sequential import Verdict, trials_until_above, watched

FALSE_ALARMS: Final = 0.05  # that a candidate which is within every limit is ever withdrawn, over all rates together


class Canary(BaseModel):
    """Who gets the candidate's answers in one step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(
        0.0, ge=0, le=1, description="Share of the requests; one tire id always meets the same version"
    )
    lines: tuple[str, ...] = Field((), description="Lines (request parameter `line`) all of whose requests it answers")

    @model_validator(mode="after")
    def _somebody(self) -> "Canary":
        if not self.share and not self.lines:
            raise ValueError("a canary step needs a share above 0 or a line: {'share': 0.05} or {'lines': ['north']}")
        return self

    def __str__(self) -> str:
        told = [f"{self.share:.3g} of the requests" if self.share else "", *(f"line {line}" for line in self.lines)]
        return "canary, " + " and ".join(part for part in told if part)


class Delivery(BaseModel):
    """How a candidate that holds every gate enters production. The defaults are cautious; a recipe sets its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shadow_requests: int = Field(
        200, ge=0, description="Photographs of production it must answer before anybody gets its answers; 0: no shadow"
    )
    canary: tuple[Canary, ...] = Field(
        (Canary(share=0.05), Canary(share=0.25)), description="Steps in which it answers some of the requests"
    )
    canary_requests: int = Field(200, ge=1, description="Requests it must answer in each of these steps")
    minutes: float = Field(60, gt=0, description="If production shows too few photographs for that long: withdrawn")
    max_error_rate: float = Field(
        0.0, ge=0, lt=1, description="Requests it has no answer for and the champion has; 0: the first one withdraws it"
    )
    max_late_rate: float = Field(0.05, ge=0, lt=1, description="Answers later than `max_p99_ms` of the limits")
    max_disagreement: float = Field(
        0.1, ge=0, lt=1, description="Photographs that it labels otherwise than the champion"
    )
    max_missed: float = Field(
        0.2, ge=0, lt=1, description="Of the pieces the champion calls defective: those it calls good"
    )
    max_overcalled: float = Field(
        0.1, ge=0, lt=1, description="Of the pieces the champion calls good: those it calls defective"
    )

    @model_validator(mode="after")
    def _something(self) -> "Delivery":
        if not self.shadow_requests and not self.canary:
            raise ValueError("a delivery without shadow and canary is none: leave `delivery` empty to switch at once")
        return self


@dataclass(frozen=True)
class Tally:
    """What was counted. served: requests of clients that the candidate was chosen for; answers: these and the photographs that
    it was asked in the shadow, with or without an answer; late: of `answered`. pairs: photographs with a decision of both;
    defects, good: those of them that the champion calls so (none of either without defect labels).
    """

    served: int = 0
    answers: int = 0
    errors: int = 0
    answered: int = 0
    late: int = 0
    pairs: int = 0
    disagreements: int = 0
    defects: int = 0
    missed: int = 0
    good: int = 0
    overcalled: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


@dataclass(frozen=True)
class Watched:
    """One rate: what it is, its limit, and what has been seen of it so far."""

    what: str
    limit: float
    seen: Verdict

    @property
    def is_above(self) -> bool:
        return self.seen.settled == "above"

    def __str__(self) -> str:
        seen = self.seen
        between = f"between {seen.lower:.2%} and {seen.upper:.2%}, limit {self.limit:.2%}"
        return f"{self.what}: {seen.events} of {seen.trials} ({between})"


def rates(tally: Tally, how: Delivery) -> tuple[Watched, ...]:
    """Every watched rate; those above their limits first. A false alarm in any of them has at most the chance FALSE_ALARMS."""
    counted = (
        ("without an answer", how.max_error_rate, tally.errors, tally.answers),
        ("late", how.max_late_rate, tally.late, tally.answered),
        ("labelled otherwise than by the champion", how.max_disagreement, tally.disagreements, tally.pairs),
        ("good where the champion says defective", how.max_missed, tally.missed, tally.defects),
        ("defective where the champion says good", how.max_overcalled, tally.overcalled, tally.good),
    )
    found = [Watched(what, limit, watched(events, of, limit, alpha())) for what, limit, events, of in counted]
    return tuple(sorted(found, key=lambda each: not each.is_above))


def any_above(tally: Tally, how: Delivery) -> bool:
    """Whether what has been seen withdraws the candidate."""
    return any(each.is_above for each in rates(tally, how))


def alpha() -> float:
    """Of one rate: Bonferroni over the five."""
    return FALSE_ALARMS / 5


def photographs_until_withdrawn(rate: float, limit: float, defect_share: float = 1.0) -> int:
    """How many photographs a plain fault survives: one that misses `rate` of the champion's defects, where `defect_share` of
    the pieces are defective (1: a rate of all photographs). Raises ValueError for a rate within the limit.
    """
    return math.ceil(trials_until_above(rate, limit, alpha()) / defect_share)


@dataclass(frozen=True)
class Stage:
    """One step of a delivery, as it stands. canary: None for the shadow. needed: candidate's answers until the next step."""

    name: str
    needed: int
    tally: Tally = Tally()
    canary: Canary | None = None

    @property
    def done(self) -> int:
        """Of what is needed: answers of any kind in the shadow, to clients in a canary."""
        return self.tally.served if self.canary else self.tally.answers


def stages(how: Delivery) -> tuple[Stage, ...]:
    """The steps that are declared, in order."""
    shadow = (Stage("shadow", how.shadow_requests),) if how.shadow_requests else ()
    return (*shadow, *(Stage(str(step), how.canary_requests, canary=step) for step in how.canary))


def gate(stage: Stage, total: Tally, how: Delivery, why_not: str = "") -> Gate:
    """The step as a gate of the promotion. total: over all steps so far. why_not: it ended for a reason that is no rate."""
    found = [each for each in rates(total, how) if each.seen.trials]
    above = [each for each in found if each.is_above]
    measured = "; ".join([f"{stage.done} answers in this step", *(str(each) for each in (above or found))])
    if why_not:
        measured = f"{why_not}; {measured}"
    held = not above and not why_not and stage.done >= stage.needed
    return Gate(f"delivery, {stage.name}", held, measured, f"{stage.needed} answers, no rate above its limit")


def as_markdown(title: str, stage: Stage, total: Tally, how: Delivery, gates: Sequence[Gate] = ()) -> str:
    """Where the delivery stands, for people. gates: of the steps that ended."""
    lines = [f"# {title}", ""]
    for step in gates:
        told = f"passed: {step.measured.split(';')[0]}" if step.held else f"ended it: {step.measured}"
        lines.append(f"- **{step.name}** {told}")
    if not gates:
        lines.append(f"Step: {stage.name}, {stage.done} of {stage.needed} answers.")
    lines += ["", "| rate | seen | lies between | limit |", "| --- | --- | --- | --- |"]
    for each in rates(total, how):
        seen = each.seen
        if gates and not seen.trials:
            continue  # no class is a defect, or none came
        above = "**above** " if each.is_above else ""
        between = f"{seen.lower:.2%} and {seen.upper:.2%}" if seen.trials else "not seen yet"
        lines.append(f"| {each.what} | {seen.events} of {seen.trials} | {above}{between} | {each.limit:.2%} |")
    lines += [
        "",
        f"{total.pairs} photographs of production were answered by both versions, {total.served} requests of clients by the "
        "candidate. The bounds hold at every look (99 % each, 95 % together).",
    ]
    return "\n".join(lines) + "\n"
