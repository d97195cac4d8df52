"""tasks/dataset.py: versions that appear whole or not at all."""

import hashlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import lance
import pyarrow as pa
import pytest

from flows import ingest
from flows.ingest import IngestOptions
from tasks import dataset, storage
from tasks.batch import BatchRefused
from tasks.dataset import DatasetVersion, newest_version, open_version, read_rows, writer
from tasks.ingest_report import Ingested
from tasks.storage import Store

ROOT = Path(__file__).parents[1]
Made = Callable[..., bytes]


def upload(store: Store, name: str, batch: str, photographs: dict[str, bytes]) -> str:
    prefix = f"incoming/{name}/{batch}/"
    storage.write_many(store, ((prefix + path, data) for path, data in photographs.items()))
    return prefix


def take_in(store: Store, name: str, prefix: str, spool: Path, options: IngestOptions | None = None) -> Ingested:
    """The steps of the flow without a Prefect run around them."""
    batch = ingest.find_batch.fn(store, name, prefix)
    before = ingest.already_ingested.fn(store, batch, options or IngestOptions())
    if before is not None:
        return before
    spool.mkdir(parents=True, exist_ok=True)
    with ingest.examine_photographs.fn(store, batch, spool) as examination:
        return ingest.commit.fn(
            store, batch, examination, options or IngestOptions(), writer(store, batch, examination)
        )


def pictures(photograph: Made, first: int, count: int = 12) -> dict[str, bytes]:
    return {f"{'good' if n % 3 else 'bad'}/{n}.jpg": photograph(n) for n in range(first, first + count)}


def rows_of(store: Store, version: DatasetVersion) -> pa.Table:
    return pa.Table.from_batches(read_rows(store, version, ["train", "val", "test"]), dataset.SCHEMA)


def test_before_the_first_batch_there_is_no_version(store: Store) -> None:
    assert newest_version(store, "nothing") is None
    with pytest.raises(LookupError, match="'nothing' has no version 3; it has: none"):
        open_version(store, "nothing", 3)


def test_a_version_holds_the_photographs_unchanged_with_all_that_is_known_of_them(
    store: Store, photograph: Made, tmp_path: Path
) -> None:
    sent = pictures(photograph, 0, 20)
    made = take_in(store, "whole", upload(store, "whole", "b1", sent), tmp_path).version
    table = rows_of(store, made)
    by_key = {row["source_key"]: row for row in table.to_pylist()}
    assert {key.removeprefix("incoming/whole/b1/"): row["image"] for key, row in by_key.items()} == sent
    row = by_key["incoming/whole/b1/bad/3.jpg"]
    assert (row["label"], row["batch"], row["format"], row["width"], row["height"]) == ("bad", "b1", "JPEG", 32, 32)
    assert row["sha256"] == row["group"] == hashlib.sha256(sent["bad/3.jpg"]).hexdigest()
    assert 0 < row["brightness"] < 1
    assert made.classes == ("bad", "good")
    assert sum(made.splits.values()) == 20
    assert {split: table["split"].to_pylist().count(split) for split in made.splits} == made.splits


def test_the_digest_is_over_the_sorted_rows(store: Store, photograph: Made, tmp_path: Path) -> None:
    made = take_in(store, "digest", upload(store, "digest", "b1", pictures(photograph, 0)), tmp_path).version
    rows = sorted((row["sha256"], row["label"], row["split"]) for row in rows_of(store, made).to_pylist())
    lines = "".join(f"{sha}\t{label}\t{split}\n" for sha, label, split in rows)
    assert made.digest == "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def test_rows_come_in_order_of_their_digest_across_batches_and_arrow_batches(
    store: Store, photograph: Made, tmp_path: Path
) -> None:
    for number in range(3):
        prefix = upload(store, "order", f"b{number}", pictures(photograph, 20 * number, 20))
        made = take_in(store, "order", prefix, tmp_path / str(number)).version
    batches = list(read_rows(store, made, ["train", "test"], ["sha256", "split"], batch_size=7))
    assert all(batch.num_rows == 7 for batch in batches[:-1])
    assert batches[0].schema.names == ["sha256", "split"]
    digests = [digest for batch in batches for digest in batch["sha256"].to_pylist()]
    assert digests == sorted(digests)
    assert len(digests) == made.splits["train"] + made.splits["test"]
    assert {split for batch in batches for split in batch["split"].to_pylist()} == {"train", "test"}


def test_an_unknown_split_or_column_is_refused_by_name(store: Store, photograph: Made, tmp_path: Path) -> None:
    made = take_in(store, "asked", upload(store, "asked", "b1", pictures(photograph, 0)), tmp_path).version
    with pytest.raises(ValueError, match=r"unknown \['holdout'\]"):
        next(read_rows(store, made, ["holdout"]))
    with pytest.raises(ValueError, match=r"unknown \['colour'\]"):
        next(read_rows(store, made, ["train"], ["colour"]))


def test_a_later_batch_adds_rows_moves_none_and_leaves_the_old_version_readable(
    store: Store, photograph: Made, tmp_path: Path
) -> None:
    first = take_in(store, "grow", upload(store, "grow", "b1", pictures(photograph, 0)), tmp_path / "1").version
    before = rows_of(store, first).to_pylist()
    overlapping = upload(store, "grow", "b2", pictures(photograph, 6, 30))
    second = take_in(store, "grow", overlapping, tmp_path / "2")
    assert (second.version.version, second.new_rows, second.counts["already_known"]) == (2, 24, 6)
    assert rows_of(store, open_version(store, "grow", 1)).to_pylist() == before
    splits = {row["sha256"]: row["split"] for row in rows_of(store, second.version).to_pylist()}
    assert all(splits[row["sha256"]] == row["split"] for row in before)
    assert newest_version(store, "grow") == second.version != first
    with pytest.raises(LookupError, match="it has: 1, 2"):
        open_version(store, "grow", 3)


def test_the_same_batch_again_changes_nothing_and_gives_the_same_answer(
    store: Store, photograph: Made, tmp_path: Path
) -> None:
    prefix = upload(store, "again", "b1", pictures(photograph, 0))
    first = take_in(store, "again", prefix, tmp_path / "1")
    take_in(store, "again", upload(store, "again", "b2", pictures(photograph, 50)), tmp_path / "2")
    listed = storage.list_objects(store, "datasets")
    again = take_in(store, "again", prefix, tmp_path / "3")
    assert again == replace(first, created=False)
    assert storage.list_objects(store, "datasets") == listed


def test_photographs_that_came_late_into_a_batch_make_the_next_version(
    store: Store, photograph: Made, tmp_path: Path
) -> None:
    sent = pictures(photograph, 0)
    prefix = upload(store, "late", "b1", sent)
    take_in(store, "late", prefix, tmp_path / "1")
    upload(store, "late", "b1", {"good/late.jpg": photograph(99)})
    second = take_in(store, "late", prefix, tmp_path / "2")
    assert (second.version.version, second.new_rows) == (2, 1)
    assert not take_in(store, "late", prefix, tmp_path / "3").created


def test_a_batch_of_known_photographs_only_makes_no_version(store: Store, photograph: Made, tmp_path: Path) -> None:
    sent = pictures(photograph, 0)
    first = take_in(store, "known", upload(store, "known", "b1", sent), tmp_path / "1")
    second = take_in(store, "known", upload(store, "known", "copy", sent), tmp_path / "2")
    assert (second.created, second.version, second.new_rows) == (False, first.version, 0)


def test_a_class_that_is_allowed_later_comes_in_with_a_second_run(
    store: Store, photograph: Made, tmp_path: Path
) -> None:
    take_in(store, "classes", upload(store, "classes", "b1", pictures(photograph, 0)), tmp_path / "1")
    prefix = upload(store, "classes", "b2", {**pictures(photograph, 50), "odd/1.jpg": photograph(99)})
    assert take_in(store, "classes", prefix, tmp_path / "2").counts["unknown_class"] == 1
    allowed = take_in(store, "classes", prefix, tmp_path / "3", IngestOptions(new_classes=True))
    assert (allowed.version.version, allowed.new_rows, allowed.version.classes) == (3, 1, ("bad", "good", "odd"))
    assert not take_in(store, "classes", prefix, tmp_path / "4").created


def test_a_commit_that_is_tried_again_after_its_version_was_revealed_reports_that_version(
    store: Store, photograph: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = upload(store, "retried", "b1", pictures(photograph, 0))

    def lost(*_: object) -> None:
        raise ConnectionResetError("after the record, before the tag")

    with monkeypatch.context() as patched:
        patched.setattr(dataset, "tag", lost)
        with pytest.raises(ConnectionResetError):
            take_in(store, "retried", prefix, tmp_path / "1")
    batch = ingest.find_batch.fn(store, "retried", prefix)
    with ingest.examine_photographs.fn(store, batch, tmp_path) as examination:
        again = ingest.commit.fn(store, batch, examination, IngestOptions(), writer(store, batch, examination))
    assert (again.created, again.version.version, again.new_rows) == (True, 1, 12)


def test_a_refused_batch_leaves_no_trace(store: Store, photograph: Made, tmp_path: Path) -> None:
    mixed = {"good/1.jpg": photograph(1), "good/2.jpg": b"text", "good/3.jpg": b""}
    prefix = upload(store, "refused", "b1", mixed)
    with pytest.raises(BatchRefused, match="2 of 3 files"):
        take_in(store, "refused", prefix, tmp_path)
    assert storage.list_objects(store, "datasets/refused") == []
    assert storage.list_objects(store, "quarantine/refused") == []
    made = take_in(store, "refused", prefix, tmp_path, IngestOptions(max_quarantined_share=0.9))
    assert made.version.splits["train"] == 1


def test_a_batch_of_which_nothing_remains_is_refused(store: Store, tmp_path: Path) -> None:
    prefix = upload(store, "hopeless", "b1", {"good/1.jpg": b"text"})
    with pytest.raises(BatchRefused, match="not one photograph of incoming/hopeless/b1/ can be used"):
        take_in(store, "hopeless", prefix, tmp_path, IngestOptions(max_quarantined_share=1))


def test_runs_at_once_into_one_dataset_lose_no_row_and_share_no_number(
    store: Store, photograph: Made, tmp_path: Path
) -> None:
    """Overlapping batches: what one run stores, the other must see before it decides."""
    prefixes = [upload(store, "crowd", f"b{n}", pictures(photograph, 8 * n, 12)) for n in range(5)]
    with ThreadPoolExecutor(5) as pool:
        made = list(pool.map(lambda n: take_in(store, "crowd", prefixes[n], tmp_path / str(n)), range(5)))
    assert sorted(each.version.version for each in made) == [1, 2, 3, 4, 5]
    newest = newest_version(store, "crowd")
    assert newest is not None
    digests = rows_of(store, newest)["sha256"].to_pylist()
    assert len(digests) == len(set(digests)) == 8 * 4 + 12
    for each in made:
        assert dataset.digest_of(rows_of(store, each.version)) == each.version.digest


# Kills its own process at the named point of the write.
KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import lance, lance.fragment
from lance.dataset import Tags
from tasks import dataset, storage
from tests_dataset import take_in
from tasks.storage import Store

where, store, name, prefix, spool = sys.argv[1], Store(*sys.argv[2:6]), sys.argv[6], sys.argv[7], Path(sys.argv[8])

def die(*given, **how):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function):
    return lambda *given, **how: (function(*given, **how), die())

points = {
    "before the rows are written": (lance.fragment, "write_fragments", die),
    "after the rows are written": (lance.LanceDataset, "commit", staticmethod(die)),
    "after the Lance commit": (dataset, "write_if_absent", die),
    "after the record": (dataset, "write_if_absent", after(storage.write_if_absent)),
    "after the tag": (Tags, "create", after(Tags.create)),
}
setattr(*points[where])
take_in(store, name, prefix, spool)
"""
POINTS = {
    "before the rows are written": 1,
    "after the rows are written": 1,
    "after the Lance commit": 1,
    "after the record": 2,
    "after the tag": 2,
}


@pytest.mark.parametrize(("where", "revealed"), POINTS.items())
def test_a_run_killed_anywhere_leaves_the_old_or_the_new_version_and_the_next_ends_in_the_same_place(
    store: Store, photograph: Made, tmp_path: Path, where: str, revealed: int
) -> None:
    batches = [pictures(photograph, 0), pictures(photograph, 50)]
    ends = []
    for killed in (False, True):
        here = replace(store, bucket=f"kill-{hashlib.sha256(f'{where}{killed}'.encode()).hexdigest()[:12]}")
        storage.ensure_bucket(here)
        first, second = (upload(here, "tire", f"b{n}", batch) for n, batch in enumerate(batches))
        start = take_in(here, "tire", first, tmp_path / f"first{killed}").version
        if killed:
            kill_at(where, here, second, tmp_path)
            newest = newest_version(here, "tire")
            assert newest is not None
            assert newest.version == revealed
            assert dataset.digest_of(rows_of(here, newest)) == newest.digest
            assert rows_of(here, start).num_rows == 12
        end = take_in(here, "tire", second, tmp_path / f"second{killed}").version
        ends.append((end.version, end.digest, end.splits, rows_of(here, end)["sha256"].to_pylist()))
        tagged = lance.dataset(end.uri, version="v2", storage_options=here.lance_options)
        assert tagged.count_rows() == 24
    assert ends[0] == ends[1]


def kill_at(where: str, store: Store, prefix: str, folder: Path) -> None:
    (folder / "tests_dataset.py").write_text(Path(__file__).read_text())
    given = [store.bucket, store.endpoint_url or "", store.access_key_id or "", store.secret_access_key or ""]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), where, *given, "tire", prefix, str(folder / "killed")],
        cwd=folder,
        check=False,  # it is killed
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def test_what_a_killed_run_left_behind_is_not_inherited_by_another_batch(
    store: Store, photograph: Made, tmp_path: Path
) -> None:
    here = replace(store, bucket="orphan")
    storage.ensure_bucket(here)
    first, second = (upload(here, "tire", f"b{n}", pictures(photograph, 50 * n)) for n in range(2))
    take_in(here, "tire", first, tmp_path / "1")
    kill_at("after the Lance commit", here, second, tmp_path)
    assert lance.dataset(dataset.table_uri(here, "tire"), storage_options=here.lance_options).count_rows() == 24
    other = take_in(here, "tire", upload(here, "tire", "other", pictures(photograph, 100)), tmp_path / "2").version
    batches = rows_of(here, other)["batch"].to_pylist()
    assert {batch: batches.count(batch) for batch in batches} == {"b0": 12, "other": 12}


def test_a_record_reads_back_as_it_was_written(store: Store, photograph: Made, tmp_path: Path) -> None:
    made = take_in(store, "record", upload(store, "record", "b1", pictures(photograph, 0)), tmp_path).version
    record = dataset.newest_record(store, "record")
    assert record is not None
    assert asdict(record.version) == asdict(made) == asdict(open_version(store, "record", 1))
    assert record.batches["b1"]["version"] == 1
