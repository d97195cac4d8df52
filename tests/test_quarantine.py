"""`tirewatch quarantine ...` on a real S3: what ingest set aside is found, explained, and comes in again as a batch."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from deploy import dataset as commands
from deploy.cli import app
from deploy.stack import read_stack
from flows.ingest import IngestOptions
from flows.settings import Settings
from tasks import dataset, resubmission, storage
from tasks.batch import BatchRefused, content_of, read_batch
from tasks.claims import Verdict, batch_subject, write_verdict
from tasks.storage import Store

Made = Callable[..., bytes]
Ingest = Callable[..., Any]
NOT_NEEDED = ("prefect", "mlflow", "triton", "bridge", "worker-cpu", "worker-gpu", "watchdog")


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stack of S3 alone."""
    here = tmp_path_factory.mktemp("quarantine") / ".tirewatch"
    result = CliRunner().invoke(app, ["up", "--state", str(here), *(f"--without={name}" for name in NOT_NEEDED)])
    assert result.exit_code == 0, result.output
    yield here
    CliRunner().invoke(app, ["down", "--state", str(here)])


@pytest.fixture
def store(state: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in read_stack(state).environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(commands.console, "width", 250)
    return Settings().store


@pytest.fixture
def run(state: Path) -> Callable[..., Result]:
    """`run(*arguments)`: `tirewatch quarantine ...` against the stack."""
    return lambda *arguments: CliRunner().invoke(app, ["quarantine", *arguments, "--state", str(state)])


@pytest.fixture
def said(run: Callable[..., Result]) -> Callable[..., str]:
    """The same for a command that must succeed: what it printed."""

    def output(*arguments: str) -> str:
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        return result.output

    return output


def pictures(photograph: Made, first: int = 0, count: int = 12) -> dict[str, bytes]:
    return {f"{'good' if n % 3 else 'bad'}/{n}.jpg": photograph(n) for n in range(first, first + count)}


def filled(store: Store, photograph: Made, ingested: Ingest, name: str) -> None:
    """A version of 12 photographs, and a batch of which four files were set aside, each for a reason of its own."""
    ingested(store, name, "first", pictures(photograph))
    wrong = {
        "good/again.jpg": photograph(0),  # stored as bad/0.jpg
        "odd/unknown.jpg": photograph(901),
        "good/cut.jpg": photograph(902, 200)[:-800],
        "loose.jpg": photograph(903),
    }
    ingested(store, name, "second", {**pictures(photograph, 100, 20), **wrong})


def labels(store: Store, name: str, version: int | None = None) -> dict[str, str]:
    """The source of each row -> its label, in a version (the newest)."""
    newest = dataset.newest_record(store, name) if version is None else dataset.read_record(store, name, version)
    assert newest is not None
    rows = dataset.open_rows(store, newest).to_table(columns=["source_key", "label"]).to_pylist()
    return {row["source_key"].rsplit("/", 1)[-1]: row["label"] for row in rows}


def sent(store: Store, text: str) -> str:
    """The name of the batch that the command says it made."""
    found = re.search(r" as incoming/[a-z-]+/(resubmitted-[0-9-]+)/$", text, re.MULTILINE)
    assert found, text
    assert storage.exists(store, f"{found[0].removeprefix(' as ')}annotations.json")
    return found[1]


def test_what_was_set_aside_is_listed_by_reason_and_batch_for_people_and_scripts(
    store: Store, photograph: Made, ingested: Ingest, said: Callable[..., str]
) -> None:
    filled(store, photograph, ingested, "q-list")
    text = said("list", "q-list")
    assert re.search(
        r"^second +good/again\.jpg +contradicts_dataset +good +20\d\d-\S+ \S+ +waiting", text, re.MULTILINE
    )
    assert re.search(r"^second +loose\.jpg +no_label +- ", text, re.MULTILINE)
    assert "4 files of q-list are set aside (1 contradicts_dataset, " in text
    told = json.loads(said("list", "q-list", "--reason", "unknown_class", "--batch", "second", "--json"))
    assert [(each["name"], each["label"], each["state"], each["key"]) for each in told] == [
        ("odd/unknown.jpg", "odd", "waiting", "incoming/q-list/second/odd/unknown.jpg")
    ]
    shown = said("show", "q-list", "second", "good/again.jpg")
    assert "contradicts_dataset: bytes the dataset already holds under another label" in shown
    assert "say --corrects to make them 'good' there" in shown


def test_a_wrong_class_comes_in_under_its_right_label_and_leaves_the_list(
    store: Store, photograph: Made, ingested: Ingest, run: Callable[..., Result], said: Callable[..., str]
) -> None:
    filled(store, photograph, ingested, "q-class")
    files = ("--name", "odd/unknown.jpg", "--name", "loose.jpg")
    refused = run("resubmit", "q-class", "second", *files)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "odd/unknown.jpg: 'odd' is not one of bad, good: say --label" in refused.stderr
    assert "loose.jpg: its label is unknown: say --label" in refused.stderr
    assert "would send 2 files" in said("resubmit", "q-class", "second", *files, "--label", "good", "--dry-run")
    batch = sent(store, said("resubmit", "q-class", "second", *files, "--label", "good"))
    assert f"sent again in {batch}" in said("list", "q-class")
    twice = run("resubmit", "q-class", "second", *files, "--label", "good")
    assert (twice.exit_code, f"it went into {batch} already" in twice.stderr) == (1, True)

    assert ingested(store, "q-class", batch, {}).new_rows == 2
    assert labels(store, "q-class")["0001-unknown.jpg"] == labels(store, "q-class")["0002-loose.jpg"] == "good"
    assert "2 files of q-class are set aside" in said("list", "q-class")
    every = said("list", "q-class", "--all")
    assert re.search(r"odd/unknown\.jpg .* in the dataset as good$", every, re.MULTILINE)
    settled = run("resubmit", "q-class", "second", *files, "--label", "good", "--again")
    assert "the dataset holds these bytes already, as 'good'" in settled.stderr


def test_a_contradiction_corrects_the_dataset_when_that_is_asked_for(
    store: Store, photograph: Made, ingested: Ingest, run: Callable[..., Result], said: Callable[..., str]
) -> None:
    filled(store, photograph, ingested, "q-fix")
    file = ("q-fix", "second", "--name", "good/again.jpg")
    assert "holds these bytes as 'bad': say --corrects" in run("resubmit", *file).stderr
    batch = sent(store, said("resubmit", *file, "--corrects"))
    assert ingested(store, "q-fix", batch, {}).relabelled == {"bad -> good": 1}
    assert (labels(store, "q-fix", 2)["0.jpg"], labels(store, "q-fix")["0.jpg"]) == ("bad", "good")
    assert "good/again.jpg" not in said("list", "q-fix")


def test_a_class_that_is_meant_to_be_new_comes_in_by_a_run_that_allows_it(
    store: Store, photograph: Made, ingested: Ingest, said: Callable[..., str]
) -> None:
    filled(store, photograph, ingested, "q-new")
    text = said("resubmit", "q-new", "second", "--reason", "unknown_class", "--new-classes")
    assert "prefect deployment run ingest/q-new -p prefix=incoming/q-new/resubmitted-" in text
    batch = sent(store, text)
    with pytest.raises(BatchRefused, match="unknown_class"):
        ingested(store, "q-new", batch, {})
    assert ingested(store, "q-new", batch, {}, IngestOptions(new_classes=True)).version.classes == (
        "bad",
        "good",
        "odd",
    )


def test_damaged_bytes_are_sent_only_when_other_bytes_lie_there(
    store: Store, photograph: Made, ingested: Ingest, run: Callable[..., Result], said: Callable[..., str]
) -> None:
    filled(store, photograph, ingested, "q-cut")
    everything = run("resubmit", "q-cut", "second")
    assert (everything.exit_code, "sent 0 files of second" in everything.stdout) == (1, True)
    assert "left: good/cut.jpg: the bytes themselves are at fault (truncated): replace s3://" in everything.stdout
    storage.write(store, "incoming/q-cut/second/good/cut.jpg", photograph(902, 200))
    text = said("resubmit", "q-cut", "second")
    assert "sent 1 files of second" in text and "left: loose.jpg: its label is unknown" in text
    assert ingested(store, "q-cut", sent(store, text), {}).new_rows == 1
    assert "good/cut.jpg" not in said("list", "q-cut")


def test_an_annotated_photograph_keeps_its_group_line_and_time(
    store: Store, photograph: Made, ingested: Ingest, said: Callable[..., str]
) -> None:
    ingested(store, "q-note", "first", pictures(photograph))
    entries: list[dict[str, Any]] = [{"FilePath": f"{n}.jpg", "label_value": "good"} for n in range(200, 210)]
    about = {"group": "tire-7", "line": "north", "captured_at": "2026-03-01T12:00:00+00:00", "split": "val"}
    entries += [{"FilePath": "x.jpg", "label_value": "odd", **about}, {"FilePath": "gone.jpg", "label_value": "bad"}]
    files = {f"{n}.jpg": photograph(n) for n in [*range(200, 210)]}
    files |= {"x.jpg": photograph(300), "annotations.json": json.dumps({"annotation": {"data": entries}}).encode()}
    ingested(store, "q-note", "second", files)
    text = said("resubmit", "q-note", "second", "--label", "bad")
    assert "left: gone.jpg: there is no such file to send again" in text
    batch = sent(store, text)
    [item] = read_batch(store, "q-note", f"incoming/q-note/{batch}/").items
    assert (item.name, item.label, item.split, item.group, item.line) == ("0001-x.jpg", "bad", "val", "tire-7", "north")
    assert item.captured_at is not None and item.captured_at.isoformat() == "2026-03-01T12:00:00+00:00"


def test_one_picture_under_two_labels_is_sent_only_when_one_is_chosen(
    store: Store, photograph: Made, ingested: Ingest, said: Callable[..., str], run: Callable[..., Result]
) -> None:
    both = {"good/a.jpg": photograph(500), "bad/b.jpg": photograph(500)}
    ingested(store, "q-both", "first", {**pictures(photograph), **both})
    assert run("resubmit", "q-both", "first").stdout.count("the same bytes under several labels: choose one") == 2
    batch = sent(store, said("resubmit", "q-both", "first", "--name", "bad/b.jpg"))
    assert ingested(store, "q-both", batch, {}).new_rows == 1
    left = json.loads(said("list", "q-both", "--json"))
    assert [(each["name"], each["stored"], each["state"]) for each in left] == [("good/a.jpg", "bad", "waiting")]
    assert "1 files of first are off the list" in said("dismiss", "q-both", "first", "--name", "good/a.jpg")
    assert "0 files of q-both are set aside; 1 others are settled" in said("list", "q-both")
    assert storage.exists(store, "incoming/q-both/first/good/a.jpg")


def test_a_batch_that_is_ingested_again_remembers_what_was_sent_again_and_what_was_dismissed(
    store: Store, photograph: Made, ingested: Ingest, said: Callable[..., str]
) -> None:
    filled(store, photograph, ingested, "q-memory")
    batch = sent(store, said("resubmit", "q-memory", "second", "--name", "odd/unknown.jpg", "--label", "good"))
    said("dismiss", "q-memory", "second", "--name", "good/cut.jpg")
    said("dismiss", "q-memory", "second", "--name", "good/again.jpg")
    late = {"good/late.jpg": photograph(990), "good/cut.jpg": photograph(905, 200)[:-700]}
    ingested(store, "q-memory", "second", late)
    left = {each["name"]: each for each in json.loads(said("list", "q-memory", "--all", "--json"))}
    assert (left["odd/unknown.jpg"]["resubmitted"], left["odd/unknown.jpg"]["state"]) == (batch, "resubmitted")
    assert "good/again.jpg" not in left, "it was dismissed, and nothing about it has changed"
    assert left["good/cut.jpg"]["state"] == "waiting", "other bytes: another finding"


def test_a_resubmission_that_dies_before_its_seal_changes_nothing_whoever_ingests_it(
    store: Store, photograph: Made, ingested: Ingest, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(store, photograph, ingested, "q-dies")

    def dies(*_: object) -> None:
        raise ConnectionError("the machine lost its network here")

    with monkeypatch.context() as patch:
        patch.setattr(resubmission, "write", dies)
        died = run("resubmit", "q-dies", "second", "--label", "good", "--reason", "unknown_class")
    assert isinstance(died.exception, ConnectionError)
    [left] = [each for each in storage.list_folders(store, "incoming/q-dies") if each.startswith("resubmitted-")]
    with pytest.raises(BatchRefused, match="1 no_label"):  # silence may seal it
        ingested(store, "q-dies", left, {})
    newest = dataset.newest_version(store, "q-dies")
    assert newest is not None and newest.version == 2


def test_a_file_whose_resubmission_was_refused_waits_again_with_the_reason(
    store: Store, photograph: Made, ingested: Ingest, said: Callable[..., str]
) -> None:
    filled(store, photograph, ingested, "q-back")
    batch = sent(store, said("resubmit", "q-back", "second", "--name", "odd/unknown.jpg", "--new-classes"))
    prefix = f"incoming/q-back/{batch}/"
    with pytest.raises(BatchRefused) as refusal:
        ingested(store, "q-back", batch, {})
    subject = batch_subject(prefix, content_of(store, "q-back", prefix))  # as the flow writes it down
    write_verdict(store, subject, Verdict("refused", "run-1", figures={"reason": str(refusal.value)}))
    assert f"waiting; {batch} was refused: 1 of 1 files" in said("show", "q-back", "second", "odd/unknown.jpg")
    assert sent(store, said("resubmit", "q-back", "second", "--name", "odd/unknown.jpg", "--label", "bad")) != batch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("list nothing", r"no batch of a dataset 'nothing' was ever uploaded; there are: .*q-wrong"),
        ("list q-wrong --batch third", r"no file of incoming/q-wrong/third/ is quarantined; .*: second \(4\)"),
        ("list q-wrong --reason ugly", r"no file is set aside as 'ugly'; there are: contradicts_dataset, no_label, "),
        ("show q-wrong second good/cat.jpg", r"'good/cat.jpg' of the batch 'second' is not .* such as good/cut.jpg"),
        ("resubmit q-wrong second --name x.jpg", r"'x.jpg' of the batch 'second' is not quarantined; 4 files are"),
        ("dismiss q-wrong second", r"say which: --name, once for each file, or --reason"),
    ],
)
def test_a_wrong_name_gets_one_sentence_with_the_right_ones(
    store: Store, photograph: Made, ingested: Ingest, run: Callable[..., Result], arguments: str, message: str
) -> None:
    if dataset.newest_version(store, "q-wrong") is None:
        filled(store, photograph, ingested, "q-wrong")
    result = run(*arguments.split())
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(rf"error {message}.*\n", result.stderr, re.DOTALL), result.stderr
