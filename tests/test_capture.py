"""Capture: nothing waits for it, nothing half-written is ever seen, the disk stays bounded, gaps are counted."""

import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from monitoring import capture
from monitoring.capture import CaptureRecord, Spool, make_room, read_record, read_spool, spooled, write_record

RECORD = CaptureRecord(
    request_id="r-1",
    captured_at=1_700_000_000.25,
    model="tire",
    version=7,
    label="worn",
    score=0.75,
    image=b"\xff\xd8 not really a JPEG",
    probabilities=np.array([0.25, 0.75], np.float32),
    embedding=np.arange(5, dtype=np.float32),
    tire_id="T 1",
    line="north",
    dropped=3,
)


def eventually(true, within=10.0):
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_record_comes_back_as_it_was_captured(tmp_path):
    found = read_record(write_record(tmp_path, RECORD))
    for name, value in vars(RECORD).items():
        np.testing.assert_array_equal(getattr(found, name), value)
        assert type(getattr(found, name)) is type(value)


def test_pixels_come_back_as_a_picture_of_the_same_pixels(tmp_path):
    from tasks.images import decode_full

    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    found = read_record(write_record(tmp_path, replace(RECORD, image=pixels)))
    np.testing.assert_array_equal(decode_full(found.image), pixels)


def test_records_are_read_oldest_first(tmp_path):
    for second in (30, 4, 200, 7):
        write_record(tmp_path, replace(RECORD, captured_at=float(second), request_id=str(second)), second)
    assert [record.request_id for _, record in read_spool(tmp_path)] == ["4", "7", "30", "200"]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"PK\x03\x04" + b"\0" * 50])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = write_record(tmp_path, RECORD)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name} is no capture record"):
        read_record(path)


def test_a_record_that_made_room_while_it_was_read_is_passed_over(tmp_path):
    paths = [write_record(tmp_path, replace(RECORD, request_id=str(n)), n) for n in range(3)]
    reader = read_spool(tmp_path)
    assert next(reader)[1].request_id == "0"
    paths[1].unlink()
    assert next(reader)[1].request_id == "2"


def test_a_file_is_seen_whole_or_not_at_all(tmp_path):
    large = replace(RECORD, embedding=np.zeros(500_000, np.float32))
    writer = threading.Thread(target=lambda: [write_record(tmp_path, large, n) for n in range(40)])
    writer.start()
    seen = 0
    while writer.is_alive():
        seen += sum(len(record.embedding) == 500_000 for _, record in read_spool(tmp_path))
    writer.join()
    assert seen > 0 and len(spooled(tmp_path)) == 40


def test_room_is_made_by_the_oldest_and_of_what_killed_writers_left(tmp_path):
    paths = [write_record(tmp_path, replace(RECORD, captured_at=float(n)), n) for n in range(10)]
    old, young = tmp_path / ".0000000000001-1-000000.npz", tmp_path / ".0000000000002-1-000000.npz"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 3600,) * 2)
    assert make_room(tmp_path, paths[0].stat().st_size * 4) == 6
    assert spooled(tmp_path) == paths[6:]
    assert not old.exists() and young.exists()


def test_the_directory_stays_bounded_however_large_the_photographs(tmp_path):
    limit = 2_000_000
    spool = Spool(tmp_path, share=1.0, max_bytes=limit)
    for number in range(60):
        record = replace(RECORD, request_id=str(number), image=bytes(150_000), captured_at=float(number))
        while not spool.offer(record):
            time.sleep(0.005)
    spool.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1.05 * limit + 2 * 151_000
    assert [record.request_id for _, record in read_spool(tmp_path)][-1] == "59"


def test_what_went_unread_to_make_room_is_counted_as_dropped_and_told(tmp_path, caplog):
    spool = Spool(tmp_path, share=1.0, max_bytes=1_000_000)
    for number in range(30):
        record = replace(RECORD, request_id=str(number), image=bytes(100_000), captured_at=float(number))
        while not spool.offer(record):
            spool.dropped -= 1  # it is offered again
            time.sleep(0.005)
    spool.close()
    kept = len(spooled(tmp_path))
    assert kept < 15 and spool.dropped == 30 - kept
    assert "to keep it within 0 MiB" in caplog.text and str(tmp_path) in caplog.text


def test_offering_never_waits_and_counts_what_was_dropped(tmp_path, monkeypatch):
    blocked = threading.Event()
    monkeypatch.setattr(capture, "write_record", lambda *args: blocked.wait(20) and write_record(*args))
    spool = Spool(tmp_path, share=1.0, queue_size=4)
    began = time.monotonic()
    taken = [spool.offer(replace(RECORD, request_id=str(n))) for n in range(100)]
    assert time.monotonic() - began < 0.5
    assert 4 <= sum(taken) <= 5 and spool.dropped == 100 - sum(taken)
    blocked.set()
    spool.close()
    assert len(spooled(tmp_path)) == sum(taken)


def test_a_disk_that_vanishes_and_comes_back_costs_records_but_not_the_capture(tmp_path):
    home = tmp_path / "spool"
    spool = Spool(home, share=1.0)
    home.rename(tmp_path / "gone")
    spool.offer(RECORD)
    eventually(lambda: spool.dropped == 1)
    (tmp_path / "gone").rename(home)
    spool.offer(replace(RECORD, dropped=spool.dropped))
    spool.close()
    [(_, record)] = read_spool(home)
    assert record.dropped == 1


def test_what_was_handed_over_is_written_before_the_end(tmp_path):
    spool = Spool(tmp_path, share=1.0)
    for number in range(50):
        spool.offer(replace(RECORD, request_id=str(number)))
    spool.close()
    assert [record.request_id for _, record in read_spool(tmp_path)] == [str(n) for n in range(50)]


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_the_share_is_kept(tmp_path, share):
    spool = Spool(tmp_path, share)
    wanted = sum(spool.wants_one() for _ in range(4000)) / 4000
    spool.close()
    assert wanted == pytest.approx(share, abs=0.04)


def test_no_share_no_thread_no_folder(tmp_path):
    Spool(tmp_path / "never", share=0.0).close()
    assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match=r"capture share 1.5 is outside"):
        Spool(tmp_path, share=1.5)
