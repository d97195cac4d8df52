"""`tirewatch demo`: from nothing to a served answer, on real photographs. Every figure it prints comes from the run.

Nobody calls a flow here: the upload's event starts ingest, whose event starts training, whose event starts promotion.
The one exception is said aloud: a candidate that misses its gates is trained on once, longer.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.status import Status
from rich.table import Table

from deploy import local, photographs
from deploy.photographs import Photographs
from deploy.stack import SOURCE, Stack, StackError
from deploy.watch import RunFailed, wait_for_run

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from tasks.dataset import DatasetVersion

APPEARS_WITHIN: Final = 90.0
FINISHES_WITHIN: Final = {"ingest": 900.0, "train": 3600.0, "promote": 900.0}


@dataclass
class Story:
    """What is told on the screen, and what is kept for the report."""

    console: Console
    began: float = field(default_factory=time.monotonic)
    report: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        self.console.print(f"  {text}")

    @contextmanager
    def step(self, title: str) -> Iterator[Status]:
        """A spinner while it lasts, a line with its seconds when it is done."""
        started = time.monotonic()
        with self.console.status(title) as status:
            yield status
        self.console.print(f"[green]✓[/green] {title} [dim]{time.monotonic() - started:.1f} s[/dim]")


class Refused(RuntimeError):
    """The candidate was refused twice. The message holds the reasons."""


def run_demo(state: Path, data: str | None = None, defect: Sequence[str] = (), stop: bool = False) -> int:
    """The whole story; 0 when a version answers at the end, 1 when none was good enough or something failed.

    data: a folder of class folders, `digits`, or None for the solar cells. defect: classes that count as a defect.
    """
    story = Story(Console())
    try:
        pictures = _photographs(state, data)
        if pictures.notice:
            story.console.print(pictures.notice, style="dim")
        stack = _bring_up(story, state)
        _tell(story, stack, pictures, tuple(defect))
        _close(story, stack)
        return 0
    except (Refused, RunFailed, TimeoutError, ValueError, StackError) as error:
        story.console.print(f"[red]✗[/red] {error}")
        return 1
    finally:
        if stop and (state / "stack.json").exists():
            with story.step("stack down"):
                local.down(state)


def _photographs(state: Path, data: str | None) -> Photographs:
    workspace = state.resolve() / "demo"
    if data is None:
        return photographs.solar_cells(workspace)
    if data == "digits":
        return photographs.digits(workspace)
    return photographs.own(Path(data), workspace)


def _bring_up(story: Story, state: Path) -> Stack:
    with story.step("stack up: S3, Prefect, MLflow, Triton, bridge, workers") as status:
        stack = local.up(
            state, lambda name, seconds, url: status.update(f"stack up: {name} ready in {seconds:.0f} s {url}")
        )
    os.environ.update(stack.environment())
    return stack


def _tell(story: Story, stack: Stack, pictures: Photographs, defect: tuple[str, ...]) -> None:
    from flows.settings import Settings

    here = Settings()
    recipe = pictures.recipe
    if recipe == "photographs":
        _deploy_recipe(story, pictures, defect)
    batch = f"demo-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    prefix = f"incoming/{recipe}/{batch}/"
    with story.step(f"upload: {pictures.count} photographs to s3://{here.s3_bucket}/{prefix}"):
        from tasks.sources import upload_folder

        upload_folder(here.store, pictures.folder, recipe, batch)
    sealed = datetime.now(UTC)

    ingested = _follow(story, f"ingest/{recipe}", sealed, {"prefix": prefix})
    assert ingested.start_time is not None
    story.report["upload_to_run_seconds"] = round(ingested.start_time.timestamp() - sealed.timestamp(), 2)
    story.say(f"the upload's event started it after {story.report['upload_to_run_seconds']:.1f} s")
    dataset = _dataset(story, here.store, recipe)

    trained = _follow(story, f"train/{recipe}", sealed, {"dataset": recipe, "dataset_version": dataset.version})
    version, promoted = _judge(story, recipe, sealed, trained)
    if promoted.state_name == "Refused":
        story.console.print(f"[yellow]![/yellow] refused: {promoted.state.message if promoted.state else ''}")
        trained = _train_on(story, trained, version)
        version, promoted = _judge(story, recipe, datetime.now(UTC), trained)
    story.report["promotion"] = {"decision": promoted.state_name, "version": version}
    if promoted.state_name == "Refused":
        raise Refused(f"no version was good enough: {promoted.state.message if promoted.state else ''}")
    _figures(story, here.mlflow_tracking_uri, recipe, version, dataset)
    _ask(story, here, pictures)


def _deploy_recipe(story: Story, pictures: Photographs, defect: tuple[str, ...]) -> None:
    """The deployments of the recipe `tire` under another name, for these classes."""
    from deploy.recipes import deploy_all, for_recipe, read_prefect_yaml

    unknown = sorted(set(defect) - set(pictures.classes))
    if unknown:
        raise ValueError(f"DEFECT={','.join(unknown)} is no class folder; there are {', '.join(pictures.classes)}")
    with story.step(f"deployments for the recipe {pictures.recipe}"):
        parsed = read_prefect_yaml(SOURCE / "prefect.yaml")
        deploy_all(for_recipe(parsed, pictures.recipe, template="tire", config={"defect_labels": list(defect)}))


def _follow(story: Story, deployment: str, since: datetime, parameters: dict[str, Any]) -> "FlowRun":
    with story.step(deployment) as status:

        def show(run: "FlowRun") -> None:
            status.update(f"{deployment} [dim]{run.name}[/dim] {run.state_name} {_epoch(run)}")

        flow = deployment.split("/", maxsplit=1)[0]
        run = wait_for_run(deployment, since, parameters, APPEARS_WITHIN, FINISHES_WITHIN[flow], show)
    if run.state and run.state.message:
        story.say(f"[bold]{run.state_name}[/bold] {run.state.message}")
    return run


def _epoch(run: "FlowRun") -> str:
    """The newest epoch of a training run, as MLflow has it."""
    from mlflow import MlflowClient

    if not run.name or "train" not in run.name or run.state_name != "Running":
        return ""
    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`prefect.flow_run_id` = '{run.id}'", max_results=1)
    return _progress(found[0].data.metrics) if found else ""


def _progress(metrics: dict[str, float]) -> str:
    shown = ("val/Loss", "val/Accuracy", "val/Recall")
    return "  ".join(f"{name} {metrics[name]:.3f}" for name in shown if name in metrics)


def _dataset(story: Story, store: Any, recipe: str) -> "DatasetVersion":
    from tasks.dataset import newest_version

    dataset = newest_version(store, recipe)
    if dataset is None:
        raise RunFailed(f"ingest ended without a version of {recipe}: read its run in the Prefect UI")
    story.report["dataset"] = {
        "name": dataset.name,
        "versions": dataset.version,
        "digest": dataset.digest,
        "splits": dict(dataset.splits),
        "classes": list(dataset.classes),
    }
    story.say(f"{recipe} v{dataset.version} {dataset.digest[:19]} {dict(dataset.splits)}")
    return dataset


def _judge(story: Story, recipe: str, since: datetime, trained: "FlowRun") -> "tuple[int, FlowRun]":
    """The version the training run registered, and the promotion run its event started."""
    from tasks.registry import version_of_flow_run

    if trained.state_name == "BelowMinimum":
        raise Refused(f"nothing was registered: {trained.state.message if trained.state else ''}")
    version = version_of_flow_run(os.environ["MLFLOW_TRACKING_URI"], recipe, str(trained.id))
    return version, _follow(story, f"promote/{recipe}", since, {"model": recipe, "version": version})


def _train_on(story: Story, trained: "FlowRun", version: int) -> "FlowRun":
    """Once more from the refused version's weights, twice as long."""
    from prefect.deployments import run_deployment

    since = datetime.now(UTC)
    config = dict(trained.parameters.get("config") or {})
    longer = {**config, "epochs": 2 * int(config.get("epochs", 6)), "continue_from": version}
    parameters = {**trained.parameters, "config": longer}
    recipe = str(trained.parameters["dataset"])
    run_deployment(f"train/{recipe}", parameters=parameters, timeout=0, as_subflow=False)
    story.say(f"training on from v{version} for up to {longer['epochs']} epochs")
    return _follow(story, f"train/{recipe}", since, {"dataset": recipe})


def _figures(story: Story, uri: str, recipe: str, version: int, dataset: "DatasetVersion") -> None:
    """The run's own figures, as MLflow holds them."""
    from tasks.registry import load_card, run_metrics

    trained, card = load_card(uri, recipe, version)
    metrics = run_metrics(uri, trained.run_id)
    rows = sum(dataset.splits.values())
    story.report["train"] = {
        "recipe": f"train/{recipe}",
        "architecture": card.architecture,
        "image_size": card.image_size,
        "seed": card.seed,
        "test_accuracy": metrics["test_accuracy"],
        "test_share": round(dataset.splits["test"] / rows, 4),
        "threshold": card.rule.threshold,
        "seconds": metrics.get("train_seconds"),
        "mlflow_run": trained.run_id,
    }
    served = {name.removeprefix("served_"): value for name, value in metrics.items() if name.startswith("served_")}
    story.report["served"] = served


def _ask(story: Story, here: Any, pictures: Photographs) -> None:
    """The held-back photographs over gRPC and HTTP; both must say the same."""
    from tasks.serving import infer_front_door

    table = Table("photograph", "truth", "answer", "score", "version", "dataset")
    asked: list[dict[str, Any]] = []
    with story.step(f"{len(pictures.held_back)} held-back photographs over gRPC and HTTP"):
        for path, truth in pictures.held_back:
            answers = [infer_front_door(here.triton, pictures.recipe, path.read_bytes(), p) for p in ("grpc", "http")]
            grpc, http = answers
            if (grpc.label, grpc.model_version) != (http.label, http.model_version):
                raise RunFailed(f"{path.name}: gRPC says {grpc.label}, HTTP says {http.label}")
            good = "green" if grpc.label == truth else "red"
            digest = str(grpc.lineage["dataset_digest"])
            table.add_row(
                path.name,
                truth,
                f"[{good}]{grpc.label}[/{good}]",
                f"{grpc.score:.3f}",
                str(grpc.model_version),
                digest[:15],
            )
            asked.append({"file": path.name, "truth": truth, "answer": grpc.label, "score": round(grpc.score, 4)})
    story.console.print(table)
    story.report["held_back"] = {"right": sum(a["answer"] == a["truth"] for a in asked), "asked": asked}


def _close(story: Story, stack: Stack) -> None:
    report = story.report
    report["seconds_total"] = round(time.monotonic() - story.began, 1)
    report["urls"] = {service.name: service.url for service in local.status(stack.state) if service.url}
    path = stack.state / "demo-report.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    table = Table("figure", "value", title="What happened, measured")
    for section, values in report.items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            if not isinstance(value, (list, dict)):
                table.add_row(
                    f"{section}.{name}".rstrip("."), f"{value:.4g}" if isinstance(value, float) else str(value)
                )
    story.console.print(table)
    story.say(f"report: {path}")
