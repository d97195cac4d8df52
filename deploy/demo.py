"""`tirewatch demo`: the whole story on real photographs. Every figure it prints comes from the run.

A model is born, answers, is watched, is replaced under load and taken back. Nobody calls a flow of the line: an upload's
event starts ingest, whose event starts training, whose event starts promotion. The one exception is said aloud: a first
candidate that misses its gates is trained on once, longer.
"""

import io
import os
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table

from deploy import local, photographs
from deploy.figures import first_figures, swap_figures
from deploy.photographs import Labelled, Photographs
from deploy.stack import SOURCE, Stack, StackError
from deploy.story import Story, message_of
from deploy.watch import RunFailed

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from flows.settings import Settings
    from tasks.dataset import DatasetVersion

# A few hundred photographs, of which the demo keeps 40 % for later, leave a test split that proves little: the limits for
# somebody's own folder are wide enough to show the line, and say on the promotion's page how wide they are.
SMALL_SET_LIMITS: Final = {
    "min_accuracy": 0.75,
    "min_test_images": 50,
    "min_defects": 15,
    "max_escape_rate": 0.4,
    "max_overkill_rate": 0.5,
}


class Refused(RuntimeError):
    """No version was good enough. The message holds the reasons."""


def run_demo(state: Path, data: str | None = None, defect: Sequence[str] = (), stop: bool = False) -> int:
    """The whole story; 0 when it was told to its end, 1 when no version was good enough or something failed.

    data: a folder of class folders, `digits`, or None for the solar cells. defect: classes that count as a defect.
    """
    story = Story(Console())
    try:
        pictures = _photographs(state.resolve() / "demo", data)
        if pictures.notice:
            story.console.print(pictures.notice, style="dim")
        stack = _bring_up(story, state)
        _tell(story, pictures, tuple(defect))
        story.report["urls"] = {service.name: service.url for service in local.status(stack.state) if service.url}
        story.close(stack.state / "demo-report.json")
        return 0
    except (Refused, RunFailed, TimeoutError, ValueError, StackError) as error:
        story.console.print(f"[red]✗[/red] {error}", soft_wrap=True)
        return 1
    finally:
        if stop and (state / "stack.json").exists():
            with story.step("stack down"):
                local.down(state)


def _photographs(workspace: Path, data: str | None) -> Photographs:
    if data is None:
        return photographs.solar_cells(workspace / "solar_cells")
    if data == "digits":
        return photographs.digits(workspace / "digits")
    return photographs.own(Path(data), workspace / "photographs")


def _bring_up(story: Story, state: Path) -> Stack:
    with story.step("stack up: S3, Prefect, MLflow, Triton, bridge, workers") as status:
        stack = local.up(state, lambda name, seconds, _: status.update(f"stack up: {name} ready in {seconds:.0f} s"))
    os.environ.update(stack.environment())
    return stack


def _tell(story: Story, pictures: Photographs, defect: tuple[str, ...]) -> None:
    from flows.settings import Settings

    here = Settings()
    _not_told_before(here, pictures.recipe)
    if pictures.recipe == "photographs":
        _deploy_recipe(story, pictures, defect)
    first, second = pictures.counts

    story.chapter(f"A model is born: {first} photographs")
    dataset, version = _first_version(story, here, pictures)
    first_figures(story, here, pictures.recipe, version, dataset)
    _ask(story, here, pictures)

    story.chapter(f"Production is watched: {len(pictures.traffic)} photographs nobody uploaded")
    story.report["drift"] = {
        "quiet": _watch(story, here, pictures, Path.read_bytes, "through the usual camera"),
        "broken_camera": _watch(
            story, here, pictures, lambda path: photographs.break_camera(path.read_bytes()), "the camera breaks:"
        ),
    }

    story.chapter(f"The next model, under load: {second} more photographs")
    promoted = _second_version(story, here, pictures)

    story.chapter("Taken back")
    _roll_back(story, here, pictures.recipe, promoted)


def _not_told_before(here: "Settings", recipe: str) -> None:
    """The same photographs make no second version, so the story cannot begin again on their own dataset."""
    from tasks.dataset import newest_version

    told = newest_version(here.store, recipe)
    if told is not None:
        raise ValueError(
            f"this stack knows {recipe} v{told.version} already, from an earlier demo: look at it (tirewatch status), or begin "
            "anew with `make down`, removing .tirewatch, and `make demo`"
        )


def _deploy_recipe(story: Story, pictures: Photographs, defect: tuple[str, ...]) -> None:
    """The deployments of the recipe `tire` under another name, for these classes."""
    from deploy.recipes import deploy_all, for_recipe, read_prefect_yaml

    unknown = sorted(set(defect) - set(pictures.classes))
    if unknown:
        raise ValueError(f"DEFECT={','.join(unknown)} is no class folder; there are {', '.join(pictures.classes)}")
    with story.step(f"deployments for the recipe {pictures.recipe}"):
        parsed = read_prefect_yaml(SOURCE / "prefect.yaml")
        config = {"defect_labels": list(defect)}
        recipe = for_recipe(parsed, pictures.recipe, template="tire", config=config, limits=SMALL_SET_LIMITS)
        said = io.StringIO()  # four screens of Prefect's own, wanted only when something is wrong
        try:
            with redirect_stdout(said):
                deploy_all(recipe)
        except RuntimeError as error:
            raise RunFailed(f"{error}\n{said.getvalue()[-2000:]}") from error


def _first_version(story: Story, here: "Settings", pictures: Photographs) -> "tuple[DatasetVersion, int]":
    """Upload, and watch until a version answers; the dataset version and the model version."""
    recipe = pictures.recipe
    sealed, prefix = _upload(story, here, pictures.first, recipe)
    ingested = story.follow(f"ingest/{recipe}", sealed, {"prefix": prefix})
    assert ingested.start_time is not None
    story.report["upload_to_run_seconds"] = round(ingested.start_time.timestamp() - sealed.timestamp(), 2)
    story.say(f"the upload's event started it after {story.report['upload_to_run_seconds']:.1f} s")
    dataset = _dataset(story, here, recipe)
    trained = story.follow(f"train/{recipe}", sealed, {"dataset": recipe, "dataset_version": dataset.version})
    longer = trained.state_name == "BelowMinimum"
    if longer:
        sealed, trained = datetime.now(UTC), _train_longer(story, trained, None)
    version, promoted = _judged(story, here, recipe, sealed, trained)
    if promoted.state_name == "Refused" and not longer:
        since, trained = datetime.now(UTC), _train_longer(story, trained, version)
        version, promoted = _judged(story, here, recipe, since, trained)
    if promoted.state_name == "Refused":
        raise Refused(f"no version was good enough: {message_of(promoted)}")
    return dataset, version


def _upload(story: Story, here: "Settings", folder: Path, recipe: str) -> tuple[datetime, str]:
    """(when the sealing marker was stored, prefix of the batch)."""
    from tasks.sources import upload_folder

    batch = f"demo-{folder.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    with story.step(f"upload to s3://{here.s3_bucket}/incoming/{recipe}/{batch}/"):
        prefix = upload_folder(here.store, folder, recipe, batch)
    return datetime.now(UTC), prefix


def _dataset(story: Story, here: "Settings", recipe: str) -> "DatasetVersion":
    from tasks.dataset import newest_version

    dataset = newest_version(here.store, recipe)
    if dataset is None:
        raise RunFailed(f"ingest ended without a version of {recipe}: read its run in the Prefect UI")
    story.report["dataset"] = {
        "name": dataset.name,
        "versions": dataset.version,
        "digest": dataset.digest,
        "splits": dict(dataset.splits),
    }
    story.say(f"{recipe} v{dataset.version} {dataset.digest[:19]} {dict(dataset.splits)}")
    return dataset


def _judged(story: Story, here: "Settings", recipe: str, since: datetime, trained: "FlowRun") -> "tuple[int, FlowRun]":
    """The version the training run registered, and the promotion run its event started."""
    from tasks.registry import version_of_flow_run

    if trained.state_name == "BelowMinimum":
        raise Refused(f"nothing was registered: {message_of(trained)}")
    version = version_of_flow_run(here.mlflow_tracking_uri, recipe, str(trained.id))
    return version, story.follow(f"promote/{recipe}", since, {"model": recipe, "version": version})


def _train_longer(story: Story, trained: "FlowRun", version: int | None) -> "FlowRun":
    """Once more, twice as long: from the refused version's weights, or anew where none was registered."""
    from prefect.deployments import run_deployment

    config = dict(trained.parameters.get("config") or {})
    longer = {**config, "epochs": 2 * int(config.get("epochs", 6)), "continue_from": version, "max_minutes": 10}
    recipe, since = str(trained.parameters["dataset"]), datetime.now(UTC)
    parameters = {**trained.parameters, "config": longer, "occasion": None}  # by hand: whatever was decided before
    run_deployment(f"train/{recipe}", parameters=parameters, timeout=0, as_subflow=False)
    story.say(f"training once more, up to {longer['epochs']} epochs" + (f", from v{version}" if version else ""))
    return story.follow(f"train/{recipe}", since, {"dataset": recipe})


def _ask(story: Story, here: "Settings", pictures: Photographs) -> None:
    """The held-back photographs over gRPC and HTTP; both must say the same."""
    from tasks.serving import infer_front_door

    table = Table("photograph", "truth", "answer", "score", "version", "dataset")
    asked: list[dict[str, Any]] = []
    with story.step(f"{len(pictures.held_back)} held-back photographs over gRPC and HTTP"):
        for path, truth in pictures.held_back:
            photograph = path.read_bytes()
            grpc, http = (infer_front_door(here.triton, pictures.recipe, photograph, p) for p in ("grpc", "http"))
            if (grpc.label, grpc.model_version) != (http.label, http.model_version):
                raise RunFailed(f"{path.name}: gRPC says {grpc.label}, HTTP says {http.label}")
            colour = "green" if grpc.label == truth else "red"
            answer, digest = f"[{colour}]{grpc.label}[/{colour}]", str(grpc.lineage["dataset_digest"])[:15]
            table.add_row(path.name, truth, answer, f"{grpc.score:.3f}", str(grpc.model_version), digest)
            asked.append({"file": path.name, "truth": truth, "answer": grpc.label, "score": round(grpc.score, 4)})
    story.console.print(table)
    story.report["held_back"] = {"right": sum(a["answer"] == a["truth"] for a in asked), "photographs": asked}


def _watch(
    story: Story, here: "Settings", pictures: Photographs, photograph_of: Callable[[Path], bytes], what: str
) -> dict[str, Any]:
    """Production traffic, then a drift run by hand; its verdict."""
    from prefect.deployments import run_deployment

    _traffic(story, here, pictures.recipe, pictures.traffic, photograph_of, what)
    since, seen = datetime.now(UTC), len(pictures.traffic)
    parameters = {"model": pictures.recipe, "options": {"window": seen, "minimum": min(100, seen)}}
    run_deployment(f"drift/{pictures.recipe}", parameters=parameters, timeout=0, as_subflow=False)
    run = story.follow(f"drift/{pictures.recipe}", since, {"model": pictures.recipe})
    return {
        "verdict": run.state_name,
        "message": message_of(run),
        "page": f"{here.prefect_ui_url}/runs/flow-run/{run.id}",
    }


def _traffic(
    story: Story,
    here: "Settings",
    recipe: str,
    traffic: Sequence[Labelled],
    photograph_of: Callable[[Path], bytes],
    what: str,
) -> None:
    from tasks.model_repository import version_directory
    from tasks.routing import read_routing
    from tasks.sealed import read_sealed
    from tasks.serving import evaluate_served

    table = read_routing(here.serving_root, recipe)
    assert table is not None
    directory = version_directory(here.serving_root, table.champion.network, table.champion.version)
    with story.step(f"{what} {len(traffic)} photographs over gRPC"):
        images = [photograph_of(path) for path, _ in traffic]
        served = evaluate_served(here.triton, recipe, images, read_sealed(directory, verify_files=False))
    story.say(f"{served.requests - len(served.errors)} answers, p99 {served.p99_ms:.0f} ms")


def _second_version(story: Story, here: "Settings", pictures: Photographs) -> bool:
    """A further batch through the whole line; whether the challenger took over."""
    recipe = pictures.recipe
    sealed, prefix = _upload(story, here, pictures.second, recipe)
    story.follow(f"ingest/{recipe}", sealed, {"prefix": prefix})
    dataset = _dataset(story, here, recipe)
    trained = story.follow(f"train/{recipe}", sealed, {"dataset": recipe, "dataset_version": dataset.version})
    if trained.state_name == "BelowMinimum":
        story.report["promotion"] = {"decision": "BelowMinimum", "reasons": message_of(trained)}
        return False
    version, run = _judged(story, here, recipe, sealed, trained)
    story.report["promotion"] = {"decision": run.state_name, "version": version, "reasons": message_of(run)}
    if run.state_name == "Refused" and _only_not_better(message_of(run)):
        run = _overrule(story, recipe, version, run)
        story.report["promotion"]["overruled"] = run.state_name
    if run.state_name == "Promoted":
        story.report["swap"] = swap_figures(here, recipe, version)
    return run.state_name == "Promoted"


def _only_not_better(reasons: str) -> bool:
    """Whether the champion's accuracy was the one thing the challenger did not beat."""
    return "better than the champion: " in reasons and reasons.count("demanded") == 1


def _overrule(story: Story, recipe: str, version: int, refused: "FlowRun") -> "FlowRun":
    """What a person may do about a challenger that is as good, and knows more photographs: every other gate is asked again."""
    from prefect.deployments import run_deployment

    limits = {**(refused.parameters.get("limits") or {}), "must_beat_champion": False}
    story.say("as good within chance, and trained on more: by hand that one gate is waived, and the proof begins anew")
    since, parameters = datetime.now(UTC), {"model": recipe, "version": version, "limits": limits}
    run_deployment(f"promote/{recipe}", parameters=parameters, timeout=0, as_subflow=False)
    return story.follow(f"promote/{recipe}", since, {"model": recipe, "version": version})


def _roll_back(story: Story, here: "Settings", recipe: str, promoted: bool) -> None:
    from tasks.rollback import roll_back

    if not promoted:
        story.say("the challenger was refused, so the champion never changed: there is nothing to take back")
        story.report["rollback"] = {"seconds": None}
        return
    with story.step("rollback"):
        started = time.monotonic()
        done = roll_back(
            here.serving_root, here.triton, here.store, here.mlflow_tracking_uri, recipe, "demo", "shown in the demo"
        )
        seconds = time.monotonic() - started
    story.say(f"v{done.version} answers again instead of v{done.withdrawn} after {seconds:.2f} s")
    story.report["rollback"] = {"seconds": round(seconds, 3), "version": done.version}
