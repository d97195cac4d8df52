"""How many planted wrong labels stand among the first doubted ones, on real photographs.

    python -m benchmarks.label_noise [--photographs FOLDER] [--only SET ...]

Of each set 5 % of the labels are changed at random to another class (seeds 0, 1, 2); then all of them are judged as the flow
`labels` judges them by default. Found: the share of the changed ones within the most doubtful tenth of the set. Nothing is
tuned on the changed labels: the strength of the ridge is chosen by how well the given labels, wrong ones included, are
predicted.

FOLDER holds `tyre-condition`, `magnetic-tile`, `cifar10-jpg` and `mnist`; the solar cells come with the extra `demo`, the
digits with scikit-learn. What is absent is left out.
"""

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tasks.images import decode
from tasks.samples import processors
from tasks.sources import digit_folders, solar_cell_folders

SHARED: Final = Path(__file__).parents[2] / "shared" / "data"
SHARE: Final = 0.05  # of the labels are changed
FIRST: Final = 0.1  # of the set is looked at
SEEDS: Final = (0, 1, 2)
SIDE: Final = 160
FOLDS, ROUNDS = 5, 3  # the flow's defaults
MOST: Final = 3000  # photographs of one set
Paths = list[tuple[Path, str, str]]  # photograph, label, group


@dataclass(frozen=True)
class Embedded:
    """features float32 [N, 1280], labels int64 [N], groups int64 [N], and the names of the classes."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Planted:
    """found: share of the changed labels in the first tenth. suspects: of all photographs; caught: of the changed ones.

    renamed: share of the changed labels whose true class is the suggestion. agreement: labels that the judge would have given.
    """

    name: str
    photographs: int
    seed: int
    found: float
    suspects: float
    caught: float
    renamed: float
    agreement: float
    error_rate: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--photographs", type=Path, default=SHARED, help="the folder with the sets")
    parser.add_argument("--only", nargs="*", default=[], help="names of sets")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="tirewatch-noise-") as directory:
        for name, paths in real_sets(chosen.photographs, Path(directory)):
            if not chosen.only or name in chosen.only:
                each = embedded(paths)
                rows += [planted(name, each, seed) for seed in SEEDS]
    show(rows)
    versions = {name: version(name) for name in ("cleanlab", "scikit-learn", "torch")}
    settings = {"share": SHARE, "first": FIRST, "side": SIDE, "folds": FOLDS, "rounds": ROUNDS}
    print(json.dumps({"sets": [asdict(row) for row in rows], "settings": settings, "versions": versions}))


def real_sets(shared: Path, directory: Path) -> Iterator[tuple[str, Paths]]:
    """Name and photographs of each set that is there, at most MOST of each, drawn by a fixed seed."""
    made: dict[str, Callable[[], Paths]] = {"digits": lambda: in_folders(digit_folders(directory / "digits"), "*.png")}
    if find_spec("elpv_dataset") is not None:
        made["solar-cells"] = lambda: in_folders(solar_cell_folders(directory / "cells"), "*.png")
    if (shared / "tyre-condition").is_dir():
        made["tyre-condition"] = lambda: in_folders(shared / "tyre-condition", "*.*")
        made["magnetic-tile"] = lambda: tiles(shared / "magnetic-tile")
        made["mnist"] = lambda: in_folders(shared / "mnist" / "png", "*.png")
        made["cifar10-jpg"] = lambda: in_folders(shared / "cifar10-jpg" / "train", "*.jpg")
    for name, paths in made.items():
        found = paths()
        kept = np.random.default_rng(0).permutation(len(found))[:MOST]
        yield name, [found[number] for number in sorted(kept)]


def in_folders(folder: Path, pattern: str) -> Paths:
    """Photographs by the name of their folder, each a group of its own."""
    found = (path for path in sorted(folder.rglob(pattern)) if path.is_file() and path.suffix != ".md")
    return [(path, path.parent.name, str(path)) for path in found]


def tiles(folder: Path) -> Paths:
    """The magnetic tiles as free or defective; the six photographs of one tile are a group."""
    with (folder / "groups.csv").open(newline="") as table:
        groups = {row["path"]: row["group"] for row in csv.DictReader(table)}
    return [
        (path, "free" if path.parent.name == "MT_Free" else "defective", groups[path.relative_to(folder).as_posix()])
        for path in sorted(folder.rglob("*.jpg"))
    ]


def embedded(paths: Paths, side: int = SIDE) -> Embedded:
    """The photographs as EfficientNet-Lite0 with ImageNet weights sees them."""
    from tasks.model import build_model, image_network
    from tasks.training import predict

    network = image_network("efficientnet_lite0", build_model("efficientnet_lite0", 2, pretrained=True))
    parts = []
    with ThreadPoolExecutor(processors()) as pool:
        for start in range(0, len(paths), 256):
            some = pool.map(lambda each: decode(each[0].read_bytes(), side), paths[start : start + 256])
            parts.append(predict(network, np.stack(list(some)))["embedding"])
    classes, labels = np.unique([label for _, label, _ in paths], return_inverse=True)
    _, groups = np.unique([group for _, _, group in paths], return_inverse=True)
    return Embedded(np.concatenate(parts), labels.astype(np.int64), groups.astype(np.int64), tuple(classes.tolist()))


def planted(name: str, each: Embedded, seed: int) -> Planted:
    """Changes SHARE of the labels to another class, judges all, and counts the changed ones among the first."""
    from tasks.labels import by_features, opinion

    random, count = np.random.default_rng(seed), len(each.labels)
    wrong = random.choice(count, round(SHARE * count), replace=False)
    given = each.labels.copy()
    given[wrong] = (given[wrong] + random.integers(1, len(each.classes), len(wrong))) % len(each.classes)
    began = time.perf_counter()
    probabilities, _ = by_features(each.features, given, each.groups, len(each.classes), FOLDS, ROUNDS, seed)
    found = opinion(given, probabilities, each.classes)
    seconds = time.perf_counter() - began
    figures = {
        "found": np.isin(wrong, found.order[: round(FIRST * count)]).mean(),
        "suspects": found.suspect.mean(),
        "caught": found.suspect[wrong].mean(),
        "renamed": (found.suggested[wrong] == each.labels[wrong]).mean(),
        "agreement": found.agreement,
        "error_rate": found.error_rate,
    }
    told: dict[str, Any] = {key: round(float(value), 3) for key, value in figures.items()}
    return Planted(name, count, seed, seconds=round(seconds, 1), **told)


def show(rows: list[Planted]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in (
        "set",
        "photographs",
        "found in the first tenth (seeds 0, 1, 2)",
        "mean",
        "suspects",
        "caught",
        "renamed",
    ):
        table.add_column(column)
    for name in dict.fromkeys(row.name for row in rows):
        of = [row for row in rows if row.name == name]
        means = [np.mean([getattr(row, key) for row in of]) for key in ("found", "suspects", "caught", "renamed")]
        each = ", ".join(f"{row.found:.3f}" for row in of)
        table.add_row(name, str(of[0].photographs), each, f"{means[0]:.3f}", *(f"{value:.1%}" for value in means[1:]))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
