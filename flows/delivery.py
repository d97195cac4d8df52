"""The step of a promotion that lets a proven version into production by degrees, and what is seen of it on the run's page."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast
from uuid import UUID

import httpx
from prefect import task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows.settings import Settings
from tasks.delivery import Delivery, Stage, Tally, as_markdown, stages
from tasks.gates import Gate, Limits

if TYPE_CHECKING:
    from tasks.proof import Proof

PAGE_EVERY: Final = 30.0  # seconds between two versions of the page while nothing is decided

log = logging.getLogger(__name__)


def check_delivery(here: Settings, how: Delivery | None) -> None:
    """Raises ValueError before any work where nothing of production can be seen."""
    if how and not here.capture_share:
        raise ValueError(
            "capture_share is 0: nothing of production is captured, so a delivery would see nothing. Set "
            "TIREWATCH_CAPTURE_SHARE above 0, or leave `delivery` empty"
        )


@task(cache_policy=NO_CACHE)
def deliver(here: Settings, staged: Path, proof: "Proof", how: Delivery, limits: Limits) -> tuple[Gate, ...]:
    """Shadow and canaries beside the champion, until the candidate has shown enough or is withdrawn."""
    from tasks.rollout import Server, roll_out
    from tasks.sealed import read_sealed

    sealed = read_sealed(staged, verify_files=False)
    page = _Page(sealed.model, sealed.version, how)
    server = Server(here.serving_root, here.triton, here.cpu_accelerator)
    who = f"flow-run/{flow_run.get_id() or 'by-hand'}"
    gates = roll_out(server, here.store, staged, proof.golden, how, limits.max_p99_ms, who, page.tell)
    page.end(gates)
    return gates


class _Page:
    """A progress bar and a page of figures. A Prefect server that is away for a moment changes nothing for the delivery."""

    def __init__(self, model: str, version: int, how: Delivery) -> None:
        self.title, self.key, self.how = f"{model} v{version}", model.replace("_", "-"), how
        self.steps = stages(how)
        made = create_progress_artifact(0.0, f"progress-delivery-{self.key}", f"{self.title}: brought up")
        self.bar = cast(UUID, made)  # called synchronously
        self.shown: tuple[str, float] = ("", 0.0)
        self.latest: tuple[Stage, Tally] = (self.steps[0], Tally())

    def tell(self, stage: Stage, total: Tally) -> None:
        """After each look."""
        self.latest = stage, total
        before = next(index for index, each in enumerate(self.steps) if each.name == stage.name)
        done = (before + min(stage.done / max(stage.needed, 1), 1.0)) / len(self.steps)
        told = f"{self.title}, {stage.name}: {stage.done} of {stage.needed} answers"
        try:
            update_progress_artifact(self.bar, round(100 * done, 1), told)
            name, at = self.shown
            if name != stage.name or time.monotonic() - at > PAGE_EVERY:
                self.shown = stage.name, time.monotonic()
                self._show(f"{self.title}: {stage.name}", ())
        except httpx.HTTPError as error:
            log.warning("the page of the delivery stays behind: %s", error)

    def end(self, gates: tuple[Gate, ...]) -> None:
        """What became of it."""
        held = bool(gates) and all(gate.held for gate in gates)
        verdict = "delivered" if held else "withdrawn"
        if held:
            update_progress_artifact(self.bar, 100.0, f"{self.title}: {verdict}")
        self._show(f"{self.title}: {verdict}", gates)

    def _show(self, title: str, gates: tuple[Gate, ...]) -> None:
        stage, total = self.latest
        create_markdown_artifact(
            key=f"delivery-{self.key}", markdown=as_markdown(title, stage, total, self.how, gates), description=title
        )
