"""ingest: a batch of photographs on S3 becomes the next version of its dataset, or is refused with reasons.

Makes a dataset version (Lance table on S3), a record for each quarantined file, a report with pictures on the run's page, and
the event `tirewatch.dataset.version.created`, which starts training. Needs the bucket and the Prefect server. By hand:

    prefect deployment run 'ingest/tire' -p prefix=incoming/tire/batch-1/

Running a batch again changes nothing and gives the same answer; a run that died half-way is made good by the next. A run that
an event started (it has an `occasion`) leaves a batch alone that was refused with this very content.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict, Field, model_validator

from flows.settings import settings
from tasks.storage import NETWORK_RETRY, Store
from tasks.twin_rule import TwinRule

if TYPE_CHECKING:
    from tasks.batch import Batch
    from tasks.checks import Plan
    from tasks.dataset import DatasetVersion, Record, RowWriter
    from tasks.examination import Examination, Spooled
    from tasks.ingest_report import Ingested

log = logging.getLogger(__name__)

_COMMIT_ATTEMPTS = 20  # rounds against other runs that ingest into the same dataset at the same time


class IngestOptions(BaseModel):
    """How strictly a batch is read and how its rows are split. The defaults suit a labelled batch of class folders."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_quarantined_share: float = Field(
        0.2, ge=0, le=1, description="Refuse the whole batch when a greater share of its files is bad"
    )
    new_classes: bool = Field(False, description="Accept classes that the dataset does not have yet")
    val_share: float = Field(0.15, ge=0, le=0.5, description="Share of the rows without a given split for validation")
    test_share: float = Field(0.15, ge=0, le=0.5, description="The same for the test split that only the gates read")
    twins: TwinRule = Field(
        TwinRule(), description="When two photographs count as one picture, which no two splits may share"
    )
    split_seed: int = Field(0, ge=0, lt=2**31, description="Another seed gives another random split of new rows")

    @model_validator(mode="after")
    def _something_to_train_on(self) -> "IngestOptions":
        if self.val_share + self.test_share > 0.8:
            raise ValueError(
                f"val_share {self.val_share} and test_share {self.test_share} leave less than 0.2 to train on"
            )
        return self


@flow(name="ingest", flow_run_name="ingest {prefix}")
def ingest(
    dataset: str, prefix: str, options: IngestOptions = IngestOptions(), occasion: str | None = None
) -> "State[Ingested | None]":
    """Read the batch, check every photograph, write the next dataset version, say so.

    Args:
        dataset: Name of the dataset, as in `incoming/<dataset>/`.
        prefix: Where the batch lies: `incoming/<dataset>/<batch>/`.
        options: How strictly the batch is read and how its rows are split.
        occasion: The event that started this run. Empty by hand: then a batch that was refused is looked at again.
    """
    store = settings().store
    with refusals_kept(store, dataset, prefix):
        batch = find_batch(store, dataset, prefix)
        result = already_ingested(store, batch, options)
        if result is None:
            if occasion and (why := reason_to_wait(store, batch)):
                return Completed(name="Unchanged", message=why)
            with examined(store, batch, settings().ray_address) as (examination, write):
                result = commit(store, batch, examination, options, write)
                show(result, examination)
    announce(store, result.version)
    decided(store, batch.prefix, batch.content, "ingested", {"version": result.version.version})
    return final_state(result)


@contextmanager
def examined(store: Store, batch: "Batch", ray_address: str | None) -> "Iterator[tuple[Examination, RowWriter]]":
    """Every photograph read and decoded, and what writes those that are taken: threads of this process with a spool on local
    disk, or the workers of a Ray cluster.
    """
    if ray_address:
        from flows.fan_out import examined_on, ray_cluster, writer_on

        with ray_cluster(ray_address) as cluster:
            yield examined_on(cluster, store, batch), writer_on(cluster, store, batch)
        return
    from tasks.dataset import writer

    with (
        TemporaryDirectory(prefix="tirewatch-ingest-") as spool,
        examine_photographs(store, batch, Path(spool)) as examination,
    ):
        yield examination, writer(store, batch, examination)


@contextmanager
def refusals_kept(store: Store, dataset: str, prefix: str) -> Iterator[None]:
    """Writes down that the batch was refused with this content; the refusal itself goes on and fails the run."""
    from tasks.batch import BatchRefused, content_of

    try:
        yield
    except BatchRefused as refusal:
        decided(store, prefix, content_of(store, dataset, prefix), "refused", {"reason": str(refusal)})
        raise


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def reason_to_wait(store: Store, batch: "Batch") -> str | None:
    """Why the batch must not be ingested now: it was refused with this content, or another run is at it."""
    from tasks.claims import batch_subject, claim, read_verdict
    from tasks.runs import is_alive, this_run

    subject = batch_subject(batch.prefix, batch.content)
    made = read_verdict(store, subject)
    if made and made.outcome == "refused":
        return f"{batch.prefix} was refused with this very content by run {made.run}: {made.figures['reason']}"
    if not claim(store, subject, this_run(), is_alive):
        return f"another run is ingesting {batch.prefix}"
    return None


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def decided(store: Store, prefix: str, content: str, outcome: str, figures: Mapping[str, Any]) -> None:
    """Writes down what became of the batch: repeated events and `sweep` read it."""
    from tasks.claims import Verdict, batch_subject, write_verdict
    from tasks.runs import this_run

    write_verdict(store, batch_subject(prefix, content), Verdict(outcome, this_run(), figures=dict(figures)))


def final_state(result: "Ingested") -> "State[Ingested | None]":
    """The state tells a run that changed something from one that did not; triggers and people read its name."""
    where = f"{result.version.name} v{result.version.version}"
    if not result.created:
        return Completed(name="Unchanged", message=f"{where} holds all of {result.batch} already", data=result)
    bad = f", {result.quarantined} files quarantined" if result.quarantined else ""
    corrected = f", {sum(result.relabelled.values())} labels corrected" if result.relabelled else ""
    return Completed(
        message=f"{where}: {result.new_rows} new photographs from {result.batch}{corrected}{bad}", data=result
    )


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def find_batch(store: Store, dataset: str, prefix: str) -> "Batch":
    """The batch's layout: every file with its label and given split."""
    from tasks.batch import read_batch

    return read_batch(store, dataset, prefix)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def already_ingested(store: Store, batch: "Batch", options: IngestOptions) -> "Ingested | None":
    """What this very batch, with this content, became in an earlier run; None where there was none."""
    from tasks.dataset import record_of_batch
    from tasks.ingest_report import ingested

    record = record_of_batch(store, batch, options.new_classes)
    return ingested(batch.name, record.version, created=False, report=record.report) if record else None


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False)
def examine_photographs(store: Store, batch: "Batch", spool: Path) -> "Spooled":
    """Reads and decodes every photograph once; the bytes stay in the spool until they are committed."""
    from tasks.examination import examine

    return examine(store, batch, spool / "photographs")


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def commit(
    store: Store, batch: "Batch", examination: "Examination", options: IngestOptions, write: "RowWriter"
) -> "Ingested":
    """Decides on every file, records what is quarantined and writes the next version, after whoever else writes one."""
    os.environ.setdefault("LANCE_UPLOAD_CONCURRENCY", "2")  # ten, the default, hold 100 MB more and are no faster
    from tasks.checks import plan, refuse_if_too_bad
    from tasks.dataset import append, known_rows, newest_record, record_of_batch
    from tasks.ingest_report import ingested, report_of
    from tasks.memory import give_back
    from tasks.split import SplitRule
    from tasks.twins import find_twins

    rule = SplitRule(options.val_share, options.test_share, options.split_seed)
    for _ in range(_COMMIT_ATTEMPTS):
        if made := record_of_batch(store, batch, options.new_classes):  # by the try before this one
            return ingested(batch.name, made.version, created=True, report=made.report)
        base = newest_record(store, batch.dataset)
        known = known_rows(store, base, examination.photographs, batch.corrections)
        twins = find_twins(store, base, examination, options.twins)
        planned = plan(batch, examination, known, rule, options.new_classes, twins)
        refuse_if_too_bad(batch, planned, options.max_quarantined_share)
        give_back()
        quarantine(store, batch, planned)  # before the version: a run killed in between is not asked again
        report = report_of(batch, planned, known)
        changed = bool(planned.rows or planned.relabelled)
        record = append(store, base, batch, planned, write, report) if changed else _nothing_new(batch, base)
        if record is not None:
            return ingested(batch.name, record.version, created=changed, report=report)
        log.info("another run made a version of %s meanwhile; deciding again upon it", batch.dataset)
    raise RuntimeError(
        f"{_COMMIT_ATTEMPTS} rounds against other runs into {batch.dataset!r} were lost: run this batch again"
    )


def _nothing_new(batch: "Batch", base: "Record | None") -> "Record":
    from tasks.batch import BatchRefused

    if base is None:
        raise BatchRefused(f"not one photograph of {batch.prefix} can be used: nothing to begin {batch.dataset!r} with")
    return base


def quarantine(store: Store, batch: "Batch", planned: "Plan") -> None:
    """One record for each quarantined file, and none for files that are good by now; what people decided about one that was set
    aside before, for the same reason and with the same bytes, stays in it. The files stay where they are.
    """
    from tasks.quarantine import with_decisions
    from tasks.storage import delete, list_objects, write_many

    folder = f"quarantine/{batch.dataset}/{batch.name}/"
    records = {
        f"{folder}{each.name}.json": {**asdict(each), "key": batch.prefix + each.name, "batch": batch.name}
        for each in planned.quarantined
    }
    before = list_objects(store, folder)
    decided = with_decisions(store, records, before)
    write_many(store, ((key, json.dumps(record, indent=1).encode()) for key, record in decided.items()))
    delete(store, [found.key for found in before if found.key not in records])


def show(result: "Ingested", examination: "Examination") -> None:
    """The report and the table of checks on the run's page."""
    from prefect.artifacts import create_markdown_artifact, create_table_artifact

    from tasks.ingest_report import as_markdown, checks_table

    name, described = (
        result.version.name.replace("_", "-"),
        f"{result.batch} -> {result.version.name} v{result.version.version}",
    )
    create_markdown_artifact(as_markdown(result, examination), key=f"ingest-{name}", description=described)
    create_table_artifact(checks_table(result), key=f"checks-{name}", description=described)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def announce(store: Store, version: "DatasetVersion") -> None:
    """The event that starts training, once for each version: the note that it was sent is written after it."""
    from tasks.events import emit
    from tasks.storage import exists, write

    note = f"datasets/{version.name}/announced/{version.version:08d}"
    if exists(store, note):
        return
    emit(
        "tirewatch.dataset.version.created",
        f"tirewatch.dataset.{version.name}",
        {"dataset": version.name, "version": version.version, "digest": version.digest},
    )
    write(store, note, b"")
