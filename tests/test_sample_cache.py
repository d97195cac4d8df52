import gc
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tasks.images import decode
from tasks.sample_cache import Cache, Key, cached_samples, load_samples, open_entry

CLASSES = ("bad", "good")
COUNT, SIDE = 20, 32
BYTES = COUNT * SIDE**2 * 3


@pytest.fixture(scope="module")
def photographs(photograph):
    return [photograph(seed, size=48) for seed in range(COUNT)]


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 100 * BYTES)


class Rows:
    """Arrow batches of the photographs; counts how often they were asked for."""

    def __init__(self, photographs):
        self.asked = 0
        self.photographs = photographs

    def __call__(self):
        self.asked += 1
        for start in range(0, len(self.photographs), 8):
            some = self.photographs[start : start + 8]
            digests = [hashlib.sha256(data).hexdigest() for data in some]
            labels = [CLASSES[(start + number) % 2] for number in range(len(some))]
            yield pa.RecordBatch.from_pydict({"image": some, "label": labels, "sha256": digests})


def key(content="one", split="train", size=SIDE):
    return Key(f"sha256:{hashlib.sha256(content.encode()).hexdigest()}", split, size)


def expect(samples, photographs):
    np.testing.assert_array_equal(samples.images, np.stack([decode(data, SIDE) for data in photographs]))
    assert samples.labels.tolist() == [number % 2 for number in range(len(photographs))]
    assert samples.sha256.tolist() == [hashlib.sha256(data).hexdigest() for data in photographs]


def test_what_one_run_decoded_the_next_one_opens(cache, photographs):
    rows = Rows(photographs)
    for _ in range(3):
        expect(cached_samples(cache, key(), COUNT, CLASSES, rows), photographs)
    assert rows.asked == 1
    assert [path.name for path in cache.folder.iterdir() if path.name != ".lock"] == [key().name]


def test_another_content_split_or_size_is_another_entry(cache, photographs):
    rows = Rows(photographs)
    for each in (key(), key("two"), key(split="val"), key(size=24)):
        cached_samples(cache, each, COUNT, CLASSES, rows)
    assert rows.asked == 4
    assert len({each.name for each in (key(), key("two"), key(split="val"), key(size=24))}) == 4
    assert replace(key(), preprocessing="resize-area-v2").name != key().name


def test_a_dataset_version_that_was_loaded_once_needs_its_store_no_more(store, ingested, photograph, cache):
    files = {f"{label}/{n}.jpg": photograph(40 * n + len(label)) for label in CLASSES for n in range(12)}
    version = ingested(store, "cached", "b1", files).version
    first = load_samples(store, version, "train", 16, cache)
    assert len(first) == version.splits["train"] > 0
    gone = replace(store, endpoint_url="http://127.0.0.1:9")  # nobody listens there
    again = load_samples(gone, version, "train", 16, cache)
    np.testing.assert_array_equal(again.images, first.images)
    np.testing.assert_array_equal(again.labels, first.labels)
    by_digest = {hashlib.sha256(data).hexdigest(): data for data in files.values()}
    for image, digest in zip(again.images, again.sha256, strict=True):
        np.testing.assert_array_equal(image, decode(by_digest[digest], 16))


def test_the_mapping_names_its_file_so_that_other_processes_can_map_it(cache, photographs):
    for _ in range(2):  # made, and opened
        images = cached_samples(cache, key(), COUNT, CLASSES, Rows(photographs)).images
        other = np.memmap(images.filename, dtype=np.uint8, mode="r", shape=images.shape)
        np.testing.assert_array_equal(other, images)


def test_nobody_can_change_what_the_others_see(cache, photographs):
    samples = cached_samples(cache, key(), COUNT, CLASSES, Rows(photographs))
    samples.images[:] = 7
    expect(open_entry(cache.folder / key().name, key(), CLASSES), photographs)


def truncate(entry):
    os.truncate(entry / "images.u8", BYTES - 1)


def flip_a_bit(entry):
    with (entry / "images.u8").open("r+b") as file:
        file.seek(BYTES // 2)
        byte = file.read(1)[0]
        file.seek(BYTES // 2)
        file.write(bytes([byte ^ 1]))


def swap_labels(entry):
    with np.load(entry / "rows.npz") as rows:
        np.savez(entry / "rows.npz", labels=1 - rows["labels"], sha256=rows["sha256"])


def cut_the_description(entry):
    (entry / "entry.json").write_bytes((entry / "entry.json").read_bytes()[:50])


def describe_another(entry):
    told = json.loads((entry / "entry.json").read_text())
    told["key"]["digest"] = "sha256:" + 64 * "0"
    (entry / "entry.json").write_text(json.dumps(told))


def lose_the_images(entry):
    (entry / "images.u8").unlink()


def lose_the_rows(entry):
    (entry / "rows.npz").unlink()


def lose_the_description(entry):
    (entry / "entry.json").unlink()


DAMAGES = (truncate, flip_a_bit, swap_labels, cut_the_description, describe_another)
LOSSES = (lose_the_images, lose_the_rows, lose_the_description)


@pytest.mark.parametrize("damage", [*DAMAGES, *LOSSES], ids=lambda damage: damage.__name__)
def test_a_damaged_entry_is_noticed_and_made_again(cache, photographs, damage, caplog):
    rows = Rows(photographs)
    cached_samples(cache, key(), COUNT, CLASSES, rows)
    damage(cache.folder / key().name)
    expect(cached_samples(cache, key(), COUNT, CLASSES, rows), photographs)
    expect(cached_samples(cache, key(), COUNT, CLASSES, rows), photographs)
    assert rows.asked == 2
    if damage in DAMAGES:
        assert "are damaged" in caplog.text and "decoded again" in caplog.text


def test_photographs_that_cannot_be_decoded_leave_nothing(cache, photographs):
    spoiled = [*photographs[:-1], photographs[-1][:200]]
    with pytest.raises(ValueError, match="cannot be decoded"):
        cached_samples(cache, key(), COUNT, CLASSES, Rows(spoiled))
    assert not [path for path in cache.folder.iterdir() if path.is_dir()]
    expect(cached_samples(cache, key(), COUNT, CLASSES, Rows(photographs)), photographs)


ANOTHER_PROCESS = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_sample_cache import CLASSES, COUNT, Cache, Rows, cached_samples, key
photographs = [path.read_bytes() for path in sorted(Path({folder!r}).glob("*.jpg"))]
class Slow(Rows):
    def __call__(self):
        print("decodes", flush=True)
        for batch in super().__call__():
            yield batch
            time.sleep({pause})
samples = cached_samples(Cache(Path({cache!r}), {limit}), key(), COUNT, CLASSES, Slow(photographs))
print("has", samples.images.sum(), flush=True)
time.sleep({hold})
"""


@pytest.fixture
def elsewhere(cache, photographs, tmp_path):
    """`elsewhere(pause, hold)`: a process that loads the samples, waiting between batches and before its end."""
    for number, data in enumerate(photographs):
        (tmp_path / f"{number:03d}.jpg").write_bytes(data)
    started = []

    def start(pause=0.0, hold=0.0):
        names = {"tests": str(Path(__file__).parent), "folder": str(tmp_path), "cache": str(cache.folder)}
        code = ANOTHER_PROCESS.format(**names, limit=cache.limit, pause=pause, hold=hold)
        started.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_of_a_killed_writer_nothing_is_read_and_nothing_stays(cache, photographs, elsewhere):
    writer = elsewhere(pause=30)
    assert writer.stdout.readline() == "decodes\n"
    made = cache.folder / f"{key().name}.making" / "images.u8"
    assert made.stat().st_size == BYTES, "its space is taken before anything is decoded"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert open_entry(cache.folder / key().name, key(), CLASSES) is None
    rows = Rows(photographs)
    expect(cached_samples(cache, key(), COUNT, CLASSES, rows), photographs)
    assert rows.asked == 1 and sorted(path.name for path in cache.folder.iterdir()) == [".lock", key().name]


def test_processes_that_want_the_same_photographs_decode_them_once(elsewhere, photographs):
    processes = [elsewhere(pause=0.3) for _ in range(2)]
    told = [process.communicate(timeout=60)[0].split() for process in processes]
    total = str(np.stack([decode(data, SIDE) for data in photographs]).sum(dtype=np.uint64))
    assert [each[-1] for each in told] == [total] * 2
    assert sum("decodes" in each for each in told) == 1


def fill(cache, photographs, *contents):
    for number, content in enumerate(contents):
        cached_samples(cache, key(content), COUNT, CLASSES, Rows(photographs))
        entry = cache.folder / key(content).name / "entry.json"
        os.utime(entry, (1000 + number, 1000 + number))  # used long ago, one after the other


def kept(cache, *contents):
    return [content for content in contents if (cache.folder / key(content).name / "entry.json").exists()]


def room_for(cache, entries):
    return replace(cache, limit=int((entries + 0.5) * BYTES))


def test_the_least_recently_used_make_room(cache, photographs):
    cache = room_for(cache, 3)
    fill(cache, photographs, "one", "two", "three")
    gc.collect()
    cached_samples(cache, key("one"), COUNT, CLASSES, Rows(photographs))  # used again
    fill(cache, photographs, "four")
    assert kept(cache, "one", "two", "three", "four") == ["one", "three", "four"]


def test_the_cache_never_takes_more_than_it_may(cache, photographs):
    cache = room_for(cache, 2)
    for number in range(6):
        cached_samples(cache, key(str(number)), COUNT, CLASSES, Rows(photographs))
        taken = sum(path.stat().st_size for path in cache.folder.rglob("*") if path.is_file())
        assert taken <= cache.limit
    assert len(kept(cache, *map(str, range(6)))) == 2


def test_an_entry_that_is_open_stays_whatever_is_needed(cache, photographs):
    cache = room_for(cache, 2)
    fill(cache, photographs, "old")
    held = open_entry(cache.folder / key("old").name, key("old"), CLASSES).images[3:5]  # a part of it is enough
    os.utime(cache.folder / key("old").name / "entry.json", (1, 1))
    fill(cache, photographs, "two", "three")
    assert kept(cache, "old", "two", "three") == ["old", "three"]
    np.testing.assert_array_equal(held, np.stack([decode(data, SIDE) for data in photographs[3:5]]))
    del held
    gc.collect()
    os.utime(cache.folder / key("old").name / "entry.json", (1, 1))
    fill(cache, photographs, "four")
    assert kept(cache, "old", "three", "four") == ["three", "four"]


def test_what_another_process_has_open_stays_until_it_ends(cache, photographs, elsewhere):
    other = elsewhere(hold=60)
    assert other.stdout.readline() == "decodes\n" and other.stdout.readline().startswith("has ")
    os.utime(cache.folder / key().name / "entry.json", (1, 1))
    small = room_for(cache, 2)
    fill(small, photographs, "two", "three")
    assert kept(small, "one", "two", "three") == ["one", "three"]
    other.kill()
    other.wait()
    fill(small, photographs, "four")
    assert kept(small, "one", "three", "four") == ["three", "four"]


def test_samples_that_do_not_fit_are_decoded_for_one_run_and_nothing_is_thrown_out(cache, photographs, caplog):
    cache = room_for(cache, 2)
    fill(cache, photographs, "one", "two")
    held = [open_entry(cache.folder / key(content).name, key(content), CLASSES) for content in ("one", "two")]
    expect(cached_samples(cache, key("three"), COUNT, CLASSES, Rows(photographs)), photographs)
    assert "do not fit" in caplog.text and "TIREWATCH_CACHE_GB" in caplog.text
    assert kept(cache, "one", "two", "three") == ["one", "two"] and len(held) == 2
    expect(cached_samples(room_for(cache, 0), key("four"), COUNT, CLASSES, Rows(photographs)), photographs)
    assert kept(cache, "one", "two", "four") == ["one", "two"]


def test_a_disk_without_room_costs_the_cache_and_not_the_run(cache, photographs, caplog):
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES // 2, allowed[1]))  # no file may grow beyond that
    try:
        found = cached_samples(cache, key(), COUNT, CLASSES, Rows(photographs))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    expect(found, photographs)
    assert "decodes for itself" in caplog.text
    assert not [path for path in cache.folder.iterdir() if path.is_dir()]


def test_a_limit_of_nothing_keeps_nothing(tmp_path, photographs):
    expect(cached_samples(Cache(tmp_path / "none", 0), key(), COUNT, CLASSES, Rows(photographs)), photographs)
    assert not (tmp_path / "none").exists()


def test_opening_takes_a_fraction_of_decoding(tmp_path, photograph):
    """The point of it all, with a wide margin: measured are 50 times and more (benchmarks/training.py)."""
    many = [photograph(seed, size=320) for seed in range(150)]
    cache, seconds = Cache(tmp_path / "cache", 10**9), []
    for _ in range(2):
        began = time.perf_counter()
        cached_samples(cache, key(size=64), len(many), CLASSES, Rows(many))
        seconds.append(time.perf_counter() - began)
    assert seconds[1] < seconds[0] / 3
