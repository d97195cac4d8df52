"""flows/drift.py on real S3, MLflow and Prefect: a trained champion, captured production, verdicts, pages, events."""

import json
import re
import time
import uuid
from pathlib import Path

import cv2
import numpy as np
import pytest
from pydantic import SecretStr, ValidationError

from flows.drift import DriftOptions, drift
from flows.ingest import IngestOptions, ingest
from flows.settings import Settings
from flows.train import train
from monitoring.capture import CaptureRecord, spooled, write_record
from tasks import registry
from tasks.decision import decide, score
from tasks.images import decode
from tasks.recipe import Augmentation, TrainConfig
from tasks.storage import list_objects, read, write, write_many

QUICK = TrainConfig(
    architecture="cnn",
    pretrained=False,
    image_size=16,
    epochs=4,
    batch_size=16,
    learning_rate=3e-3,
    head_rate=1,
    defect_labels=("scratched",),
    augmentation=Augmentation(flip_vertical=True, quarter_turns=True, brightness=0, contrast=0),
    precision="float32",
)
MODEL = "drifting_plates"
OPTIONS = DriftOptions(window=120, minimum=60)


def plate(number: int, scratched: bool) -> bytes:
    """A noisy plate of its own brightness, with a bright line across it or without."""
    random = np.random.default_rng(number)
    level = random.uniform(80, 140)
    pixels = random.normal(level, 12, (40, 40, 3)).clip(0, 255).astype(np.uint8)
    if scratched:
        start, end = random.integers(0, 40, 2), random.integers(0, 40, 2)
        cv2.line(pixels, (int(start[0]), 0), (int(end[0]), 39), (250, 250, 250), 3)
    return cv2.imencode(".png", pixels)[1].tobytes()


def broken(photograph: bytes) -> bytes:
    """Out of focus and too dark."""
    pixels = cv2.imdecode(np.frombuffer(photograph, np.uint8), cv2.IMREAD_COLOR)
    return cv2.imencode(".png", (cv2.GaussianBlur(pixels, (0, 0), 2) * 0.6).astype(np.uint8))[1].tobytes()


@pytest.fixture(scope="module")
def here(store, mlflow_uri, prefect_server, tmp_path_factory):
    """The stack's settings for the flows of this module."""
    found = Settings(
        s3_bucket=store.bucket,
        s3_endpoint_url=store.endpoint_url,
        s3_access_key_id=store.access_key_id,
        s3_secret_access_key=SecretStr(store.secret_access_key),
        mlflow_tracking_uri=mlflow_uri,
        serving_root=tmp_path_factory.mktemp("serving"),
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ingest", "train", "drift"):
            patch.setattr(f"flows.{name}.settings", lambda: found)
        yield found


@pytest.fixture(scope="module")
def champion(here):
    """A version trained on plates, half of them scratched, made champion."""
    prefix = f"incoming/{MODEL}/first/"
    write_many(
        here.store,
        [
            (f"{prefix}{label}/{n}.png", plate(2 * n + (label == "scratched"), label == "scratched"))
            for label in ("plain", "scratched")
            for n in range(200)
        ],
    )
    write(here.store, f"{prefix}_SUCCESS", b"")
    ingest(MODEL, prefix, IngestOptions(val_share=0.4, test_share=0.1))
    model = train(MODEL, config=QUICK, return_state=True).result()
    registry.set_alias(here.mlflow_tracking_uri, MODEL, "champion", model.version)
    return model


@pytest.fixture
def produce(here, champion):
    """`produce(photographs)`: what the server would have captured of these requests, answered by the champion."""
    from tasks.training import predict

    network = registry.load_network(here.mlflow_tracking_uri, MODEL, champion.version)
    _, card = registry.load_card(here.mlflow_tracking_uri, MODEL, champion.version)
    spool = here.serving_root / "spool" / MODEL
    spool.mkdir(parents=True, exist_ok=True)

    def capture(photographs: list[bytes]) -> None:
        answers = predict(network, np.stack([decode(each, card.image_size) for each in photographs]))
        labels, scores = decide(answers["probabilities"], card.rule), score(answers["probabilities"], card.rule)
        for row, photograph in enumerate(photographs):
            record = CaptureRecord(
                request_id=uuid.uuid4().hex,
                captured_at=time.time(),
                model=MODEL,
                version=champion.version,
                label=card.rule.labels[labels[row]],
                score=float(scores[row]),
                image=photograph,
                probabilities=answers["probabilities"][row],
                embedding=answers["embedding"][row],
            )
            write_record(spool, record, row)

    return capture


def ordinary(count: int, first: int, scratched: float = 0.5) -> list[bytes]:
    """Plates that no training saw, mixed as in training."""
    return [plate(n, (n * 0.618) % 1 < scratched) for n in range(first, first + count)]


def run(options: DriftOptions = OPTIONS):
    return drift(MODEL, options, return_state=True)


def page_of(state) -> str:
    from prefect.client.orchestration import get_client

    wanted = {"artifacts": {"flow_run_id": {"any_": [str(state.state_details.flow_run_id)]}}}
    with get_client(sync_client=True) as client:
        (artifact,) = client.request("POST", "/artifacts/filter", json=wanted).json()
    assert artifact["key"] == "drift-drifting-plates"
    return artifact["data"]


def line_of(here, state) -> dict:
    """What the run wrote into the history on S3."""
    run_id = str(state.state_details.flow_run_id)
    (key,) = (found.key for found in list_objects(here.store, f"drift/{MODEL}/") if run_id in found.key)
    return json.loads(read(here.store, key))


def events_named(name: str, at_least: int = 0) -> list[dict]:
    from prefect.client.orchestration import get_client

    deadline = time.monotonic() + 20
    with get_client(sync_client=True) as client:
        while True:  # the server stores events a moment after it took them
            body = {"filter": {"event": {"name": [name]}}}
            found = client.request("POST", "/events/filter", json=body).json()["events"]
            mine = [event for event in found if event["payload"]["model"] == MODEL]
            if len(mine) >= at_least or time.monotonic() > deadline:
                return mine
            time.sleep(0.3)


def test_a_model_without_champion_is_insufficient_and_says_what_to_do(here):
    state = drift("nobody", return_state=True)
    assert (state.name, state.is_completed()) == ("Insufficient", True)
    assert "run its promote deployment first" in state.message


def test_too_few_photographs_are_no_verdict_and_no_alarm(here, champion, produce):
    produce(ordinary(30, 9000))
    state = run()
    assert state.name == "Insufficient" and "30 photographs were captured, 60 are needed" in state.message
    assert "Too few photographs" in page_of(state)
    assert line_of(here, state)["finding"]["announced"] is None
    assert spooled(here.serving_root / "spool" / MODEL) == []


def test_the_story_of_a_camera_that_breaks_and_is_repaired(here, champion, produce):
    """One story, because each run is judged by the history of those before it."""
    from mlflow import MlflowClient

    produce(ordinary(120, 10_000))
    quiet = run()
    assert quiet.name == "Quiet", quiet.message
    assert "No drift" in page_of(quiet)
    assert events_named("tirewatch.drift.detected") == []

    produce([broken(photograph) for photograph in ordinary(120, 20_000)])
    drifted = run()
    assert drifted.name == "Drifted" and drifted.is_completed(), drifted.message
    result = drifted.result()
    assert [cause.name for cause in result.causes] == ["camera"]
    assert "darker" in result.causes[0].evidence and "blurred" in result.causes[0].evidence
    (event,) = events_named("tirewatch.drift.detected", 1)
    assert event["resource"]["prefect.resource.id"] == f"tirewatch.model.{MODEL}"
    told = event["payload"]
    assert (told["version"], told["verdict"], told["causes"]) == (champion.version, "drifted", ["camera"])
    assert told["score"] == pytest.approx(result.score, abs=1e-3)
    page = page_of(drifted)
    assert (
        "Fix the camera, do not retrain" in page and len(re.findall(r"!\[[^]]*\]\(data:image/png;base64,", page)) == 2
    )
    link = re.search(r"\((http[^)]*/artifacts/drift/([^)]*\.html))\)", page)
    assert link and link[1].startswith(here.mlflow_tracking_uri)
    stored = MlflowClient(here.mlflow_tracking_uri).download_artifacts(champion.run_id, f"drift/{link[2]}")
    archived = Path(stored).read_text()
    assert "K-S distance" in archived and "sharpness" in archived
    assert line_of(here, drifted)["artifact"] == told["artifact"]

    again = run()
    assert again.name == "Drifted" and len(events_named("tirewatch.drift.detected")) == 1, "the same alarm once"

    produce(ordinary(120, 30_000))
    repaired = run()
    assert repaired.name == "Quiet" and repaired.message.endswith("cleared"), repaired.message
    (cleared,) = events_named("tirewatch.drift.cleared", 1)
    assert cleared["payload"]["verdict"] == "quiet"


def test_more_scratches_are_a_defect_rate_and_no_camera(here, champion, produce):
    produce(ordinary(120, 40_000, scratched=0.95))
    state = run()
    assert [cause.name for cause in state.result().causes] == ["defect_rate"], state.message
    assert "Do not retrain" in page_of(state)


def test_only_photographs_of_the_champion_are_compared(here, champion, produce):
    state = run(DriftOptions(window=1000, minimum=1000, max_age_hours=0.001))
    assert state.name == "Insufficient", "photographs older than the span are left out"
    registry.set_alias(here.mlflow_tracking_uri, MODEL, "champion", champion.version)
    spool = here.serving_root / "spool" / MODEL
    record = CaptureRecord(
        "other",
        time.time(),
        MODEL,
        champion.version + 1,
        "plain",
        0.1,
        plate(1, False),
        *([np.ones(2, np.float32)] * 2),
    )
    write_record(spool, record)
    state = run()
    assert "other" not in str(line_of(here, state)) and state.result().window == 120


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"window": 100, "minimum": 200}, "minimum 200 is more than the window of 100"),
        ({"alarm_after": 3, "alarm_of": 2}, "alarm_after 3 is more than alarm_of 2"),
        ({"window": 5000}, "less than or equal to 1000"),
        ({"windw": 50}, "windw"),
    ],
)
def test_impossible_options_are_refused_by_name(wrong, told):
    with pytest.raises(ValidationError, match=told):
        DriftOptions(**wrong)
