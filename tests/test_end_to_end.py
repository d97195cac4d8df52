"""The whole system on one machine, as a stranger meets it: `tirewatch demo`, then every door. Minutes, so marked slow."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from deploy.stack import Stack, read_stack
from deploy.watch import wait_for_run
from flows.settings import Settings
from tasks.ledger import read_ledger
from tasks.probe import ProbeLoad
from tasks.routing import Route, read_routing, write_routing
from tasks.serving import infer_front_door
from tasks.sources import digit_folders, upload_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[1]
TIREWATCH = (sys.executable, "-m", "deploy.cli")


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stack that the demo on scikit-learn's digits has brought up and filled."""
    state = tmp_path_factory.mktemp("demo") / "state"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "CI"))}
    done = subprocess.run(
        [*TIREWATCH, "demo", "--data", "digits", "--state", str(state)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=state.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        yield state
    finally:
        if (state / "stack.json").exists():
            subprocess.run([*TIREWATCH, "down", "--state", str(state)], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def stack(state: Path) -> Stack:
    return read_stack(state)


@pytest.fixture(scope="module")
def report(state: Path) -> dict[str, Any]:
    return json.loads((state / "demo-report.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture
def here(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """The settings of this stack, for the project and for Prefect's own client (other tests have a server of their own)."""
    for name, value in stack.environment().items():
        monkeypatch.setenv(name, value)
    with temporary_settings({PREFECT_API_URL: stack.environment()["PREFECT_API_URL"]}):
        yield Settings()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = digit_folders(tmp_path_factory.mktemp("digits"))
    return [path.read_bytes() for path in sorted(folder.rglob("*.png"))[::30]]


def prefect(stack: Stack, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        env={**os.environ, **stack.environment()},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


def test_every_figure_of_the_report_is_what_the_stores_say(report: dict[str, Any], here: Settings) -> None:
    from tasks.dataset import newest_version
    from tasks.registry import run_metrics

    dataset = newest_version(here.store, "digits")
    assert dataset is not None
    assert (report["dataset"]["versions"], report["dataset"]["digest"]) == (dataset.version, dataset.digest)
    metrics = run_metrics(here.mlflow_tracking_uri, report["train"]["mlflow_run"])
    assert report["train"]["test_accuracy"] == metrics["test_accuracy"] >= 0.95
    assert report["served"]["accuracy"] == metrics["served_accuracy"] >= 0.95
    assert 0 < report["served"]["p50_ms"] <= report["served"]["p99_ms"]
    assert 0 < report["upload_to_run_seconds"] < 60
    assert report["seconds_total"] > report["train"]["seconds"]


def test_the_story_was_told_with_its_two_verdicts_and_without_a_lost_request(report: dict[str, Any]) -> None:
    assert report["drift"]["quiet"]["verdict"] == "Quiet"
    assert report["drift"]["broken_camera"]["verdict"] == "Drifted"
    assert report["promotion"]["decision"] in ("Promoted", "Refused")
    if report["promotion"]["decision"] == "Promoted":
        assert report["swap"]["failed_requests"] == 0
        assert report["rollback"]["seconds"] < 10  # 0.1 s on a machine that does nothing else


def test_door_one_a_deployment_runs_by_hand(stack: Stack, here: Settings) -> None:
    from tasks.registry import newest_version

    before = newest_version(here.mlflow_tracking_uri, "digits")
    prefect(stack, "deployment", "run", "train/digits", "-p", 'config={"architecture": "cnn", "pretrained": false, '
            '"image_size": 32, "epochs": 1, "minimum_accuracy": 0.0, "minimum_balanced_accuracy": 0.0}', "--watch")  # fmt: skip
    assert newest_version(here.mlflow_tracking_uri, "digits") == before + 1


def test_a_value_outside_its_bound_is_refused_with_field_and_bound(stack: Stack) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "deployment", "run", "train/digits", "-p", 'config={"epochs": 0}'],
        env={**os.environ, **stack.environment()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "epochs" in said and "1" in said


def test_door_three_grpc_and_http_say_the_same_and_where_it_comes_from(
    here: Settings, photographs: list[bytes], report: dict[str, Any]
) -> None:
    for photograph in photographs[:10]:
        grpc, http = (infer_front_door(here.triton, "digits", photograph, protocol) for protocol in ("grpc", "http"))
        assert (grpc.label, grpc.score, grpc.lineage) == (http.label, http.score, http.lineage)
        assert grpc.lineage["version"] == grpc.model_version
        assert str(grpc.lineage["dataset_digest"]).startswith("sha256:")


def test_twenty_switches_under_load_lose_no_request_and_never_answer_from_elsewhere(
    here: Settings, photographs: list[bytes], stack: Stack
) -> None:
    versions = _two_versions(here, stack)
    table = read_routing(here.serving_root, "digits")
    assert table is not None
    switches: list[tuple[float, float, int]] = []
    try:
        with ProbeLoad(here.triton, "digits", photographs, lanes=("grpc", "http") * 4, pause=0.0) as load:
            load.wait_for(50)
            for turn in range(20):
                route = versions[turn % 2]
                began = time.monotonic()
                write_routing(here.serving_root, replace(table, champion=route, previous=versions[1 - turn % 2]))
                switches.append((began, time.monotonic(), route.version))
                load.wait_for(40)
    finally:
        write_routing(here.serving_root, table)
    assert [probe.error for probe in load.probes if probe.error] == []
    assert len(load.probes) > 800
    for probe in load.probes:
        routed = {table.champion.version} if probe.sent < switches[0][1] else set()
        routed |= {version for began, _, version in switches if probe.sent <= began <= probe.answered}
        done = [version for _, ended, version in switches if ended <= probe.sent]
        routed |= {done[-1]} if done else set()
        routed |= {v for began, ended, v in switches if began <= probe.answered and ended >= probe.sent}
        assert probe.version in routed


def _two_versions(here: Settings, stack: Stack) -> list[Route]:
    """Two loaded versions; a second promotion where the demo's challenger was refused."""
    from tasks.model_repository import published_versions

    table = read_routing(here.serving_root, "digits")
    assert table is not None
    network = table.champion.network
    if len(published_versions(here.serving_root, network)) < 2:
        limits = json.dumps({"min_accuracy": 0.1, "must_beat_champion": False})
        prefect(stack, "deployment", "run", "promote/digits", "-p", f"limits={limits}", "--watch")
    return [Route(network, version) for version in published_versions(here.serving_root, network)[-2:]]


def test_a_challenger_from_shuffled_labels_is_refused_and_the_champion_untouched(
    here: Settings, stack: Stack, tmp_path: Path
) -> None:
    before = read_routing(here.serving_root, "digits"), read_ledger(here.store, "digits")
    since = datetime.now(UTC)
    prefix = upload_folder(here.store, _shuffled_digits(tmp_path), "digits", "shuffled")
    assert run_after("ingest/digits", since, {"prefix": prefix}).state_name == "Completed"
    trained = run_after("train/digits", since, {"dataset": "digits"})
    if trained.state_name == "BelowMinimum":  # its validation labels are shuffled as well: insist
        config = {**trained.parameters["config"], "minimum_accuracy": 0.0, "minimum_balanced_accuracy": 0.0}
        prefect(stack, "deployment", "run", "train/digits", "-p", f"config={json.dumps(config)}", "--watch")
    promoted = run_after("promote/digits", since, {"model": "digits"})
    assert promoted.state_name == "Refused"
    assert "accuracy" in promoted.state.message and "demanded" in promoted.state.message
    assert (read_routing(here.serving_root, "digits"), read_ledger(here.store, "digits")) == before


def run_after(deployment: str, since: datetime, parameters: dict[str, Any]) -> Any:
    return wait_for_run(deployment, since, parameters, 90, 300, lambda _: None)


def _shuffled_digits(folder: Path) -> Path:
    """The scans, each a little darker so that they are new photographs, in class folders drawn at random."""
    import cv2

    random = np.random.default_rng(5)
    for path in sorted(digit_folders(folder / "scans").rglob("*.png")):
        target = folder / "shuffled" / str(random.integers(10)) / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(target), cv2.imread(str(path)) // 8 * 7)
    return folder / "shuffled"


def test_the_ledger_says_who_was_champion(here: Settings, report: dict[str, Any]) -> None:
    entries = read_ledger(here.store, "digits")
    assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
    assert entries[0].action == "promoted" and entries[0].previous is None
    assert all(entry.previous == before.version for before, entry in pairwise(entries))


@pytest.mark.browser
def test_door_four_the_drift_page_shows_verdict_and_pictures_in_a_browser(
    stack: Stack, tmp_path: Path, here: Settings
) -> None:
    from playwright.sync_api import sync_playwright
    from prefect.client.orchestration import get_client

    chromium = next((path for path in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(path).exists()), None)
    if chromium is None:
        pytest.skip("no Chromium is installed (apt install chromium)")
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/latest/filter", json={}).json()
    artifact = next(each["latest_id"] for each in found if each["key"] == "drift-digits")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1400})
        page.goto(f"{stack.prefect_url}/artifacts/artifact/{artifact}")
        page.wait_for_selector("img[src^='data:image/png']", timeout=30_000)
        widths = page.eval_on_selector_all("img[src^='data:image/png']", "all => all.map(one => one.naturalWidth)")
        text = page.inner_text("body")
        page.screenshot(path=str(tmp_path / "drift.png"), full_page=True)
        browser.close()
    assert widths and min(widths) > 100, "a picture of the report did not load"
    assert "drift" in text.lower()
    assert "camera" in text.lower(), "the report does not name the camera as the cause"


def test_answers_go_on_while_prefect_mlflow_and_s3_are_down_and_the_sample_is_there_once(
    stack: Stack, here: Settings, photographs: list[bytes]
) -> None:
    """Supervisor brings them back; the captured sample of the meantime reaches S3 once."""
    from deploy.supervisor import Supervisor
    from monitoring.capture import read_spool

    supervisor = Supervisor(stack)
    for name in ("prefect", "mlflow", "s3"):
        psutil.Process(supervisor.programs()[name].pid).kill()
    asked = [f"outage-{number}" for number in range(30)]
    for number, request_id in enumerate(asked):
        photograph = photographs[number % len(photographs)]
        infer_front_door(here.triton, "digits", photograph, parameters={"request_id": request_id})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        status = subprocess.run(
            [*TIREWATCH, "status", "--state", str(stack.state)], cwd=ROOT, capture_output=True, check=False
        )
        if status.returncode == 0:
            break
        time.sleep(2)
    assert status.returncode == 0, status.stdout.decode()
    spooled = [record.request_id for _, record in read_spool(here.serving_root / "spool" / "digits")]
    assert sorted(found for found in spooled if found.startswith("outage-")) == sorted(asked)
    prefect(stack, "deployment", "run", "drift/digits", "--watch")
    prefect(stack, "deployment", "run", "drift/digits", "--watch")
    assert _captured(here).count("outage-0") == 1
    assert {found for found in _captured(here) if found.startswith("outage-")} == set(asked)


def _captured(here: Settings) -> list[str]:
    import io

    import pyarrow.parquet as pq

    from tasks.storage import list_objects, read

    bundles = [each.key for each in list_objects(here.store, "captures/digits/")]
    return [id for key in bundles for id in pq.read_table(io.BytesIO(read(here.store, key)))["request_id"].to_pylist()]
