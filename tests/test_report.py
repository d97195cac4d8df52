"""monitoring/report.py: the page reads right to a stranger, and its pictures show what they say."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from monitoring.calibration import Sample
from monitoring.causes import Cause
from monitoring.drift import DriftResult, Measure, compare
from monitoring.features import STATISTICS
from monitoring.report import MEANINGS, TILE, Subject, contact_sheet, distribution_plot, headline, page

SUBJECT = Subject("tire", 7, "tire v3", 1_790_000_000.0, 1_790_003_600.0)
CAMERA = Cause("camera", "All are shifted: darker (brightness x 0.60).", "Fix the camera, do not retrain: check lamps.")
MOVED = Measure("brightness", 0.82, 0.13, True, 0.512, 0.301)
STILL = Measure("sharpness", 0.05, 0.13, False, 412.3, 405.1)
EMBEDDING = Measure("embedding", 0.31, 0.11, True)
LABELS = Measure("labels", 0.04, 0.12, False, 0.25, 0.28)
DRIFTED = DriftResult("drifted", 300, 394, 0.01, (MOVED, STILL), EMBEDDING, (LABELS,), (CAMERA,))
QUIET = DriftResult("quiet", 300, 394, 0.01, (STILL,), Measure("embedding", 0.05, 0.11, False), (LABELS,))
FEW = DriftResult("insufficient", 12, 394, 0.01, reason="12 photographs were captured, 100 are needed.")


def sections(text: str) -> list[str]:
    return re.findall(r"^#+ (.*)$", text, re.MULTILINE)


def sample(seed: int, count: int = 120, shift: float = 0.0) -> Sample:
    rng = np.random.default_rng(seed)
    label = np.arange(count) % 2
    statistics = rng.normal(0.5, 0.1, (count, len(STATISTICS))).astype(np.float32)
    statistics[:, 0] += shift
    embedding = rng.normal(size=(count, 8)).astype(np.float32)
    return Sample(statistics, embedding, rng.random(count).astype(np.float32), label, ("good", "bad"), ("bad",), label)


def noise(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, TILE, TILE, 3), dtype=np.uint8)


def test_a_drifted_page_says_what_happened_what_to_do_and_how_sure_in_this_order() -> None:
    text = page(SUBJECT, DRIFTED, b"sheet", b"plot", "http://mlflow/#/x")
    assert sections(text) == [
        "Drift: the camera changed (tire version 7)",
        "What to do",
        "How sure",
        "What was compared",
        "Photographs",
        "Distributions",
    ]
    assert "newest 300 photographs" in text and "394 photographs that this version was validated on" in text
    assert "2026-09-21 14:13 to 2026-09-21 15:13 UTC" in text and "dataset tire v3" in text
    assert "1. Fix the camera, do not retrain" in text
    assert "2 of 4 distances" in text and "6.3 times its threshold" in text
    assert "about 1 comparison in 100" in text and "false-alarm rate 1.0%" in text
    assert "(http://mlflow/#/x)" in text


def test_the_table_has_the_farthest_first_with_medians_score_and_threshold() -> None:
    rows = [line for line in page(SUBJECT, DRIFTED, None, None, None).splitlines() if line.startswith("| ")][2:]
    assert [row.split(":")[0] for row in rows] == ["| brightness", "| embedding", "| sharpness", "| labels"]
    assert rows[0].endswith("| 0.512 | 0.301 | 0.820 | 0.130 | **moved** |")
    assert rows[2].endswith("| 412.3 | 405.1 | 0.050 | 0.130 | as before |")
    assert all(row.count("|") == 7 for row in rows)


def test_a_quiet_page_says_that_nothing_is_to_be_done() -> None:
    text = page(SUBJECT, QUIET, None, None, None)
    assert sections(text)[0] == "No drift (tire version 7)"
    assert "They look alike." in text and "## What to do\n\nNothing." in text
    assert "No distance is beyond its threshold; the greatest reaches 45% of it." in text


def test_a_page_without_verdict_has_the_reason_and_neither_figures_nor_pictures() -> None:
    text = page(SUBJECT, FEW, None, None, None)
    assert "12 photographs were captured, 100 are needed." in text
    assert "|" not in text and "data:image" not in text
    assert headline(SUBJECT, FEW) == "Too few photographs for a verdict (tire version 7)"


def test_every_distance_is_explained() -> None:
    result = compare(sample(0), sample(1), 0.01, 50)
    assert {each.name for each in result.measures} == set(MEANINGS)


def test_each_picture_is_a_block_of_its_own_that_decodes_and_together_they_stay_below_300_kb() -> None:
    """Photographs of noise are the worst case for PNG."""
    before, after = sample(0), sample(1, shift=0.3)
    sheet = contact_sheet([noise(1, 8), noise(2, 8)], [noise(3, 8), noise(4, 8)], ["most typical", "most unlike"])
    plot = distribution_plot(before, after, compare(before, after, 0.01, 50))
    assert len(sheet) + len(plot) < 300_000
    text = page(SUBJECT, DRIFTED, sheet, plot, None)
    blocks = [block for block in text.split("\n\n") if block.startswith("![")]
    assert len(blocks) == 2
    for block, png in zip(blocks, (sheet, plot), strict=True):
        data = base64.b64decode(re.fullmatch(r"!\[[^]]+\]\(data:image/png;base64,(.*)\)", block)[1])  # type: ignore[index]
        assert data == png
        Image.open(io.BytesIO(data)).verify()


def test_the_contact_sheet_has_training_on_the_left_and_production_on_the_right() -> None:
    red, blue = (np.full((8, TILE, TILE, 3), color, np.uint8) for color in ((200, 0, 0), (0, 0, 200)))
    sheet = Image.open(io.BytesIO(contact_sheet([red, red[:3]], [blue, blue[:5]], ["a", "b"]))).convert("RGB")
    pixels = np.asarray(sheet).astype(int)
    left, right = pixels[:, : sheet.width // 2], pixels[:, sheet.width // 2 :]
    tile = TILE * TILE
    for side, channel, other, tiles in ((left, 0, 2, 11), (right, 2, 0, 13)):
        assert ((side[..., channel] > 150) & (side[..., other] < 50)).sum() == tiles * tile
        assert ((side[..., other] > 150) & (side[..., channel] < 50)).sum() == 0


def test_the_distributions_are_those_that_moved_most() -> None:
    before, after = sample(0), sample(1, shift=0.3)
    result = compare(before, after, 0.01, 50)
    assert result.measures[0].name == "brightness"
    changed = distribution_plot(before, after, result)
    alike = distribution_plot(before, before, compare(before, before, 0.01, 50))
    width, height = Image.open(io.BytesIO(changed)).size
    assert (width, height) == Image.open(io.BytesIO(alike)).size and width > 2 * height
    assert changed != alike


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_statistic_that_is_the_same_everywhere_can_be_drawn(value: float) -> None:
    before = sample(0)
    before.statistics[:] = value
    assert distribution_plot(before, before, compare(before, before, 0.01, 50)).startswith(b"\x89PNG")
