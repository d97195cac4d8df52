"""The demo's photographs: solar cells from a package, digits from scikit-learn, or anyone's folder of class folders.

They are divided by the hash of their names, the same way every time: a first batch, a second batch, what production will see,
and a few to ask about by name. What is in one part is in no other.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tasks.images import UnreadableImage, probe

HELD_BACK: Final = 16
TRAFFIC: Final = 300
TRAFFIC_SHARE: Final = 0.15  # at most, where there are few
SECOND_SHARE: Final = 0.25
SPLITS: Final = ("train", "val", "test")

Labelled = tuple[Path, str]


@dataclass(frozen=True)
class Photographs:
    """first, second: folders to upload, trees of links. held_back, traffic: (file, label) pairs that are in neither."""

    recipe: str
    first: Path
    second: Path
    held_back: tuple[Labelled, ...]
    traffic: tuple[Labelled, ...]
    classes: tuple[str, ...]
    notice: str = ""

    @property
    def counts(self) -> tuple[int, int]:
        """Photographs in the first and in the second batch."""
        first, second = (sum(path.is_file() for path in folder.rglob("*")) for folder in (self.first, self.second))
        return first, second


def solar_cells(workspace: Path) -> Photographs:
    """2,624 electroluminescence photographs of solar cells; raises RuntimeError when the extra is not installed."""
    from tasks.sources import SOLAR_CELLS_CITATION, SOLAR_CELLS_LICENCE, solar_cell_folders

    source = solar_cell_folders(workspace / "source")
    return divide("solar_cells", source, workspace, f"{SOLAR_CELLS_LICENCE}\n{SOLAR_CELLS_CITATION}")


def digits(workspace: Path) -> Photographs:
    """1,797 scans of handwritten digits, BSD licence."""
    from tasks.sources import digit_folders

    return divide("digits", digit_folders(workspace / "source"), workspace)


def own(folder: Path, workspace: Path) -> Photographs:
    """Somebody's class folders, optionally below train/ val/ test/. Raises ValueError naming what is wrong with it."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give a folder of class folders, DATA=<folder>")
    return divide("photographs", folder, workspace)


def divide(recipe: str, source: Path, workspace: Path, notice: str = "") -> Photographs:
    """Links the two batches below `workspace` and names the rest; every class is in every part, in the same share."""
    files = [(path, label) for path in sorted(source.rglob("*")) if (label := _label(path, source)) is not None]
    classes = tuple(sorted({label for _, label in files}))
    if len(classes) < 2:
        raise ValueError(
            f"{source} holds photographs of {len(classes)} class(es) {list(classes)}: at least two class folders are needed"
        )
    traffic_share = min(TRAFFIC_SHARE, TRAFFIC / len(files))
    parts: dict[str, list[Labelled]] = {"held_back": [], "traffic": [], "second": [], "first": []}
    for label in classes:
        mine = sorted((found for found in files if found[1] == label), key=lambda found: _rank(found[0], source))
        askable = [found for found in mine if _readable(found[0])]
        asked = max(1, HELD_BACK // len(classes)) if len(askable) >= 20 else 0
        seen = asked + round(traffic_share * len(mine))
        parts["held_back"] += askable[:asked]
        parts["traffic"] += askable[asked:seen]
        taken = set(askable[:seen])
        others = [found for found in mine if found not in taken]
        cut = round(SECOND_SHARE * len(others))
        parts["second"] += others[:cut]
        parts["first"] += others[cut:]
    return Photographs(
        recipe,
        _linked(parts["first"], source, workspace / "first"),
        _linked(parts["second"], source, workspace / "second"),
        tuple(parts["held_back"]),
        tuple(parts["traffic"]),
        classes,
        notice,
    )


def break_camera(photograph: bytes) -> bytes:
    """The same photograph from a camera that lost focus and light: 45 % of the exposure, blurred over 1/60 of the side."""
    import cv2
    import numpy as np

    from tasks.images import decode_full

    pixels = decode_full(photograph)
    sigma = max(1.0, min(pixels.shape[:2]) / 60)
    dark = cv2.GaussianBlur(pixels, (0, 0), sigma).astype(np.float32) * 0.45
    done, data = cv2.imencode(".jpg", dark.astype(np.uint8)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    if not done:
        raise ValueError(f"a photograph of {pixels.shape} could not be encoded as JPEG")
    return bytes(data)


def _linked(files: list[Labelled], source: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for path, _ in files:
        link = folder / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    return folder


def _label(path: Path, source: Path) -> str | None:
    parts = path.relative_to(source).parts
    if not path.is_file() or path.name.startswith((".", "_")) or len(parts) < 2:
        return None
    return path.parent.name if path.parent.name not in SPLITS else None


def _rank(path: Path, source: Path) -> str:
    return hashlib.sha256(str(path.relative_to(source)).encode()).hexdigest()


def _readable(path: Path) -> bool:
    """The demo asks about pictures that are pictures; what ingest says of the others is its own story."""
    try:
        probe(path.read_bytes())
    except UnreadableImage:
        return False
    return True
