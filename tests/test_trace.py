"""tasks/trace.py: one captured request found again, in a spool and on a real S3; how little is read for it."""

from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pytest

from monitoring import capture
from monitoring.capture import CaptureRecord, write_record
from tasks import storage, trace
from tasks.production import collect
from tasks.storage import Store, list_objects
from tasks.stored_file import StoredFile
from tasks.trace import find_captured

BYTES = 50_000  # of a photograph here
DAYS = [datetime(2026, 3, day, 12, tzinfo=UTC) for day in (1, 2, 3)]


@pytest.fixture
def answered(tmp_path: Path) -> Callable[..., Path]:
    """`answered(model, request_id, moment)`: the file of one answered request in the spool."""

    def written(model: str, request_id: str, moment: datetime, label: str = "good", error: str = "") -> Path:
        nothing = np.zeros(2, np.float32)
        image = np.random.default_rng(len(request_id)).bytes(BYTES)
        facts = (request_id, moment.timestamp(), model, 1, label, 0.5, image, nothing, nothing)
        spool = tmp_path / "spool" / model
        spool.mkdir(parents=True, exist_ok=True)
        return write_record(spool, CaptureRecord(*facts, error=error), len(list(spool.iterdir())))

    return written


def test_in_the_spool_the_newest_answer_is_found_and_only_its_photograph_is_read(
    store: Store, tmp_path: Path, answered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered("spooled", "twice", DAYS[0], label="cut")
    again = answered("spooled", "twice", DAYS[1], label="good")
    answered("spooled", "twice", DAYS[2], error="a challenger had no answer")
    for number in range(20):
        answered("spooled", f"other-{number}", DAYS[2])
    (tmp_path / "spool/spooled/2000000000000-1-000000.npz").write_bytes(b"half a record")
    whole: list[Path] = []
    read_record = capture.read_record

    def told(path: Path) -> CaptureRecord:
        whole.append(path)
        return read_record(path)

    monkeypatch.setattr(capture, "read_record", told)
    found = find_captured(store, tmp_path, "spooled", "twice")
    assert found is not None and (found.label, found.where, len(found.image)) == ("good", str(again), BYTES)
    assert len(whole) == 2, "the challenger's and the champion's"


def test_on_s3_the_newest_day_is_looked_at_first_and_of_other_bundles_only_the_ids_are_fetched(
    store: Store, tmp_path: Path, answered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for day, moment in enumerate(DAYS):
        for number in range(20):
            answered("archived", f"day-{day}-{number}", moment)
    assert collect(store, tmp_path / "spool" / "archived", "archived") == 60
    listed: list[str] = []
    fetched: list[int] = []

    def told(store: Store, prefix: str) -> list[storage.StoredObject]:
        listed.append(prefix.rsplit("/", 1)[-1])
        return list_objects(store, prefix)

    class Counted(StoredFile):
        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            fetched.append(len(data))
            return data

    monkeypatch.setattr(trace, "list_objects", told)
    monkeypatch.setattr(trace, "StoredFile", Counted)
    for day, request in ((2, "day-2-7"), (1, "day-1-7")):
        listed.clear()
        fetched.clear()
        found = find_captured(store, tmp_path, "archived", request)
        assert found is not None and found.at == DAYS[day] and len(found.image) == BYTES
        assert listed == ["2026-03-03", "2026-03-02"][: 3 - day]
        assert sum(fetched) < 20 * BYTES + (3 - day) * 200_000, "the rows of the other bundle were fetched"
    assert find_captured(store, tmp_path, "archived", "day-1-7", date(2026, 3, 3)) is None
    assert find_captured(store, tmp_path, "archived", "nobody") is None


def test_a_stored_file_reads_and_seeks_as_a_file_does(store: Store, tmp_path: Path) -> None:
    data = bytes(range(200))
    storage.write(store, "ranges/file", data)
    [stored] = list_objects(store, "ranges")
    with StoredFile(store, stored) as file:
        assert (file.read(10), file.tell(), file.seek(-5, 2), file.read(), file.read(3)) == (
            data[:10],
            10,
            195,
            data[195:],
            b"",
        )
        assert (file.seek(20), file.seek(5, 1), file.read(1)) == (20, 25, data[25:26])
