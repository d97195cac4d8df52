"""Label corrections: another label makes another version, and nothing else of a row changes."""

import hashlib
import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import lance
import pytest

from flows.ingest import IngestOptions
from tasks import dataset, storage
from tasks.batch import BatchRefused
from tasks.dataset import newest_version, open_version
from tasks.storage import Store

ROOT = Path(__file__).parents[1]
Made = Callable[..., bytes]
_spec = spec_from_file_location("tests_dataset", Path(__file__).with_name("test_dataset.py"))
assert _spec and _spec.loader
_steps = module_from_spec(_spec)
_spec.loader.exec_module(_steps)
upload, take_in, pictures, rows_of = _steps.upload, _steps.take_in, _steps.pictures, _steps.rows_of


def correction(*entries: dict[str, Any], **files: bytes) -> dict[str, bytes]:
    """A batch that corrects: the annotations and the images that are uploaded again."""
    document = {"annotation": {"corrects": True, "data": list(entries)}}
    return {**files, "annotations.json": json.dumps(document).encode()}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def by_digest(store: Store, version: dataset.DatasetVersion) -> dict[str, dict[str, Any]]:
    return {row["sha256"]: row for row in rows_of(store, version).to_pylist()}


def begun(store: Store, photograph: Made, name: str, folder: Path) -> tuple[dict[str, bytes], dataset.DatasetVersion]:
    """A dataset of two batches, so that its rows lie in two fragments; the first batch and the second version."""
    sent = pictures(photograph, 0)
    take_in(store, name, upload(store, name, "b1", sent), folder / "1")
    return sent, take_in(store, name, upload(store, name, "b2", pictures(photograph, 50)), folder / "2").version


def test_a_correction_by_sha256_changes_the_label_and_nothing_else(
    store: Store, photograph: Made, tmp_path: Path
) -> None:
    sent, second = begun(store, photograph, "mend", tmp_path)
    before = by_digest(store, second)
    wrong = digest(sent["good/1.jpg"])
    prefix = upload(store, "mend", "fix", correction({"sha256": wrong, "label_value": "bad"}))
    done = take_in(store, "mend", prefix, tmp_path / "3")
    assert (done.created, done.version.version, done.new_rows, done.relabelled) == (True, 3, 0, {"good -> bad": 1})
    after = by_digest(store, done.version)
    assert after == {**before, wrong: {**before[wrong], "label": "bad"}}
    assert after[wrong]["image"] == sent["good/1.jpg"]
    assert done.version.digest == dataset.digest_of(rows_of(store, done.version)) != second.digest
    assert done.version.splits == second.splits
    assert by_digest(store, open_version(store, "mend", 2)) == before
    tagged = lance.dataset(done.version.uri, version="v3", storage_options=store.lance_options)
    assert tagged.count_rows() == 24


def test_a_correction_by_images_uploaded_again_takes_new_photographs_in_as_well(
    store: Store, photograph: Made, tmp_path: Path
) -> None:
    sent, second = begun(store, photograph, "mend-again", tmp_path)
    before = by_digest(store, second)
    files = {"again.jpg": sent["good/2.jpg"], "same.jpg": sent["good/4.jpg"], "new.jpg": photograph(99)}
    labels = {"again.jpg": "bad", "same.jpg": "good", "new.jpg": "good"}
    entries = [{"FilePath": name, "label_value": label} for name, label in labels.items()]
    done = take_in(
        store, "mend-again", upload(store, "mend-again", "fix", correction(*entries, **files)), tmp_path / "3"
    )
    assert (done.new_rows, done.relabelled, done.quarantined) == (1, {"good -> bad": 1}, 0)
    after = by_digest(store, done.version)
    changed = digest(files["again.jpg"])
    assert {sha: row for sha, row in after.items() if sha in before} == {
        **before,
        changed: {**before[changed], "label": "bad"},
    }
    assert after.keys() - before.keys() == {digest(files["new.jpg"])}


def test_without_corrects_another_label_is_a_contradiction(store: Store, photograph: Made, tmp_path: Path) -> None:
    sent, second = begun(store, photograph, "no-mend", tmp_path)
    prefix = upload(store, "no-mend", "b3", {"bad/1.jpg": sent["good/1.jpg"], "bad/new.jpg": photograph(99)})
    done = take_in(store, "no-mend", prefix, tmp_path / "3", IngestOptions(max_quarantined_share=0.5))
    assert (done.counts["contradicts_dataset"], done.relabelled, done.new_rows) == (1, {}, 1)
    wrong = digest(sent["good/1.jpg"])
    assert by_digest(store, done.version)[wrong] == by_digest(store, second)[wrong]


def test_what_cannot_be_corrected_is_a_finding_of_its_own(store: Store, photograph: Made, tmp_path: Path) -> None:
    sent, _ = begun(store, photograph, "mend-some", tmp_path)
    good = [digest(sent[f"good/{n}.jpg"]) for n in (1, 2, 4, 5)]
    entries = [
        {"sha256": good[0], "label_value": "bad"},
        {"sha256": "0" * 64, "label_value": "bad"},
        {"sha256": good[1], "label_value": "odd"},
        {"sha256": good[2], "label_value": "bad"},
        {"sha256": good[2], "label_value": "good"},
        {"sha256": good[3], "label_value": "good"},
    ]
    prefix = upload(store, "mend-some", "fix", correction(*entries))
    with pytest.raises(BatchRefused, match="4 of 6 files"):
        take_in(store, "mend-some", prefix, tmp_path / "3")
    done = take_in(store, "mend-some", prefix, tmp_path / "4", IngestOptions(max_quarantined_share=0.7))
    assert done.relabelled == {"good -> bad": 1}
    counted = {reason: count for reason, count in done.counts.items() if reason != "small_class"}
    assert counted == {"unknown_photograph": 1, "unknown_class": 1, "contradictory_labels": 2, "already_known": 1}
    records = storage.list_objects(store, "quarantine/mend-some/fix")
    assert {each.key.rsplit("/", 1)[-1] for each in records} == {f"annotations.json#{n}.json" for n in (1, 2, 3, 4)}
    allowed = take_in(
        store, "mend-some", prefix, tmp_path / "5", IngestOptions(max_quarantined_share=0.7, new_classes=True)
    )
    assert allowed.version.classes == ("bad", "good", "odd")


def test_a_correction_of_a_dataset_that_does_not_exist_is_refused(store: Store, tmp_path: Path) -> None:
    prefix = upload(store, "nobody", "fix", correction({"sha256": "0" * 64, "label_value": "bad"}))
    with pytest.raises(BatchRefused, match="unknown_photograph"):
        take_in(store, "nobody", prefix, tmp_path)
    with pytest.raises(BatchRefused, match="not one photograph"):
        take_in(store, "nobody", prefix, tmp_path, IngestOptions(max_quarantined_share=1))


def test_corrections_of_corrections_and_later_batches_build_upon_each_other(
    store: Store, photograph: Made, tmp_path: Path
) -> None:
    """Rows marked as deleted survive appends; a whole fragment may be replaced; a correction can be taken back."""
    sent, second = begun(store, photograph, "chain", tmp_path)
    before = by_digest(store, second)
    everything = [{"sha256": digest(data), "label_value": "bad"} for data in sent.values()]
    took = take_in(store, "chain", upload(store, "chain", "all-bad", correction(*everything)), tmp_path / "3")
    assert took.relabelled == {"good -> bad": 8}
    more = take_in(store, "chain", upload(store, "chain", "b3", pictures(photograph, 200)), tmp_path / "4")
    assert (more.version.version, more.new_rows) == (4, 12)
    back = [{"sha256": digest(data), "label_value": path.split("/")[0]} for path, data in sent.items()]
    done = take_in(store, "chain", upload(store, "chain", "back", correction(*back)), tmp_path / "5")
    after = by_digest(store, done.version)
    assert {sha: row for sha, row in after.items() if sha in before} == before
    assert len(after) == 36
    assert [sum(open_version(store, "chain", n).splits.values()) for n in range(1, 6)] == [12, 24, 24, 36, 36]
    for number in range(1, 6):
        version = open_version(store, "chain", number)
        assert dataset.digest_of(rows_of(store, version)) == version.digest


def test_the_same_correction_again_changes_nothing(store: Store, photograph: Made, tmp_path: Path) -> None:
    sent, _ = begun(store, photograph, "mend-twice", tmp_path)
    fix = correction({"sha256": digest(sent["good/1.jpg"]), "label_value": "bad"})
    prefix = upload(store, "mend-twice", "fix", fix)
    first = take_in(store, "mend-twice", prefix, tmp_path / "3")
    assert take_in(store, "mend-twice", prefix, tmp_path / "4") == replace(first, created=False)
    other = take_in(store, "mend-twice", upload(store, "mend-twice", "fix-2", fix), tmp_path / "5")
    assert (other.created, other.version) == (False, first.version)


def test_corrections_and_batches_at_once_are_all_kept(store: Store, photograph: Made, tmp_path: Path) -> None:
    sent, second = begun(store, photograph, "busy", tmp_path)
    wrong = [digest(sent[f"good/{n}.jpg"]) for n in (1, 2, 4)]
    prefixes = [
        upload(store, "busy", f"fix{n}", correction({"sha256": sha, "label_value": "bad"}))
        for n, sha in enumerate(wrong)
    ]
    prefixes += [upload(store, "busy", f"more{n}", pictures(photograph, 100 + 20 * n)) for n in range(2)]
    with ThreadPoolExecutor(5) as pool:
        made = list(pool.map(lambda n: take_in(store, "busy", prefixes[n], tmp_path / f"at-once-{n}"), range(5)))
    assert sorted(each.version.version for each in made) == [3, 4, 5, 6, 7]
    newest = newest_version(store, "busy")
    assert newest is not None
    after = by_digest(store, newest)
    assert len(after) == 24 + 24
    assert all(after[sha]["label"] == "bad" for sha in wrong)
    kept = by_digest(store, second)
    assert all(after[sha] == row for sha, row in kept.items() if sha not in wrong)
    for each in made:
        assert dataset.digest_of(rows_of(store, each.version)) == each.version.digest


# Kills its own process at the named point of a correction.
KILLED = """
import os, signal, sys
from pathlib import Path
import lance, lance.fragment
from lance.dataset import Tags
from tasks import dataset, storage
from tests_dataset import take_in
from tasks.storage import Store

where, store, name, prefix, spool = sys.argv[1], Store(*sys.argv[2:6]), sys.argv[6], sys.argv[7], Path(sys.argv[8])
commit = lance.LanceDataset.commit

def die(*given, **how):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function):
    return lambda *given, **how: (function(*given, **how), die())

def only(kind, then):
    # Dies at a commit of this kind, before or after it; others pass.
    def committed(uri, operation, **how):
        if isinstance(operation, kind) and then == "before":
            die()
        made = commit(uri, operation, **how)
        if isinstance(operation, kind):
            die()
        return made
    return staticmethod(committed)

fragment = lance.fragment.LanceFragment
points = {
    "after the new rows": (lance.fragment, "write_fragments", after(lance.fragment.write_fragments)),
    "after the old rows were marked": (fragment, "delete_rows", after(fragment.delete_rows)),
    "before the Lance commit": (lance.LanceDataset, "commit", only(lance.LanceOperation.Update, "before")),
    "after the Lance commit": (lance.LanceDataset, "commit", only(lance.LanceOperation.Update, "after")),
    "after the record": (dataset, "write_if_absent", after(storage.write_if_absent)),
    "after the tag": (Tags, "create", after(Tags.create)),
}
setattr(*points[where])
take_in(store, name, prefix, spool)
"""
POINTS = {
    "after the new rows": 2,
    "after the old rows were marked": 2,
    "before the Lance commit": 2,
    "after the Lance commit": 2,
    "after the record": 3,
    "after the tag": 3,
}


@pytest.mark.parametrize(("where", "revealed"), POINTS.items())
def test_a_correction_killed_anywhere_leaves_the_old_or_the_new_version_and_the_next_ends_in_the_same_place(
    store: Store, photograph: Made, tmp_path: Path, where: str, revealed: int
) -> None:
    ends = []
    for killed in (False, True):
        here = replace(store, bucket=f"mend-{digest(f'{where}{killed}'.encode())[:12]}")
        storage.ensure_bucket(here)
        sent, second = begun(here, photograph, "tire", tmp_path / str(killed))
        before = rows_of(here, second).to_pylist()
        fix = correction({"sha256": digest(sent["good/1.jpg"]), "label_value": "bad"})
        prefix = upload(here, "tire", "fix", fix)
        if killed:
            kill_at(where, here, prefix, tmp_path)
            newest = newest_version(here, "tire")
            assert newest is not None
            assert newest.version == revealed
            assert dataset.digest_of(rows_of(here, newest)) == newest.digest
        end = take_in(here, "tire", prefix, tmp_path / f"end{killed}").version
        ends.append((end.version, end.digest, end.splits, by_digest(here, end).keys()))
        assert rows_of(here, open_version(here, "tire", 2)).to_pylist() == before
        assert lance.dataset(end.uri, version="v3", storage_options=here.lance_options).count_rows() == 24
    assert ends[0] == ends[1]


def test_another_batch_does_not_inherit_what_a_killed_correction_left(
    store: Store, photograph: Made, tmp_path: Path
) -> None:
    here = replace(store, bucket="mend-orphan")
    storage.ensure_bucket(here)
    sent, second = begun(here, photograph, "tire", tmp_path)
    before = by_digest(here, second)
    fix = correction({"sha256": digest(sent["good/1.jpg"]), "label_value": "bad"})
    kill_at("after the Lance commit", here, upload(here, "tire", "fix", fix), tmp_path)
    other = correction({"sha256": digest(sent["good/2.jpg"]), "label_value": "bad"})
    done = take_in(here, "tire", upload(here, "tire", "other", other), tmp_path / "other").version
    changed = digest(sent["good/2.jpg"])
    assert by_digest(here, done) == {**before, changed: {**before[changed], "label": "bad"}}


def kill_at(where: str, store: Store, prefix: str, folder: Path) -> None:
    (folder / "tests_dataset.py").write_text((ROOT / "tests" / "test_dataset.py").read_text())
    given = [store.bucket, store.endpoint_url or "", store.access_key_id or "", store.secret_access_key or ""]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), where, *given, "tire", prefix, str(folder / "killed")],
        cwd=folder,
        check=False,  # it is killed
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
