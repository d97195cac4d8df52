"""Dataset versions for people: summaries, differences, folders, and versions that retire."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lance.dataset import Tags

from monitoring.features import STATISTICS
from tasks import dataset, retention, storage
from tasks.dataset import DatasetVersion, newest_record, open_version, read_record, read_rows, summary_of
from tasks.dataset_compare import difference
from tasks.dataset_export import export, folder_of
from tasks.importers import recognised
from tasks.registry import FLOW_RUN_TAG, client_of
from tasks.retention import ReferencesUnknown, referenced_versions, retire, versions_to_retire
from tasks.sources import upload_folder
from tasks.storage import Store
from tasks.summary import MAX_BATCHES, QUANTILES, spread, summary_from

Made = Callable[..., bytes]
Ingest = Callable[..., Any]
NOW = datetime.now(UTC)


def pictures(photograph: Made, first: int, count: int = 12, kind: str = "JPEG") -> dict[str, bytes]:
    suffix = kind.lower().replace("jpeg", "jpg")
    return {
        f"{'good' if n % 3 else 'bad'}/{n}.{suffix}": photograph(n, 32 + n % 4, kind)
        for n in range(first, first + count)
    }


def correction(**labels: str) -> dict[str, bytes]:
    entries = [{"sha256": sha256, "label_value": label} for sha256, label in labels.items()]
    return {"annotations.json": json.dumps({"annotation": {"corrects": True, "data": entries}}).encode()}


def rows_of(store: Store, version: DatasetVersion) -> list[dict[str, Any]]:
    batches = read_rows(store, version, ["train", "val", "test"])
    return pa.Table.from_batches(batches, dataset.SCHEMA).to_pylist()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Summaries


def test_the_record_describes_the_photographs_of_its_version(store: Store, photograph: Made, ingested: Ingest) -> None:
    ingested(store, "told", "b1", pictures(photograph, 0))
    version = ingested(store, "told", "b2", pictures(photograph, 50, 20, "PNG")).version
    record = newest_record(store, "told")
    assert record is not None
    found, rows = record.summary, rows_of(store, version)
    assert found is not None
    assert (found.rows, found.formats, found.batches) == (32, {"JPEG": 12, "PNG": 20}, {"b1": 12, "b2": 20})
    assert (found.width, found.height) == ((32, 35), (32, 35))
    counted = Counter((row["label"], row["split"]) for row in rows)
    assert {(label, split): n for label, splits in found.classes.items() for split, n in splits.items()} == counted
    assert found.columns["image"] == "large_binary"
    assert tuple(found.statistics) == STATISTICS
    for name, told in found.statistics.items():
        values = np.array([row[name] for row in rows], np.float32).astype(float)
        assert told.count == 32
        assert told.mean == pytest.approx(values.mean(), rel=1e-5)
        assert told.deviation == pytest.approx(values.std(), rel=1e-4, abs=1e-6)
        assert (told.least, told.greatest) == pytest.approx((values.min(), values.max()), rel=1e-5)
        assert told.quantiles == pytest.approx(np.quantile(values, QUANTILES), rel=1e-5)
    assert len(json.dumps(asdict(found))) < 4000


def test_a_record_of_before_there_were_summaries_is_still_read(
    store: Store, photograph: Made, ingested: Ingest
) -> None:
    ingested(store, "older", "b1", pictures(photograph, 0))
    key = dataset.record_key("older", 1)
    told = json.loads(storage.read(store, key))
    summary = told.pop("summary")
    told.pop("retired_at")
    storage.write(store, key, json.dumps(told).encode())
    record = read_record(store, "older", 1)
    assert (record.summary, record.retired_at) == (None, None)
    assert summary_of(store, record) == summary_from(summary)
    assert ingested(store, "older", "b2", pictures(photograph, 50)).version.version == 2


def test_the_summary_stays_small_however_many_batches_there_were(
    store: Store, photograph: Made, ingested: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.summary.MAX_BATCHES", 2)
    for number in range(4):
        ingested(store, "many", f"b{number}", pictures(photograph, 20 * number, 4 + number))
    record = newest_record(store, "many")
    assert record is not None
    assert record.summary is not None
    assert (record.summary.batches, record.summary.other_batches) == ({"b2": 6, "b3": 7}, 9)
    assert MAX_BATCHES == 50


@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), max_size=30))
def test_a_spread_is_of_the_finite_values_and_its_quantiles_ascend(values: list[float]) -> None:
    found = spread(np.array(values, np.float32))
    finite = [value for value in values if np.isfinite(value)]
    assert found.count == len(finite)
    assert list(found.quantiles) == sorted(found.quantiles)
    if finite:
        assert found.least <= found.quantiles[0] <= found.quantiles[-1] <= found.greatest
        assert found.least == pytest.approx(min(finite), rel=1e-5)


# Differences


def test_the_difference_names_what_was_added_relabelled_and_left(
    store: Store, photograph: Made, ingested: Ingest
) -> None:
    sent = pictures(photograph, 0)
    first = ingested(store, "differ", "b1", sent).version
    ingested(store, "differ", "b2", pictures(photograph, 50, 5))
    wrong = digest(sent["good/1.jpg"])
    third = ingested(store, "differ", "fix", correction(**{wrong: "bad"})).version
    found = difference(store, first, third)
    assert found.counts == {"added": 5, "removed": 0, "relabelled": 1, "moved": 0, "unchanged": 11}
    (row,) = found.relabelled.to_pylist()
    assert (row["sha256"], row["was"], row["label"]) == (wrong, "good", "bad")
    assert row["source_key"] == "incoming/differ/b1/good/1.jpg"
    assert set(found.added["sha256"].to_pylist()) == {digest(data) for data in pictures(photograph, 50, 5).values()}
    back = difference(store, third, first)
    assert back.removed.equals(found.added)
    assert back.counts == {"added": 0, "removed": 5, "relabelled": 1, "moved": 0, "unchanged": 11}
    assert difference(store, third, third).counts["unchanged"] == 17
    assert len(found.as_json(limit=2)["added"]) == 2


def test_photographs_in_other_splits_of_another_dataset_have_moved(
    store: Store, photograph: Made, ingested: Ingest
) -> None:
    sent = pictures(photograph, 0)
    first = ingested(store, "here", "b1", {f"train/{path}": data for path, data in sent.items()}).version
    second = ingested(store, "there", "b1", {f"test/{path}": data for path, data in sent.items()}).version
    found = difference(store, first, second)
    assert found.counts["moved"] == 12 - first.splits["test"] > 0
    assert {row["split"] for row in found.moved.to_pylist()} == {"test"}


# Folders


def annotated(photograph: Made, count: int = 30) -> dict[str, bytes]:
    """Photographs with everything an annotation can say, under labels that are no folder names."""
    labels = ("good", "a/b", "../up", ".hidden", "ünïcode ok", "x" * 200)
    entries = [
        {
            "FilePath": f"{n}.jpg",
            "label_value": labels[n % len(labels)],
            "group": f"tire {n // 2}",
            "captured_at": f"2026-03-01T12:{n:02d}:00.25+02:00",
            "line": "north",
        }
        for n in range(count - 6)
    ]
    entries += [{"FilePath": f"{n}.jpg", "label_value": "good"} for n in range(count - 6, count)]
    files = {f"{n}.jpg": photograph(n) for n in range(count)}
    return {**files, "annotations.json": json.dumps({"annotation": {"data": entries}}).encode()}


def meaning(store: Store, version: DatasetVersion) -> list[dict[str, Any]]:
    """The rows without what says where they came from."""
    return [
        {name: value for name, value in row.items() if name not in ("batch", "source_key", "source_version")}
        for row in rows_of(store, version)
    ]


@pytest.mark.parametrize("split_folders", [True, False])
def test_an_exported_version_ingests_again_to_the_same_rows(
    store: Store, photograph: Made, ingested: Ingest, tmp_path: Path, split_folders: bool
) -> None:
    name = f"out-{split_folders}".lower()
    version = ingested(store, name, "b1", annotated(photograph)).version
    folder = tmp_path / "folder"
    told: list[int] = []
    assert export(store, version, folder, split_folders=split_folders, progress=told.append) == 30
    assert told == list(range(1, 31))
    assert (folder / "train").is_dir() == split_folders
    assert all(digest(path.read_bytes()) == path.stem for path in folder.rglob("*.jpg"))
    assert recognised(folder).text == "images with annotations.json: 30 files beside it"
    upload_folder(store, folder, f"{name}-again", "b1")
    again = ingested(store, f"{name}-again", "b1", {})
    assert (again.version.digest, again.quarantined, again.counts) == (
        version.digest,
        0,
        {"small_class": again.counts["small_class"]},
    )
    assert meaning(store, again.version) == meaning(store, version)


def test_one_split_can_be_exported(store: Store, photograph: Made, ingested: Ingest, tmp_path: Path) -> None:
    version = ingested(store, "part", "b1", pictures(photograph, 0, 30)).version
    assert export(store, version, tmp_path / "val", ["val"]) == version.splits["val"]
    assert {path.name for path in (tmp_path / "val").iterdir()} == {"val", "annotations.json"}
    with pytest.raises(ValueError, match=r"unknown split \['holdout'\]"):
        export(store, version, tmp_path / "none", ["holdout"])
    assert not (tmp_path / "none").exists()


def test_a_folder_with_something_in_it_is_left_alone(
    store: Store, photograph: Made, ingested: Ingest, tmp_path: Path
) -> None:
    version = ingested(store, "full", "b1", pictures(photograph, 0)).version
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already and not empty"):
        export(store, version, tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]
    (tmp_path / "mine" / "notes.txt").unlink()
    assert export(store, version, tmp_path / "mine") == 12


KILLED = """
import os, signal, sys
from pathlib import Path
from tasks.dataset import open_version
from tasks.dataset_export import export
from tasks.storage import Store

def progress(written):
    if written == 7:
        os.kill(os.getpid(), signal.SIGKILL)

store = Store(*sys.argv[1:5])
export(store, open_version(store, "cut", 1), Path(sys.argv[5]), progress=progress)
"""


def test_a_killed_export_leaves_no_folder_and_the_next_one_is_whole(
    store: Store, photograph: Made, ingested: Ingest, tmp_path: Path
) -> None:
    version = ingested(store, "cut", "b1", pictures(photograph, 0)).version
    folder = tmp_path / "folder"
    given = [store.bucket, store.endpoint_url or "", store.access_key_id or "", store.secret_access_key or ""]
    code = [sys.executable, "-c", textwrap.dedent(KILLED), *given, str(folder)]
    done = subprocess.run(code, check=False, capture_output=True, text=True)  # it is killed
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["folder.partial"]
    (tmp_path / "folder.partial" / "left over").write_text("")
    assert export(store, version, folder) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert not (folder / "left over").exists()
    shutil.rmtree(folder)


@given(st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=300))
def test_every_label_gives_one_visible_folder_of_its_own(label: str) -> None:
    name = folder_of(label)
    assert len(name.encode()) <= 255
    assert "/" not in name
    assert not name.startswith((".", "__MACOSX"))
    assert name == label or name.endswith(hashlib.sha256(label.encode()).hexdigest()[:8])


# Versions that retire


def aged(numbers: int, day: int = 1, **changes: Any) -> list[dataset.Record]:
    """Records of versions 1 to `numbers`; version n is (numbers - n) * day days old."""
    return [
        dataset.Record(
            DatasetVersion("tire", n, "sha256:0", "s3://x", ("good",), {"train": 1}),
            lance_version=n,
            carved=(),
            batches={},
            report={},
            created_at=(NOW - timedelta(days=day * (numbers - n))).isoformat(),
            retired_at=NOW.isoformat() if n in changes.get("retired", ()) else None,
        )
        for n in range(1, numbers + 1)
    ]


def test_only_old_unreferenced_versions_beyond_the_newest_retire() -> None:
    assert versions_to_retire(aged(10), {2}, 3, timedelta(days=5), NOW) == (1, 3, 4, 5)
    assert versions_to_retire(aged(10), {2}, 8, timedelta(days=5), NOW) == (1,)
    assert versions_to_retire(aged(10), set(), 0, timedelta(0), NOW) == tuple(range(1, 10))
    assert versions_to_retire(aged(10, retired=(1, 2)), set(), 3, timedelta(days=8), NOW) == ()
    assert versions_to_retire([], set(), 3, timedelta(0), NOW) == ()
    with pytest.raises(ValueError, match="must not be negative"):
        versions_to_retire(aged(1), set(), -1, timedelta(0), NOW)


@given(
    st.integers(1, 12), st.sets(st.integers(1, 12)), st.integers(0, 12), st.integers(0, 12), st.sets(st.integers(1, 11))
)
def test_no_version_that_is_needed_ever_retires(
    numbers: int, referenced: set[int], keep: int, age: int, gone: set[int]
) -> None:
    records = aged(numbers, retired=gone)
    chosen = versions_to_retire(records, referenced, keep, timedelta(days=age), NOW)
    assert not set(chosen) & (referenced | gone)
    assert max(chosen, default=0) <= max(0, numbers - max(1, keep))
    assert all(numbers - n >= age for n in chosen)
    needed = referenced | gone | set(range(numbers + 1 - max(1, keep), numbers + 1))
    assert set(chosen) == {n for n in range(1, numbers + 1) if n not in needed and numbers - n >= age}


def test_a_retired_version_says_so_and_the_kept_ones_stay_readable(
    store: Store, photograph: Made, ingested: Ingest
) -> None:
    """Corrected photographs lie in files of the first versions: those files stay as long as any version needs them."""
    sent = pictures(photograph, 0)
    ingested(store, "retire", "b1", sent)
    ingested(store, "retire", "b2", pictures(photograph, 50))
    ingested(store, "retire", "fix", correction(**{digest(sent["good/1.jpg"]): "bad"}))
    ingested(store, "retire", "b3", pictures(photograph, 100))
    kept = {number: rows_of(store, open_version(store, "retire", number)) for number in (2, 4)}
    done = retire(store, "retire", (1, 3), NOW)
    assert done.versions == (1, 3)
    for number in (1, 3):
        version = read_record(store, "retire", number).version
        gone = rf"retire v{number} was retired on {NOW:%Y-%m-%d}: its record is kept, its rows are gone"
        with pytest.raises(LookupError, match=gone):
            open_version(store, "retire", number)
        with pytest.raises(LookupError, match="was retired"):
            next(read_rows(store, version, ["train"]))
        with pytest.raises(LookupError, match="was retired"):
            difference(store, version, open_version(store, "retire", 4))
        assert version.digest.startswith("sha256:")
    for number, rows in kept.items():
        version = open_version(store, "retire", number)
        assert rows_of(store, version) == rows
        tagged = lance.dataset(version.uri, version=f"v{number}", storage_options=store.lance_options)
        assert tagged.count_rows() == len(rows)
    table = lance.dataset(version.uri, storage_options=store.lance_options)
    held = {read_record(store, "retire", number).lance_version for number in (2, 4)}
    assert held <= {each["version"] for each in table.versions()}
    assert not {read_record(store, "retire", n).lance_version for n in (1, 3)} & {
        each["version"] for each in table.versions()
    }
    assert set(table.tags.list()) == {"v2", "v4"}
    again = ingested(store, "retire", "b4", pictures(photograph, 150)).version
    assert (again.version, sum(again.splits.values())) == (5, 48)
    assert retire(store, "retire", (1, 3), NOW).bytes_removed == 0
    assert read_record(store, "retire", 1).retired_at == NOW.isoformat(timespec="seconds")


def test_retiring_gives_the_files_of_replaced_rows_back(store: Store, photograph: Made, ingested: Ingest) -> None:
    """When every photograph of a file was replaced, the file goes with the last version that showed it."""
    sent = {f"good/{n}.jpg": photograph(n, 200) for n in range(12)}
    ingested(store, "give-back", "b1", sent)
    done = ingested(
        store, "give-back", "fix", correction(**{digest(data): "odd" for data in sent.values()}), new_classes()
    )
    files = [each.key for each in storage.list_objects(store, "datasets/give-back.lance/data")]
    assert len(files) == 2
    freed = retire(store, "give-back", (1,), NOW).bytes_removed
    left = [each.key for each in storage.list_objects(store, "datasets/give-back.lance/data")]
    assert len(left) == 1
    assert freed > sum(len(data) for data in sent.values())
    assert len(rows_of(store, done.version)) == 12


def new_classes() -> Any:
    from flows.ingest import IngestOptions

    return IngestOptions(new_classes=True)


def test_the_newest_version_never_retires_and_a_batch_of_a_retired_one_is_still_known(
    store: Store, photograph: Made, ingested: Ingest
) -> None:
    from flows import ingest

    ingested(store, "last", "b1", pictures(photograph, 0))
    ingested(store, "last", "b2", pictures(photograph, 50))
    with pytest.raises(ValueError, match="last v2 is the newest version"):
        retire(store, "last", (1, 2), NOW)
    assert open_version(store, "last", 1).version == 1
    retire(store, "last", (1,), NOW)
    batch = ingest.find_batch.fn(store, "last", "incoming/last/b1/")
    found = ingest.already_ingested.fn(store, batch, ingest.IngestOptions())
    assert found is not None
    assert (found.created, found.version.version) == (False, 1)


@pytest.mark.parametrize("step", ["write", "delete", "cleanup_old_versions"])
def test_a_retirement_that_died_half_way_is_finished_by_the_next(
    store: Store, photograph: Made, ingested: Ingest, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    name = f"half-{step.removesuffix('_old_versions')}"
    for number in range(3):
        ingested(store, name, f"b{number}", pictures(photograph, 50 * number))
    owner: Any = {"write": retention, "delete": Tags, "cleanup_old_versions": lance.LanceDataset}[step]
    real, calls = getattr(owner, step), []

    def dies(*given: Any, **how: Any) -> Any:
        calls.append(given)
        if len(calls) == (1 if step == "cleanup_old_versions" else 2):
            raise ConnectionResetError("killed here")
        return real(*given, **how)

    with monkeypatch.context() as patched:
        patched.setattr(owner, step, dies)
        with pytest.raises(ConnectionResetError):
            retire(store, name, (1, 2), NOW)
    chosen = versions_to_retire(dataset.read_records(store, name), set(), 1, timedelta(0), NOW + timedelta(hours=1))
    retire(store, name, chosen, NOW + timedelta(hours=1))
    table = dataset.open_table(store, name)
    assert set(table.tags.list()) == {"v3"}
    held = read_record(store, name, 3).lance_version
    assert {each["version"] for each in table.versions()} == {held}
    assert len(rows_of(store, open_version(store, name, 3))) == 36


def test_rows_of_a_run_that_died_are_removed_when_they_are_a_day_old(
    store: Store, photograph: Made, ingested: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingested(store, "died", "b1", pictures(photograph, 0))

    def dies(*_: Any) -> None:
        raise ConnectionResetError("after the Lance commit")

    with monkeypatch.context() as patched:
        patched.setattr(dataset, "write_if_absent", dies)
        with pytest.raises(ConnectionResetError):
            ingested(store, "died", "b2", pictures(photograph, 50))
    ingested(store, "died", "b3", pictures(photograph, 100))
    assert len(dataset.open_table(store, "died").versions()) == 3
    retire(store, "died", (), datetime.now(UTC))
    assert len(dataset.open_table(store, "died").versions()) == 3
    retire(store, "died", (), datetime.now(UTC) + timedelta(days=2))
    assert {each["version"] for each in dataset.open_table(store, "died").versions()} == {
        read_record(store, "died", number).lance_version for number in (1, 2)
    }
    assert [len(rows_of(store, open_version(store, "died", number))) for number in (1, 2)] == [12, 24]


# What models refer to


def register(uri: str, model: str, tags: dict[str, str], run_tags: dict[str, str] | None = None) -> None:
    from mlflow.exceptions import MlflowException

    client = client_of(uri)
    experiment = client.get_experiment_by_name(model)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(model)
    run = client.create_run(experiment_id, tags={FLOW_RUN_TAG: str(time.monotonic()), **(run_tags or {})})
    try:
        client.create_registered_model(model)
    except MlflowException as error:
        assert error.error_code == "RESOURCE_ALREADY_EXISTS"
    client.create_model_version(model, source=f"runs:/{run.info.run_id}/model", run_id=run.info.run_id, tags=tags)
    client.set_terminated(run.info.run_id)


def test_versions_named_by_any_model_or_a_run_that_trains_are_referenced(mlflow_uri: str) -> None:
    register(mlflow_uri, "kept", {"dataset": "kept", "dataset_version": "3"})
    register(mlflow_uri, "kept", {"dataset": "kept", "dataset_version": "5"})
    register(mlflow_uri, "kept-small", {"dataset": "kept", "dataset_version": "7"})
    register(mlflow_uri, "kept-by-run", {}, {"dataset": "kept", "dataset_version": "8"})
    register(mlflow_uri, "unrelated", {"dataset": "other", "dataset_version": "9"})
    client = client_of(mlflow_uri)
    tags = {"dataset": "kept", "dataset_version": "11"}
    running = client.create_run(client.get_experiment_by_name("kept").experiment_id, tags=tags)
    assert referenced_versions(mlflow_uri, "kept") == {3, 5, 7, 8, 11}
    client.set_terminated(running.info.run_id, "FAILED")
    assert referenced_versions(mlflow_uri, "kept") == {3, 5, 7, 8}
    assert referenced_versions(mlflow_uri, "nobody") == set()


def test_a_model_that_hides_its_dataset_version_stops_every_retirement(mlflow_uri: str) -> None:
    register(mlflow_uri, "hiding", {})
    with pytest.raises(ReferencesUnknown, match="model hiding v1 does not say on which version of 'hiding'"):
        referenced_versions(mlflow_uri, "hiding")
    assert referenced_versions(mlflow_uri, "somebody-else") == set()


def test_without_mlflow_nothing_is_known_and_that_is_said_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(ReferencesUnknown, match=re.escape("MLflow at http://127.0.0.1:9 does not answer")):
        referenced_versions("http://127.0.0.1:9", "tire")
    assert time.monotonic() - began < 20


def test_another_bucket_has_no_datasets(store: Store) -> None:
    empty = replace(store, bucket="no-datasets")
    storage.ensure_bucket(empty)
    assert dataset.dataset_names(empty) == []
    with pytest.raises(LookupError, match="there is no dataset 'tire'; there are: none"):
        dataset.read_records(empty, "tire")
