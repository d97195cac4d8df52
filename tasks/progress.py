"""How far a training is, as a progress bar on the page of its Prefect run."""

import logging
from typing import TYPE_CHECKING, cast
from uuid import UUID

from tasks.recipe import TrainConfig
from tasks.runs import artifact_key

if TYPE_CHECKING:
    from tasks.loop import Epoch

log = logging.getLogger(__name__)


class ProgressBar:
    """An artifact of the run, made at once and updated with every epoch. A server that is away for a moment is no harm."""

    def __init__(self, dataset: str, config: TrainConfig) -> None:
        from prefect.artifacts import create_progress_artifact

        self.config = config
        made = create_progress_artifact(0.0, artifact_key("progress", dataset), f"epoch 0 of {config.epochs}")
        self.artifact = cast(UUID, made)  # called synchronously

    def tell(self, epoch: "Epoch") -> None:
        self._update(progress_of(epoch, self.config), described(epoch, self.config))

    def end(self, epoch: "Epoch", stopped: str) -> None:
        self._update(100.0, f"{described(epoch, self.config)}: {stopped}")

    def _update(self, progress: float, description: str) -> None:
        import httpx
        from prefect.artifacts import update_progress_artifact

        try:
            update_progress_artifact(self.artifact, progress, description)
        except httpx.HTTPError as error:
            log.warning("the progress bar stays behind: %s", error)


def progress_of(epoch: "Epoch", config: TrainConfig) -> float:
    """Percent of what may be trained: by epochs or by time, whichever is nearer to its end."""
    done = max(epoch.number / config.epochs, epoch.seconds / 60 / config.max_minutes)
    return round(100 * min(done, 1.0), 1)


def described(epoch: "Epoch", config: TrainConfig) -> str:
    return (
        f"epoch {epoch.number} of {config.epochs}, {epoch.seconds / 60:.1f} of {config.max_minutes:g} minutes, "
        f"validation loss {epoch.validation_loss:.4f}, accuracy {epoch.validation.accuracy:.4f}"
    )
