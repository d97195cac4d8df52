"""tasks/storage.py against a real S3."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from prefect import flow, task

from tasks import storage
from tasks.storage import Store, StoredObject


@pytest.fixture(scope="module")
def versioned(store: Store) -> Store:
    made = replace(store, bucket="versioned")
    storage.ensure_bucket(made)
    return made


def test_a_listing_holds_every_object_beyond_the_first_page_in_order(store: Store) -> None:
    keys = [f"paged/{number:05d}.jpg" for number in range(1203)]
    assert storage.write_many(store, ((key, b"x") for key in reversed(keys))) == 1203
    assert [found.key for found in storage.list_objects(store, "paged/")] == keys


def test_a_prefix_matches_whole_folders_only(store: Store) -> None:
    storage.write(store, "incoming/tire/batch-1/a.jpg", b"1")
    storage.write(store, "incoming/tire/batch-10/a.jpg", b"1")
    assert [found.key for found in storage.list_objects(store, "incoming/tire/batch-1/")] == [
        "incoming/tire/batch-1/a.jpg"
    ]


@pytest.mark.parametrize("name", ["a b.jpg", "ü#?%+&='.png", "x" * 180 + ".jpg", "[1]{2}~^|.png", "wrong.jpg.jpeg"])
def test_names_that_web_photographs_have_come_back_unchanged(store: Store, name: str) -> None:
    storage.write(store, f"odd/{name}", name.encode())
    assert f"odd/{name}" in [found.key for found in storage.list_objects(store, "odd")]
    assert storage.read(store, f"odd/{name}") == name.encode()


def test_a_missing_object_is_named(store: Store) -> None:
    with pytest.raises(FileNotFoundError, match=r"s3://tirewatch/no/such.jpg"):
        storage.read(store, "no/such.jpg")
    assert not storage.exists(store, "no/such.jpg")


def test_of_many_writers_of_one_key_exactly_one_creates_it(store: Store) -> None:
    with ThreadPoolExecutor(12) as pool:
        created = list(pool.map(lambda n: storage.write_if_absent(store, "race/record", str(n).encode()), range(12)))
    assert sum(created) == 1
    assert storage.read(store, "race/record") == str(created.index(True)).encode()


def test_a_repeated_conditional_write_of_the_same_bytes_counts_as_created(store: Store) -> None:
    assert storage.write_if_absent(store, "race/again", b"mine")
    assert storage.write_if_absent(store, "race/again", b"mine")
    assert not storage.write_if_absent(store, "race/again", b"theirs")


def test_deleted_objects_are_gone_and_deleting_them_again_is_no_error(store: Store) -> None:
    storage.write(store, "doomed/a", b"1")
    for _ in range(2):
        storage.delete(store, ["doomed/a"])
    assert not storage.exists(store, "doomed/a")


def test_read_many_keeps_the_order_and_holds_no_more_than_its_bytes(store: Store) -> None:
    storage.write_many(store, ((f"many/{number:03d}", bytes([number]) * 1000) for number in range(60)))
    objects = storage.list_objects(store, "many")
    started: list[str] = []

    def work(each: StoredObject, content: storage.Content) -> bytes:
        started.append(each.key)
        return content.data

    reader = storage.read_many(store, objects, work, concurrency=8, in_flight_bytes=5000)
    assert next(reader) == bytes([0]) * 1000
    time.sleep(0.3)
    assert len(started) <= 6
    assert [data[0] for data in reader] == list(range(1, 60))


def test_read_many_reads_an_object_that_is_larger_than_its_bytes(store: Store) -> None:
    storage.write(store, "large/one", b"x" * 10_000)
    found = storage.list_objects(store, "large")
    assert list(storage.read_many(store, found, lambda _, content: len(content.data), in_flight_bytes=10)) == [10_000]


def test_read_many_raises_what_went_wrong_with_one_object(store: Store) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        list(storage.read_many(store, [StoredObject("gone", 1, "")], lambda _, content: content.data))


def test_one_client_serves_all_threads_of_a_store(store: Store) -> None:
    seen: set[int] = set()
    threads = [threading.Thread(target=lambda: seen.add(id(storage._client(replace(store))))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {id(storage._client(store))}


def test_a_versioned_bucket_tells_which_version_was_read(versioned: Store) -> None:
    storage.write(versioned, "photo", b"first")
    first = storage.read_version(versioned, "photo")
    storage.write(versioned, "photo", b"second")
    second = storage.read_version(versioned, "photo")
    assert first.version
    assert second.version
    assert first.version != second.version


def test_making_a_bucket_twice_is_harmless(versioned: Store) -> None:
    storage.write(versioned, "kept", b"1")
    storage.ensure_bucket(versioned)
    assert storage.exists(versioned, "kept")


def test_wrong_keys_are_refused(store: Store) -> None:
    with pytest.raises(Exception, match=r"403|Denied|SignatureDoesNotMatch"):
        storage.read(replace(store, secret_access_key="wrong"), "paged/00000.jpg")


def test_without_keys_of_its_own_a_store_uses_the_usual_aws_ones(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write(store, "chain/a", b"1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", store.access_key_id or "")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", store.secret_access_key or "")
    bare = replace(store, access_key_id=None, secret_access_key=None)
    assert [found.key for found in storage.list_objects(bare, "chain")] == ["chain/a"]


def test_the_secret_is_not_printed(store: Store) -> None:
    assert store.secret_access_key
    assert store.secret_access_key not in repr(store)


@pytest.mark.usefixtures("prefect_server")
def test_a_network_fault_is_tried_again_and_bad_data_is_not() -> None:
    tries = {"network": 0, "data": 0}
    at_once = {**storage.NETWORK_RETRY, "retry_delay_seconds": [0, 0, 0]}

    @task(**at_once)
    def flaky() -> str:
        tries["network"] += 1
        if tries["network"] < 3:
            raise ConnectionResetError("peer went away")
        return "there"

    @task(**at_once)
    def bad() -> None:
        tries["data"] += 1
        raise ValueError("this will not get better")

    @flow
    def both() -> str:
        result = flaky()
        bad(return_state=True)
        return result

    assert both() == "there"
    assert tries == {"network": 3, "data": 1}
