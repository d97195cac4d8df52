"""What the line should have decided by now and has not: the subjects whose events were lost.

Events are at-least-once at best: a store may fail to report an object, a server may be away, an automation may be missed.
What S3 and MLflow hold is the truth; comparing it with the verdicts finds what fell through.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from tasks.batch import ANNOTATIONS, BATCH_NAME, INCOMING, MARKER, content_digest
from tasks.claims import batch_subject, read_verdict, verdict_times, version_subject
from tasks.followers import Follower
from tasks.storage import Store, list_folders, list_objects

log = logging.getLogger(__name__)

BATCH_SEALED: Final = "tirewatch.batch.sealed"
VERSION_CREATED: Final = "tirewatch.dataset.version.created"
MODEL_REGISTERED: Final = "tirewatch.model.registered"


@dataclass(frozen=True)
class Lost:
    """An event to be sent again: nothing has come of it."""

    event: str
    resource: str
    what: str
    payload: Mapping[str, Any]
    occasion: str


def lost_batches(
    store: Store, followers: Sequence[Follower], now: datetime, grace: timedelta, quiet: timedelta, look_back: timedelta
) -> Iterator[Lost]:
    """Batches that are complete (marked, or unchanged for `quiet`) and have neither become a version nor been refused.

    Photographs are listed one batch at a time, and not at all for a batch that was decided longer than `look_back` ago: the
    history of a line grows, what a sweep reads does not.
    """
    from tasks.dataset import newest_record

    for follower in followers:
        record = newest_record(store, follower.name)
        ingested = {name: told["content"] for name, told in record.batches.items()} if record else {}
        for batch in _batches_to_look_at(store, follower.name, now, look_back):
            prefix = f"{INCOMING}/{follower.name}/{batch}/"
            objects = list_objects(store, prefix)
            age = now - max((each.modified or now for each in objects), default=now)
            names = {each.key.removeprefix(prefix) for each in objects}
            if age > look_back or age < (grace if names & {MARKER, ANNOTATIONS} else quiet):
                continue
            content = content_digest(prefix, objects)
            subject = batch_subject(prefix, content)
            if ingested.get(batch) == content or read_verdict(store, subject) or follower.is_at({"prefix": prefix}):
                continue
            payload = {"dataset": follower.name, "batch": batch, "prefix": prefix}
            yield Lost(BATCH_SEALED, follower.resource, f"batch {prefix} has not been ingested", payload, content)


def _batches_to_look_at(store: Store, dataset: str, now: datetime, look_back: timedelta) -> list[str]:
    """Names of the batches but for those whose last verdict is older than `look_back`."""
    decided: dict[str, datetime] = {}
    for batch, written in verdict_times(store, f"ingest/{dataset}"):
        decided[batch] = max(written, decided.get(batch, written))
    found = [
        batch for batch in list_folders(store, f"{INCOMING}/{dataset}/") if now - decided.get(batch, now) <= look_back
    ]
    for batch in found:
        if not BATCH_NAME.fullmatch(batch):
            log.warning("%s/%s/%r is never ingested: no batch can have this name", INCOMING, dataset, batch)
    return [batch for batch in found if BATCH_NAME.fullmatch(batch)]


def lost_versions(store: Store, followers: Sequence[Follower], now: datetime, grace: timedelta) -> Iterator[Lost]:
    """Newest dataset versions about which a deployment that follows them has not decided. Older ones are superseded."""
    from tasks.dataset import newest_record

    for follower in followers:
        record = newest_record(store, follower.name)
        if record is None or now - datetime.fromisoformat(record.created_at) < grace:
            continue
        version = record.version
        subject = version_subject(follower.stage, version.name, version.version)
        at = {"dataset": version.name, "dataset_version": version.version}
        if read_verdict(store, subject) is None and not follower.is_at(at):
            payload = {"dataset": version.name, "version": version.version, "digest": version.digest}
            what = f"{follower.stage} has not decided about {version.name} v{version.version}"
            yield Lost(VERSION_CREATED, follower.resource, what, payload, follower.stage)


def lost_registrations(
    store: Store, tracking_uri: str, followers: Sequence[Follower], now: datetime, grace: timedelta
) -> Iterator[Lost]:
    """Newest registered versions about which a deployment that follows them has not decided."""
    from tasks.registry import load_card, newest_registration

    for follower in followers:
        newest = newest_registration(tracking_uri, follower.name)
        if newest is None or now - newest.at < grace:
            continue
        subject = version_subject(follower.stage, follower.name, newest.version)
        at = {"model": follower.name, "version": newest.version}
        if read_verdict(store, subject) is None and not follower.is_at(at):
            _, card = load_card(tracking_uri, follower.name, newest.version)
            payload = {**at, "dataset": card.dataset, "dataset_version": card.dataset_version}
            what = f"{follower.stage} has not decided about {follower.name} v{newest.version}"
            yield Lost(MODEL_REGISTERED, follower.resource, what, payload, follower.stage)


def send_again(lost: Lost, sweep: str) -> None:
    """The event once more. `sweep` names the run that found it: Prefect drops an id that it saw in the last half hour, and
    the next sweep must not be dropped when nothing came of this one (a failed action of an automation is never repeated).
    """
    from tasks.events import emit

    emit(lost.event, lost.resource, lost.payload, occasion=f"sweep {sweep} {lost.occasion}")
