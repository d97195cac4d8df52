"""What production saw: captured records from the server's spool to S3, and back as one window of one served version.

    captures/<model>/<yyyy-mm-dd>/v<version>-<first ms>-<last ms>-<digest>.parquet     by the day of the first record, UTC

Uploaded first, deleted from the spool afterwards. A run killed in between uploads the same records again, perhaps bundled
otherwise; whoever reads takes each record once, by its request id and time. While S3 is down the spool keeps everything.
"""

import hashlib
import io
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from monitoring.calibration import MAX_ROWS, Sample
from monitoring.capture import CaptureRecord, read_record, spooled
from monitoring.features import STATISTICS, image_statistics
from monitoring.report import TILE
from tasks.decision import DecisionRule, decide, score
from tasks.images import UnreadableImage, decode_full
from tasks.samples import processors
from tasks.storage import Store, list_objects, read, write

if TYPE_CHECKING:
    from tasks.dataset import DatasetVersion
    from tasks.registry import Reference

BUNDLE_RECORDS: Final = 256
BUNDLE_BYTES: Final = 64 * 2**20  # of photographs in one bundle: what is held in memory on both ways
DAMAGED: Final = ".damaged"  # appended to the name of a spool file that is no record: kept, never read again

SCHEMA: Final = pa.schema(
    [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("captured_at", pa.float64(), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("image", pa.large_binary(), nullable=False),
        pa.field("probabilities", pa.list_(pa.float32()), nullable=False),
        pa.field("embedding", pa.list_(pa.float32()), nullable=False),
        pa.field("tire_id", pa.string(), nullable=False),
        pa.field("line", pa.string(), nullable=False),
        pa.field("dropped", pa.int64(), nullable=False),
        pa.field("milliseconds", pa.float64(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bundle:
    """One object of captures/, by what its name says; times in Unix milliseconds."""

    key: str
    version: int
    first: int
    last: int


@dataclass(frozen=True)
class Window:
    """Captured requests that one version answered, oldest first.

    captured_at: Unix seconds [n]. statistics: float32 [n, len(STATISTICS)]. probabilities: float32 [n, C].
    embedding: float32 [n, D]. tiles: uint8 [n, TILE, TILE, 3], for looking at.
    """

    request_ids: tuple[str, ...]
    captured_at: NDArray[np.float64]
    statistics: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    embedding: NDArray[np.float32]
    tiles: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.request_ids)

    @property
    def digest(self) -> str:
        """The same for the same records."""
        told = "\n".join(f"{name}\t{time!r}" for name, time in zip(self.request_ids, self.captured_at, strict=True))
        return hashlib.sha256(told.encode()).hexdigest()


def collect(store: Store, spool: Path, model: str) -> int:
    """Move what is in the spool now to S3; the number of records moved.

    What arrives meanwhile waits for the next call. A file that is no record is set aside under another name.
    """
    moved = 0
    for files, records in _bundles(spool):
        write(store, _bundle_key(model, records), _packed(records))
        for file in files:
            file.unlink(missing_ok=True)  # the server may have made room meanwhile
        moved += len(records)
    return moved


def _bundles(spool: Path) -> Iterator[tuple[list[Path], list[CaptureRecord]]]:
    """Files with their records, in bundles of one version and day, oldest first."""
    open_bundles: dict[tuple[int, str], tuple[list[Path], list[CaptureRecord]]] = {}
    held = 0
    for file in spooled(spool):
        record = _record(file)
        if record is None:
            continue
        files, records = open_bundles.setdefault((record.version, _day(record.captured_at)), ([], []))
        files.append(file)
        records.append(record)
        held += len(record.image)
        if held >= BUNDLE_BYTES or len(records) >= BUNDLE_RECORDS:
            yield from open_bundles.values()
            open_bundles, held = {}, 0
    yield from open_bundles.values()


def _record(file: Path) -> CaptureRecord | None:
    try:
        return read_record(file)
    except FileNotFoundError:  # the server made room
        return None
    except ValueError as error:
        log.warning("set aside as %s%s: %s", file.name, DAMAGED, error)
        file.rename(file.with_name(file.name + DAMAGED))
        return None


def _day(captured_at: float) -> str:
    return datetime.fromtimestamp(captured_at, UTC).date().isoformat()


def _bundle_key(model: str, records: Sequence[CaptureRecord]) -> str:
    times = sorted(record.captured_at for record in records)
    told = "\n".join(f"{record.request_id}\t{record.captured_at!r}" for record in records)
    digest = hashlib.sha256(told.encode()).hexdigest()[:12]
    name = f"v{records[0].version}-{int(times[0] * 1000):013d}-{int(times[-1] * 1000):013d}-{digest}.parquet"
    return f"captures/{model}/{_day(times[0])}/{name}"


def _packed(records: Sequence[CaptureRecord]) -> bytes:
    rows = [{name: getattr(record, name) for name in SCHEMA.names} for record in records]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), out, compression="none")  # photographs are compressed
    return out.getvalue()


def read_window(store: Store, model: str, version: int, last: int, since: datetime) -> Window:
    """The newest `last` records that the version answered at or after `since`; fewer where there are not as many.

    One bundle is in memory at a time; of each photograph only its statistics and a tile stay.
    """
    kept: dict[tuple[str, float], dict[str, Any]] = {}
    for bundle in bundles(store, model, version, since):
        times = sorted((time for _, time in kept), reverse=True)
        if len(times) >= last and bundle.last / 1000 + 0.001 < times[last - 1]:
            break
        for row in _newest_rows(read(store, bundle.key), last, since.timestamp(), kept):
            kept[row["request_id"], row["captured_at"]] = row
    chosen = [kept[identity] for identity in sorted(kept, key=lambda identity: (identity[1], identity[0]))[-last:]]
    return Window(
        request_ids=tuple(row["request_id"] for row in chosen),
        captured_at=np.array([row["captured_at"] for row in chosen], dtype=np.float64),
        statistics=np.array([row["statistics"] for row in chosen], dtype=np.float32).reshape(-1, len(STATISTICS)),
        probabilities=_stacked([row["probabilities"] for row in chosen]),
        embedding=_stacked([row["embedding"] for row in chosen]),
        tiles=np.array([row["tile"] for row in chosen], dtype=np.uint8).reshape(-1, TILE, TILE, 3),
    )


def bundles(store: Store, model: str, version: int, since: datetime) -> Iterator[Bundle]:
    """Bundles of the version, by their last record; listed day by day, so that old days are not listed at all."""
    oldest = since.astimezone(UTC).date() - timedelta(days=1)  # a bundle lies under the day of its first record
    day = datetime.now(UTC).date() + timedelta(days=1)  # a server's clock may be ahead
    while day >= oldest:
        listed = [_bundle(found.key) for found in list_objects(store, f"captures/{model}/{day.isoformat()}")]
        yield from sorted((each for each in listed if each.version == version), key=lambda each: -each.last)
        day -= timedelta(days=1)


def rows_of(data: bytes) -> pa.Table:
    """The rows of a bundle; what bundles of former releases did not hold has its value of then: no duration, no error."""
    table = pq.read_table(io.BytesIO(data))
    for name, value in (("milliseconds", 0.0), ("error", "")):
        if name not in table.column_names:
            table = table.append_column(SCHEMA.field(name), pa.array([value] * len(table), SCHEMA.field(name).type))
    return table.select([name for name in SCHEMA.names if name != "version"])


def _bundle(key: str) -> Bundle:
    version, first, last, _ = key.rsplit("/", 1)[-1].split("-")
    return Bundle(key, int(version.removeprefix("v")), int(first), int(last))


def _newest_rows(
    data: bytes, last: int, since: float, known: dict[tuple[str, float], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The bundle's rows that may be among the newest `last`, looked at; those already known are left out."""
    table = rows_of(data)
    fresh = {
        (row["request_id"], row["captured_at"]): position
        for position, row in enumerate(table.select(["request_id", "captured_at", "error"]).to_pylist())
        if row["captured_at"] >= since and not row["error"] and (row["request_id"], row["captured_at"]) not in known
    }
    newest = sorted(fresh, key=lambda identity: identity[1])[-last:]
    rows = table.take(pa.array([fresh[identity] for identity in newest], pa.int64())).to_pylist()
    with ThreadPoolExecutor(processors()) as pool:
        return [row for row in pool.map(_looked_at, rows) if row is not None]


def _looked_at(row: dict[str, Any]) -> dict[str, Any] | None:
    """The row with the statistics and a tile of its photograph in the photograph's place."""
    try:
        pixels = decode_full(row.pop("image"))
    except UnreadableImage as error:  # the server decoded it, so its codecs and ours differ: say so, go on
        log.warning("captured request %s cannot be decoded here (%s): %s", row["request_id"], error.reason, error)
        return None
    found = image_statistics(pixels)
    return {**row, "statistics": [found[name] for name in STATISTICS], "tile": tile(pixels)}


def tile(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 3] -> [TILE, TILE, 3]."""
    return np.asarray(cv2.resize(pixels, (TILE, TILE), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _stacked(rows: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    return np.array(rows, dtype=np.float32).reshape(len(rows), -1) if rows else np.empty((0, 0), np.float32)


def observed(window: Window, rule: DecisionRule) -> Sample:
    """The window as drift compares it, decided by the version's rule."""
    if not len(window):
        nothing = np.empty(0)
        return Sample(window.statistics, window.embedding, nothing.astype(np.float32), nothing.astype(int), rule.labels)
    return _sample(window.statistics, window.embedding, window.probabilities, rule)


def expected(reference: "Reference", rule: DecisionRule) -> Sample:
    """The training reference as drift compares it."""
    table = reference.statistics.select(list(STATISTICS))
    statistics = np.column_stack([column.to_numpy() for column in table.columns]).astype(np.float32)
    return _sample(statistics, reference.embedding, reference.probabilities, rule, reference.labels)


def part_of(reference: "Reference", limit: int = MAX_ROWS) -> "Reference":
    """The reference, or a part of it that is the same every time."""
    count = len(reference.labels)
    if count <= limit:
        return reference
    rows = np.sort(np.random.default_rng(0).permutation(count)[:limit])
    arrays = ("embedding", "probabilities", "labels", "sha256")
    part = {name: getattr(reference, name)[rows] for name in arrays}
    return replace(reference, **part, statistics=reference.statistics.take(pa.array(rows)))


def _sample(
    statistics: NDArray[np.float32],
    embedding: NDArray[np.float32],
    probabilities: NDArray[np.float32],
    rule: DecisionRule,
    truth: NDArray[np.int64] | None = None,
) -> Sample:
    return Sample(
        statistics=statistics,
        embedding=embedding,
        score=score(probabilities, rule),
        label=decide(probabilities, rule),
        labels=rule.labels,
        defects=rule.defect_labels,
        truth=truth,
    )


def training_tiles(store: Store, version: "DatasetVersion", sha256: Sequence[str]) -> NDArray[np.uint8]:
    """[K, TILE, TILE, 3]: these photographs of the dataset version. Raises LookupError when one is not in it."""
    import lance

    from tasks.dataset import read_record

    number = read_record(store, version.name, version.version).lance_version
    table = lance.dataset(version.uri, version=number, storage_options=store.lance_options)
    places = {digest: place for place, digest in enumerate(table.to_table(columns=["sha256"])["sha256"].to_pylist())}
    if missing := [digest for digest in sha256 if digest not in places]:
        raise LookupError(f"{version.name} v{version.version} does not hold the photographs {missing[:3]}")
    images = table.take([places[digest] for digest in sha256], columns=["image"])["image"]
    return np.stack([tile(decode_full(image.as_py())) for image in images])
