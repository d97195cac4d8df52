"""When two photographs count as one picture: part of the ingest form in the Prefect UI. Imports pydantic only."""

from typing import Final

from pydantic import BaseModel, ConfigDict, Field

SMALLEST_LIMIT: Final = 16  # a group of so many photographs is never too large: one tile was photographed 15 times


class TwinRule(BaseModel):
    """When two photographs count as one picture. The defaults are what did best on real sets: docs/decisions.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hash_distance: int = Field(
        14,
        ge=0,
        le=16,
        description="Compare the pixels of photographs whose 64-bit perceptual hashes differ in at most so many bits; "
        "0: do not look for near-duplicates (tiny images such as digits, which are all alike)",
    )
    likeness: float = Field(
        0.93,
        ge=0.5,
        le=1,
        description="Correlation of the registered pixels (1: equal but for light) from which two photographs are one picture",
    )
    max_group_share: float = Field(
        0.01,
        gt=0,
        le=1,
        description="A group with a greater share of the photographs is reported and divided; "
        f"up to {SMALLEST_LIMIT} photographs are always allowed",
    )

    def largest_group(self, photographs: int) -> int:
        """How many of that many photographs may share a group."""
        return max(SMALLEST_LIMIT, int(self.max_group_share * photographs))
