"""What ingest set aside: which files, why, and what has become of each since.

    quarantine/<dataset>/<batch>/<path below the batch>.json    one record for each file, written by ingest

The file itself stays where it was uploaded. What has become of it is never written down, it is looked up: a file whose bytes
the dataset holds by now is settled. How a file comes in again is `tasks/resubmission.py`.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final, Literal

from tasks.batch import ANNOTATIONS, INCOMING, BatchItem, BatchRefused, content_of, read_batch
from tasks.claims import batch_subject, read_verdict
from tasks.storage import Content, Store, StoredObject, list_folders, list_objects, read, read_many, write_many

if TYPE_CHECKING:
    from tasks.dataset import Record

PREFIX: Final = "quarantine"
_BY_PEOPLE: Final = ("resubmitted", "resubmitted_as", "resubmitted_sha256", "dismissed")  # fields of a record
_CONTRADICTIONS: Final = ("contradicts_dataset", "contradictory_labels")

State = Literal["waiting", "resubmitted", "settled"]


@dataclass(frozen=True)
class Quarantined:
    """One file that was not ingested. name: its path below the batch. at: when ingest said so.

    item: label, group and so on, as the batch has them now; None where it gives none. present: whether there is such a file.
    stored: the label under which the newest version holds its bytes. disputed: they were stored under another label when it
    was set aside. resubmitted: the batch that took it along, `_as` which label, with which digest. refused: why that was.
    """

    dataset: str
    batch: str
    name: str
    reason: str
    message: str
    sha256: str | None
    at: datetime | None
    resubmitted: str | None = None
    resubmitted_as: str | None = None
    resubmitted_sha256: str | None = None
    item: BatchItem | None = None
    present: bool = False
    stored: str | None = None
    disputed: bool = False
    refused: str | None = None

    @property
    def key(self) -> str:
        """Where the file lies."""
        return f"{INCOMING}/{self.dataset}/{self.batch}/{self.name}"

    @property
    def record_key(self) -> str:
        return f"{PREFIX}/{self.dataset}/{self.batch}/{self.name}.json"

    @property
    def label(self) -> str | None:
        return self.item.label if self.item else None

    @property
    def state(self) -> State:
        """settled: the dataset holds the photograph, as it should be. resubmitted: on its way in another batch."""
        if self.stored is not None and (not self.disputed or self.stored == (self.resubmitted_as or self.label)):
            return "settled"
        return "resubmitted" if self.resubmitted and not self.refused else "waiting"


def datasets(store: Store) -> list[str]:
    """Names of the datasets that have quarantined files."""
    return list_folders(store, PREFIX)


def quarantined(store: Store, dataset: str, batch: str | None = None) -> list[Quarantined]:
    """Every record of the dataset (or of one batch), by batch and name, with what has become of it.

    Raises LookupError naming what there is when the dataset is unknown or the batch has no record.
    """
    records = _records(store, dataset)
    if not records and dataset not in list_folders(store, INCOMING):
        known = ", ".join(list_folders(store, INCOMING)) or "none"
        raise LookupError(f"no batch of a dataset {dataset!r} was ever uploaded; there are: {known}")
    if batch is not None:
        counts = Counter(each.batch for each in records)
        records = [each for each in records if each.batch == batch]
        if not records:
            known = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())) or "none"
            raise LookupError(
                f"no file of {INCOMING}/{dataset}/{batch}/ is quarantined; batches with such files: {known}"
            )
    return _with_rows(
        store, dataset, [each for name in _batches(records) for each in _with_items(store, name, records)]
    )


def quarantined_file(store: Store, dataset: str, batch: str, name: str) -> Quarantined:
    """One of them. Raises LookupError naming those that are nearest."""
    records = {each.name: each for each in quarantined(store, dataset, batch)}
    if name not in records:
        near = get_close_matches(name, records, n=3, cutoff=0.3) or sorted(records)[:3]
        raise LookupError(
            f"{name!r} of the batch {batch!r} is not quarantined; {len(records)} files are, such as {', '.join(near)}"
        )
    return records[name]


def dismiss(store: Store, chosen: Sequence[Quarantined], now: datetime) -> None:
    """Takes the files off the list: somebody has looked, and they are not wanted. That stands in their records, so that the
    batch may be ingested again without asking once more. The files themselves stay where they are.
    """

    def dismissed(each: Quarantined) -> bytes:
        return json.dumps({**json.loads(read(store, each.record_key)), "dismissed": now.isoformat()}, indent=1).encode()

    write_many(store, ((each.record_key, dismissed(each)) for each in chosen))


def with_decisions(
    store: Store, records: Mapping[str, Mapping[str, Any]], before: Sequence[StoredObject]
) -> dict[str, dict[str, Any]]:
    """The records of a batch by their key, each with what people decided about the one `before` it: for the same reason and the
    same bytes; otherwise it is another finding.
    """

    def decisions(found: StoredObject, content: Content) -> tuple[str, dict[str, Any]]:
        told, now = json.loads(content.data), records[found.key]
        same = all(told.get(field) == now.get(field) for field in ("reason", "sha256"))
        return found.key, {field: told[field] for field in _BY_PEOPLE if same and field in told}

    kept = dict(read_many(store, [found for found in before if found.key in records], decisions))
    return {key: {**record, **kept.get(key, {})} for key, record in records.items()}


def _records(store: Store, dataset: str) -> list[Quarantined]:
    """Those that nobody dismissed."""

    def record(found: StoredObject, content: Content) -> Quarantined | None:
        told = json.loads(content.data)
        if told.get("dismissed"):
            return None
        said = {name: told.get(name) for name in ("reason", "message", "sha256")}
        sent = {name: told.get(name) for name in ("resubmitted", "resubmitted_as", "resubmitted_sha256")}
        return Quarantined(dataset, told["batch"], told["name"], at=found.modified, **said, **sent)

    found = list_objects(store, f"{PREFIX}/{dataset}/")
    waiting = [each for each in read_many(store, found, record) if each is not None]
    return sorted(waiting, key=lambda each: (each.batch, each.name))


def _batches(records: Sequence[Quarantined]) -> list[str]:
    return sorted({each.batch for each in records})


def _with_items(store: Store, batch: str, records: Sequence[Quarantined]) -> Iterator[Quarantined]:
    """The records of the batch with what its layout says about each file today."""
    some = [each for each in records if each.batch == batch]
    dataset = some[0].dataset
    prefix = f"{INCOMING}/{dataset}/{batch}/"
    files = {each.key.removeprefix(prefix) for each in list_objects(store, prefix)} - {ANNOTATIONS}
    try:
        layout = read_batch(store, dataset, prefix)
        items, corrects = {each.name: each for each in layout.items}, layout.corrects
    except BatchRefused:  # its annotations cannot be read any more, or its files are gone
        items, corrects = {}, False
    refusals = {name: _refusal(store, dataset, name) for name in {each.resubmitted for each in some} if name}
    for each in some:
        disputed = corrects or each.reason in _CONTRADICTIONS
        refused = refusals.get(each.resubmitted or "")
        yield replace(each, item=items.get(each.name), present=each.name in files, disputed=disputed, refused=refused)


def _refusal(store: Store, dataset: str, batch: str) -> str | None:
    """Why ingest refused the batch as a whole; None where it did not."""
    prefix = f"{INCOMING}/{dataset}/{batch}/"
    made = read_verdict(store, batch_subject(prefix, content_of(store, dataset, prefix)))
    return str(made.figures["reason"]) if made and made.outcome == "refused" else None


def _with_rows(store: Store, dataset: str, records: list[Quarantined]) -> list[Quarantined]:
    """The records with the label under which the newest version holds their bytes."""
    from tasks.dataset import newest_record

    digests = [each.resubmitted_sha256 or each.sha256 or "" for each in records]
    newest = newest_record(store, dataset) if records else None
    labels = _labels(store, newest, set(digests)) if newest else {}
    return [replace(each, stored=labels.get(digest)) for each, digest in zip(records, digests, strict=True)]


def _labels(store: Store, record: "Record", wanted: set[str]) -> dict[str, str]:
    import pyarrow as pa
    import pyarrow.compute as pc

    from tasks.dataset import open_rows

    index = open_rows(store, record).to_table(columns=["sha256", "label"])
    met = index.filter(pc.is_in(index["sha256"], pa.array(sorted(wanted), pa.string())))
    return dict(zip(met["sha256"].to_pylist(), met["label"].to_pylist(), strict=True))
