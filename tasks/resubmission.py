"""Quarantined files as a new batch: what must have been corrected before, and the copy within S3.

    incoming/<dataset>/resubmitted-<time>/0001-<file>, ..., annotations.json last: that seals the batch

The copies lie in no class folder, so a resubmission that was killed before its annotations is no batch anybody could ingest
by mistake: every file of it has no label.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, Final

from tasks.batch import ANNOTATIONS, INCOMING
from tasks.images import MAX_BYTES
from tasks.quarantine import Quarantined
from tasks.storage import CONCURRENCY, Store, copy, read, write, write_many

# Reasons that lie in the bytes themselves: the same bytes would be quarantined again.
DAMAGED: Final = (
    "empty",
    "not_an_image",
    "unsupported_format",
    "too_small",
    "too_large",
    "truncated",
    "too_many_bytes",
)


@dataclass(frozen=True)
class Wish:
    """How the files come in again. label: for all of them, instead of their own. corrects: their labels hold against those
    that the dataset has stored. new_classes: the run that ingests them will allow such. again: also what is on its way.
    """

    label: str | None = None
    corrects: bool = False
    new_classes: bool = False
    again: bool = False


@dataclass(frozen=True)
class Resubmitted:
    """The batch that was made, and how many files it has."""

    prefix: str
    files: int


def obstacle(store: Store, each: Quarantined, wish: Wish, classes: Sequence[str]) -> str | None:
    """Why the file cannot usefully come in again as wished, with what to do; None when nothing is in the way.

    classes: those of the dataset; empty where it has no version yet.
    """
    return next(_obstacles(store, each, wish, classes), None)


def _obstacles(store: Store, each: Quarantined, wish: Wish, classes: Sequence[str]) -> Iterator[str]:
    """The first is the one to mend first."""
    label = wish.label or each.label
    if not each.present:
        yield "there is no such file to send again: upload it in a batch"
    if each.state == "settled" or (each.stored is not None and each.stored == label):
        yield f"the dataset holds these bytes already, as {each.stored!r}"
    if each.state == "resubmitted" and not wish.again:
        yield f"it went into {each.resubmitted} already: look at that run, or say --again"
    if each.reason in DAMAGED and not _was_replaced(store, each):
        yield f"the bytes themselves are at fault ({each.reason}): replace {store.uri(each.key)} by a good file first"
    if each.reason == "twin_bridges_splits":
        yield "its twins stand in two splits, and rows never move: it cannot join both"
    if label is None:
        yield "its label is unknown: say --label"
    if classes and label not in classes and not wish.new_classes:
        yield f"{label!r} is not one of {', '.join(classes)}: say --label, or --new-classes when the class is meant"
    if each.stored is not None and not wish.corrects:
        yield f"the dataset holds these bytes as {each.stored!r}: say --corrects to make them {label!r} there"


def disagreeing(chosen: Sequence[Quarantined], wish: Wish) -> list[str]:
    """Names of chosen files that have the same bytes under several labels; none when one label is given for all."""
    labels: dict[str | None, set[str | None]] = defaultdict(set)
    for each in chosen:
        labels[each.sha256].add(wish.label or each.label)
    return [each.name for each in chosen if each.sha256 and len(labels[each.sha256]) > 1]


def resubmit(store: Store, chosen: Sequence[Quarantined], wish: Wish, now: datetime) -> Resubmitted:
    """Copies the files within S3 into a batch of their own, writes each record's note, and seals the batch last."""
    dataset, name = chosen[0].dataset, f"resubmitted-{now:%Y%m%d-%H%M%S-%f}"
    prefix = f"{INCOMING}/{dataset}/{name}/"
    names = [f"{number:04d}-{PurePosixPath(each.name).name}" for number, each in enumerate(chosen, 1)]
    with ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="s3") as pool:
        list(pool.map(lambda pair: copy(store, pair[0].key, prefix + pair[1]), zip(chosen, names, strict=True)))
    entries = [_entry(each, path, wish) for each, path in zip(chosen, names, strict=True)]
    annotation: dict[str, Any] = {"data": entries, **({"corrects": True} if wish.corrects else {})}
    _note(store, chosen, name, wish)
    write(store, prefix + ANNOTATIONS, json.dumps({"annotation": annotation}, indent=1).encode())
    return Resubmitted(prefix, len(entries))


def _entry(each: Quarantined, path: str, wish: Wish) -> dict[str, Any]:
    """What the batch said about the file, under the label that holds now, and where it comes from."""
    told: Mapping[str, Any] = {"resubmitted_from": each.key}
    if each.item is not None:
        moment = each.item.captured_at
        said = {"group": each.item.group, "line": each.item.line, "captured_at": moment.isoformat() if moment else None}
        # Whose given split was not that of its group joins the group now.
        split = None if each.reason == "bridges_splits" else each.item.split
        told = {**told, **said, "split": split}
    known = {field: value for field, value in told.items() if value is not None}
    return {"FilePath": path, "label_value": wish.label or each.label, **known}


def _note(store: Store, chosen: Sequence[Quarantined], batch: str, wish: Wish) -> None:
    """In each record, before the batch is sealed: nobody sends a file a second time without being told.

    The digest of what was sent finds it in the dataset: a file without a label was never read by ingest, and one that was
    damaged has other bytes now.
    """

    def noted(each: Quarantined) -> bytes:
        sent = each.sha256 if each.sha256 and each.reason not in DAMAGED else _digest(store, each)
        told = {"resubmitted": batch, "resubmitted_as": wish.label or each.label, "resubmitted_sha256": sent}
        return json.dumps({**json.loads(read(store, each.record_key)), **told}, indent=1).encode()

    write_many(store, ((each.record_key, noted(each)) for each in chosen))


def _was_replaced(store: Store, each: Quarantined) -> bool:
    """Whether other bytes lie there than those that were found bad."""
    if each.reason == "too_many_bytes":
        return each.item is not None and each.item.size <= MAX_BYTES
    return _digest(store, each) != each.sha256


def _digest(store: Store, each: Quarantined) -> str:
    return hashlib.sha256(read(store, each.key)).hexdigest()
