"""tasks/batch.py: what a batch's layout means."""

import json
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge import sealing
from tasks import storage
from tasks.batch import (
    BATCH_NAME,
    DATASET_NAME,
    BatchRefused,
    Correction,
    batch_of,
    from_annotations,
    from_folders,
    read_batch,
)
from tasks.checks import RULES
from tasks.storage import Store, StoredObject


def files(*names: str) -> dict[str, StoredObject]:
    return {name: StoredObject(f"incoming/tire/b/{name}", 10, "etag") for name in names}


def annotations(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"annotation": {"data": list(entries)}}).encode()


def test_class_folders_give_labels_and_split_folders_above_them_splits() -> None:
    items, findings = from_folders(files("good/a.jpg", "train/bad/b.jpg", "valid/good/c.jpg", "test/bad/deep/d.jpg"))
    assert {each.name: (each.label, each.split) for each in items} == {
        "good/a.jpg": ("good", None),
        "train/bad/b.jpg": ("bad", "train"),
        "valid/good/c.jpg": ("good", "val"),
        "test/bad/deep/d.jpg": ("bad", "test"),
    }
    assert findings == []


@pytest.mark.parametrize("name", ["loose.jpg", "train/loose.jpg"])
def test_a_file_outside_every_class_folder_has_no_label(name: str) -> None:
    items, findings = from_folders(files(name))
    assert items == []
    assert [(each.reason, each.name) for each in findings] == [("no_label", name)]


def test_tables_and_texts_beside_the_photographs_are_ignored_aloud() -> None:
    items, findings = from_folders(files("groups.csv", "good/README.md", "good/a.jpg"))
    assert [each.name for each in items] == ["good/a.jpg"]
    assert [each.reason for each in findings] == ["ignored_file", "ignored_file"]


def test_an_annotation_gives_everything_it_says() -> None:
    entry = {
        "FilePath": "a b.jpg",
        "label_value": "bad",
        "group": 17,
        "split": "test",
        "line": "north",
        "captured_at": "2026-03-01T12:00:00+02:00",
    }
    said = from_annotations(annotations(entry), files("a b.jpg"))
    (item,) = said.items
    assert (item.label, item.group, item.split, item.line) == ("bad", "17", "test", "north")
    assert item.captured_at == datetime(2026, 3, 1, 10, tzinfo=UTC)
    assert (said.findings, said.corrects, said.corrections) == ((), False, ())


@pytest.mark.parametrize(
    "path", ["x/a.jpg", "./x/a.jpg", "s3://lake/incoming/tire/b/x/a.jpg", "incoming/tire/b/x/a.jpg"]
)
def test_a_path_may_be_relative_a_key_or_a_uri(path: str) -> None:
    known = ("s3://lake/incoming/tire/b/", "incoming/tire/b/")
    said = from_annotations(annotations({"FilePath": path, "label_value": "good"}), files("x/a.jpg"), *known)
    assert [each.name for each in said.items] == ["x/a.jpg"]


def test_annotations_and_files_without_each_other_are_found() -> None:
    text = annotations({"FilePath": "gone.jpg", "label_value": "good"}, {"FilePath": "a.jpg", "label_value": "good"})
    said = from_annotations(text, files("a.jpg", "orphan.jpg", "annotations.json"))
    assert [each.name for each in said.items] == ["a.jpg"]
    assert {(each.reason, each.name) for each in said.findings} == {
        ("annotation_without_file", "gone.jpg"),
        ("file_without_annotation", "orphan.jpg"),
    }


def test_a_file_annotated_twice_counts_once_when_both_agree_and_not_at_all_when_they_differ() -> None:
    good = {"FilePath": "a.jpg", "label_value": "good"}
    said = from_annotations(annotations(good, good), files("a.jpg"))
    assert (len(said.items), said.findings) == (1, ())
    said = from_annotations(annotations(good, {**good, "label_value": "bad"}), files("a.jpg"))
    assert said.items == ()
    assert [each.reason for each in said.findings] == ["contradictory_annotations"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_value": None}, "label_value is missing"),
        ({"label_value": "  "}, "label_value is '  '"),
        ({"split": "holdout"}, "'holdout': expected one of train, val, test"),
        ({"captured_at": "yesterday"}, "'yesterday': expected ISO 8601"),
        ({"captured_at": "0001-01-01T00:00:00+23:59"}, "expected ISO 8601"),
        ({"FilePath": 3}, "FilePath is 3"),
        ({"label_value": "a\tb"}, "holds control characters"),
        ({"label_value": "\ud800"}, "holds control characters"),
        ({"group": "g" * 400}, "has 400 characters: 300 are the most"),
        ({"line": [1]}, "line is [1]"),
    ],
)
def test_a_bad_annotation_costs_that_file_only(change: dict[str, Any], message: str) -> None:
    bad = {"FilePath": "a.jpg", "label_value": "good", **change}
    said = from_annotations(annotations(bad, {"FilePath": "b.jpg", "label_value": "x"}), files("a.jpg", "b.jpg"))
    assert [each.name for each in said.items] == ["b.jpg"]
    assert message in next(each.message for each in said.findings if each.reason == "bad_annotation")


@pytest.mark.parametrize(
    "text",
    [
        *(b"not json", b"[]", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000, b'{"annotation": null}'),
        *(b'{"annotation": {"data": {}}}', b'{"annotation": {"data": ["a"]}}', b'{"annotation": [["data"]]}'),
        b'{"annotation": {"corrects": "yes", "data": []}}',
    ],
)
def test_a_document_of_another_form_refuses_the_batch(text: bytes) -> None:
    with pytest.raises(BatchRefused, match=r"annotations.json is not of the form") as refused:
        from_annotations(text, files("a.jpg"))
    assert len(str(refused.value)) < 400


SHA = "0123456789abcdef" * 4


def test_a_correction_names_a_stored_photograph_by_its_digest() -> None:
    document = {"annotation": {"corrects": True, "data": [{"sha256": SHA, "label_value": "bad"}]}}
    said = from_annotations(json.dumps(document).encode(), files("annotations.json"))
    assert (said.items, said.findings, said.corrects) == ((), (), True)
    assert said.corrections == (Correction("annotations.json#0", SHA, "bad"),)


@pytest.mark.parametrize(
    ("corrects", "change", "message"),
    [
        (False, {}, '"corrects": true'),
        (True, {"sha256": SHA[:-1]}, "expected the 64 hexadecimal digits"),
        (True, {"sha256": SHA.upper()}, "expected the 64 hexadecimal digits"),
        (True, {"sha256": None}, "sha256 is None"),
        (True, {"FilePath": "a.jpg"}, "name the photograph by one of them"),
        (True, {"label_value": None}, "label_value is missing"),
    ],
)
def test_a_correction_that_cannot_be_understood_is_a_finding(
    corrects: bool, change: dict[str, Any], message: str
) -> None:
    entry = {"sha256": SHA, "label_value": "bad", **change}
    said = from_annotations(
        json.dumps({"annotation": {"corrects": corrects, "data": [entry]}}).encode(), files("annotations.json")
    )
    assert (said.items, said.corrections) == ((), ())
    assert [(each.reason, each.name) for each in said.findings] == [("bad_annotation", "annotations.json#0")]
    assert message in said.findings[0].message


@pytest.mark.parametrize("path", ["../../datasets/tire/versions/1", "a//b.jpg", "x" * 400, "a\nb", "\ud800", "."])
def test_a_path_that_could_be_no_file_never_becomes_part_of_a_key(path: str) -> None:
    said = from_annotations(annotations({"FilePath": path, "label_value": "good"}), files("a.jpg"))
    missing = next(each for each in said.findings if each.reason == "annotation_without_file")
    assert missing.name == "annotations.json#0"
    missing.message.encode()


# What people and programs write by mistake, at any place of the document.
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([SHA, "test"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
FIELDS = (
    "FilePath",
    "label_value",
    "split",
    "group",
    "captured_at",
    "line",
    "sha256",
    "corrects",
    "data",
    "annotation",
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A document of the right form in which some values, keys and bytes are not what they should be."""
    paths = st.sampled_from(["a.jpg", "./b.jpg", "incoming/tire/b/c.jpg", "gone.jpg", "../a.jpg", ""])
    entry = st.fixed_dictionaries({"FilePath": paths, "label_value": st.sampled_from(["good", "bad", " ", "7"])})
    entries: list[Any] = draw(st.lists(entry, max_size=5))
    for _ in range(draw(st.integers(0, 4))):
        if entries:
            target = entries[draw(st.integers(0, len(entries) - 1))]
            if isinstance(target, dict):
                target[draw(st.sampled_from(FIELDS) | st.text(max_size=5))] = draw(VALUES)
    if draw(st.booleans()):
        entries.append(draw(VALUES))
    document: Any = {"annotation": {"data": entries, "corrects": draw(st.booleans() | VALUES)}}
    if draw(st.integers(0, 9)) == 0:
        document["annotation"] = draw(VALUES)
    text = json.dumps(document, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.integers(0, 3)) if draw(st.integers(0, 4)) == 0 else 0):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(max_size=3)) + text[at + draw(st.integers(0, 3)) :]
    return text


@settings(max_examples=2000, deadline=1000, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_whatever_stands_in_the_annotations_every_entry_is_accepted_found_or_the_batch_refused(text: bytes) -> None:
    known = files("a.jpg", "b.jpg", "c.jpg", "annotations.json")
    try:
        said = from_annotations(text, known, "s3://lake/incoming/tire/b/", "incoming/tire/b/")
    except BatchRefused as refused:
        assert len(str(refused).encode()) < 1000
        return
    accounted = {each.name for each in said.items} | {each.name for each in said.findings}
    assert known.keys() - {"annotations.json"} <= accounted
    assert all(each.reason in RULES for each in said.findings)
    for text_kept in (
        *(f"{each.name} {each.message}" for each in said.findings),
        *(f"{each.label} {each.group} {each.line}" for each in said.items),
        *(each.label for each in said.corrections),
    ):
        assert len(text_kept.encode()) < 5000
    for each in said.items:
        assert (each.name in known, each.split in (None, "train", "val", "test")) == (True, True)
        assert each.captured_at is None or each.captured_at.tzinfo is UTC
    pa.array([each.captured_at for each in said.items], pa.timestamp("us", tz="UTC"))
    assert said.corrects or not said.corrections


@pytest.mark.parametrize("prefix", ["incoming/tire/", "incoming/other/b/", "datasets/tire/b", "incoming/tire/b/c/", ""])
def test_a_prefix_that_is_no_batch_of_the_dataset_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match=r"expected incoming/tire/<batch>/"):
        batch_of("tire", prefix)


@pytest.mark.parametrize("name", ["Tire", "", "a/b", "../x", "-a", "x" * 64])
def test_a_dataset_name_that_could_not_name_a_model_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a-z 0-9"):
        batch_of(name, f"incoming/{name}/b/")


@pytest.mark.parametrize("name", ["my photos", "..", ".hidden", "-a", "f\u00e4lle", "x" * 101])
def test_a_batch_that_the_bridge_would_not_announce_is_refused_with_the_rule(name: str) -> None:
    with pytest.raises(ValueError, match=r"use 1 to 100 of A-Z a-z 0-9 \. _ -"):
        batch_of("tire", f"incoming/tire/{name}/")


def test_the_bridge_announces_what_ingest_accepts_and_nothing_else() -> None:
    assert (sealing.DATASET_NAME, sealing.BATCH_NAME) == (DATASET_NAME, BATCH_NAME)


def test_marker_and_hidden_files_are_no_photographs(store: Store) -> None:
    for name in ("good/a.jpg", "good/.DS_Store", ".hidden/good/b.jpg", "__MACOSX/good/a.jpg", "_SUCCESS"):
        storage.write(store, f"incoming/hidden/b/{name}", b"1")
    batch = read_batch(store, "hidden", "incoming/hidden/b")
    assert [each.name for each in batch.items] == ["good/a.jpg"]
    assert batch.findings == ()


@pytest.mark.parametrize("others", [(), ("_SUCCESS",), ("README.md", "_SUCCESS")])
def test_a_batch_without_photographs_is_refused_by_name(store: Store, others: tuple[str, ...]) -> None:
    for name in others:
        storage.write(store, f"incoming/empty/b{len(others)}/{name}", b"1")
    with pytest.raises(BatchRefused, match=rf"s3://tirewatch/incoming/empty/b{len(others)}/ holds no photograph"):
        read_batch(store, "empty", f"incoming/empty/b{len(others)}/")


def test_the_content_digest_follows_the_photographs_and_not_the_marker(store: Store) -> None:
    def digest() -> str:
        return read_batch(store, "content", "incoming/content/b/").content

    storage.write(store, "incoming/content/b/good/a.jpg", b"1")
    first = digest()
    storage.write(store, "incoming/content/b/_SUCCESS", b"")
    assert digest() == first
    storage.write(store, "incoming/content/b/good/a.jpg", b"2")
    assert digest() != first
