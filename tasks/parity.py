"""The same images through every rung from PyTorch to Triton's answer; what counts is whether a decision flips.

numpy only: rungs are compared by their probabilities, wherever they were computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tasks.decision import DecisionRule, decide, score

GOLDEN_IMAGES: Final = 128
ROUNDING: Final = 1e-3  # another runtime, batch or thread count in the same precision: 1e-6 to 1e-5 were measured
RETRAINED: Final = 1e-2  # what training wrote down, perhaps on a GPU with TF32, against the same weights here
GOLDEN_MARGIN: Final = 0.05  # golden images are clear cases: a flip there is a fault, not rounding at the threshold


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: how far the step moved the probabilities, and how many decisions changed.

    silent: images without a number on either side. Each is a flip too, and no part of the differences.
    """

    name: str
    images: int
    largest_difference: float
    mean_difference: float
    flips: int
    limit: float | None = None  # of the largest difference; None where the step changes the precision
    silent: int = 0

    @property
    def flip_share(self) -> float:
        return self.flips / self.images if self.images else 0.0

    @property
    def held(self) -> bool:
        """No decision flipped on the golden images, and nothing moved further than rounding where rounding is all there is."""
        return self.images > 0 and self.flips == 0 and (self.limit is None or self.largest_difference <= self.limit)

    @property
    def measured(self) -> str:
        """What was found, in one sentence."""
        found = (
            f"{self.flips} of {self.images} golden decisions flip, differences to {self.largest_difference:.0e}, "
            f"mean {self.mean_difference:.0e}"
        )
        return f"{found}; {self.silent} without a number" if self.silent else found

    @property
    def demanded(self) -> str:
        return "0 flips" if self.limit is None else f"0 flips, differences to at most {self.limit:.0e}"


@dataclass(frozen=True)
class Step:
    """Where the golden images were put through: probabilities [N, C]. limit: how far this step may move them from the one
    before; None where it changes the precision, and only decisions count.
    """

    name: str
    probabilities: NDArray[Any]
    limit: float | None = None


def climb(steps: Sequence[Step], rule: DecisionRule) -> tuple[Rung, ...]:
    """A rung between each step and the next: the rung that does not hold names the step that is at fault."""
    return tuple(
        replace(
            compare(f"{lower.name} -> {upper.name}", lower.probabilities, upper.probabilities, rule), limit=upper.limit
        )
        for lower, upper in pairwise(steps)
    )


def compare(name: str, before: NDArray[Any], after: NDArray[Any], rule: DecisionRule) -> Rung:
    """[N, C] probabilities of the same N images before and after a step. Raises ValueError for shapes that differ."""
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before.shape != after.shape:
        raise ValueError(f"rung {name!r}: {before.shape} probabilities before the step and {after.shape} after it")
    spoken = np.isfinite(before).all(axis=1) & np.isfinite(after).all(axis=1)
    difference = np.abs(after[spoken] - before[spoken])
    silent = int((~spoken).sum())
    return Rung(
        name=name,
        images=len(before),
        largest_difference=float(difference.max(initial=0.0)),
        mean_difference=float(difference.mean()) if difference.size else 0.0,
        flips=int((decide(before[spoken], rule) != decide(after[spoken], rule)).sum()) + silent,
        silent=silent,
    )


def golden_indices(
    probabilities: NDArray[Any], labels: Sequence[str], rule: DecisionRule, count: int = GOLDEN_IMAGES
) -> NDArray[np.int64]:
    """Indices of the golden images among N validation images in their fixed order (by sha256): up to `count`, the same
    share of each label, clear cases only: the score at least 0.05 from the threshold, or, where there is no threshold,
    the first class at least 0.05 ahead of the second.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if rule.threshold is not None:
        clear = np.abs(score(probabilities, rule) - rule.threshold) >= GOLDEN_MARGIN
    else:
        top = np.sort(probabilities, axis=1)
        clear = top[:, -1] - top[:, -2] >= GOLDEN_MARGIN
    by_label: dict[str, list[int]] = {}
    for index in np.flatnonzero(clear).tolist():
        by_label.setdefault(labels[index], []).append(index)
    chosen: list[int] = []
    depth = 0
    while len(chosen) < count and any(depth < len(group) for group in by_label.values()):
        for label in sorted(by_label):  # one of each label in turn: stratified, and no chance in it
            if depth < len(by_label[label]) and len(chosen) < count:
                chosen.append(by_label[label][depth])
        depth += 1
    return np.array(sorted(chosen), dtype=np.int64)
