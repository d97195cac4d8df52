import csv
import io
import json
import re
from base64 import b64decode
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from monitoring.features import STATISTICS
from tasks.decision import DecisionRule, decide
from tasks.evaluation import Figures, evaluate
from tasks.judgement import Finding, Judged
from tasks.recipe import TrainConfig
from tasks.slices import slices, thirds
from tasks.temperature import fit_temperature, softmax
from tasks.tracking import write_tensorboard
from tasks.training import Epoch, Trained
from tasks.training_report import Outcome, as_dict, files, note, page, pictures, summary_metrics

RULE = DecisionRule(("good", "worn"), ("worn",), 0.6)
SKETCH = io.BytesIO()
Image.new("RGB", (300, 200), "red").save(SKETCH, "PNG")


def judged(rule: DecisionRule = RULE, count: int = 200) -> Judged:
    """Logits three times too sure of themselves, and what follows from them; line `south` is worse than `north`."""
    random = np.random.default_rng(4)
    classes = len(rule.labels)
    truth = random.integers(0, classes, count)
    south = np.arange(count) % 4 == 0
    logits = random.normal(0, 1, (count, classes)) + np.where(south, 0.3, 3.0)[:, None] * np.eye(classes)[truth]
    calibration = fit_temperature(3 * logits, truth)
    rows = pa.table(
        {
            "label": [rule.labels[label] for label in truth],
            "line": np.where(south, "south | dock", "north").tolist(),
            "batch": ["b"] * count,
            **{name: random.random(count).tolist() for name in STATISTICS},
        }
    )
    finding = found("validation", rule, 3 * logits, truth, rows, calibration.temperature)
    outputs = {"probabilities": finding.probabilities, "embedding": np.zeros((count, 4), np.float32)}
    return Judged(None, calibration, rule, finding, outputs, rows, thirds(rows))


def found(split, rule, logits, truth, rows, temperature) -> Finding:
    probabilities = softmax(logits / temperature)
    decided = decide(probabilities, rule)
    parts = slices(decided, truth, rule, rows, thirds(rows))
    evaluation = evaluate(probabilities, truth, rule)
    return Finding(split, rule, truth, decided, probabilities, softmax(logits), evaluation, parts)


def epoch(number: int) -> Epoch:
    figures = Figures(0.5 + number / 10, 0.5, 0.5, 0.5, 0.5)
    return Epoch(number, 0.01 / number, 1 / number, figures, 1.1 / number, 1.0 / number, figures, 30.0 * number)


TRAINED = Trained(None, tuple(epoch(n) for n in (1, 2, 3)), 3, "all 3 epochs done", "float32", "cpu", 90.0, 170.0)


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    """A registered model with a test split, which here is the validation split over again."""
    chosen = judged()
    test = replace(chosen.validation, split="test")
    return Outcome("tire on dataset version 3", TrainConfig(), TRAINED, chosen, test, (), SKETCH.getvalue())


@pytest.fixture(scope="module")
def drawn(outcome) -> dict[str, bytes]:
    return pictures(outcome)


def test_every_picture_is_a_readable_png(drawn):
    shown = {"learning_curves", "overview", "explanation"}
    each = {f"{kind}_{split}" for kind in ("confusion", "roc", "precision_recall", "reliability")
            for split in ("validation", "test")}  # fmt: skip
    assert set(drawn) == shown | each
    for name, png in drawn.items():
        with Image.open(io.BytesIO(png)) as picture:
            assert picture.format == "PNG" and min(picture.size) >= 200, name
            colours = len(picture.convert("RGB").getcolors(1 << 24) or [])
        assert colours > 10 or name == "explanation", f"{name} is empty"


def test_several_classes_without_defects_and_very_many_of_them_are_drawn_too():
    for classes in (3, 40):
        rule = DecisionRule(tuple(f"class {n:02}" for n in range(classes)))
        chosen = judged(rule, count=300)
        bare = Outcome("many", TrainConfig(), TRAINED, chosen, None, (), "No heat maps: an MLP.")
        drawn = pictures(bare)
        assert "explanation" not in drawn and len(drawn["overview"]) > 5000
        text = page(bare, drawn, "http://mlflow/run")
        assert "threshold" not in text and "escapes" not in text
        assert ("10 more are in" in text) == (classes == 40), "the page shows the thirty worst classes"


def test_the_page_tells_figures_bounds_temperature_weakness_and_shows_pictures(outcome, drawn):
    text = page(outcome, drawn, "http://mlflow/run")
    point = outcome.test.evaluation.operating
    assert f"{point.escapes} of {point.defects} (at most {point.escape_upper:.1%})" in text
    assert f"temperature {outcome.judged.calibration.temperature:.3f}" in text and "too sure of itself" in text
    assert "(http://mlflow/run)" in text
    weak = text[text.index("## Where it is weak") : text.index("## What it looked at")]
    assert "line: south \\| dock" in weak, "a bar in a name must not break the table"
    shown = [b64decode(data) for data in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)]
    assert shown == [drawn["overview"], drawn["learning_curves"], drawn["explanation"]]
    assert len(text) < 400_000


def test_every_row_of_every_table_has_as_many_cells_as_its_head(outcome, drawn):
    tables = re.findall(r"(?:^\|.*\|$\n?)+", page(outcome, drawn, "http://mlflow/run"), re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().splitlines()}
        assert len(widths) == 1, table


def test_a_model_that_is_not_registered_says_why_and_knows_nothing_of_the_test_split(outcome):
    poor = replace(
        outcome, test=None, reasons=("validation accuracy 0.5 is below the minimum 0.7",), explanation="None."
    )
    text = page(poor, pictures(poor), "http://mlflow/run")
    assert "**Not registered:** validation accuracy 0.5" in text and "test (" not in text
    assert not any(name.startswith("test_") for name in summary_metrics(poor))
    assert as_dict(poor)["test"] is None and "Not registered" in note(poor)


def test_the_metrics_have_the_names_that_others_read(outcome):
    metrics = summary_metrics(outcome)
    for split in ("val", "test"):
        for name in ("accuracy", "auc", "average_precision", "brier", "calibration_error", "escape_upper", "threshold"):
            assert f"{split}_{name}" in metrics
    assert metrics["temperature"] == outcome.judged.calibration.temperature
    assert metrics["val_nll"] < metrics["val_nll_uncalibrated"]
    assert metrics["val_calibration_error"] < metrics["val_calibration_error_uncalibrated"]


def test_the_tables_in_mlflow_are_whole(outcome, drawn):
    stored = files(outcome, drawn)
    assert {path for path in stored if path.endswith(".png")} == {f"figures/{name}.png" for name in drawn}
    parts = list(csv.DictReader(io.StringIO(stored["tables/slices_test.csv"].decode())))
    assert len(parts) == len(outcome.test.slices) > 20
    classes = list(csv.DictReader(io.StringIO(stored["tables/classes_validation.csv"].decode())))
    assert [line["label"] for line in classes] == ["good", "worn"]


def test_evaluation_json_is_json_for_everybody_even_where_a_figure_is_nothing(outcome):
    no_defects = replace(
        outcome.judged.validation, evaluation=replace(outcome.judged.validation.evaluation, auc=np.nan)
    )
    stored = as_dict(replace(outcome, judged=replace(outcome.judged, validation=no_defects)))
    read = json.loads(json.dumps(stored, allow_nan=False))
    assert read["validation"]["auc"] is None
    assert read["calibration"]["temperature"] == outcome.judged.calibration.temperature
    assert {part["column"] for part in read["test"]["slices"]} >= {"label", "line", "brightness"}


def test_tensorboard_reads_the_series_of_every_epoch(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # a run that was killed after it writes them once more
        write_tensorboard(tmp_path / "tensorboard", TRAINED.epochs)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    loss = events.Scalars("val/Loss")
    assert [point.step for point in loss] == [1, 2, 3]
    assert [point.value for point in loss] == pytest.approx([1.1, 0.55, 1.1 / 3])
    assert loss[2].wall_time - loss[0].wall_time == pytest.approx(60, abs=0.1)
    assert {"learning_rate", "train/F1_Score", "val/Accuracy"} <= set(events.Tags()["scalars"])


def test_a_training_without_an_epoch_leaves_an_empty_log(tmp_path):
    write_tensorboard(tmp_path / "tensorboard", ())
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_shows_its_tables_and_all_its_pictures_in_a_browser(outcome, drawn, start_service, tmp_path):
    import httpx
    from playwright.sync_api import sync_playwright

    from deploy import services

    chromium = next((path for path in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(path).exists()), None)
    if chromium is None:
        pytest.skip("no Chromium is installed (apt install chromium)")
    running = start_service(services.prefect(tmp_path, services.free_ports(1)[0]), tmp_path / "prefect.log", 120)
    try:
        text = page(outcome, drawn, "http://mlflow/run")
        artifact = {"key": "training-tire", "type": "markdown", "data": text}
        made = httpx.post(f"{running.service.url}/api/artifacts/", json=artifact, timeout=30).json()["id"]
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            shown = browser.new_page(viewport={"width": 1400, "height": 1400})
            shown.goto(f"{running.service.url}/artifacts/artifact/{made}", timeout=60_000)
            shown.wait_for_selector("img[src^='data:image/png']", timeout=60_000)
            widths = shown.eval_on_selector_all("img[src^='data:image/png']", "all => all.map(one => one.naturalWidth)")
            cells = shown.eval_on_selector_all("table td", "all => all.map(one => one.innerText)")
            shown.screenshot(path=str(tmp_path / "training.png"), full_page=True)
            browser.close()
    finally:
        running.stop()
    assert len(widths) == 3 and min(widths) >= 300
    assert "line: south | dock" in cells and "balanced accuracy" in cells
