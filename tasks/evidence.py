"""What a promotion is decided by: the limits of the recipe, the evidence about the candidate, and gates that hold or do not.

Values only: `proof` and `cohorts` measure, `gates` and `comparison` judge.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from tasks.decision import DecisionRule
from tasks.parity import Rung


class CostLimit(BaseModel):
    """What wrong decisions may cost in production, where defects are rarer than in the test split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    escape: float = Field(gt=0, description="What one defect that passes as good costs, in any currency")
    overkill: float = Field(gt=0, description="What one good piece that is rejected costs, in the same currency")
    defect_share: float = Field(gt=0, lt=1, description="Share of defective pieces in production, such as 0.02")
    at_most: float = Field(
        gt=0, description="What 10,000 pieces may cost: the upper 95 % bound must stay at or below this"
    )


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
    min_slice_images: int = Field(
        20, ge=5, description="Slices of the test split with fewer images are not compared with the champion's"
    )
    max_calibration_error: float | None = Field(
        None, gt=0, le=1, description="Expected calibration error of the served probabilities; empty: not demanded"
    )
    cost: CostLimit | None = Field(
        None, description="Expected cost per 10,000 pieces of the production; empty: not demanded"
    )
    suspect_share: float = Field(
        0.02,
        ge=0,
        le=0.2,
        description="The verdict must be the same without this share of test images whose labels are doubted most; 0: not "
        "demanded",
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
class Suspects:
    """Test images whose label is doubted. order: their positions, the most doubtful first. by: what doubts them."""

    order: NDArray[np.int64]
    by: str


@dataclass(frozen=True)
class Evidence:
    """What was measured on the served candidate. Decisions and truth: label indices [N] of the same N test images.

    parts: `column value` -> bool [N], the slices of the test split. suspects: None where nothing can tell.
    """

    rule: DecisionRule
    truth: NDArray[np.int64]
    served: NDArray[np.int64]  # -1 where the server answered with an error
    offline: NDArray[np.int64]  # -1 where the artifact has no number
    rungs: Sequence[Rung]  # on the golden images; the last rung is the server's answer
    test_rung: Rung  # PyTorch against the sealed artifact, on the whole test split
    p99_ms: float
    champion: NDArray[np.int64] | None = None  # the champion's decisions on the same images, in this rule's label order
    probabilities: NDArray[np.float32] | None = None  # [N, C] as served; rows without an answer do not count
    parts: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    suspects: Suspects | None = None


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


def accuracy(decisions: NDArray[Any], truth: NDArray[Any]) -> float:
    """Share of right decisions; NaN for none."""
    return float((decisions == truth).mean()) if len(truth) else float("nan")
