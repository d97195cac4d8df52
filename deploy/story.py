"""What the demo tells on the screen and keeps for its report."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.status import Status
from rich.table import Table

from deploy.watch import wait_for_run

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

APPEARS_WITHIN: Final = 90.0
FINISHES_WITHIN: Final = {"ingest": 900.0, "train": 3600.0, "promote": 900.0, "drift": 600.0}
SHOWN_METRICS: Final = ("val/Loss", "val/Accuracy", "val/Recall")


@dataclass
class Story:
    """`report` is what `.tirewatch/demo-report.json` will hold."""

    console: Console
    began: float = field(default_factory=time.monotonic)
    report: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        self.console.print(f"  {text}", soft_wrap=True)

    def chapter(self, title: str) -> None:
        self.console.print(f"\n[bold]{title}[/bold] [dim]{time.monotonic() - self.began:.0f} s[/dim]")

    @contextmanager
    def step(self, title: str) -> Iterator[Status]:
        """A spinner while it lasts, a line with its seconds when it is done."""
        started = time.monotonic()
        with self.console.status(title) as status:
            yield status
        self.console.print(f"[green]✓[/green] {title} [dim]{time.monotonic() - started:.1f} s[/dim]", soft_wrap=True)

    def follow(self, deployment: str, since: datetime, parameters: Mapping[str, Any]) -> "FlowRun":
        """Wait for the run that an event started since then, and say how it ended."""
        flow, _, _ = deployment.partition("/")
        with self.step(deployment) as status:

            def show(run: "FlowRun") -> None:
                status.update(f"{deployment} [dim]{run.name}[/dim] {run.state_name} {_newest_epoch(run)}")

            run = wait_for_run(deployment, since, parameters, APPEARS_WITHIN, FINISHES_WITHIN[flow], show)
        self.say(f"[bold]{run.state_name}[/bold] {message_of(run)}")
        return run

    def close(self, path: Path) -> None:
        """The closing table, and the report on disk."""
        self.report["seconds_total"] = round(time.monotonic() - self.began, 1)
        path.write_text(json.dumps(self.report, indent=2) + "\n")
        table = Table("figure", "value", title="What happened, measured")
        for name, value in _flat(self.report):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        self.console.print(table)
        self.say(f"report: {path}")


def message_of(run: "FlowRun") -> str:
    """What the run said of its end."""
    return (run.state.message if run.state else None) or ""


def _newest_epoch(run: "FlowRun") -> str:
    """The newest epoch of a running training, as MLflow has it."""
    from mlflow import MlflowClient

    if not (run.name or "").startswith("train") or run.state_name != "Running":
        return ""
    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`prefect.flow_run_id` = '{run.id}'", max_results=1)
    metrics = found[0].data.metrics if found else {}
    return "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN_METRICS if name in metrics)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list) and value is not None:
            yield f"{prefix}{name}", value
