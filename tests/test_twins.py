"""tasks/twins.py with a real dataset on S3: near-duplicates share a group and never stand in two splits."""

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from tasks.batch import read_batch
from tasks.checks import Known, Plan, plan
from tasks.dataset import Record, append, known_rows, newest_record, open_rows, writer
from tasks.examination import examine
from tasks.sources import upload_folder
from tasks.split import SplitRule
from tasks.storage import Store, write_many
from tasks.twin_rule import TwinRule
from tasks.twins import find_twins

RULE = TwinRule()
Picture = Callable[[int], np.ndarray]


@pytest.fixture(scope="module")
def picture() -> Picture:
    """`picture(seed)`: a scene of its own, 160x120, rich enough to be recognised."""

    def drawn(seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        canvas = cv2.resize(random.integers(40, 200, (6, 8, 3), np.uint8), (160, 120), interpolation=cv2.INTER_CUBIC)
        for _ in range(25):
            centre, axes = random.integers(0, 120, 2).tolist(), random.integers(4, 25, 2).tolist()
            colour = random.integers(0, 256, 3).tolist()
            cv2.ellipse(canvas, centre, axes, float(random.integers(180)), 0, 360, colour, -1)
        return canvas

    return drawn


def jpeg(pixels: np.ndarray, quality: int = 92) -> bytes:
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def brighter(pixels: np.ndarray) -> bytes:
    return jpeg(cv2.convertScaleAbs(pixels, alpha=1.1, beta=8), 70)


def ingested(store: Store, dataset: str, name: str, files: dict[str, bytes], tmp_path: Path) -> tuple[Plan, Record]:
    """A batch planned and committed as the flow does it."""
    prefix = f"incoming/{dataset}/{name}/"
    write_many(store, ((prefix + file, data) for file, data in files.items()))
    batch, base = read_batch(store, dataset, prefix), newest_record(store, dataset)
    with examine(store, batch, tmp_path / name) as examination:
        twins = find_twins(store, base, examination, RULE)
        planned = plan(batch, examination, known_rows(store, base, examination.photographs), SplitRule(), twins=twins)
        record = append(store, base, batch, planned, writer(store, batch, examination), {}) if planned.rows else base
    assert record is not None
    return planned, record


def where(store: Store, record: Record) -> dict[str, tuple[str, str]]:
    """File -> (split, group) of every row."""
    rows = open_rows(store, record).to_table(columns=["source_key", "split", "group"]).to_pylist()
    return {row["source_key"].split("/", 3)[3]: (row["split"], row["group"]) for row in rows}


def test_twins_in_one_batch_share_group_and_split(store: Store, tmp_path: Path, picture: Picture) -> None:
    files = {f"good/{seed}.jpg": jpeg(picture(seed)) for seed in range(40)}
    files |= {f"good/{seed} again.jpg": brighter(picture(seed)) for seed in range(0, 40, 2)}
    planned, record = ingested(store, "twins-one", "b1", files, tmp_path)
    placed = where(store, record)
    assert len(placed) == 60
    for seed in range(0, 40, 2):
        assert placed[f"good/{seed}.jpg"] == placed[f"good/{seed} again.jpg"]
    assert len({group for _, group in placed.values()}) == 40, "different pictures stay apart"
    assert Counter(each.reason for each in planned.findings)["near_duplicate"] == 40


def test_a_newcomer_joins_the_split_of_its_twin_in_the_dataset(store: Store, tmp_path: Path, picture: Picture) -> None:
    ingested(store, "twins-later", "b1", {f"good/{seed}.jpg": jpeg(picture(seed)) for seed in range(40)}, tmp_path)
    files = {f"good/late {seed}.jpg": brighter(picture(seed)) for seed in range(60)}
    planned, record = ingested(store, "twins-later", "b2", files, tmp_path)
    placed = where(store, record)
    assert {placed[f"good/{seed}.jpg"][0] for seed in range(40)} == {"train", "val", "test"}
    for seed in range(40):
        assert placed[f"good/late {seed}.jpg"] == placed[f"good/{seed}.jpg"]
    told = [each.message for each in planned.findings if each.reason == "near_duplicate"]
    assert len(told) == 40 and all("in the dataset" in message for message in told)


def test_given_train_twins_of_test_photographs_are_dropped_and_counted(
    store: Store, tmp_path: Path, picture: Picture
) -> None:
    files = {f"train/good/{seed}.jpg": jpeg(picture(seed)) for seed in range(20)}
    files |= {f"val/good/{seed}.jpg": jpeg(picture(seed)) for seed in range(100, 110)}
    files |= {f"test/good/{seed}.jpg": brighter(picture(seed)) for seed in range(5)}
    planned, record = ingested(store, "twins-given", "b1", files, tmp_path)
    dropped = {each.name for each in planned.findings if each.reason == "twin_across_splits"}
    assert dropped == {f"train/good/{seed}.jpg" for seed in range(5)}
    assert Counter(split for split, _ in where(store, record).values()) == {"train": 15, "val": 10, "test": 5}


def test_a_newcomer_that_is_a_twin_of_rows_in_two_splits_is_quarantined(
    store: Store, tmp_path: Path, picture: Picture
) -> None:
    """Rows of before there was this check may stand so; nothing may make it worse."""
    prefix = "incoming/twins-bridge/b1/"
    files = {"train/good/a.jpg": jpeg(picture(1)), "test/good/b.jpg": brighter(picture(1))}
    files |= {f"val/good/{seed}.jpg": jpeg(picture(seed)) for seed in range(50, 60)}
    write_many(store, ((prefix + name, data) for name, data in files.items()))
    batch = read_batch(store, "twins-bridge", prefix)
    with examine(store, batch, tmp_path / "before") as examination:
        planned = plan(batch, examination, Known(), SplitRule())
        append(store, None, batch, planned, writer(store, batch, examination), {})
    newcomer = {"good/c.jpg": jpeg(picture(1), 60), "good/other.jpg": jpeg(picture(7))}
    planned, record = ingested(store, "twins-bridge", "b2", newcomer, tmp_path)
    [found] = planned.quarantined
    assert (found.reason, found.name) == ("twin_bridges_splits", "good/c.jpg")
    assert "train" in found.message and "test" in found.message
    assert "good/c.jpg" not in where(store, record) and "good/other.jpg" in where(store, record)


def test_twins_under_two_labels_are_told_apart_from_harmless_ones(
    store: Store, tmp_path: Path, picture: Picture
) -> None:
    files = {"good/1.jpg": jpeg(picture(1)), "worn/1 again.jpg": brighter(picture(1)), "worn/2.jpg": jpeg(picture(2))}
    planned, _ = ingested(store, "twins-disagree", "b1", files, tmp_path)
    told = {each.name: each.message for each in planned.findings if each.reason == "twins_disagree"}
    assert set(told) == {"good/1.jpg", "worn/1 again.jpg"}
    assert "labelled 'worn' and not 'good'" in told["good/1.jpg"]


def test_switched_off_nothing_is_compared(store: Store, tmp_path: Path, picture: Picture) -> None:
    prefix = "incoming/twins-off/b1/"
    write_many(store, [(f"{prefix}good/1.jpg", jpeg(picture(1))), (f"{prefix}good/2.jpg", brighter(picture(1)))])
    with examine(store, read_batch(store, "twins-off", prefix), tmp_path / "off") as examination:
        assert find_twins(store, None, examination, TwinRule(hash_distance=0)).groups == {}
        assert len(find_twins(store, None, examination, RULE).groups) == 2


@pytest.mark.shared_data
def test_no_twin_of_real_tire_photographs_stands_in_two_splits(store: Store, shared_data: Path, tmp_path: Path) -> None:
    prefix = upload_folder(store, shared_data / "tyre-condition", "tyre-twins", "all")
    batch = read_batch(store, "tyre-twins", prefix)
    with examine(store, batch, tmp_path / "tyres") as examination:
        twins = find_twins(store, None, examination, RULE)
        planned = plan(batch, examination, Known(), SplitRule(), twins=twins)
    counts = Counter(each.reason for each in planned.findings)
    exact = (counts["contradictory_labels"], counts["duplicate"], counts["wrong_extension"])
    assert exact == (6, 2, 156)
    assert counts["twin_across_splits"] >= 1 and counts["near_duplicate"] > 0
    splits = defaultdict(set)
    for photograph, split in planned.rows:
        splits[twins.groups.get(photograph.sha256, photograph.sha256)].add(split)
    assert all(len(some) == 1 for some in splits.values())


@pytest.mark.shared_data
def test_photographs_of_one_magnetic_tile_stay_together_when_the_groups_are_given(
    store: Store, shared_data: Path, tmp_path: Path
) -> None:
    """Six exposures of one tile in two splits would teach the tile and not the defect."""
    tiles = shared_data / "magnetic-tile"
    with (tiles / "groups.csv").open(newline="") as table:
        told = list(csv.DictReader(table))
    entries = [{"FilePath": row["path"], "label_value": row["class"], "group": f"tile-{row['group']}"} for row in told]
    prefix = "incoming/magnetic/all/"
    files: list[tuple[str, bytes | Path]] = [(prefix + row["path"], tiles / row["path"]) for row in told]
    write_many(store, [*files, (f"{prefix}annotations.json", json.dumps({"annotation": {"data": entries}}).encode())])
    batch = read_batch(store, "magnetic", prefix)
    with examine(store, batch, tmp_path / "tiles") as examination:
        twins = find_twins(store, None, examination, RULE)
        planned = plan(batch, examination, Known(), SplitRule(), twins=twins)
    splits, counts = defaultdict(set), Counter(split for _, split in planned.rows)
    for photograph, split in planned.rows:
        splits[photograph.item.group].add(split)
    assert len(splits) > 200 and all(len(some) == 1 for some in splits.values())
    assert len(planned.rows) > 0.97 * len(told)
    for split in ("val", "test"):
        assert counts[split] / len(planned.rows) == pytest.approx(0.15, abs=0.02)
