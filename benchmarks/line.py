"""How long the line itself takes: from the upload of a batch to a running flow, and everything that is not training.

The bare limit of "upload -> run started" is the same deployment asked for by hand (`run_deployment`): worker, process and
imports, without S3, webhook, bridge and trigger. The bare limit of the whole is the training loop alone. One embedded stack
in a temporary folder, scikit-learn's digits.
"""

import json
import os
import statistics
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from deploy import local
from deploy.watch import wait_for_run

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

RECIPE = "digits"
REPEATS = 5


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tirewatch-line-") as directory:
        state = Path(directory) / "stack"
        began = time.monotonic()
        stack = local.up(state, lambda *_: None, new_ports=True)
        up_seconds = time.monotonic() - began
        try:
            os.environ.update(stack.environment())
            figures = {"up_s": round(up_seconds, 1), **measure(Path(directory))}
        finally:
            local.down(state)
    figures["versions"] = {name: version(name) for name in ("prefect", "mlflow", "torch", "tritonclient")}
    show(figures)
    print(json.dumps(figures))


def measure(workspace: Path) -> dict[str, Any]:
    """Figures of one whole line, then of several small uploads and as many runs by hand."""
    from flows.settings import Settings
    from tasks.registry import load_card, run_metrics, version_of_flow_run
    from tasks.sources import digit_folders

    here = Settings()
    folder = digit_folders(workspace / "digits")
    sealed, prefix = upload_timed(here, folder, "whole")
    ingest = follow("ingest", sealed, {"prefix": prefix})
    train = follow("train", sealed, {"dataset": RECIPE})
    model = version_of_flow_run(here.mlflow_tracking_uri, RECIPE, str(train.id))
    promote = follow("promote", sealed, {"model": RECIPE, "version": model})
    trained, _ = load_card(here.mlflow_tracking_uri, RECIPE, model)
    loop = run_metrics(here.mlflow_tracking_uri, trained.run_id)["train_seconds"]
    whole = seconds_between(sealed, ended(promote))
    figures: dict[str, Any] = {
        "whole_line_s": round(whole, 1),
        "training_loop_s": round(loop, 1),
        "overhead_s": round(whole - loop, 1),
        "upload_to_ingest_s": round(seconds_between(sealed, started(ingest)), 2),
        "ingest_s": round(seconds_between(started(ingest), ended(ingest)), 1),
        "ingest_to_train_s": round(seconds_between(ended(ingest), started(train)), 2),
        "train_s": round(seconds_between(started(train), ended(train)), 1),
        "train_to_promote_s": round(seconds_between(ended(train), started(promote)), 2),
        "promote_s": round(seconds_between(started(promote), ended(promote)), 1),
        "promotion": promote.state_name,
    }
    return figures | latencies(here, workspace, folder)


def latencies(here: Any, workspace: Path, folder: Path) -> dict[str, Any]:
    """Median seconds from a sealed upload to its running flow, and from a request by hand to its running flow."""
    from prefect.deployments import run_deployment

    by_event, by_hand = [], []
    for number in range(REPEATS):
        small = workspace / f"small-{number}"
        for label in ("0", "1"):
            (small / label).mkdir(parents=True)
            for picture in sorted((folder / label).iterdir())[:3]:
                (small / label / picture.name).write_bytes(picture.read_bytes())
        sealed, prefix = upload_timed(here, small, f"small-{number}")
        by_event.append(seconds_between(sealed, started(follow("ingest", sealed, {"prefix": prefix}))))
        asked = datetime.now(UTC)
        parameters = {"dataset": RECIPE, "prefix": prefix}
        run_deployment(f"ingest/{RECIPE}", parameters=parameters, timeout=0, as_subflow=False)
        by_hand.append(seconds_between(asked, started(follow("ingest", asked, parameters))))
    event, hand = statistics.median(by_event), statistics.median(by_hand)
    return {
        "upload_to_run_s": round(event, 2),
        "by_hand_to_run_s": round(hand, 2),
        "upload_to_run_ratio": round(event / hand, 2),
        "repeats": REPEATS,
    }


def upload_timed(here: Any, folder: Path, batch: str) -> tuple[datetime, str]:
    """(when the sealing marker was stored, prefix)."""
    from tasks.sources import upload_folder

    prefix = upload_folder(here.store, folder, RECIPE, batch)
    return datetime.now(UTC), prefix


def follow(flow: str, since: datetime, parameters: dict[str, Any]) -> "FlowRun":
    return wait_for_run(f"{flow}/{RECIPE}", since, parameters, 120, 900, lambda run: None)


def started(run: "FlowRun") -> datetime:
    assert run.start_time is not None
    return run.start_time


def ended(run: "FlowRun") -> datetime:
    assert run.end_time is not None
    return run.end_time


def seconds_between(first: datetime, second: datetime) -> float:
    return (second - first).total_seconds()


def show(figures: dict[str, Any]) -> None:
    table = Table("step", "seconds", title="The line, digits")
    for name, value in figures.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.2f}")
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
