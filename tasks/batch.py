"""A batch as it lies in S3: which photographs, under which label, in which given split.

`incoming/<dataset>/<batch>/` holds images in class folders, optionally below `train/ val/ test/`; or images with an
`annotations.json`, which may also correct labels of photographs that the dataset holds. Reading the layout opens no photograph:
what is inside them is `tasks/checks.py`.
"""

import hashlib
import json
import posixpath
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from tasks.storage import Store, StoredObject, list_objects, read

INCOMING: Final = "incoming"
MARKER: Final = "_SUCCESS"
ANNOTATIONS: Final = "annotations.json"
SPLITS: Final = ("train", "val", "test")
SPLIT_FOLDERS: Final = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_NO_PHOTOGRAPH: Final = frozenset(
    (".csv", ".db", ".htm", ".html", ".ini", ".json", ".log", ".md", ".txt", ".xml", ".yaml", ".yml")
)
_MAX_TEXT: Final = 300  # characters of a label, group or line: they become folder names, table cells and metric names
# Line feeds and tabs would break the lines of the digest, and half of a surrogate pair has no UTF-8.
_UNSTORABLE: Final = {"Cc", "Cs", "Zl", "Zp"}
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_FORM: Final = '{"annotation": {"data": [{"FilePath": ..., "label_value": ...}]}}'
# The bridge, which imports nothing of ours, has the same two (bridge/sealing.py); tests/test_batch.py holds them equal.
DATASET_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")  # names a model too
BATCH_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class BatchRefused(ValueError):
    """The batch as a whole cannot become a dataset version; nothing was changed."""


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One photograph of a batch: `name` is its path below the batch's prefix, `size` its bytes. Small: see `Photograph`."""

    prefix: str
    name: str
    size: int
    label: str
    split: str | None = None
    group: str | None = None
    captured_at: datetime | None = None
    line: str | None = None

    @property
    def key(self) -> str:
        """Of the object on S3."""
        return self.prefix + self.name


@dataclass(frozen=True)
class Correction:
    """Another label for a stored photograph that the batch names by its sha256. `name` is the place in the annotations."""

    name: str
    sha256: str
    label: str


@dataclass(frozen=True)
class Finding:
    """One thing that was found about one file of a batch. `reason` is a key of `tasks.checks.RULES`."""

    reason: str
    name: str
    message: str
    sha256: str | None = None


@dataclass(frozen=True)
class Annotations:
    """What `annotations.json` says. corrects: its labels hold against those that the dataset has stored."""

    items: tuple[BatchItem, ...]
    findings: tuple[Finding, ...]
    corrects: bool = False
    corrections: tuple[Correction, ...] = ()


@dataclass(frozen=True)
class Batch:
    """The layout of one batch. `content` is a digest over names, sizes and etags: equal content, equal digest.

    corrects: its labels replace those that the dataset holds for the same bytes. corrections: for photographs that were
    not uploaded again.
    """

    dataset: str
    name: str
    prefix: str
    items: tuple[BatchItem, ...]
    findings: tuple[Finding, ...]
    content: str
    corrects: bool = False
    corrections: tuple[Correction, ...] = ()


def batch_of(dataset: str, prefix: str) -> str:
    """The batch's name in `incoming/<dataset>/<batch>/`. Raises ValueError for any other prefix, and for a name that the bridge
    would not announce.
    """
    if not DATASET_NAME.fullmatch(dataset):
        raise ValueError(f"dataset {dataset!r}: use 1 to 63 of a-z 0-9 _ - and begin with a letter or digit")
    parts = prefix.strip("/").split("/")
    if len(parts) != 3 or parts[:2] != [INCOMING, dataset] or not parts[2]:
        raise ValueError(f"prefix {prefix!r} is no batch of {dataset!r}: expected {INCOMING}/{dataset}/<batch>/")
    if not BATCH_NAME.fullmatch(parts[2]):
        raise ValueError(
            f"batch {parts[2]!r}: use 1 to 100 of A-Z a-z 0-9 . _ - and begin with a letter or digit, such as 2026-11-21"
        )
    return parts[2]


def read_batch(store: Store, dataset: str, prefix: str) -> Batch:
    """The batch below `prefix`. Raises BatchRefused when it holds no photograph or its annotations cannot be read."""
    name = batch_of(dataset, prefix)
    prefix = f"{INCOMING}/{dataset}/{name}/"
    files = _visible(prefix, list_objects(store, prefix))
    if ANNOTATIONS in files:
        said = from_annotations(read(store, prefix + ANNOTATIONS), files, store.uri(prefix), prefix)
    else:
        items, findings = from_folders(files)
        said = Annotations(tuple(items), tuple(findings))
    if not said.items and not said.corrections and all(each.reason == "ignored_file" for each in said.findings):
        raise BatchRefused(
            f"{store.uri(prefix)} holds no photograph ({len(files)} other files): upload images in class folders, or "
            f"images with {ANNOTATIONS}, and ingest again"
        )
    content = _content_digest(files)
    return Batch(dataset, name, prefix, said.items, said.findings, content, said.corrects, said.corrections)


def content_of(store: Store, dataset: str, prefix: str) -> str:
    """The digest that `read_batch` gives as `content`, from the listing alone."""
    prefix = f"{INCOMING}/{dataset}/{batch_of(dataset, prefix)}/"
    return content_digest(prefix, list_objects(store, prefix))


def content_digest(prefix: str, objects: Sequence[StoredObject]) -> str:
    """The same, for objects that have been listed."""
    return _content_digest(_visible(prefix, objects))


def _visible(prefix: str, objects: Sequence[StoredObject]) -> dict[str, StoredObject]:
    """Path below the prefix -> object, without hidden files, the marker and the empty objects some tools make of folders."""
    files = {each.key.removeprefix(prefix): each for each in objects if each.key.startswith(prefix)}
    folders = {name[:at] for name in files for at, letter in enumerate(name) if letter == "/"}
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


def is_no_photograph(name: str) -> bool:
    """Whether the extension is that of a table, text or the like, which may lie beside photographs."""
    return extension(name) in _NO_PHOTOGRAPH


def extension(name: str) -> str:
    """`.jpg` of `good/17.JPG`. Not by pathlib, which keeps every name it was asked about (CPython interns the parts)."""
    return posixpath.splitext(name)[1].lower()


def _ignored(name: str) -> Finding:
    return Finding("ignored_file", name, "the extension is no photograph's; the file was not looked at")


def from_folders(files: dict[str, StoredObject]) -> tuple[list[BatchItem], list[Finding]]:
    """Class folders, optionally below split folders. Deeper folders belong to the class folder above them."""
    items: list[BatchItem] = []
    findings: list[Finding] = []
    for name, each in sorted(files.items()):
        folders = name.split("/")[:-1]
        split = SPLIT_FOLDERS.get(folders[0].lower()) if folders else None
        below = folders[1:] if split else folders
        if is_no_photograph(name):
            findings.append(_ignored(name))
        elif not below:
            where = f"in the split folder {folders[0]!r} but in no class folder" if folders else "in no class folder"
            findings.append(Finding("no_label", name, f"the file lies {where}: its label is unknown"))
        elif wrong := _not_storable(below[0]):
            findings.append(Finding("no_label", name, f"the class folder's name {below[0]!r} {wrong}"))
        else:
            items.append(_item(name, each, below[0].strip(), split))
    return items, findings


def from_annotations(text: bytes, files: dict[str, StoredObject], *prefixes: str) -> Annotations:
    """`{"annotation": {"data": [{"FilePath", "label_value", ...}]}}`. A `FilePath` is below the batch, or a full key or URI
    that begins with one of `prefixes`. With `"corrects": true` beside `data`, labels may differ from those that the dataset
    has stored, and an entry may name a stored photograph by `sha256` instead.

    Raises BatchRefused when the document as a whole is not of this form.
    """
    entries, corrects = _document(text)
    claims: dict[str, list[BatchItem]] = {}
    corrections: list[Correction] = []
    findings: list[Finding] = []
    for position, entry in enumerate(entries):
        place = f"{ANNOTATIONS}#{position}"
        try:
            if "sha256" in entry:
                corrections.append(_correction(place, entry, corrects))
                continue
            name = _named(entry, prefixes)
        except ValueError as error:
            findings.append(Finding("bad_annotation", place, str(error)))
            continue
        if name not in files:
            # The finding's name becomes part of a key: only what could have been a file's may stand there.
            shown = place if _not_storable(name) or _strange_path(name) else name
            gone = f"{ANNOTATIONS} names a file that is not there: {name[:_MAX_TEXT]!r}"
            findings.append(Finding("annotation_without_file", shown, gone))
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
        findings.append(_ignored(name) if is_no_photograph(name) else missing)
    items.sort(key=lambda each: each.name)
    return Annotations(tuple(items), tuple(findings), corrects, tuple(corrections))


def _document(text: bytes) -> tuple[list[dict[str, Any]], bool]:
    """The entries, and whether they correct."""
    try:
        annotation = json.loads(text)["annotation"]
        entries, corrects = annotation["data"], annotation.get("corrects", False)
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise TypeError("annotation.data is not a list of objects")
        if not isinstance(corrects, bool):
            raise TypeError("annotation.corrects is neither true nor false")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BatchRefused(f"{ANNOTATIONS} is not of the form {_FORM}: {type(error).__name__}: {error}") from None
    return entries, corrects


def _correction(place: str, entry: dict[str, Any], corrects: bool) -> Correction:
    sha256 = entry["sha256"]
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError(f"sha256 is {_brief(sha256)}: expected the 64 hexadecimal digits of a stored photograph")
    if "FilePath" in entry:
        raise ValueError("FilePath and sha256 stand in one entry: name the photograph by one of them")
    if not corrects:
        raise ValueError('sha256 names a stored photograph: that needs "corrects": true beside "data"')
    return Correction(place, sha256, _label(entry))


def _named(entry: dict[str, Any], prefixes: Sequence[str]) -> str:
    path = entry.get("FilePath")
    if not isinstance(path, str) or not path:
        raise ValueError(f"FilePath is {_brief(path)}: expected the path of a file of this batch")
    for prefix in prefixes:
        path = path.removeprefix(prefix)
    return path.removeprefix("./").lstrip("/")


def _annotated(name: str, each: StoredObject, entry: dict[str, Any]) -> BatchItem:
    split = entry.get("split")
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is {_brief(split)}: expected one of {', '.join(SPLITS)}")
    label = _label(entry)
    captured = _text(entry, "captured_at")
    try:
        moment = datetime.fromisoformat(captured) if captured else None
        if moment is not None:
            moment = moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):  # the latter at both ends of the calendar
        raise ValueError(f"captured_at is {captured!r}: expected ISO 8601, such as 2026-03-01T12:00:00+00:00") from None
    return _item(name, each, label, split, _text(entry, "group"), moment, _text(entry, "line"))


def _item(name: str, each: StoredObject, label: str, *more: Any) -> BatchItem:
    return BatchItem(sys.intern(each.key.removesuffix(name)), name, each.size, sys.intern(label), *more)


def _label(entry: dict[str, Any]) -> str:
    label = _text(entry, "label_value")
    if label is None:
        raise ValueError("label_value is missing")
    return label


def _text(entry: dict[str, Any], field: str) -> str | None:
    value = entry.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError(f"{field} is {_brief(value)}: expected a text that is not empty")
    if wrong := _not_storable(str(value)):
        raise ValueError(f"{field} {_brief(value)} {wrong}")
    return str(value).strip()


def _not_storable(text: str) -> str | None:
    """What keeps the text from being stored in a table, a key and a line of the digest; None when nothing does."""
    if len(text) > _MAX_TEXT:
        return f"has {len(text)} characters: {_MAX_TEXT} are the most"
    if not text.strip():
        return "is blank"
    if any(unicodedata.category(each) in _UNSTORABLE for each in text):
        return "holds control characters"
    return None


def _strange_path(name: str) -> bool:
    return any(part in ("", ".", "..") for part in name.split("/"))


def _brief(value: object) -> str:
    """The value as it was written, cut: findings are shown to people."""
    try:
        shown = repr(value)
    except RecursionError:
        shown = f"a deeply nested {type(value).__name__}"
    return shown if len(shown) <= _MAX_TEXT else f"{shown[:_MAX_TEXT]}..."
