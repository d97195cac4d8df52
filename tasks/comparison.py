"""The candidate against the champion on the same photographs: over all of them, slice by slice, and without doubted labels.

Pure. The paired test is the exact form of McNemar's (a sign test on the photographs where the two differ); over many slices
it is corrected by Holm's step-down procedure (Holm 1979), which holds however the slices overlap.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tasks.evaluation import CONFIDENCE
from tasks.evidence import Evidence, Gate, Limits, accuracy

_NAMED: Final = 3  # slices that a gate tells with their numbers


def probability_of_no_loss(lost: int, won: int) -> float:
    """One-sided exact McNemar p value: the chance of losing at least `lost` of the `lost + won` images on which the two
    differ, were both equally good. Small means the candidate is worse.
    """
    from scipy.stats import binom

    if lost + won == 0:
        return 1.0
    return float(binom.sf(lost - 1, lost + won, 0.5))


def holm(chances: Sequence[float]) -> list[float]:
    """p values as corrected for their number: each below 0.05 is significant over all of them together."""
    corrected = [1.0] * len(chances)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=lambda index: chances[index])):
        highest = max(highest, min(1.0, (len(chances) - rank) * chances[place]))
        corrected[place] = highest
    return corrected


def against_champion(evidence: Evidence, limits: Limits) -> list[Gate]:
    """No gate without a champion."""
    if evidence.champion is None:
        return []
    lost, won = _differences(evidence, evidence.champion, np.ones(len(evidence.truth), dtype=bool))
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


def in_slices(evidence: Evidence, limits: Limits) -> list[Gate]:
    """In no slice with enough images is the candidate significantly worse than the champion."""
    if evidence.champion is None:
        return []
    names = [name for name, part in evidence.parts.items() if part.sum() >= limits.min_slice_images]
    pairs = [_differences(evidence, evidence.champion, evidence.parts[name]) for name in names]
    corrected = holm([probability_of_no_loss(lost, won) for lost, won in pairs])
    told = sorted(zip(corrected, names, pairs, strict=True), key=lambda each: (each[0], each[2][1] - each[2][0]))
    worse = [each for each in told if each[0] < 1 - CONFIDENCE]
    shown = "; ".join(f"{name}: {lost} lost, {won} won, p {p:.2g}" for p, name, (lost, won) in (worse or told)[:_NAMED])
    counted = f"{len(worse)} of {len(names)} slices of at least {limits.min_slice_images} images are worse"
    return [
        Gate(
            "no slice worse than the champion",
            not worse,
            f"{counted} ({shown})" if shown else counted,
            f"in each, exact McNemar p after Holm at least {1 - CONFIDENCE:.2f}",
        )
    ]


def _differences(evidence: Evidence, champion: NDArray[np.int64], part: NDArray[np.bool_]) -> tuple[int, int]:
    """Images of the part that only the champion gets right, and those that only the candidate does."""
    right, was_right = evidence.served == evidence.truth, champion == evidence.truth
    return int((part & ~right & was_right).sum()), int((part & right & ~was_right).sum())


def without_suspects(evidence: Evidence, limits: Limits, judge: Callable[[Evidence, Limits], list[Gate]]) -> list[Gate]:
    """The gates of `judge`, which believe the labels, come to the same verdict without the most doubted ones."""
    if limits.suspect_share == 0 or evidence.suspects is None:
        return []
    most = int(limits.suspect_share * len(evidence.truth))
    left_out = evidence.suspects.order[:most]
    before = judge(evidence, limits)
    after = judge(_without(evidence, left_out), limits)
    verdicts = [all(gate.held for gate in gates) for gates in (before, after)]
    turned = [f"{new.name}: {new.measured}" for old, new in zip(before, after, strict=True) if old.held != new.held]
    words = ["hold" if verdict else "do not hold" for verdict in verdicts]
    measured = (
        f"without {len(left_out)} of {len(evidence.suspects.order)} doubted images ({evidence.suspects.by}) they "
    )
    measured += f"{words[1]}, with them they {words[0]}"
    return [
        Gate(
            "verdict without doubted labels",
            verdicts[0] == verdicts[1],
            "; ".join((measured, *turned)),
            f"the gates that believe the labels say the same without the most doubtful {limits.suspect_share:.1%}",
        )
    ]


def _without(evidence: Evidence, left_out: NDArray[np.int64]) -> Evidence:
    keep = np.ones(len(evidence.truth), dtype=bool)
    keep[left_out] = False
    return replace(
        evidence,
        truth=evidence.truth[keep],
        served=evidence.served[keep],
        offline=evidence.offline[keep],
        champion=None if evidence.champion is None else evidence.champion[keep],
        probabilities=None if evidence.probabilities is None else evidence.probabilities[keep],
        parts={name: part[keep] for name, part in evidence.parts.items()},
        suspects=None,
    )
