"""The rows of dataset versions in one Lance table: written, replaced, read back.

A Lance commit here always says what the table holds from then on: the rows of one earlier Lance version, without those that
are replaced, and the new ones. What a killed or beaten run committed in between is never inherited.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from monitoring.features import STATISTICS
from tasks.examination import Photograph
from tasks.memory import give_back, large_blocks_apart
from tasks.storage import Store

if TYPE_CHECKING:
    import lance
    from lance.fragment import FragmentMetadata

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
_WRITE_BYTES: Final = 4 * 2**20  # of photographs in one Arrow batch on the way in; larger ones are slower
_FILE_BYTES: Final = (
    400 * 2**20
)  # of photographs in one file: beyond 100 parts of 5 MB Lance's upload takes ever larger ones
_COPIED_ROWS: Final = 32  # of photographs read at a time to be written again under another label
_COMMIT_ATTEMPTS: Final = 50


def table_uri(store: Store, name: str) -> str:
    return store.uri(f"datasets/{name}.lance")


def open_table(store: Store, name: str, lance_version: int | None = None) -> "lance.LanceDataset":
    """The Lance table of the dataset at one of its versions; without it, at its latest, which is nobody's dataset version."""
    import lance

    return lance.dataset(table_uri(store, name), version=lance_version, storage_options=store.lance_options)


def new_rows(rows: Iterable[tuple[Photograph, str]], images: Iterable[bytes], batch: str) -> Iterator[pa.RecordBatch]:
    """Photographs with their splits and bytes as Arrow batches of at most 4 MB (one photograph may be larger by itself)."""
    some: list[dict[str, Any]] = []
    held = 0
    for (photograph, split), image in zip(rows, images, strict=True):
        if some and (held + photograph.size > _WRITE_BYTES or len(some) == 1024):
            yield pa.RecordBatch.from_pylist(some, schema=SCHEMA)
            some, held = [], 0
        some.append(_row(photograph, split, image, batch))
        held += photograph.size
    if some:
        yield pa.RecordBatch.from_pylist(some, schema=SCHEMA)


def _row(photograph: Photograph, split: str, image: bytes, batch: str) -> dict[str, Any]:
    item = photograph.item
    return {
        "image": image,
        "sha256": photograph.sha256,
        "phash": photograph.phash,
        "source_key": item.key,
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
        **dict(zip(STATISTICS, np.frombuffer(photograph.statistics, np.float32).tolist(), strict=True)),
    }


def relabelled_rows(table: "lance.LanceDataset", labels: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
    """The stored rows of these photographs (sha256 -> new label) under their new label, otherwise as they are."""
    if not labels:
        return
    stored = table.to_table(columns=["sha256"])["sha256"]
    met = pc.is_in(stored, pa.array(list(labels), pa.string()))
    positions = pc.indices_nonzero(met).to_pylist()
    for start in range(0, len(positions), _COPIED_ROWS):
        rows = table.take(positions[start : start + _COPIED_ROWS], columns=SCHEMA.names)
        renamed = pa.array([labels[sha256] for sha256 in rows["sha256"].to_pylist()], pa.string())
        rows = rows.set_column(SCHEMA.get_field_index("label"), SCHEMA.field("label"), renamed)
        yield from rows.cast(SCHEMA).to_batches()


def write_rows(store: Store, name: str, batches: Iterable[pa.RecordBatch]) -> "list[FragmentMetadata]":
    """The rows as files of the table that no version of it names yet."""
    from lance.fragment import write_fragments

    rows = pa.RecordBatchReader.from_batches(SCHEMA, batches)
    uri, options = table_uri(store, name), store.lance_options
    with large_blocks_apart():
        written = write_fragments(rows, uri, schema=SCHEMA, max_bytes_per_file=_FILE_BYTES, storage_options=options)
    give_back()
    return list(written)


def commit_rows(
    store: Store,
    name: str,
    base: int | None,
    written: "Sequence[FragmentMetadata]",
    replaced: Collection[str] = (),
) -> int:
    """The Lance version that holds the rows of the Lance version `base` (None: none) and the written ones; its number.

    replaced: sha256 of the rows of the base that are left out; their photographs stay in the files, marked as deleted.
    """
    table = None if base is None else open_table(store, name, base)
    kept = [] if table is None else [each.metadata for each in table.get_fragments()]
    if table is None or not (replaced or any(each.deletion_file for each in kept)):
        return _commit_whole(store, name, [*kept, *written])
    return _commit_upon(store, name, table, replaced, written)


def _commit_whole(store: Store, name: str, fragments: "Sequence[FragmentMetadata]") -> int:
    """Lance's Overwrite with the full list of files. It gives fragments new numbers, so it refuses rows marked as deleted."""
    import lance
    from lance.commit import CommitConflictError

    uri, options = table_uri(store, name), store.lance_options
    operation = lance.LanceOperation.Overwrite(SCHEMA, list(fragments))
    for _ in range(_COMMIT_ATTEMPTS):
        try:
            latest = open_table(store, name).version
        except ValueError:  # how Lance says that there is no table yet
            latest = None
        try:
            return int(lance.LanceDataset.commit(uri, operation, read_version=latest, storage_options=options).version)
        except CommitConflictError:
            continue
        except OSError as error:  # how Lance says that another run made the table meanwhile
            if "already exists" not in str(error):
                raise
    raise _overtaken(uri)


def _commit_upon(
    store: Store,
    name: str,
    base: "lance.LanceDataset",
    replaced: Collection[str],
    written: "Sequence[FragmentMetadata]",
) -> int:
    """Rows of `base` marked as deleted, and new ones: Lance's Update, after a Restore where `base` is not the latest.

    Lance merges an Update with what others committed meanwhile; what came out is compared with what was wanted.
    """
    import lance
    from lance.commit import CommitConflictError

    uri, options = table_uri(store, name), store.lance_options
    updated, removed = _without(base, replaced)
    operation = lance.LanceOperation.Update(
        removed_fragment_ids=removed, updated_fragments=updated, new_fragments=list(written), update_mode="rewrite_rows"
    )
    changed = {each.id for each in updated} | set(removed)
    untouched = [each.metadata for each in base.get_fragments() if each.fragment_id not in changed]
    wanted = _holdings([*untouched, *updated, *written])
    for _ in range(_COMMIT_ATTEMPTS):
        try:
            latest = open_table(store, name).version
            if latest != base.version:
                restore = lance.LanceOperation.Restore(base.version)
                latest = lance.LanceDataset.commit(uri, restore, read_version=latest, storage_options=options).version
            made = lance.LanceDataset.commit(uri, operation, read_version=latest, storage_options=options)
        except CommitConflictError:
            continue
        if _holdings([each.metadata for each in made.get_fragments()]) == wanted:
            return int(made.version)
    raise _overtaken(uri)


def _overtaken(uri: str) -> RuntimeError:
    return RuntimeError(f"{uri}: {_COMMIT_ATTEMPTS} commits were overtaken by others; run this batch again")


def _without(base: "lance.LanceDataset", replaced: Collection[str]) -> "tuple[list[FragmentMetadata], list[int]]":
    """Fragments of the base that hold replaced rows, with these marked as deleted; ids of those of which nothing is left."""
    updated, removed = [], []
    gone = pa.array(list(replaced), pa.string())
    for fragment in base.get_fragments():
        rows = fragment.to_table(columns=["sha256"], with_row_address=True)
        addresses = rows["_rowaddr"].filter(pc.is_in(rows["sha256"], gone)).to_pylist()
        if not addresses:
            continue
        left = fragment.delete_rows(
            [address & 0xFFFFFFFF for address in addresses]
        )  # the lower half is the row's offset
        if left is None:
            removed.append(fragment.fragment_id)
        else:
            updated.append(left)
    return updated, removed


def _holdings(fragments: "Iterable[FragmentMetadata]") -> dict[tuple[str, ...], int]:
    """Data files of each fragment -> its rows that are not deleted."""
    return {tuple(str(file.path) for file in each.files): each.num_rows for each in fragments}
