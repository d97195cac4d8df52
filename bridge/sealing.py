"""Which objects make a batch complete: a marker at once, otherwise a quiet period. Pure."""

import re
from dataclasses import dataclass
from typing import Final
from uuid import NAMESPACE_URL, UUID, uuid5

from bridge.s3_events import ObjectCreated

MARKERS: Final = ("_SUCCESS", "annotations.json")
# What ingest accepts (tasks/batch.py has the same two): an announced batch can be ingested, any other is never announced.
DATASET_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
BATCH_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Batch:
    """One drop of photographs: `incoming/<dataset>/<batch>/`."""

    dataset: str
    name: str

    @property
    def prefix(self) -> str:
        return f"incoming/{self.dataset}/{self.name}/"


@dataclass(frozen=True)
class Ignored:
    """Why an object belongs to no batch. reason: one stable word for counting."""

    reason: str


def batch_of(created: ObjectCreated, bucket: str) -> Batch | Ignored:
    """The batch an object belongs to, or the reason why it belongs to none:
    other_bucket, not_incoming, bad_name, bad_path, folder.
    """
    if created.bucket != bucket:
        return Ignored("other_bucket")
    parts = created.key.split("/")
    if parts[0] != "incoming" or len(parts) < 4:
        return Ignored("not_incoming")
    _, dataset, batch, *rest = parts
    if not DATASET_NAME.fullmatch(dataset) or not BATCH_NAME.fullmatch(batch):
        return Ignored("bad_name")
    if rest[-1] == "":  # the empty object that consoles make for a folder
        return Ignored("folder")
    if any(part in ("", ".", "..") for part in rest) or "\\" in created.key or "\0" in created.key:
        return Ignored("bad_path")
    return Batch(dataset, batch)


def is_marker(created: ObjectCreated, batch: Batch) -> bool:
    """Whether this object seals its batch at once."""
    return created.key.removeprefix(batch.prefix) in MARKERS


def event_id(bucket: str, batch: Batch, marker: str) -> UUID:
    """The same batch sealed by the same marker is the same event, however often a store reports it."""
    return uuid5(NAMESPACE_URL, f"s3://{bucket}/{batch.prefix}#{marker}")


def sealed_event(batch: Batch, identity: UUID, occurred: str) -> dict[str, object]:
    """`tirewatch.batch.sealed` as the Prefect API takes it."""
    return {
        "id": str(identity),
        "occurred": occurred,
        "event": "tirewatch.batch.sealed",
        "resource": {
            "prefect.resource.id": f"tirewatch.dataset.{batch.dataset}",
            "prefect.resource.name": batch.dataset,
        },
        "related": [],
        "payload": {"dataset": batch.dataset, "batch": batch.name, "prefix": batch.prefix},
    }
