"""Dataset versions: a Lance table on S3, and beside it one small immutable record for each version.

    datasets/<name>.lance               the rows; Lance's own versions are internal
    datasets/<name>/versions/<n>.json   version n: which Lance version holds it, digest, classes, splits, batches

Write, then reveal: the rows are committed to Lance first, where nobody looks, and become version n by the conditional write of
record n. A run killed before that leaves rows that no version holds; two runs at once cannot both write record n, and the
second builds anew upon the first. Every Lance commit states the full list of its data files (those of the base version and
the new ones), so what a killed or beaten run left behind is never inherited.
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

from monitoring.features import STATISTICS
from tasks.batch import SPLITS, Batch
from tasks.checks import Known, Photograph, Plan
from tasks.storage import Store, list_objects, read, write_if_absent

if TYPE_CHECKING:
    import lance

SCHEMA: Final = pa.schema(
    [
        pa.field("image", pa.large_binary(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("phash", pa.uint64(), nullable=False),
        pa.field("source_key", pa.string(), nullable=False),
        pa.field("source_version", pa.string()),
        pa.field("label", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("batch", pa.string(), nullable=False),
        pa.field("captured_at", pa.timestamp("us", tz="UTC")),
        pa.field("line", pa.string()),
        *(pa.field(name, pa.float32(), nullable=False) for name in STATISTICS),
    ]
)
_WRITE_BYTES: Final = 32 * 2**20  # of photographs in one Arrow batch on the way in
_READ_AHEAD: Final = 3  # Arrow batches in memory on the way out
_COMMIT_ATTEMPTS: Final = 50


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
    """

    version: DatasetVersion
    lance_version: int
    carved: tuple[str, ...]
    batches: dict[str, dict[str, Any]]
    report: dict[str, Any]
    created_at: str
    writer: str = field(default_factory=lambda: uuid.uuid4().hex)


def table_uri(store: Store, name: str) -> str:
    return store.uri(f"datasets/{name}.lance")


def _versions_prefix(name: str) -> str:
    return f"datasets/{name}/versions/"


def _record_key(name: str, version: int) -> str:
    return f"{_versions_prefix(name)}{version:08d}.json"


def version_numbers(store: Store, name: str) -> list[int]:
    """Numbers of the versions that exist, ascending."""
    prefix = _versions_prefix(name)
    return [int(found.key.removeprefix(prefix).removesuffix(".json")) for found in list_objects(store, prefix)]


def read_record(store: Store, name: str, version: int) -> Record:
    """The record of one version. Raises LookupError naming the versions that exist."""
    try:
        found = json.loads(read(store, _record_key(name, version)))
    except FileNotFoundError:
        known = ", ".join(map(str, version_numbers(store, name))) or "none"
        raise LookupError(f"dataset {name!r} has no version {version}; it has: {known}") from None
    stated = found.pop("version")
    of_rows = DatasetVersion(**{**stated, "classes": tuple(stated["classes"]), "uri": table_uri(store, name)})
    return Record(**{**found, "version": of_rows, "carved": tuple(found["carved"])})


def newest_record(store: Store, name: str) -> Record | None:
    numbers = version_numbers(store, name)
    return read_record(store, name, numbers[-1]) if numbers else None


def newest_version(store: Store, name: str) -> DatasetVersion | None:
    """The newest version, or None where no batch has been ingested yet."""
    record = newest_record(store, name)
    return record.version if record else None


def open_version(store: Store, name: str, version: int) -> DatasetVersion:
    """Version number `version` of the dataset. Raises LookupError naming the versions that exist."""
    return read_record(store, name, version).version


def _open_table(store: Store, name: str, lance_version: int | None = None) -> "lance.LanceDataset":
    import lance

    return lance.dataset(table_uri(store, name), version=lance_version, storage_options=store.lance_options)


def read_rows(
    store: Store,
    version: DatasetVersion,
    splits: Sequence[str],
    columns: Sequence[str] | None = None,
    batch_size: int = 256,
) -> Iterator[pa.RecordBatch]:
    """The rows of the splits in order of sha256, in Arrow batches of `batch_size` rows, at most a few of them in memory.

    `columns` None: all of SCHEMA. Raises ValueError for a split or column that does not exist.
    """
    wanted = list(columns) if columns is not None else SCHEMA.names
    if unknown := (set(splits) - set(SPLITS)) | (set(wanted) - set(SCHEMA.names)):
        raise ValueError(f"unknown {sorted(unknown)}: splits are {list(SPLITS)}, columns are {SCHEMA.names}")
    table = _open_table(store, version.name, read_record(store, version.name, version.version).lance_version)
    index = table.to_table(columns=["sha256", "split"])
    index = index.append_column("position", pa.array(range(index.num_rows), pa.int64()))
    index = index.filter(pc.is_in(index["split"], pa.array(splits, pa.string()))).sort_by("sha256")
    positions = index["position"].to_pylist()
    slices = [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]
    yield from _ahead(slices, lambda some: _one_batch(table.take(some, columns=wanted)))


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


def known_rows(store: Store, base: Record | None, photographs: Sequence[Photograph]) -> Known:
    """What the base version holds already, as far as these photographs meet it."""
    if base is None:
        return Known()
    index = _open_table(store, base.version.name, base.lance_version).to_table(
        columns=["sha256", "label", "group", "split"]
    )
    met = index.filter(pc.is_in(index["sha256"], pa.array([each.sha256 for each in photographs], pa.string())))
    kin = index.filter(pc.is_in(index["group"], pa.array([each.group for each in photographs], pa.string())))
    counts = index.group_by(["label", "split"]).aggregate([([], "count_all")]).to_pylist()
    return Known(
        classes=base.version.classes,
        labels=dict(zip(met["sha256"].to_pylist(), met["label"].to_pylist(), strict=True)),
        groups=dict(zip(kin["group"].to_pylist(), kin["split"].to_pylist(), strict=True)),
        rows=Counter({(row["label"], row["split"]): row["count_all"] for row in counts}),
        carved=base.carved,
    )


def digest_of(rows: pa.Table) -> str:
    """`sha256:<hex>` over the lines `sha256 TAB label TAB split LF` of the rows, sorted by sha256."""
    digest = hashlib.sha256()
    for some in rows.select(["sha256", "label", "split"]).sort_by("sha256").to_batches(max_chunksize=65536):
        columns = (column.to_pylist() for column in some.columns)
        digest.update(
            "".join(f"{sha}\t{label}\t{split}\n" for sha, label, split in zip(*columns, strict=True)).encode()
        )
    return f"sha256:{digest.hexdigest()}"


def append(
    store: Store,
    base: Record | None,
    batch: Batch,
    planned: Plan,
    bytes_of: Callable[[Photograph], bytes],
    report: Mapping[str, Any],
) -> Record | None:
    """The version after `base` (None: the first) with the planned rows as well; None when another run took that number.

    May be killed anywhere and called again.
    """
    lance_version = _commit(store, batch, base, planned.rows, bytes_of)
    index = _open_table(store, batch.dataset, lance_version).to_table(columns=["sha256", "label", "split"])
    number = base.version.version + 1 if base else 1
    earlier = base.batches if base else {}
    record = Record(
        version=_version_of(store, batch.dataset, number, index),
        lance_version=lance_version,
        carved=planned.carved,
        batches={**earlier, batch.name: {**_identity(batch, planned.new_classes), "version": number}},
        report=dict(report),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    told = json.dumps(asdict(record), indent=1).encode()
    if not write_if_absent(store, _record_key(batch.dataset, number), told):
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
    tag(store, record)  # the earlier run may have been killed before it
    return record


def _version_of(store: Store, name: str, number: int, index: pa.Table) -> DatasetVersion:
    counts = Counter(index["split"].to_pylist())
    return DatasetVersion(
        name=name,
        version=number,
        digest=digest_of(index),
        uri=table_uri(store, name),
        classes=tuple(sorted(pc.unique(index["label"]).to_pylist())),
        splits={split: counts[split] for split in SPLITS},
    )


def _commit(
    store: Store,
    batch: Batch,
    base: Record | None,
    rows: Sequence[tuple[Photograph, str]],
    bytes_of: Callable[[Photograph], bytes],
) -> int:
    """Rows of the base and these rows, as a Lance version; its number."""
    import lance
    from lance.commit import CommitConflictError
    from lance.fragment import write_fragments

    name, options = batch.dataset, store.lance_options
    uri = table_uri(store, name)
    batches = _arrow_batches(rows, bytes_of, batch.name)
    written = write_fragments(
        pa.RecordBatchReader.from_batches(SCHEMA, batches), uri, schema=SCHEMA, storage_options=options
    )
    kept = (
        [] if base is None else [each.metadata for each in _open_table(store, name, base.lance_version).get_fragments()]
    )
    operation = lance.LanceOperation.Overwrite(SCHEMA, [*kept, *written])
    for _ in range(_COMMIT_ATTEMPTS):
        try:
            latest = _open_table(store, name).version
        except ValueError:  # how Lance says that there is no table yet
            latest = None
        try:
            return int(lance.LanceDataset.commit(uri, operation, read_version=latest, storage_options=options).version)
        except CommitConflictError:
            continue
        except OSError as error:  # how Lance says that another run made the table meanwhile
            if "already exists" not in str(error):
                raise
    raise RuntimeError(f"{uri}: {_COMMIT_ATTEMPTS} commits were overtaken by others; run this batch again")


def _arrow_batches(
    rows: Sequence[tuple[Photograph, str]], bytes_of: Callable[[Photograph], bytes], batch: str
) -> Iterator[pa.RecordBatch]:
    some: list[dict[str, Any]] = []
    held = 0
    for photograph, split in rows:
        if some and (held + photograph.size > _WRITE_BYTES or len(some) == 1024):
            yield pa.RecordBatch.from_pylist(some, schema=SCHEMA)
            some, held = [], 0
        some.append(_row(photograph, split, bytes_of(photograph), batch))
        held += photograph.size
    if some:
        yield pa.RecordBatch.from_pylist(some, schema=SCHEMA)


def _row(photograph: Photograph, split: str, image: bytes, batch: str) -> dict[str, Any]:
    item = photograph.item
    return {
        "image": image,
        "sha256": photograph.sha256,
        "phash": photograph.phash,
        "source_key": item.object.key,
        "source_version": photograph.source_version,
        "label": item.label,
        "group": photograph.group,
        "split": split,
        "width": photograph.width,
        "height": photograph.height,
        "format": photograph.format,
        "batch": batch,
        "captured_at": item.captured_at,
        "line": item.line,
        **photograph.statistics,
    }


def tag(store: Store, record: Record) -> None:
    """Lance tag `v<n>` on the version's rows, for Lance's own tools: their clean-up spares what is tagged. Repeatable."""
    name = f"v{record.version.version}"
    tags = _open_table(store, record.version.name, record.lance_version).tags
    if name in tags.list():
        return
    try:
        tags.create(name, record.lance_version)
    except ValueError:
        if name not in tags.list():
            raise
