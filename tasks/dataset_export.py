"""A dataset version as a folder: class folders, and an `annotations.json` that ingests again to the same rows."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tasks.batch import ANNOTATIONS, SPLITS
from tasks.dataset import DatasetVersion, read_rows, readable_record
from tasks.storage import Store

PARTIAL: Final = ".partial"
_EXTENSIONS: Final = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tiff"}
_COLUMNS: Final = ("image", "sha256", "label", "group", "split", "format", "captured_at", "line")
_ROWS: Final = 64  # photographs in memory at a time, thrice
_PLAIN: Final = re.compile(r"[^\W_][\w .+-]{0,79}")


def export(
    store: Store,
    version: DatasetVersion,
    folder: Path,
    splits: Sequence[str] = SPLITS,
    split_folders: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Writes the photographs of the splits, unmodified, as `<split>/<class>/<sha256>.<ext>` below `folder`; their number.

    split_folders False: `<class>/<sha256>.<ext>`. progress: told how many are written. The folder appears whole: until then it
    is `<folder>.partial`, and what a killed export left there is replaced. Raises FileExistsError for a folder that is not
    empty, ValueError for an unknown split, LookupError for a version that was retired.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already and not empty: name a new folder, or empty this one")
    readable_record(store, version.name, version.version)
    if unknown := set(splits) - set(SPLITS):
        raise ValueError(f"unknown split {sorted(unknown)}: there are {', '.join(SPLITS)}")
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    written = 0
    with (partial / ANNOTATIONS).open("w", encoding="utf-8") as annotations:
        annotations.write('{"annotation": {"data": [')
        for row in _rows(store, version, splits):
            path = _path(row, split_folders)
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_bytes(row["image"])
            annotations.write(("," if written else "") + "\n" + json.dumps(_entry(row, path), ensure_ascii=False))
            written += 1
            progress(written)
        annotations.write("\n]}}\n")
    partial.replace(folder)  # over an empty folder too
    return written


def _rows(store: Store, version: DatasetVersion, splits: Sequence[str]) -> Iterator[dict[str, Any]]:
    for rows in read_rows(store, version, splits, _COLUMNS, _ROWS):
        for position in range(rows.num_rows):  # one photograph at a time as Python bytes
            yield rows.slice(position, 1).to_pylist()[0]


def _path(row: dict[str, Any], split_folders: bool) -> str:
    name = f"{folder_of(row['label'])}/{row['sha256']}{_EXTENSIONS[row['format']]}"
    return f"{row['split']}/{name}" if split_folders else name


def folder_of(label: str) -> str:
    """The label as a folder name: itself where it is a plain word, else what is plain of it and a short digest."""
    if _PLAIN.fullmatch(label) and label == label.rstrip(" ."):
        return label
    plain = re.sub(r"[^\w-]+", "-", label).strip("-_")[:60]
    return f"{plain or 'class'}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _entry(row: dict[str, Any], path: str) -> dict[str, str]:
    entry = {"FilePath": path, "label_value": row["label"], "split": row["split"]}
    if row["group"] != row["sha256"]:
        entry["group"] = row["group"]
    if row["captured_at"] is not None:
        entry["captured_at"] = row["captured_at"].isoformat()
    if row["line"] is not None:
        entry["line"] = row["line"]
    return entry
