"""When a new dataset version is worth a training."""

from typing import TYPE_CHECKING, Final

from pydantic import BaseModel, ConfigDict, Field

from tasks.storage import Store

if TYPE_CHECKING:
    from tasks.dataset import DatasetVersion

TRAINED: Final = ("registered", "below minimum")  # outcomes of a training that took place


class StartRule(BaseModel):
    """What must be new since the last training. The defaults train on every dataset version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_new_images: int = Field(0, ge=0, description="At least so many photographs more than at the last training")
    min_new_share: float = Field(0.0, ge=0, le=10, description="The same as a share of that training's photographs")


def too_little_new(store: Store, stage: str, version: "DatasetVersion", rule: StartRule) -> str | None:
    """The rule and its figures when fewer photographs than it asks for were added since the stage last trained."""
    from tasks.claims import verdicts

    if not rule.min_new_images and not rule.min_new_share:
        return None
    trained_on = [
        made.figures["photographs"]
        for made in verdicts(store, stage).values()
        if made.figures.get("dataset") == version.name and made.outcome in TRAINED
    ]
    if not trained_on:
        return None
    before, now = max(trained_on), sum(version.splits.values())
    needed = max(rule.min_new_images, round(rule.min_new_share * before))
    if now - before >= needed:
        return None
    new = f"{version.name} v{version.version} has {now - before} photographs more than the last training"
    return f"{new}, {needed} are asked for"
