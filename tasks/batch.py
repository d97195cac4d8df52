"""A batch as it lies in S3: which photographs, under which label, in which given split.

`incoming/<dataset>/<batch>/` holds images in class folders, optionally below `train/ val/ test/`; or images with an
`annotations.json`. Reading the layout opens no photograph: what is inside them is `tasks/checks.py`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, Final

from tasks.storage import Store, StoredObject, list_objects, read

INCOMING: Final = "incoming"
MARKER: Final = "_SUCCESS"
ANNOTATIONS: Final = "annotations.json"
SPLITS: Final = ("train", "val", "test")
_SPLIT_FOLDERS: Final = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_NO_PHOTOGRAPH: Final = {
    ".csv",
    ".db",
    ".htm",
    ".html",
    ".ini",
    ".json",
    ".log",
    ".md",
    ".txt",
    ".xml",
    ".yaml",
    ".yml",
}
_FORM: Final = '{"annotation": {"data": [{"FilePath": ..., "label_value": ...}]}}'
_DATASET_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


class BatchRefused(ValueError):
    """The batch as a whole cannot become a dataset version; nothing was changed."""


@dataclass(frozen=True)
class BatchItem:
    """One photograph of a batch. `name` is its path below the batch's prefix."""

    name: str
    object: StoredObject
    label: str
    split: str | None = None
    group: str | None = None
    captured_at: datetime | None = None
    line: str | None = None


@dataclass(frozen=True)
class Finding:
    """One thing that was found about one file of a batch. `reason` is a key of `tasks.checks.RULES`."""

    reason: str
    name: str
    message: str
    sha256: str | None = None


@dataclass(frozen=True)
class Batch:
    """The layout of one batch. `content` is a digest over names, sizes and etags: equal content, equal digest."""

    dataset: str
    name: str
    prefix: str
    items: tuple[BatchItem, ...]
    findings: tuple[Finding, ...]
    content: str


def batch_of(dataset: str, prefix: str) -> str:
    """The batch's name in `incoming/<dataset>/<batch>/`. Raises ValueError for any other prefix."""
    if not _DATASET_NAME.fullmatch(dataset):
        raise ValueError(f"dataset {dataset!r}: use 1 to 63 of a-z 0-9 _ - and begin with a letter or digit")
    parts = prefix.strip("/").split("/")
    if len(parts) != 3 or parts[:2] != [INCOMING, dataset] or not parts[2]:
        raise ValueError(f"prefix {prefix!r} is no batch of {dataset!r}: expected {INCOMING}/{dataset}/<batch>/")
    return parts[2]


def read_batch(store: Store, dataset: str, prefix: str) -> Batch:
    """The batch below `prefix`. Raises BatchRefused when it holds no photograph or its annotations cannot be read."""
    name = batch_of(dataset, prefix)
    prefix = f"{INCOMING}/{dataset}/{name}/"
    files = _visible(prefix, list_objects(store, prefix))
    if ANNOTATIONS in files:
        items, findings = from_annotations(read(store, prefix + ANNOTATIONS), files, store.uri(prefix), prefix)
    else:
        items, findings = from_folders(files)
    if not items and all(each.reason == "ignored_file" for each in findings):
        raise BatchRefused(
            f"{store.uri(prefix)} holds no photograph ({len(files)} other files): upload images in class folders, or "
            f"images with {ANNOTATIONS}, and ingest again"
        )
    return Batch(dataset, name, prefix, tuple(items), tuple(findings), _content_digest(files))


def _visible(prefix: str, objects: Sequence[StoredObject]) -> dict[str, StoredObject]:
    """Path below the prefix -> object, without hidden files, the marker and the empty objects some tools make of folders."""
    files = {each.key.removeprefix(prefix): each for each in objects if each.key.startswith(prefix)}
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    return {
        name: each
        for name, each in files.items()
        if name != MARKER
        and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
        and not (each.size == 0 and name in folders)
    }


def _content_digest(files: dict[str, StoredObject]) -> str:
    lines = (f"{name}\t{each.size}\t{each.etag}\n" for name, each in sorted(files.items()))
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def _no_photograph(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _NO_PHOTOGRAPH


def _ignored(name: str) -> Finding:
    return Finding("ignored_file", name, "the extension is no photograph's; the file was not looked at")


def from_folders(files: dict[str, StoredObject]) -> tuple[list[BatchItem], list[Finding]]:
    """Class folders, optionally below split folders. Deeper folders belong to the class folder above them."""
    items: list[BatchItem] = []
    findings: list[Finding] = []
    for name, each in sorted(files.items()):
        folders = name.split("/")[:-1]
        split = _SPLIT_FOLDERS.get(folders[0].lower()) if folders else None
        below = folders[1:] if split else folders
        if _no_photograph(name):
            findings.append(_ignored(name))
        elif not below:
            where = f"in the split folder {folders[0]!r} but in no class folder" if folders else "in no class folder"
            findings.append(Finding("no_label", name, f"the file lies {where}: its label is unknown"))
        else:
            items.append(BatchItem(name, each, below[0], split))
    return items, findings


def from_annotations(
    text: bytes, files: dict[str, StoredObject], *prefixes: str
) -> tuple[list[BatchItem], list[Finding]]:
    """`{"annotation": {"data": [{"FilePath", "label_value", ...}]}}`. A `FilePath` is below the batch, or a full key or URI
    that begins with one of `prefixes`. Raises BatchRefused when the document as a whole is not of this form.
    """
    claims: dict[str, list[BatchItem]] = {}
    findings: list[Finding] = []
    for position, entry in enumerate(_entries(text)):
        try:
            name = _named(entry, prefixes)
        except ValueError as error:
            findings.append(Finding("bad_annotation", f"{ANNOTATIONS}#{position}", str(error)))
            continue
        if name not in files:
            findings.append(Finding("annotation_without_file", name, f"{ANNOTATIONS} names a file that is not there"))
            continue
        try:
            claims.setdefault(name, []).append(_annotated(name, files[name], entry))
        except ValueError as error:
            claims.setdefault(name, [])
            findings.append(Finding("bad_annotation", name, str(error)))
    items = [claim[0] for claim in claims.values() if len(set(claim)) == 1]
    for name, claim in claims.items():
        if len(set(claim)) > 1:
            labels = ", ".join(sorted({each.label for each in claim}))
            findings.append(Finding("contradictory_annotations", name, f"annotated {len(claim)} times, as {labels}"))
    for name in sorted(files.keys() - claims.keys() - {ANNOTATIONS}):
        missing = Finding("file_without_annotation", name, f"{ANNOTATIONS} does not name this file")
        findings.append(_ignored(name) if _no_photograph(name) else missing)
    return sorted(items, key=lambda each: each.name), findings


def _entries(text: bytes) -> Iterable[dict[str, Any]]:
    try:
        entries = json.loads(text)["annotation"]["data"]
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise TypeError("annotation.data is not a list of objects")
    except (ValueError, KeyError, TypeError) as error:
        raise BatchRefused(f"{ANNOTATIONS} is not of the form {_FORM}: {error!r}") from None
    return entries


def _named(entry: dict[str, Any], prefixes: Sequence[str]) -> str:
    path = entry.get("FilePath")
    if not isinstance(path, str) or not path:
        raise ValueError(f"FilePath is {path!r}: expected the path of a file of this batch")
    for prefix in prefixes:
        path = path.removeprefix(prefix)
    return path.removeprefix("./").lstrip("/")


def _annotated(name: str, each: StoredObject, entry: dict[str, Any]) -> BatchItem:
    split = entry.get("split")
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is {split!r}: expected one of {', '.join(SPLITS)}")
    label = _text(entry, "label_value")
    if label is None:
        raise ValueError("label_value is missing")
    captured = _text(entry, "captured_at")
    try:
        moment = datetime.fromisoformat(captured) if captured else None
    except ValueError:
        raise ValueError(f"captured_at is {captured!r}: expected ISO 8601, such as 2026-03-01T12:00:00+00:00") from None
    if moment is not None:
        moment = moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    return BatchItem(name, each, label, split, _text(entry, "group"), moment, _text(entry, "line"))


def _text(entry: dict[str, Any], field: str) -> str | None:
    value = entry.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError(f"{field} is {value!r}: expected a text that is not empty")
    return str(value).strip()
