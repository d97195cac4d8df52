"""The demo's photographs: solar cells from a package, digits from scikit-learn, or anyone's folder of class folders; a few
of them held back, so that the served model can be asked about pictures nobody uploaded.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from tasks.images import UnreadableImage, probe

HELD_BACK = 16
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Photographs:
    """folder: what is uploaded, a tree of links. held_back: (file, label) pairs that are not in it."""

    recipe: str
    folder: Path
    held_back: tuple[tuple[Path, str], ...]
    count: int
    classes: tuple[str, ...]
    notice: str = ""


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
    """Links all photographs of `source` below `workspace`, but for a few of each class, chosen by the hash of
    their name: the same few every time.
    """
    files = [(path, label) for path in sorted(source.rglob("*")) if (label := _label(path, source)) is not None]
    classes = tuple(sorted({label for _, label in files}))
    if len(classes) < 2:
        raise ValueError(
            f"{source} holds photographs of {len(classes)} class(es) {list(classes)}: at least two class folders"
        )
    keep_back = _held_back(files, classes, source)
    folder = workspace / "upload"
    shutil.rmtree(folder, ignore_errors=True)
    for path, _ in files:
        if path not in keep_back:
            link = folder / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    held = tuple((path, label) for path, label in files if path in keep_back)
    return Photographs(recipe, folder, held, len(files) - len(held), classes, notice)


def _label(path: Path, source: Path) -> str | None:
    parts = path.relative_to(source).parts
    if not path.is_file() or path.name.startswith((".", "_")) or len(parts) < 2:
        return None
    return path.parent.name if path.parent.name not in SPLITS else None


def _held_back(files: list[tuple[Path, str]], classes: tuple[str, ...], source: Path) -> set[Path]:
    chosen: set[Path] = set()
    each = max(1, HELD_BACK // len(classes))
    for label in classes:
        mine = sorted((path for path, own_label in files if own_label == label), key=lambda p: _rank(p, source))
        chosen |= set([path for path in mine[: 8 * each] if _readable(path)][: min(each, len(mine) // 10)])
    return chosen


def _rank(path: Path, source: Path) -> str:
    return hashlib.sha256(str(path.relative_to(source)).encode()).hexdigest()


def _readable(path: Path) -> bool:
    """The demo asks about pictures that are pictures; what ingest says of the others is its own story."""
    try:
        probe(path.read_bytes())
    except UnreadableImage:
        return False
    return True
