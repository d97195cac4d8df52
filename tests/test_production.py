"""tasks/production.py: captured records from the spool to a real S3 and back as a window, each exactly once."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from monitoring.capture import CaptureRecord, spooled, write_record
from monitoring.features import STATISTICS, image_statistics
from monitoring.report import TILE
from tasks import production
from tasks.decision import DecisionRule
from tasks.images import decode_full
from tasks.production import Window, collect, expected, observed, part_of, read_window, training_tiles
from tasks.registry import Reference
from tasks.storage import Store, list_objects, write_many

RULE = DecisionRule(("good", "torn"), ("torn",), 0.3)
NOW = time.time()
LONG_AGO = datetime.now(UTC) - timedelta(days=30)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """A model name for each test: they share one bucket."""
    return f"m{abs(hash(request.node.name)) % 10**8}"


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    folder.mkdir()
    return folder


@pytest.fixture
def capture(spool: Path, photograph: Callable[..., bytes]) -> Callable[..., list[str]]:
    """`capture(10, ...)`: that many records in the spool, a second apart; their request ids."""

    def made(count: int, start: float = NOW - 3600, version: int = 1, first: int = 0) -> list[str]:
        names = []
        for number in range(first, first + count):
            record = CaptureRecord(
                request_id=f"request-{number}",
                captured_at=start + number,
                model="any",
                version=version,
                label="good",
                score=0.25,
                image=photograph(number),
                probabilities=np.array([1 - number / 1000, number / 1000], np.float32),
                embedding=np.arange(4, dtype=np.float32) + number,
                tire_id=f"tire-{number}",
                line="3",
                dropped=1,
            )
            write_record(spool, record, number)
            names.append(record.request_id)
        return names

    return made


def test_records_travel_to_s3_and_come_back_as_they_were(
    store: Store, spool: Path, model: str, capture: Callable[..., list[str]], photograph: Callable[..., bytes]
) -> None:
    names = capture(30)
    assert collect(store, spool, model) == 30
    assert spooled(spool) == []
    window = read_window(store, model, 1, 100, LONG_AGO)
    assert list(window.request_ids) == names, "all of them, oldest first"
    assert window.captured_at[7] == NOW - 3600 + 7
    assert window.embedding[7].tolist() == [7, 8, 9, 10]
    assert window.probabilities[7] == pytest.approx([0.993, 0.007])
    pixels = decode_full(photograph(7))
    assert window.statistics[7] == pytest.approx([image_statistics(pixels)[name] for name in STATISTICS])
    assert window.tiles.shape == (30, TILE, TILE, 3)


def test_the_window_is_the_newest_records_of_one_version(
    store: Store, spool: Path, model: str, capture: Callable[..., list[str]]
) -> None:
    capture(20, version=1)
    collect(store, spool, model)
    newest = capture(20, version=1, first=20)
    capture(20, version=2, first=40)
    collect(store, spool, model)
    assert list(read_window(store, model, 1, 10, LONG_AGO).request_ids) == newest[-10:]
    assert len(read_window(store, model, 1, 1000, LONG_AGO)) == 40
    assert len(read_window(store, model, 2, 1000, LONG_AGO)) == 20
    assert len(read_window(store, model, 3, 1000, LONG_AGO)) == 0


def test_the_window_begins_where_it_is_told_and_reaches_over_midnight(
    store: Store, spool: Path, model: str, capture: Callable[..., list[str]]
) -> None:
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
    capture(20, start=midnight - 10)
    collect(store, spool, model)
    days = {found.key.split("/")[2] for found in list_objects(store, f"captures/{model}")}
    assert len(days) == 2, "one folder a day"
    since = datetime.fromtimestamp(midnight - 5, UTC)
    assert len(read_window(store, model, 1, 1000, since)) == 15
    assert len(read_window(store, model, 1, 12, since)) == 12


def test_a_run_killed_between_upload_and_delete_leaves_no_record_twice(
    store: Store, spool: Path, model: str, capture: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = capture(10)

    def killed(self: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        collect(store, spool, model)
    assert len(spooled(spool)) == 10
    names += capture(5, first=10)
    assert collect(store, spool, model) == 15
    assert len(list_objects(store, f"captures/{model}")) == 2
    assert list(read_window(store, model, 1, 1000, LONG_AGO).request_ids) == names
    assert list(read_window(store, model, 1, 12, LONG_AGO).request_ids) == names[-12:]


def test_two_requests_of_one_name_at_different_times_are_two(
    store: Store, spool: Path, model: str, capture: Callable[..., list[str]]
) -> None:
    """Clients choose the request id, and some send the same one every time."""
    capture(3)
    capture(3, start=NOW - 1800)
    collect(store, spool, model)
    assert len(read_window(store, model, 1, 100, LONG_AGO)) == 6


def test_while_s3_is_down_the_spool_keeps_everything(
    store: Store, spool: Path, model: str, capture: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(5)
    down = replace(store, endpoint_url="http://127.0.0.1:9")

    def refused(_store: Store, key: str, data: bytes) -> None:
        # Nothing listens on port 9; the real client would go on trying for a minute.
        raise ConnectionError(f"{_store.endpoint_url} refused {key} of {len(data)} bytes")

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(production, "write", refused)
        collect(down, spool, model)
    assert len(spooled(spool)) == 5
    assert collect(store, spool, model) == 5


def test_large_spools_are_moved_in_bundles(
    store: Store, spool: Path, model: str, capture: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(production, "BUNDLE_RECORDS", 8)
    names = capture(20)
    collect(store, spool, model)
    assert len(list_objects(store, f"captures/{model}")) == 3
    assert list(read_window(store, model, 1, 1000, LONG_AGO).request_ids) == names


def test_a_damaged_file_is_set_aside_and_the_others_travel(
    store: Store, spool: Path, model: str, capture: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    capture(4)
    victim = spooled(spool)[1]
    victim.write_bytes(victim.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert collect(store, spool, model) == 3
    assert victim.name in caplog.text
    assert [path.name for path in spool.iterdir()] == [victim.name + production.DAMAGED]
    assert collect(store, spool, model) == 0


def test_a_spool_that_does_not_exist_yet_is_an_empty_one(store: Store, tmp_path: Path, model: str) -> None:
    assert collect(store, tmp_path / "nowhere", model) == 0
    window = read_window(store, model, 1, 100, LONG_AGO)
    assert len(window) == 0 and len(observed(window, RULE)) == 0


def test_the_same_records_have_the_same_digest(
    store: Store, spool: Path, model: str, capture: Callable[..., list[str]]
) -> None:
    capture(6)
    collect(store, spool, model)
    once, twice = (read_window(store, model, 1, 100, LONG_AGO) for _ in range(2))
    assert once.digest == twice.digest != read_window(store, model, 1, 5, LONG_AGO).digest


def window_of(probabilities: list[list[float]]) -> Window:
    count = len(probabilities)
    return Window(
        tuple(map(str, range(count))),
        np.arange(count, dtype=np.float64),
        np.zeros((count, len(STATISTICS)), np.float32),
        np.array(probabilities, np.float32),
        np.zeros((count, 4), np.float32),
        np.zeros((count, TILE, TILE, 3), np.uint8),
    )


def test_a_window_is_decided_by_the_rule_of_its_version() -> None:
    sample = observed(window_of([[0.8, 0.2], [0.6, 0.4]]), RULE)
    assert sample.label.tolist() == [0, 1] and sample.score.tolist() == pytest.approx([0.2, 0.4])
    assert (sample.labels, sample.defects, sample.truth) == (RULE.labels, RULE.defect_labels, None)


def reference_of(count: int) -> Reference:
    columns = {name: np.arange(count, dtype=np.float32) + place for place, name in enumerate(STATISTICS)}
    return Reference(
        embedding=np.arange(count * 3, dtype=np.float32).reshape(count, 3),
        probabilities=np.full((count, 2), 0.5, np.float32),
        labels=np.arange(count) % 2,
        sha256=np.array([f"{row:064x}" for row in range(count)]),
        statistics=pa.table({"sha256": [f"{row:064x}" for row in range(count)], **columns}),
    )


def test_a_reference_keeps_its_columns_in_order_and_its_true_classes() -> None:
    sample = expected(reference_of(5), RULE)
    assert sample.statistics[2].tolist() == [2 + place for place in range(len(STATISTICS))]
    assert sample.truth is not None and sample.truth.tolist() == [0, 1, 0, 1, 0]


def test_a_large_reference_is_cut_to_the_same_rows_everywhere() -> None:
    part = part_of(reference_of(500), 50)
    rows = [int(digest, 16) for digest in part.sha256]
    assert len(set(rows)) == 50 and rows == sorted(rows) and max(rows) > 250
    assert part.embedding[:, 0].tolist() == [3 * row for row in rows]
    assert part.statistics.column("sha256").to_pylist() == part.sha256.tolist()
    assert part_of(reference_of(500), 50).sha256.tolist() == part.sha256.tolist()


def test_training_photographs_are_found_by_digest(
    store: Store, photograph: Callable[..., bytes], prefect_server: None
) -> None:
    import hashlib

    from flows.ingest import IngestOptions, ingest
    from tasks.dataset import open_version

    made = {n: photograph(n, size=96, kind="PNG") for n in range(700, 720)}
    prefix = "incoming/tiles_of_training/b/"
    write_many(store, [(f"{prefix}good/{n}.png", data) for n, data in made.items()] + [(f"{prefix}_SUCCESS", b"")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.ingest.settings", lambda: type("Here", (), {"store": store, "ray_address": None}))
        ingest("tiles_of_training", prefix, IngestOptions())
    version = open_version(store, "tiles_of_training", 1)
    wanted = [713, 702]
    tiles = training_tiles(store, version, [hashlib.sha256(made[n]).hexdigest() for n in wanted])
    for n, tile in zip(wanted, tiles, strict=True):
        assert np.array_equal(tile, production.tile(decode_full(made[n])))
    with pytest.raises(LookupError, match="tiles_of_training v1 does not hold"):
        training_tiles(store, version, ["0" * 64])
