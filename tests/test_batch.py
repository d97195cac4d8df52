"""tasks/batch.py: what a batch's layout means."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from tasks import storage
from tasks.batch import BatchRefused, batch_of, from_annotations, from_folders, read_batch
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
    (item,), findings = from_annotations(annotations(entry), files("a b.jpg"))
    assert (item.label, item.group, item.split, item.line) == ("bad", "17", "test", "north")
    assert item.captured_at == datetime(2026, 3, 1, 10, tzinfo=UTC)
    assert findings == []


@pytest.mark.parametrize(
    "path", ["x/a.jpg", "./x/a.jpg", "s3://lake/incoming/tire/b/x/a.jpg", "incoming/tire/b/x/a.jpg"]
)
def test_a_path_may_be_relative_a_key_or_a_uri(path: str) -> None:
    known = ("s3://lake/incoming/tire/b/", "incoming/tire/b/")
    items, _ = from_annotations(annotations({"FilePath": path, "label_value": "good"}), files("x/a.jpg"), *known)
    assert [each.name for each in items] == ["x/a.jpg"]


def test_annotations_and_files_without_each_other_are_found() -> None:
    text = annotations({"FilePath": "gone.jpg", "label_value": "good"}, {"FilePath": "a.jpg", "label_value": "good"})
    items, findings = from_annotations(text, files("a.jpg", "orphan.jpg", "annotations.json"))
    assert [each.name for each in items] == ["a.jpg"]
    assert {(each.reason, each.name) for each in findings} == {
        ("annotation_without_file", "gone.jpg"),
        ("file_without_annotation", "orphan.jpg"),
    }


def test_a_file_annotated_twice_counts_once_when_both_agree_and_not_at_all_when_they_differ() -> None:
    good = {"FilePath": "a.jpg", "label_value": "good"}
    items, findings = from_annotations(annotations(good, good), files("a.jpg"))
    assert (len(items), findings) == (1, [])
    items, findings = from_annotations(annotations(good, {**good, "label_value": "bad"}), files("a.jpg"))
    assert items == []
    assert [each.reason for each in findings] == ["contradictory_annotations"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_value": None}, "label_value is missing"),
        ({"label_value": "  "}, "label_value is '  '"),
        ({"split": "holdout"}, "'holdout': expected one of train, val, test"),
        ({"captured_at": "yesterday"}, "'yesterday': expected ISO 8601"),
        ({"FilePath": 3}, "FilePath is 3"),
    ],
)
def test_a_bad_annotation_costs_that_file_only(change: dict[str, Any], message: str) -> None:
    bad = {"FilePath": "a.jpg", "label_value": "good", **change}
    items, findings = from_annotations(
        annotations(bad, {"FilePath": "b.jpg", "label_value": "x"}), files("a.jpg", "b.jpg")
    )
    assert [each.name for each in items] == ["b.jpg"]
    assert message in next(each.message for each in findings if each.reason == "bad_annotation")


@pytest.mark.parametrize(
    "text", [b"not json", b"[]", b'{"annotation": {"data": {}}}', b'{"annotation": {"data": ["a"]}}']
)
def test_a_document_of_another_form_refuses_the_batch(text: bytes) -> None:
    with pytest.raises(BatchRefused, match=r"annotations.json is not of the form"):
        from_annotations(text, files("a.jpg"))


@pytest.mark.parametrize("prefix", ["incoming/tire/", "incoming/other/b/", "datasets/tire/b", "incoming/tire/b/c/", ""])
def test_a_prefix_that_is_no_batch_of_the_dataset_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match=r"expected incoming/tire/<batch>/"):
        batch_of("tire", prefix)


@pytest.mark.parametrize("name", ["Tire", "", "a/b", "../x", "-a", "x" * 64])
def test_a_dataset_name_that_could_not_name_a_model_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a-z 0-9"):
        batch_of(name, f"incoming/{name}/b/")


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
