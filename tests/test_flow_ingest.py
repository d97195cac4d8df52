"""The ingest flow on a real S3 and a real Prefect server."""

import base64
import hashlib
import io
import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State

from flows.ingest import IngestOptions, ingest
from tasks import storage
from tasks.batch import SPLITS
from tasks.checks import RULES
from tasks.dataset import newest_version, read_rows
from tasks.dataset_compare import difference
from tasks.ingest_report import Ingested
from tasks.sources import digit_folders, upload_folder
from tasks.storage import Store

Made = Callable[..., bytes]
pytestmark = pytest.mark.usefixtures("prefect_server", "configured")


def upload(store: Store, name: str, photographs: dict[str, bytes], batch: str = "b1") -> str:
    prefix = f"incoming/{name}/{batch}/"
    storage.write_many(store, ((prefix + path, data) for path, data in photographs.items()))
    return prefix


def pictures(photograph: Made, first: int = 0, count: int = 12) -> dict[str, bytes]:
    return {f"{'good' if n % 2 else 'bad'}/{n}.jpg": photograph(n) for n in range(first, first + count)}


def run(name: str, prefix: str, options: IngestOptions | None = None) -> State[Ingested]:
    state = ingest(name, prefix, options or IngestOptions(), return_state=True)
    assert isinstance(state, State)
    return state


def api(path: str, body: dict[str, Any]) -> Any:
    with get_client(sync_client=True) as client:
        return client.request("POST", path, json=body).json()


def announced(name: str, at_least: int = 1) -> list[dict[str, Any]]:
    """Payloads of the events about the dataset; waits a moment for them to pass the server's queue."""
    for _ in range(50):
        found = api("/events/filter", {"filter": {"resource": {"id": [f"tirewatch.dataset.{name}"]}}})["events"]
        if len(found) >= at_least:
            break
        time.sleep(0.1)
    return [event["payload"] for event in found if event["event"] == "tirewatch.dataset.version.created"]


def test_a_batch_becomes_a_version_and_the_event_says_which(store: Store, photograph: Made) -> None:
    state = run("flow-new", upload(store, "flow-new", pictures(photograph)))
    assert (state.name, state.message) == ("Completed", "flow-new v1: 12 new photographs from b1")
    version = newest_version(store, "flow-new")
    assert version is not None
    assert announced("flow-new") == [{"dataset": "flow-new", "version": 1, "digest": version.digest}]


def test_a_second_run_says_unchanged_and_sends_no_second_event(store: Store, photograph: Made) -> None:
    prefix = upload(store, "flow-twice", pictures(photograph))
    first, second = run("flow-twice", prefix), run("flow-twice", prefix)
    assert (second.name, second.is_completed()) == ("Unchanged", True)
    assert second.result().version == first.result().version
    assert len(announced("flow-twice")) == 1


def dies(*_: object) -> None:
    raise ConnectionError("the machine lost its network here")


def test_a_run_that_died_before_its_event_is_made_good_by_the_next(
    store: Store, photograph: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = upload(store, "flow-silent", pictures(photograph))
    with monkeypatch.context() as patched:
        patched.setattr("flows.ingest.announce", dies)
        assert not run("flow-silent", prefix).is_completed()
    assert newest_version(store, "flow-silent") is not None
    assert run("flow-silent", prefix).name == "Unchanged"
    assert [payload["version"] for payload in announced("flow-silent")] == [1]


def test_the_six_bad_files_are_quarantined_and_the_good_ones_ingested(store: Store, photograph: Made) -> None:
    run("flow-bad", upload(store, "flow-bad", pictures(photograph), "first"))
    pixel, huge = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "PNG")
    Image.new("1", (10_000, 6_000)).save(huge, "PNG")
    bad = {
        "good/cut.jpg": photograph(900, 200)[:-800],
        "odd/unknown class.jpg": photograph(901),
        "good/pixel.png": pixel.getvalue(),
        "good/text.jpg": b"a text",
        "bad/huge.png": huge.getvalue(),
        "good/again.jpg": photograph(0),  # stored as bad/0.jpg
    }
    prefix = upload(store, "flow-bad", {**pictures(photograph, 100, 40), **bad}, "second")
    state = run("flow-bad", prefix)
    assert state.message == "flow-bad v2: 40 new photographs from second, 6 files quarantined"
    records = {
        found.key.removeprefix("quarantine/flow-bad/second/").removesuffix(".json"): json.loads(
            storage.read(store, found.key)
        )
        for found in storage.list_objects(store, "quarantine/flow-bad/second")
    }
    assert {name: record["reason"] for name, record in records.items()} == {
        "good/cut.jpg": "truncated",
        "odd/unknown class.jpg": "unknown_class",
        "good/pixel.png": "too_small",
        "good/text.jpg": "not_an_image",
        "bad/huge.png": "too_large",
        "good/again.jpg": "contradicts_dataset",
    }
    assert all(storage.exists(store, record["key"]) for record in records.values())


def test_a_file_that_was_repaired_leaves_quarantine(store: Store, photograph: Made) -> None:
    photographs = {**pictures(photograph), "good/cut.jpg": photograph(50, 200)[:-800]}
    prefix = upload(store, "flow-mended", photographs)
    run("flow-mended", prefix)
    assert len(storage.list_objects(store, "quarantine/flow-mended/b1")) == 1
    storage.write(store, prefix + "good/cut.jpg", photograph(50, 200))
    assert run("flow-mended", prefix).result().new_rows == 1
    assert storage.list_objects(store, "quarantine/flow-mended/b1") == []


@pytest.mark.parametrize(
    ("name", "photographs", "message"),
    [
        ("flow-empty", {}, "holds no photograph"),
        (
            "flow-rotten",
            {f"good/{n}.jpg": b"text %d" % n for n in range(4)},
            r"4 of 4 files .* are bad \(4 not_an_image\)",
        ),
    ],
)
def test_a_batch_that_cannot_be_used_fails_with_a_reason_and_changes_nothing(
    store: Store, name: str, photographs: dict[str, bytes], message: str
) -> None:
    state = run(name, upload(store, name, photographs))
    assert state.is_failed()
    assert re.search(message, state.message or "")
    assert newest_version(store, name) is None
    assert storage.list_objects(store, f"quarantine/{name}") == []


def test_an_annotated_batch_is_read_with_its_groups_and_lines(store: Store, photograph: Made) -> None:
    entries = [
        {"FilePath": f"{n}.jpg", "label_value": "good" if n % 2 else "bad", "group": f"tire-{n // 4}", "line": "north"}
        for n in range(24)
    ]
    files = {f"{n}.jpg": photograph(n) for n in range(24)}
    files["annotations.json"] = json.dumps({"annotation": {"data": entries}}).encode()
    version = run("flow-annotated", upload(store, "flow-annotated", files)).result().version
    rows = [
        row
        for batch in read_rows(store, version, ["train", "val", "test"], ["group", "split", "line"])
        for row in batch.to_pylist()
    ]
    assert {row["line"] for row in rows} == {"north"}
    homes = {(row["group"], row["split"]) for row in rows}
    assert len(rows) == 24
    assert len(homes) == len({group for group, _ in homes}) == 6


def test_the_report_shows_counts_reasons_and_pictures(store: Store, photograph: Made) -> None:
    photographs = {**pictures(photograph), "good/1 again.png": photograph(1), "good/a|b<c.jpg": b"text"}
    run("flow-report", upload(store, "flow-report", photographs))
    filtered = {"artifacts": {"key": {"any_": ["ingest-flow-report"]}}}
    (artifact,) = api("/artifacts/filter", filtered)
    report = artifact["data"]
    assert "12 new photographs, 1 files quarantined" in report
    assert "| duplicate | 1 | dropped |" in report
    assert "| not_an_image | 1 | quarantined |" in report
    assert "good/a\\|b&lt;c.jpg" in report
    pictures_shown = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", report)
    statistics, sheet = (Image.open(io.BytesIO(base64.b64decode(each))) for each in pictures_shown)
    assert statistics.width > 500 and sheet.height > 100
    assert len(set(sheet.convert("RGB").getdata())) > 500
    (table,) = api("/artifacts/filter", {"artifacts": {"key": {"any_": ["checks-flow-report"]}}})
    rows = {row["rule"]: row for row in json.loads(table["data"])}
    assert set(rows) == set(RULES), "what was looked for and not found is told as well"
    assert (rows["not_an_image"]["found"], rows["not_an_image"]["outcome"]) == ("1", "quarantined")
    assert rows["duplicate"]["found"] == "1" and "good/1" in rows["duplicate"]["for example"]


def test_the_parameters_are_bounded_and_described_for_the_form() -> None:
    schema = ingest.parameters.model_dump()
    options = schema["definitions"]["IngestOptions"]["properties"]
    assert all(field["description"] for field in options.values())
    assert (options["max_quarantined_share"]["minimum"], options["max_quarantined_share"]["maximum"]) == (0, 1)
    assert schema["properties"]["prefix"]["description"]
    with pytest.raises(ValueError, match=r"leave less than 0\.2"):
        IngestOptions(val_share=0.5, test_share=0.5)


def test_a_folder_of_digits_goes_all_the_way(store: Store, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = digit_folders(tmp_path_factory.mktemp("digits"))
    prefix = upload_folder(store, folder, "flow-digits", "scans")
    assert storage.exists(store, prefix + "_SUCCESS")
    version = run("flow-digits", prefix).result().version
    assert version.classes == tuple("0123456789")
    assert sum(version.splits.values()) == 1797
    assert abs(version.splits["test"] / 1797 - 0.15) < 0.01


def test_a_correction_is_a_version_whose_state_page_and_event_say_what_was_relabelled(
    store: Store, photograph: Made
) -> None:
    sent = pictures(photograph)
    first = run("flow-fix", upload(store, "flow-fix", sent, "first")).result().version
    wrong = hashlib.sha256(sent["good/1.jpg"]).hexdigest()
    document = {"annotation": {"corrects": True, "data": [{"sha256": wrong, "label_value": "bad"}]}}
    prefix = upload(store, "flow-fix", {"annotations.json": json.dumps(document).encode()}, "fix")
    state = run("flow-fix", prefix)
    assert (state.name, state.message) == (
        "Completed",
        "flow-fix v2: 0 new photographs from fix, 1 labels corrected",
    )
    second = state.result().version
    found = difference(store, first, second)
    assert found.counts == {"added": 0, "removed": 0, "relabelled": 1, "moved": 0, "unchanged": 11}
    [changed] = found.relabelled.to_pylist()
    assert (changed["sha256"], changed["was"], changed["label"]) == (wrong, "good", "bad")
    for version, label in ((first, "good"), (second, "bad")):
        rows = [row for some in read_rows(store, version, SPLITS, ["sha256", "label"]) for row in some.to_pylist()]
        assert len(rows) == 12 and {row["label"] for row in rows if row["sha256"] == wrong} == {label}
    page, *_ = api("/artifacts/filter", {"artifacts": {"key": {"any_": ["ingest-flow-fix"]}}, "sort": "CREATED_DESC"})
    assert page["data"].startswith("# fix: flow-fix v2") and "| good -> bad | 1 |" in page["data"]
    assert sorted(payload["version"] for payload in announced("flow-fix", 2)) == [1, 2]
    assert run("flow-fix", prefix).name == "Unchanged"
