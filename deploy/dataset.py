"""`tirewatch dataset ...` and `tirewatch upload`: dataset versions from the command line, in tables or as JSON."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy.stack import ADDRESSES, StackError, read_stack

if TYPE_CHECKING:
    from flows.settings import Settings
    from tasks.dataset import Record
    from tasks.storage import Store

app: Final = typer.Typer(no_args_is_help=True, help="Versions of datasets: list, show, diff, export, prune.")
console: Final = Console()

State = Annotated[
    Path | None,
    typer.Option(help="State folder of a stack; without it, what TIREWATCH_* address, else the stack in .tirewatch"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts")]
_STATE: Final = Path(".tirewatch")
_REFERENCE: Final = re.compile(r"([a-z0-9][a-z0-9_-]{0,62})(?:@v?(\d{1,9}))?")


@contextmanager
def settings_of(state: Path | None) -> "Iterator[Settings]":
    """The settings of the system that a command is for: of the stack that was named, else of what the environment addresses,
    else of the stack in this folder. What people can mend ends in one sentence and exit code 1.
    """
    from tasks.retention import ReferencesUnknown

    of_environment = state is None and any(os.environ.get(name) for name in ADDRESSES)
    try:
        if not of_environment:
            os.environ.update(read_stack(state or _STATE).environment())
        from flows.settings import Settings

        here = Settings()
        if state is None:  # else it has just been named
            where = "the environment" if of_environment else f"the stack {_STATE}"
            typer.echo(f"{where}: {_address(here)}", err=True)
        yield here
    except (StackError, LookupError, ValueError, FileExistsError, ReferencesUnknown) as error:
        Console(stderr=True).print(f"[bold red]error[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _address(here: "Settings") -> str:
    bucket = here.store.uri("") + (f" at {here.s3_endpoint_url}" if here.s3_endpoint_url else "")
    return f"{bucket}, MLflow {here.mlflow_tracking_uri}, Triton {here.triton_http}"


@app.command("list")
def list_versions(
    name: Annotated[str | None, typer.Argument(help="A dataset; without it, all of them")] = None,
    as_json: AsJson = False,
    state: State = None,
) -> None:
    """Datasets, or the versions of one."""
    from tasks.dataset import dataset_names, read_records

    with settings_of(state) as here:
        store = here.store
        if name is None:
            newest = {each: read_records(store, each)[-1:] for each in dataset_names(store)}
            records = [record for found in newest.values() for record in found]
        else:
            records = read_records(store, name)
    if as_json:
        typer.echo(json.dumps([_told(record) for record in records], indent=1))
        return
    table = table_of("dataset", "version", "train", "val", "test", "classes", "made", "by batch", "digest", "")
    for record in records:
        version = record.version
        gone = f"retired {record.retired_at[:10]}" if record.retired_at else ""
        splits = [str(version.splits[split]) for split in ("train", "val", "test")]
        made = [str(len(version.classes)), record.created_at[:16], _made_by(record), version.digest[7:19], gone]
        add_row(table, version.name, f"v{version.version}", *splits, *made)
    console.print(table, soft_wrap=True)


@app.command()
def show(
    reference: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="Without a version, the newest")],
    as_json: AsJson = False,
    state: State = None,
) -> None:
    """What one version holds: classes, splits, formats, sizes and statistics of its photographs."""
    from tasks.dataset import summary_of

    with settings_of(state) as here:
        record = _record(here.store, reference)
        summary = None if record.retired_at and record.summary is None else summary_of(here.store, record)
    if as_json:
        typer.echo(json.dumps({**_told(record), "summary": summary and asdict(summary)}, indent=1))
        return
    version = record.version
    console.print(f"[bold]{version.name} v{version.version}[/]  {version.digest}", highlight=False, soft_wrap=True)
    gone = f"; retired on {record.retired_at[:10]}: its rows are gone" if record.retired_at else ""
    say(f"made {record.created_at[:19]} by batch {_made_by(record)}{gone}")
    if summary is None:
        return
    width, height = (_range(side) for side in (summary.width, summary.height))
    formats = ", ".join(f"{count} {kind}" for kind, count in summary.formats.items())
    say(f"{summary.rows} photographs ({formats}), {width} x {height} pixels")
    _show_counts("class", summary.classes)
    batches = table_of("batch", "photographs")
    for name, count in [*summary.batches.items(), *([("others", summary.other_batches)] * bool(summary.other_batches))]:
        add_row(batches, name, str(count))
    console.print(batches)
    statistics = table_of("statistic", "mean", "deviation", "1 %", "5 %", "25 %", "50 %", "75 %", "95 %", "99 %")
    for name, spread in summary.statistics.items():
        values = (spread.mean, spread.deviation, *spread.quantiles)
        add_row(statistics, name, *(f"{value:.4g}" for value in values))
    console.print(statistics)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="NAME@VERSION")],
    second: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="Without a version, the newest")],
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="How many of each kind are listed")] = 20,
    as_json: AsJson = False,
    state: State = None,
) -> None:
    """What was added, removed and relabelled from one version to another; with --json all of it."""
    from tasks.dataset_compare import difference

    with settings_of(state) as here:
        store = here.store
        found = difference(store, _record(store, first).version, _record(store, second).version)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
        return
    counts = ", ".join(f"{count} {kind}" for kind, count in found.counts.items())
    say(f"{_shown(first)} -> {_shown(second)}: {counts}")
    told = found.as_json(limit)
    for kind in ("added", "removed", "relabelled", "moved"):
        if not told[kind]:
            continue
        table = table_of(kind, *(name for name in told[kind][0] if name != "sha256"))
        for row in told[kind]:
            add_row(table, row["sha256"][:12], *(str(value) for name, value in row.items() if name != "sha256"))
        console.print(table, soft_wrap=True)
        if (more := found.counts[kind] - len(told[kind])) > 0:
            console.print(f"and {more} more", style="dim")


@app.command()
def export(
    reference: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="Without a version, the newest")],
    folder: Annotated[Path, typer.Argument(help="A folder that is new or empty")],
    split: Annotated[
        list[str] | None, typer.Option(help="train, val or test; may be repeated; without it, all")
    ] = None,
    split_folders: Annotated[bool, typer.Option(help="Class folders below train/, val/ and test/")] = True,
    state: State = None,
) -> None:
    """The photographs in class folders, with an annotations.json that ingests again to the same rows."""
    from tasks.dataset_export import export as write_folder

    with settings_of(state) as here, console.status("exporting") as status:
        version = _record(here.store, reference).version
        total = sum(version.splits[each] for each in split or version.splits if each in version.splits)

        def progress(written: int) -> None:
            if written % 100 == 0:
                status.update(f"exporting {written} of {total}")

        written = write_folder(here.store, version, folder, split or tuple(version.splits), split_folders, progress)
    say(f"{written} photographs of {version.name} v{version.version} in {folder}")


@app.command()
def prune(
    name: Annotated[str, typer.Argument(help="A dataset")],
    keep: Annotated[int, typer.Option(min=1, help="The newest versions that stay in any case")] = 10,
    min_age: Annotated[float, typer.Option(min=0, help="Days that a version must be old")] = 30,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be retired, change nothing")] = False,
    as_json: AsJson = False,
    state: State = None,
) -> None:
    """Retire old versions that no registered model and no training run refers to; their records stay."""
    from tasks.dataset import read_records
    from tasks.retention import referenced_versions, retire, versions_to_retire

    now = datetime.now(UTC)
    with settings_of(state) as here:
        records = read_records(here.store, name)
        referenced = referenced_versions(here.mlflow_tracking_uri, name)
        chosen = versions_to_retire(records, referenced, keep, timedelta(days=min_age), now)
        freed = 0 if dry_run else retire(here.store, name, chosen, now).bytes_removed
    if as_json:
        told = {"retired": chosen, "referenced": sorted(referenced), "bytes_removed": freed, "dry_run": dry_run}
        typer.echo(json.dumps({"dataset": name, **told}))
        return
    shown = ", ".join(f"v{number}" for number in chosen) or "no version"
    kept = (
        f"of {len(records)}; models and runs name {', '.join(f'v{number}' for number in sorted(referenced)) or 'none'}"
    )
    say(f"would retire {shown} {kept}" if dry_run else f"retired {shown} {kept}; {freed / 2**20:.1f} MiB given back")


def upload(
    folder: Annotated[
        Path, typer.Argument(help="Class folders, images with annotations.json, MNIST IDX or binary CIFAR-10")
    ],
    dataset: Annotated[str, typer.Option(help="Name of the dataset")],
    batch: Annotated[str | None, typer.Option(help="Name of the batch; without it, that of the folder")] = None,
    state: State = None,
) -> None:
    """Upload photographs as a sealed batch: its event starts ingest."""
    from tasks.batch import INCOMING, batch_of
    from tasks.importers import recognised
    from tasks.sources import upload_set

    named = batch or re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("._-")[:100] or "batch"
    with settings_of(state) as here:
        batch_of(dataset, f"{INCOMING}/{dataset}/{named}/")  # before minutes are spent on looking through the folder
        found = recognised(folder)
        say(f"{folder}: {found.text}")
        with console.status("uploading"):
            prefix = upload_set(here.store, folder, dataset, named, found)
    say(f"uploaded and sealed as {here.store.uri(prefix)}")


def _record(store: "Store", reference: str) -> "Record":
    from tasks.dataset import read_record, read_records, version_numbers

    parsed = _REFERENCE.fullmatch(reference)
    if not parsed:
        raise ValueError(f"{reference!r} names no version: write NAME or NAME@VERSION, such as tire@12")
    name, number = parsed.groups()
    if number is None:
        return read_records(store, name)[-1]
    if not version_numbers(store, name):
        read_records(store, name)  # says which datasets there are
    return read_record(store, name, int(number))


def _told(record: "Record") -> dict[str, Any]:
    told = asdict(record)
    told.pop("writer")
    told.pop("summary")
    return {**told.pop("version"), **told}


def _made_by(record: "Record") -> str:
    number = record.version.version
    return ", ".join(name for name, told in record.batches.items() if told["version"] == number) or "-"


def _shown(reference: str) -> str:
    return reference.replace("@v", "@").replace("@", " v")


def _range(ends: Sequence[int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}-{ends[1]}"


def table_of(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def add_row(table: Table, *values: str) -> None:
    table.add_row(*(escape(value) for value in values))  # a class may well be called [bold]


def say(text: str | Table) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _show_counts(what: str, counts: Mapping[str, Mapping[str, int]]) -> None:
    table = table_of(what, "train", "val", "test", "all")
    for name, splits in counts.items():
        values = [splits.get(split, 0) for split in ("train", "val", "test")]
        add_row(table, name, *(str(value) for value in values), str(sum(values)))
    console.print(table)
