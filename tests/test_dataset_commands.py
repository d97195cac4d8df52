"""`tirewatch dataset ...` and `tirewatch upload` as people and scripts use them, on real S3 and MLflow servers."""

import hashlib
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
from flows.settings import Settings
from tasks import dataset, storage
from tasks.storage import Store

Made = Callable[..., bytes]
Ingest = Callable[..., Any]


NOT_NEEDED = ("prefect", "triton", "bridge", "worker-cpu", "worker-gpu", "watchdog")


def started(folder: Path, *without: str) -> Path:
    state = folder / ".tirewatch"
    result = CliRunner().invoke(app, ["up", "--state", str(state), *(f"--without={name}" for name in without)])
    assert result.exit_code == 0, result.output
    return state


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stack of S3 and MLflow."""
    here = started(tmp_path_factory.mktemp("commands"), *NOT_NEEDED)
    yield here
    CliRunner().invoke(app, ["down", "--state", str(here)])


def store_of(state: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The S3 of a stack; what its commands set in the environment ends with the test."""
    for name, value in read_stack(state).environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(commands.console, "width", 200)
    return Settings().store


@pytest.fixture
def store(state: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    return store_of(state, monkeypatch)


@pytest.fixture
def run(state: Path) -> Callable[..., Result]:
    """`run(*arguments)`: the command against the stack."""
    return lambda *arguments: CliRunner().invoke(app, [*arguments, "--state", str(state)])


@pytest.fixture
def said(run: Callable[..., Result]) -> Callable[..., str]:
    """The same for a command that must succeed: what it printed."""

    def output(*arguments: str) -> str:
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        return result.output

    return output


def pictures(photograph: Made, first: int, count: int = 12) -> dict[str, bytes]:
    return {f"{'good' if n % 3 else 'bad'}/{n}.jpg": photograph(n) for n in range(first, first + count)}


def grown(store: Store, photograph: Made, ingested: Ingest, name: str) -> str:
    """Three versions: a batch, another, a correction; the sha256 of the corrected photograph."""
    sent = pictures(photograph, 0)
    ingested(store, name, "first", sent)
    ingested(store, name, "second", pictures(photograph, 50, 5))
    wrong = hashlib.sha256(sent["good/1.jpg"]).hexdigest()
    entries = [{"sha256": wrong, "label_value": "bad"}]
    document = {"annotation": {"corrects": True, "data": entries}}
    ingested(store, name, "fix", {"annotations.json": json.dumps(document).encode()})
    return wrong


def test_versions_are_listed_for_people_and_for_scripts(
    store: Store, photograph: Made, ingested: Ingest, said: Callable[..., str]
) -> None:
    grown(store, photograph, ingested, "cmd-list")
    assert re.search(r"^cmd-list +v3 ", said("dataset", "list"), re.MULTILINE)
    lines = said("dataset", "list", "cmd-list").splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["cmd-list", f"v{n}"] for n in (1, 2, 3)]
    assert re.search(r"2026|20\d\d-\d\d-\d\dT\d\d:\d\d +fix ", lines[3])
    told = json.loads(said("dataset", "list", "cmd-list", "--json"))
    assert [(each["version"], sum(each["splits"].values())) for each in told] == [(1, 12), (2, 17), (3, 17)]
    assert told[2]["report"]["relabelled"] == {"good -> bad": 1}
    assert "cmd-list" in {each["name"] for each in json.loads(said("dataset", "list", "--json"))}


def test_a_version_is_shown_with_its_classes_and_statistics(
    store: Store, photograph: Made, ingested: Ingest, said: Callable[..., str]
) -> None:
    grown(store, photograph, ingested, "cmd-show")
    text = said("dataset", "show", "cmd-show@1")
    assert "12 photographs (12 JPEG), 32 x 32 pixels" in text
    assert re.search(r"^good +\d+ +\d+ +\d+ +8 *$", text, re.MULTILINE)
    assert re.search(r"^sharpness +\d", text, re.MULTILINE)
    newest = json.loads(said("dataset", "show", "cmd-show", "--json"))
    assert (newest["version"], newest["summary"]["rows"]) == (3, 17)
    assert newest["summary"]["statistics"]["brightness"]["count"] == 17


def test_the_difference_is_counted_and_listed(
    store: Store, photograph: Made, ingested: Ingest, said: Callable[..., str]
) -> None:
    wrong = grown(store, photograph, ingested, "cmd-diff")
    text = said("dataset", "diff", "cmd-diff@1", "cmd-diff@v3", "-n", "2")
    assert text.startswith("cmd-diff v1 -> cmd-diff v3: 5 added, 0 removed, 1 relabelled, 0 moved, 11 unchanged")
    assert re.search(rf"^{wrong[:12]} +good +bad ", text, re.MULTILINE)
    assert "and 3 more" in text
    told = json.loads(said("dataset", "diff", "cmd-diff@1", "cmd-diff", "--json"))
    assert (len(told["added"]), told["relabelled"][0]["sha256"], told["moved"]) == (5, wrong, [])


def test_a_class_in_brackets_is_shown_as_it_is(
    store: Store, photograph: Made, ingested: Ingest, said: Callable[..., str]
) -> None:
    ingested(store, "cmd-markup", "b1", {f"[red]/{n}.jpg": photograph(n) for n in range(8)})
    assert re.search(r"^\[red\] +\d", said("dataset", "show", "cmd-markup"), re.MULTILINE)


def test_what_was_exported_can_be_uploaded_and_is_the_same(
    store: Store,
    photograph: Made,
    ingested: Ingest,
    run: Callable[..., Result],
    said: Callable[..., str],
    tmp_path: Path,
) -> None:
    grown(store, photograph, ingested, "cmd-out")
    folder = tmp_path / "My export"
    assert said("dataset", "export", "cmd-out@3", str(folder)).startswith("17 photographs of cmd-out v3 in ")
    again = run("dataset", "export", "cmd-out@3", str(folder))
    assert (again.exit_code, again.stdout) == (1, "")
    assert "is there already and not empty" in again.stderr
    text = said("upload", str(folder), "--dataset", "cmd-back")
    assert "images with annotations.json: 17 files beside it" in text
    assert "sealed as s3://tirewatch/incoming/cmd-back/My-export/" in text
    back = ingested(store, "cmd-back", "My-export", {}).version
    assert back.digest == dataset.open_version(store, "cmd-out", 3).digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "nothing"), r"there is no dataset 'nothing'; there are: .*cmd-wrong"),
        (("show", "nothing@2"), r"there is no dataset 'nothing'; there are: .*cmd-wrong"),
        (("list", "nothing"), r"there is no dataset 'nothing'; there are: .*cmd-wrong"),
        (("show", "cmd-wrong@9"), r"dataset 'cmd-wrong' has no version 9; it has: 1$"),
        (("show", "cmd-wrong@new"), r"'cmd-wrong@new' names no version: write NAME or NAME@VERSION"),
        (("diff", "cmd-wrong@1", "cmd-wrong@2"), r"has no version 2; it has: 1$"),
        (("export", "cmd-wrong", "{folder}", "--split", "holdout"), r"unknown split \['holdout'\]: there are train"),
    ],
)
def test_a_wrong_name_gets_one_sentence_with_the_right_ones(
    store: Store,
    photograph: Made,
    ingested: Ingest,
    run: Callable[..., Result],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    if dataset.newest_version(store, "cmd-wrong") is None:
        ingested(store, "cmd-wrong", "b1", pictures(photograph, 0))
    result = run("dataset", *(each.format(folder=tmp_path / "out") for each in arguments))
    assert (result.exit_code, result.stdout.strip()) == (1, "")
    assert re.fullmatch(rf"error .*{message}.*\n", result.stderr, re.DOTALL | re.MULTILINE)
    assert "Traceback" not in result.output


def test_prune_spares_what_a_model_names_and_says_what_it_would_do(
    store: Store, photograph: Made, ingested: Ingest, run: Callable[..., Result], said: Callable[..., str]
) -> None:
    from tasks.registry import client_of

    grown(store, photograph, ingested, "cmd-prune")
    ingested(store, "cmd-prune", "third", pictures(photograph, 100))
    client = client_of(Settings().mlflow_tracking_uri)
    client.create_registered_model("cmd-prune")
    tags = {"dataset": "cmd-prune", "dataset_version": "2"}
    client.create_model_version("cmd-prune", source="s3://elsewhere/model", tags=tags)
    assert "would retire no version of 4; models and runs name v2" in said("dataset", "prune", "cmd-prune", "--dry-run")
    how = ("--keep", "1", "--min-age", "0")
    assert "would retire v1, v3 of 4" in said("dataset", "prune", "cmd-prune", *how, "--dry-run")
    assert dataset.open_version(store, "cmd-prune", 1).version == 1
    told = json.loads(said("dataset", "prune", "cmd-prune", *how, "--json"))
    assert (told["retired"], told["referenced"], told["dry_run"]) == ([1, 3], [2], False)
    assert "retired 20" in said("dataset", "list", "cmd-prune")
    assert "its rows are gone" in said("dataset", "show", "cmd-prune@1")
    gone = run("dataset", "diff", "cmd-prune@1", "cmd-prune@2")
    assert (gone.exit_code, "cmd-prune v1 was retired on" in gone.stderr) == (1, True)


def test_prune_without_mlflow_retires_nothing_and_says_so(
    photograph: Made, ingested: Ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = started(tmp_path, *NOT_NEEDED, "mlflow")
    try:
        store = store_of(state, monkeypatch)
        grown(store, photograph, ingested, "cmd-blind")
        prune = ["dataset", "prune", "cmd-blind", "--keep", "1", "--min-age", "0", "--state", str(state)]
        result = CliRunner().invoke(app, prune)
        kept = [record.retired_at for record in dataset.read_records(store, "cmd-blind")]
    finally:
        CliRunner().invoke(app, ["down", "--state", str(state)])
    assert (result.exit_code, result.stdout, kept) == (1, "", [None] * 3)
    assert "does not answer" in result.stderr
    assert "nothing is retired" in result.stderr


def test_upload_says_what_it_recognised_and_refuses_what_it_does_not(
    store: Store, photograph: Made, run: Callable[..., Result], said: Callable[..., str], tmp_path: Path
) -> None:
    for path, data in pictures(photograph, 0).items():
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_bytes(data)
    text = said("upload", str(tmp_path / "in"), "--dataset", "cmd-up", "--batch", "B.1")
    assert "class folders: 12 files in 2 classes (bad 4, good 8); no given split 12" in text
    assert storage.exists(store, "incoming/cmd-up/B.1/_SUCCESS")
    nothing = run("upload", str(tmp_path / "in"), "--dataset", "cmd-up", "--batch", "b 1")
    assert (nothing.exit_code, nothing.stdout) == (1, "") and "use 1 to 100 of A-Z a-z 0-9 . _ -" in nothing.stderr
    nothing = run("upload", str(tmp_path), "--dataset", "cmd-up", "--batch", "a/b")
    assert (nothing.exit_code, "expected incoming/cmd-up/<batch>/" in nothing.stderr) == (1, True)
    (tmp_path / "empty").mkdir()
    nothing = run("upload", str(tmp_path / "empty"), "--dataset", "cmd-up")
    assert (nothing.exit_code, "holds no class folders with images" in nothing.stderr) == (1, True)


@pytest.mark.parametrize("command", ["list", "show x", "diff x y", "export x out", "prune x"])
def test_a_folder_without_a_stack_gets_one_sentence(command: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["dataset", *command.split(), "--state", str(tmp_path / "none")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"error there is no stack in .*none: start one with `tirewatch up`\n", result.stderr)
