"""Rates watched while they come in: bounds that hold at every look, so that one may stop as soon as enough is known.

An ordinary 95 % bound that is looked at after every request is wrong far more often than once in twenty times. The bounds here
are a confidence sequence (Robbins 1970; Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform, nonparametric, nonasymptotic
confidence sequences", 2021): the probability that the true rate ever leaves them, at any of infinitely many looks, is at most
`alpha`. The requests are taken as independent, all with the same chance of the event. Pure; scipy only.
"""

import math
from dataclasses import dataclass
from typing import Final

ALPHA: Final = 0.05
PRIOR_EVENTS, PRIOR_OTHERS = (
    0.5,
    0.5,
)  # Jeffreys' mixture: sharp for rare events, never wrong by more than alpha for others


@dataclass(frozen=True)
class Verdict:
    """What n looks have shown. settled: "above", "below", or None while both are possible."""

    events: int
    trials: int
    lower: float
    upper: float
    settled: str | None


def evidence_against(rate: float, events: int, trials: int) -> float:
    """Logarithm of how many times likelier the sequence is under the mixture than under `rate` (a test martingale under it):
    above log(1 / alpha) the rate is refuted, whenever one looks.
    """
    from scipy.special import betaln, xlog1py, xlogy

    if not 0 <= events <= trials:
        raise ValueError(
            f"{events} events in {trials} trials: there cannot be more events than trials, or fewer than none"
        )
    if not 0 <= rate <= 1:
        raise ValueError(f"rate {rate} is outside [0, 1]")
    others = trials - events
    mixture = betaln(PRIOR_EVENTS + events, PRIOR_OTHERS + others) - betaln(PRIOR_EVENTS, PRIOR_OTHERS)
    return float(mixture - xlogy(events, rate) - xlog1py(others, -rate))


def bounds(events: int, trials: int, alpha: float = ALPHA) -> tuple[float, float]:
    """(lower, upper) for the rate after `trials` looks; (0, 1) before the first."""
    from scipy.optimize import brentq

    if trials == 0:
        return 0.0, 1.0
    wanted, middle = math.log(1 / alpha), events / trials

    def refuted(rate: float) -> float:
        return evidence_against(rate, events, trials) - wanted

    tiny = 1e-12
    lower = brentq(refuted, tiny, middle) if middle > tiny and refuted(tiny) > 0 else 0.0
    upper = brentq(refuted, middle, 1 - tiny) if middle < 1 - tiny and refuted(1 - tiny) > 0 else 1.0
    return float(lower), float(upper)


def watched(events: int, trials: int, limit: float, alpha: float = ALPHA) -> Verdict:
    """Whether the rate is settled to lie above or below the limit."""
    lower, upper = bounds(events, trials, alpha)
    settled = "above" if lower > limit else "below" if upper < limit else None
    return Verdict(events, trials, lower, upper, settled)


def trials_until_above(rate: float, limit: float, alpha: float = ALPHA, most: int = 10**6) -> int:
    """After how many trials at exactly this rate it is settled to lie above the limit: what to expect of a plain fault.

    Raises ValueError for a rate that is not above it.
    """
    if not limit < rate <= 1:
        raise ValueError(f"a rate of {rate} is never settled to lie above a limit of {limit}")
    few, many = 0, 1
    while watched(math.floor(rate * many), many, limit, alpha).settled != "above":
        few, many = many, 2 * many
        if many > most:
            raise ValueError(f"{most} trials are not enough to tell a rate of {rate} from the limit {limit}")
    while many - few > 1:
        middle = (few + many) // 2
        if watched(math.floor(rate * middle), middle, limit, alpha).settled == "above":
            many = middle
        else:
            few = middle
    return many
