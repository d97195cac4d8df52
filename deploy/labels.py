"""`tirewatch labels ...`: what is doubted, a folder to review, the decisions sent back, and how far people agree."""

import re
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape

from deploy.dataset import State, add_row, say, settings_of, table_of

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.agreement import Consensus, Votes
    from tasks.dataset import DatasetVersion
    from tasks.label_review import Findings
    from tasks.storage import Store

app: Final = typer.Typer(no_args_is_help=True, help="Doubted labels: show, review, submit; agreement of annotators.")

Reference = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="Without a version, the newest")]
_REFERENCE: Final = re.compile(r"([a-z0-9][a-z0-9_-]{0,62})(?:@v?(\d{1,9}))?")
_SHEET: Final = 8_000_000  # bytes of a sheet in a folder
_PLAIN: Final = re.compile(r"[^\w-]+")


@app.command()
def show(
    reference: Reference,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="How many suspects are listed")] = 20,
    state: State = None,
) -> None:
    """What the newest run of `labels/<recipe>` found about a dataset version."""
    from tasks.label_report import headline

    with settings_of(state) as here:
        _, findings, suspects = _found(here.store, reference)
    say(f"{headline(findings)}; {suspects.num_rows} of them nobody has looked at")
    say(f"estimated share of wrong labels {findings.error_rate:.1%}; agreement {findings.agreement:.1%}")
    pairs = table_of("labelled", "probably", "photographs, about", "share")
    for each in findings.noise[:limit]:
        add_row(pairs, each.given, each.likely, f"{each.photographs:.0f}", f"{each.share:.1%}")
    say(pairs)
    table = table_of("rank", "sha256", "labelled", "probably", "sure", "split", "source")
    for row in suspects.slice(0, limit).to_pylist():
        names = (row["given"], row["suggested"], f"{row['suggested_confidence']:.2f}", row["split"], row["source_key"])
        add_row(table, str(row["rank"]), row["sha256"][:12], *names)
    say(table)


@app.command()
def review(
    reference: Reference,
    folder: Annotated[Path, typer.Argument(help="A folder that is new or empty")],
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=2000, help="Suspects in the folder, at most")] = 100,
    state: State = None,
) -> None:
    """The most doubtful photographs, a sheet of them and the file to edit, for the person who decides."""
    from tasks.label_evidence import photographs_of
    from tasks.label_report import sheet
    from tasks.label_review import review_document, review_entries, write_review_folder

    with settings_of(state) as here:
        store = here.store
        version, findings, suspects = _found(store, reference)
        rows = suspects.slice(0, limit).to_pylist()
        if not rows:
            say(f"{findings.dataset} v{findings.version}: no doubted label is left that nobody has looked at")
            return
        pictures = photographs_of(store, version, [row["sha256"] for row in rows])
        images = [pictures[row["sha256"]] for row in rows]
        document = review_document(findings.dataset, findings.version, review_entries(suspects.slice(0, limit)))
        named = ((_name(row), data) for row, data in zip(rows, images, strict=True))
        write_review_folder(folder, document, named, sheet(rows, images, side=160, most=_SHEET))
    say(f"{len(rows)} photographs in {folder}: look at sheet.jpg, edit annotations.json, then")
    say(f"tirewatch labels submit {folder} {findings.dataset}")


@app.command()
def submit(
    folder: Annotated[Path, typer.Argument(help="The folder of `review`, or the edited annotations.json itself")],
    dataset: Annotated[str, typer.Argument(help="Name of the dataset")],
    batch: Annotated[str | None, typer.Option(help="Name of the batch; without it, one made of the decisions")] = None,
    state: State = None,
) -> None:
    """Send the decisions: corrections as a batch that ingest makes a version of, confirmations as what is not asked again."""
    from tasks.batch import ANNOTATIONS
    from tasks.dataset import open_rows, read_records
    from tasks.label_review import reviewed
    from tasks.label_review import submit as send

    with settings_of(state) as here:
        store = here.store
        newest = read_records(store, dataset)[-1]
        labels = open_rows(store, newest).to_table(columns=["sha256", "label"])
        known = dict(zip(labels["sha256"].to_pylist(), labels["label"].to_pylist(), strict=True))
        path = folder / ANNOTATIONS if folder.is_dir() else folder
        if not path.is_file():
            raise ValueError(f"{path} does not exist: name the folder that `tirewatch labels review` made")
        document = path.read_bytes()
        decided = reviewed(document, known, newest.version.classes)
        prefix = send(store, dataset, newest.version.version, decided, batch or f"review-{decided.content}")
        where = f" sent as {store.uri(prefix)}" if prefix else ""
    say(f"{len(decided.entries)} labels corrected{where}, {len(decided.confirmed)} confirmed")


@app.command()
def agreement(
    votes: Annotated[Path, typer.Argument(help="CSV with the columns sha256, annotator, label; one vote a line")],
    reference: Annotated[
        str | None,
        typer.Option("--dataset", metavar="NAME[@VERSION]", help="Weigh people against its labels and their ranking"),
    ] = None,
    corrections: Annotated[
        Path | None, typer.Option(help="With --dataset: write the labels that the consensus changes to this new file")
    ] = None,
    state: State = None,
) -> None:
    """How far annotators agree, whom to trust, and what their votes add up to."""
    from tasks.agreement import consensus, fleiss_kappa, pair_agreements, read_votes

    if reference is None:  # needs no stack
        try:
            read = read_votes(votes)
        except ValueError as error:
            Console(stderr=True).print(f"[bold red]error[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None
        found = consensus(read)
    else:
        with settings_of(state) as here:
            read, found, changed = _weighed(here.store, votes, reference)
            if corrections is not None:
                _write_new(corrections, changed)
    say(f"{len(read.sha256)} photographs, {len(read.annotators)} annotators, Fleiss' kappa {fleiss_kappa(read):.3f}")
    pairs = table_of("annotator", "annotator", "photographs", "same label", "Cohen's kappa")
    for pair in pair_agreements(read):
        add_row(pairs, pair.first, pair.second, str(pair.photographs), f"{pair.same:.1%}", _number(pair.kappa))
    say(pairs)
    people = table_of("annotator", "photographs", "as the consensus", "quality")
    for each in found.annotators:
        add_row(people, each.name, str(each.photographs), f"{each.agreement:.1%}", _number(each.quality))
    say(people)


def _weighed(store: "Store", path: Path, reference: str) -> "tuple[Votes, Consensus, bytes]":
    """The votes, their consensus by CROWDLAB, and the review file of what it changes in the dataset."""
    import numpy as np

    from tasks.agreement import consensus, read_votes
    from tasks.label_review import read_findings, read_ranking, review_document

    version = _version(store, reference)
    findings = read_findings(store, version.name, version.version)
    ranked = read_ranking(store, findings, ["sha256", "given", "split", "source_key", "probabilities"])
    rows: dict[str, dict[str, Any]] = {row["sha256"]: row for row in ranked.to_pylist()}
    votes = read_votes(path, findings.classes)
    if unknown := [each for each in votes.sha256 if each not in rows]:
        raise ValueError(f"{path}: {version.name} v{version.version} does not hold the photograph {unknown[0]}")
    found = consensus(votes, np.array([rows[each]["probabilities"] for each in votes.sha256], dtype=float))
    entries = [
        {
            "sha256": sha256,
            "label_value": findings.classes[label],
            "given_label": rows[sha256]["given"],
            "consensus_quality": round(float(quality), 3),
            "split": rows[sha256]["split"],
            "source": rows[sha256]["source_key"],
        }
        for sha256, label, quality in zip(votes.sha256, found.labels, found.quality, strict=True)
        if findings.classes[label] != rows[sha256]["given"]
    ]
    return votes, found, review_document(version.name, version.version, entries)


def _write_new(path: Path, document: bytes) -> None:
    if path.exists():
        raise FileExistsError(f"{path} is there already: name a new file")
    path.write_bytes(document)


def _found(store: "Store", reference: str) -> "tuple[DatasetVersion, Findings, pa.Table]":
    """A version, what was found about its labels, and the suspects that nobody has looked at."""
    from tasks.label_review import open_suspects, read_findings, read_ranking

    version = _version(store, reference)
    findings = read_findings(store, version.name, version.version)
    return version, findings, open_suspects(read_ranking(store, findings))


def _version(store: "Store", reference: str) -> "DatasetVersion":
    from tasks.dataset import open_version, read_records

    parsed = _REFERENCE.fullmatch(reference)
    if not parsed:
        raise ValueError(f"{reference!r} names no version: write NAME or NAME@VERSION, such as tire@12")
    name, number = parsed.groups()
    newest = read_records(store, name)[-1].version
    return newest if number is None else open_version(store, name, int(number))


def _name(row: dict[str, Any]) -> str:
    """A file name that sorts by doubt and says what is doubted."""
    given, suggested = (_PLAIN.sub("-", row[name])[:40] for name in ("given", "suggested"))
    extension = Path(row["source_key"]).suffix.lower()
    known = extension if re.fullmatch(r"\.[a-z]{2,5}", extension) else ".jpg"
    return f"{row['rank']:04d}_{given}_{suggested}_{row['sha256'][:12]}{known}"


def _number(value: float) -> str:
    return "-" if isnan(value) else f"{value:.3f}"
