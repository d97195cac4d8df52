"""`tirewatch quarantine ...`: what ingest set aside, why, and how it comes in again."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from deploy.dataset import AsJson, State, add_row, say, settings_of, table_of

if TYPE_CHECKING:
    from tasks.quarantine import Quarantined
    from tasks.resubmission import Wish
    from tasks.storage import Store

app: Final = typer.Typer(no_args_is_help=True, help="Files that ingest set aside: list, show, resubmit, dismiss.")

_Dataset = Annotated[str, typer.Argument(help="A dataset")]
_Batch = Annotated[str, typer.Argument(help="A batch of it, as in incoming/<dataset>/<batch>/")]
_Names = Annotated[
    list[str] | None, typer.Option("--name", help="A file, by its path below the batch; may be repeated")
]
_Reason = Annotated[str | None, typer.Option(help="Only files that were set aside for this reason")]


@app.command("list")
def list_files(
    dataset: _Dataset,
    batch: Annotated[str | None, typer.Option(help="Only this batch")] = None,
    reason: _Reason = None,
    every: Annotated[bool, typer.Option("--all", help="Also files that the dataset holds by now")] = False,
    as_json: AsJson = False,
    state: State = None,
) -> None:
    """Files that wait for somebody to look at them."""
    from tasks.quarantine import quarantined

    with settings_of(state) as here:
        records = _of_reason(quarantined(here.store, dataset, batch), reason)
    shown = [each for each in records if every or each.state != "settled"]
    if as_json:
        typer.echo(json.dumps([_told(each) for each in shown], indent=1))
        return
    table = table_of("batch", "file", "reason", "label", "set aside", "state")
    for each in shown:
        at = f"{each.at:%Y-%m-%d %H:%M}" if each.at else "-"
        add_row(table, each.batch, each.name, each.reason, each.label or "-", at, _state(each))
    if shown:
        say(table)
    counts = ", ".join(f"{count} {name}" for name, count in Counter(each.reason for each in shown).most_common())
    settled = len(records) - len(shown)
    say(
        f"{len(shown)} files of {dataset} are set aside{f' ({counts})' if counts else ''}; {settled} others are settled"
    )


@app.command()
def show(
    dataset: _Dataset,
    batch: _Batch,
    name: Annotated[str, typer.Argument(help="The file, by its path below the batch")],
    as_json: AsJson = False,
    state: State = None,
) -> None:
    """Everything known about one file, and what can be done."""
    from tasks.checks import RULES
    from tasks.quarantine import quarantined_file
    from tasks.resubmission import Wish, obstacle

    with settings_of(state) as here:
        found = quarantined_file(here.store, dataset, batch, name)
        hint = obstacle(here.store, found, Wish(), _classes(here.store, dataset))
        uri = here.store.uri(found.key)
    if as_json:
        typer.echo(json.dumps({**_told(found), "uri": uri, "obstacle": hint}, indent=1))
        return
    say(f"{uri}{'' if found.present else ' (there is no such file)'}")
    say(f"{found.reason}: {RULES[found.reason][1] if found.reason in RULES else 'an unknown rule'}")
    say(f"  {found.message}")
    say(f"label {found.label or 'unknown'}, sha256 {found.sha256 or 'unknown'}, {_state(found)}")
    again = shlex.join(["tirewatch", "quarantine", "resubmit", dataset, batch, "--name", name])
    say(f"not to be sent again as it is: {hint}" if hint else f"to send it again: {again}")


@app.command()
def resubmit(
    dataset: _Dataset,
    batch: _Batch,
    name: _Names = None,
    reason: _Reason = None,
    label: Annotated[str | None, typer.Option(help="The right label, for all files that are sent")] = None,
    corrects: Annotated[
        bool, typer.Option("--corrects", help="Their labels hold against those in the dataset")
    ] = False,
    new_classes: Annotated[bool, typer.Option("--new-classes", help="Their classes may be new to the dataset")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also what was sent before and has not arrived")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, change nothing")] = False,
    as_json: AsJson = False,
    state: State = None,
) -> None:
    """Send quarantined files again, as a new batch; the copy is made within S3, and its event starts ingest."""
    from tasks.resubmission import Wish
    from tasks.resubmission import resubmit as send

    wish = Wish(label, corrects, new_classes, again)
    with settings_of(state) as here:
        chosen, left = _chosen(here.store, dataset, batch, name, reason, wish)
        made = None if dry_run or not chosen else send(here.store, chosen, wish, datetime.now(UTC))
    files = {each.name: label or each.label for each in chosen}
    if as_json:
        told = {"prefix": made and made.prefix, "files": files, "left": left, "dry_run": dry_run}
        typer.echo(json.dumps(told, indent=1))
    else:
        for each, why in left.items():
            say(f"left: {each}: {why}")
        say(
            f"{'would send' if dry_run else 'sent'} {len(files)} files of {batch}{f' as {made.prefix}' if made else ''}"
        )
        if made and new_classes:
            options = '{"new_classes": true}'
            command = ["prefect", "deployment", "run", f"ingest/{dataset}", "-p", f"prefix={made.prefix}"]
            say(
                f"its event is refused where classes must be known; then: {shlex.join([*command, '-p', f'options={options}'])}"
            )
    if not chosen:
        raise typer.Exit(1)


@app.command()
def dismiss(
    dataset: _Dataset,
    batch: _Batch,
    name: _Names = None,
    reason: _Reason = None,
    state: State = None,
) -> None:
    """Take files off the list: somebody has looked, and they are not wanted. The files stay where they are."""
    from tasks.quarantine import dismiss as drop

    with settings_of(state) as here:
        if not name and not reason:
            raise ValueError("say which: --name, once for each file, or --reason")
        chosen = _named(here.store, dataset, batch, name, reason)
        drop(here.store, chosen, datetime.now(UTC))
    say(f"{len(chosen)} files of {batch} are off the list")


def _named(
    store: "Store", dataset: str, batch: str, names: Sequence[str] | None, reason: str | None
) -> "list[Quarantined]":
    from tasks.quarantine import quarantined, quarantined_file

    if names:
        return _of_reason([quarantined_file(store, dataset, batch, each) for each in dict.fromkeys(names)], reason)
    return _of_reason(quarantined(store, dataset, batch), reason)


def _of_reason(records: "Sequence[Quarantined]", reason: str | None) -> "list[Quarantined]":
    found = [each for each in records if reason in (None, each.reason)]
    if records and not found:
        known = ", ".join(sorted({each.reason for each in records}))
        raise LookupError(f"no file is set aside as {reason!r}; there are: {known}")
    return found


def _chosen(
    store: "Store", dataset: str, batch: str, names: Sequence[str] | None, reason: str | None, wish: "Wish"
) -> "tuple[list[Quarantined], dict[str, str]]":
    """What can be sent, and why each other file cannot. A file that was named must be sent: ValueError."""
    from tasks.resubmission import disagreeing, obstacle

    classes = _classes(store, dataset)
    found = {each.name: each for each in _named(store, dataset, batch, names, reason)}
    left = {each: why for each, record in found.items() if (why := obstacle(store, record, wish, classes))}
    for each in disagreeing([record for each, record in found.items() if each not in left], wish):
        left[each] = "the same bytes under several labels: choose one with --name, or say --label"
    if names and left:
        raise ValueError("; ".join(f"{each}: {why}" for each, why in left.items()))
    return [record for each, record in found.items() if each not in left], left


def _classes(store: "Store", dataset: str) -> tuple[str, ...]:
    from tasks.dataset import newest_version

    newest = newest_version(store, dataset)
    return newest.classes if newest else ()


def _state(each: "Quarantined") -> str:
    if each.state == "settled":
        return f"in the dataset as {each.stored}"
    if each.refused:
        return f"waiting; {each.resubmitted} was refused: {each.refused}"
    return f"sent again in {each.resubmitted}" if each.state == "resubmitted" else "waiting"


def _told(each: "Quarantined") -> dict[str, Any]:
    told = asdict(each)
    told.pop("item")
    return {**told, "at": each.at and each.at.isoformat(), "label": each.label, "key": each.key, "state": each.state}
