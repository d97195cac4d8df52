"""Dataset versions: a Lance table on S3, and beside it one small immutable record for each version.

    datasets/<name>.lance               the rows (tasks/dataset_rows.py); Lance's own versions are internal
    datasets/<name>/versions/<n>.json   version n: which Lance version holds it, digest, classes, splits, batches, summary

Write, then reveal: the rows are committed to Lance first, where nobody looks, and become version n by the conditional write of
record n. A run killed before that leaves rows that no version holds; two runs at once cannot both write record n, and the
second builds anew upon the first. A record never changes, but for the day its version was retired (tasks/retention.py).
"""

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from tasks.batch import SPLITS, Batch, Correction
from tasks.checks import Known, Plan
from tasks.dataset_rows import SCHEMA, commit_rows, new_rows, open_table, relabelled_rows, table_uri, write_rows
from tasks.examination import Examination, Photograph
from tasks.storage import Store, list_folders, list_objects, read, write_if_absent
from tasks.summary import Summary, summarised, summary_from

if TYPE_CHECKING:
    import lance
    from lance.fragment import FragmentMetadata

    RowWriter = Callable[[Sequence[tuple[Photograph, str]]], Sequence[FragmentMetadata]]

_READ_AHEAD: Final = 3  # Arrow batches in memory on the way out


@dataclass(frozen=True)
class DatasetVersion:
    """One immutable version. `splits` counts the rows of train, val and test; `digest` is `sha256:<hex>` over the rows."""

    name: str
    version: int
    digest: str
    uri: str
    classes: tuple[str, ...]
    splits: dict[str, int]


@dataclass(frozen=True)
class Record:
    """What is written down about a version beside its rows.

    batches: batch name -> {"content": digest of its layout, "new_classes": allowed or not, "version": what it became}.
    report: what the run that made the version said about it. writer: tells two runs apart that write the same record.
    summary: None in records of before there were summaries; `summary_of` computes it then. retired_at: since when the rows are
    gone (ISO 8601, UTC).
    """

    version: DatasetVersion
    lance_version: int
    carved: tuple[str, ...]
    batches: dict[str, dict[str, Any]]
    report: dict[str, Any]
    created_at: str
    writer: str = field(default_factory=lambda: uuid.uuid4().hex)
    summary: Summary | None = None
    retired_at: str | None = None

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


def dataset_names(store: Store) -> list[str]:
    """Names of the datasets that have at least one version, sorted."""
    folders = [folder for folder in list_folders(store, "datasets/") if not folder.endswith(".lance")]
    return [name for name in folders if version_numbers(store, name)]


def _versions_prefix(name: str) -> str:
    return f"datasets/{name}/versions/"


def record_key(name: str, version: int) -> str:
    return f"{_versions_prefix(name)}{version:08d}.json"


def version_numbers(store: Store, name: str) -> list[int]:
    """Numbers of the versions that exist, ascending."""
    prefix = _versions_prefix(name)
    return [int(found.key.removeprefix(prefix).removesuffix(".json")) for found in list_objects(store, prefix)]


def read_record(store: Store, name: str, version: int) -> Record:
    """The record of one version, retired or not. Raises LookupError naming the versions that exist."""
    try:
        found = json.loads(read(store, record_key(name, version)))
    except FileNotFoundError:
        known = ", ".join(map(str, version_numbers(store, name))) or "none"
        raise LookupError(f"dataset {name!r} has no version {version}; it has: {known}") from None
    stated = found.pop("version")
    of_rows = DatasetVersion(**{**stated, "classes": tuple(stated["classes"]), "uri": table_uri(store, name)})
    summary = summary_from(found["summary"]) if found.get("summary") else None
    return Record(**{**found, "version": of_rows, "carved": tuple(found["carved"]), "summary": summary})


def read_records(store: Store, name: str) -> list[Record]:
    """The records of all versions, ascending. Raises LookupError naming the datasets when there is none of this name."""
    records = [read_record(store, name, number) for number in version_numbers(store, name)]
    if not records:
        known = ", ".join(dataset_names(store)) or "none"
        raise LookupError(f"there is no dataset {name!r}; there are: {known}")
    return records


def readable_record(store: Store, name: str, version: int) -> Record:
    """The record of a version whose rows are there. Raises LookupError for one that was retired or never was."""
    record = read_record(store, name, version)
    if record.retired_at:
        raise LookupError(
            f"{name} v{version} was retired on {record.retired_at[:10]}: its record is kept, its rows are gone. "
            f"`tirewatch dataset list {name}` shows the versions that can be read"
        )
    return record


def newest_record(store: Store, name: str) -> Record | None:
    numbers = version_numbers(store, name)
    return read_record(store, name, numbers[-1]) if numbers else None


def newest_version(store: Store, name: str) -> DatasetVersion | None:
    """The newest version, or None where no batch has been ingested yet."""
    record = newest_record(store, name)
    return record.version if record else None


def open_version(store: Store, name: str, version: int) -> DatasetVersion:
    """Version number `version` of the dataset. Raises LookupError when it was retired, or naming the versions that exist."""
    return readable_record(store, name, version).version


def open_rows(store: Store, record: Record) -> "lance.LanceDataset":
    """The rows of a version as a Lance table, for those who read more than one split in order."""
    return open_table(store, record.version.name, record.lance_version)


def summary_of(store: Store, record: Record) -> Summary:
    """What the rows of the version look like: from the record, or computed for one that was written before there were any."""
    return record.summary or summarised(open_rows(store, record))


def read_rows(
    store: Store,
    version: DatasetVersion,
    splits: Sequence[str],
    columns: Sequence[str] | None = None,
    batch_size: int = 256,
) -> Iterator[pa.RecordBatch]:
    """The rows of the splits in order of sha256, in Arrow batches of `batch_size` rows, at most a few of them in memory.

    `columns` None: all of SCHEMA. Raises ValueError for a split or column that does not exist, LookupError for a retired
    version.
    """
    wanted = list(columns) if columns is not None else SCHEMA.names
    if unknown := (set(splits) - set(SPLITS)) | (set(wanted) - set(SCHEMA.names)):
        raise ValueError(f"unknown {sorted(unknown)}: splits are {list(SPLITS)}, columns are {SCHEMA.names}")
    table = open_rows(store, readable_record(store, version.name, version.version))
    index = table.to_table(columns=["sha256", "split"])
    index = index.append_column("position", pa.array(range(index.num_rows), pa.int64()))
    index = index.filter(pc.is_in(index["split"], pa.array(splits, pa.string()))).sort_by("sha256")
    positions = index["position"].to_pylist()
    slices = [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]
    yield from _ahead(slices, lambda some: _one_batch(table.take(some, columns=wanted)))


def read_table(store: Store, version: DatasetVersion, split: str) -> pa.Table:
    """The split's rows in their order, with every column but the photograph."""
    columns = [name for name in SCHEMA.names if name != "image"]
    return pa.Table.from_batches(read_rows(store, version, [split], columns))


def _one_batch(rows: pa.Table) -> pa.RecordBatch:
    return rows.combine_chunks().to_batches()[0]


def _ahead(slices: Sequence[list[int]], take: Callable[[list[int]], pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    with ThreadPoolExecutor(_READ_AHEAD, thread_name_prefix="lance") as pool:
        running = [pool.submit(take, some) for some in slices[:_READ_AHEAD]]
        for upcoming in range(_READ_AHEAD, len(slices) + _READ_AHEAD):
            if not running:
                return
            rows = running.pop(0).result()
            if upcoming < len(slices):
                running.append(pool.submit(take, slices[upcoming]))
            yield rows


def known_rows(
    store: Store, base: Record | None, photographs: Sequence[Photograph], corrections: Sequence[Correction] = ()
) -> Known:
    """What the base version holds already, as far as these photographs and corrections meet it."""
    if base is None:
        return Known()
    index = open_rows(store, base).to_table(columns=["sha256", "label", "group", "split"])
    named = [each.sha256 for each in photographs] + [each.sha256 for each in corrections]
    met = index.filter(pc.is_in(index["sha256"], pa.array(named, pa.string())))
    kin = index.filter(pc.is_in(index["group"], pa.array([each.group for each in photographs], pa.string())))
    counts = index.group_by(["label", "split"]).aggregate([([], "count_all")]).to_pylist()
    return Known(
        classes=base.version.classes,
        labels=dict(zip(met["sha256"].to_pylist(), met["label"].to_pylist(), strict=True)),
        groups=dict(zip(kin["group"].to_pylist(), kin["split"].to_pylist(), strict=True)),
        rows=Counter({(row["label"], row["split"]): row["count_all"] for row in counts}),
        carved=base.carved,
        spreads=summary_of(store, base).statistics,
    )


def digest_of(rows: pa.Table) -> str:
    """`sha256:<hex>` over the lines `sha256 TAB label TAB split LF` of the rows, sorted by sha256."""
    digest = hashlib.sha256()
    for some in rows.select(["sha256", "label", "split"]).sort_by("sha256").to_batches(max_chunksize=4096):
        columns = (column.to_pylist() for column in some.columns)
        digest.update(
            "".join(f"{sha}\t{label}\t{split}\n" for sha, label, split in zip(*columns, strict=True)).encode()
        )
    return f"sha256:{digest.hexdigest()}"


def writer(store: Store, batch: Batch, examination: Examination) -> "RowWriter":
    """Writes planned rows from this process, with the bytes that were examined."""

    def write(rows: Sequence[tuple[Photograph, str]]) -> "list[FragmentMetadata]":
        images = (examination.bytes_of(photograph) for photograph, _ in rows)
        return write_rows(store, batch.dataset, new_rows(rows, images, batch.name))

    return write


def append(
    store: Store,
    base: Record | None,
    batch: Batch,
    planned: Plan,
    write: "RowWriter",
    report: Mapping[str, Any],
) -> Record | None:
    """The version after `base` (None: the first) with the planned rows as well, and with the planned corrections; None when
    another run took that number. `write` puts the planned rows into files of the table, for instance `writer(...)`.

    May be killed anywhere and called again.
    """
    name, labels = batch.dataset, {each.sha256: each.label for each in planned.relabelled}
    written = write(planned.rows) if planned.rows else []
    if base and labels:
        written = [*written, *write_rows(store, name, relabelled_rows(open_rows(store, base), labels))]
    lance_version = commit_rows(store, name, base.lance_version if base else None, written, labels.keys())
    table = open_table(store, name, lance_version)
    number = base.version.version + 1 if base else 1
    earlier = base.batches if base else {}
    record = Record(
        version=_version_of(store, name, number, table.to_table(columns=["sha256", "label", "split"])),
        lance_version=lance_version,
        carved=planned.carved,
        batches={**earlier, batch.name: {**_identity(batch, planned.new_classes), "version": number}},
        report=dict(report),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        summary=summarised(table),
    )
    if not write_if_absent(store, record_key(name, number), record.to_json()):
        return None
    tag(store, record)
    return record


def _identity(batch: Batch, new_classes: bool) -> dict[str, Any]:
    """What must be equal for a second run of the batch to have nothing to do."""
    return {"content": batch.content, "new_classes": new_classes}


def record_of_batch(store: Store, batch: Batch, new_classes: bool) -> Record | None:
    """The record of the version that this batch, with this content, became in an earlier run; None where there was none."""
    newest = newest_record(store, batch.dataset)
    before = newest.batches.get(batch.name) if newest else None
    if before is None or before != {**_identity(batch, new_classes), "version": before["version"]}:
        return None
    record = read_record(store, batch.dataset, before["version"])
    if not record.retired_at:
        tag(store, record)  # the earlier run may have been killed before it
    return record


def _version_of(store: Store, name: str, number: int, index: pa.Table) -> DatasetVersion:
    counts = Counter({each["values"]: each["counts"] for each in pc.value_counts(index["split"]).to_pylist()})
    return DatasetVersion(
        name=name,
        version=number,
        digest=digest_of(index),
        uri=table_uri(store, name),
        classes=tuple(sorted(pc.unique(index["label"]).to_pylist())),
        splits={split: counts[split] for split in SPLITS},
    )


def tag(store: Store, record: Record) -> None:
    """Lance tag `v<n>` on the version's rows, for Lance's own tools: their clean-up spares what is tagged. Repeatable."""
    name = f"v{record.version.version}"
    tags = open_rows(store, record).tags
    if name in tags.list():
        return
    try:
        tags.create(name, record.lance_version)
    except ValueError:
        if name not in tags.list():
            raise
