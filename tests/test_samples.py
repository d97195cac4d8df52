import hashlib

import numpy as np
import pyarrow as pa
import pytest

from tasks.images import decode
from tasks.samples import read_samples


def rows(photographs, labels):
    digests = [hashlib.sha256(data).hexdigest() for data in photographs]
    return pa.RecordBatch.from_pydict({"image": photographs, "label": labels, "sha256": digests})


def test_samples_are_what_images_decode_gives_in_the_order_of_the_rows(photograph):
    photographs = [photograph(seed, size=40, kind=("JPEG", "PNG", "WEBP")[seed % 3]) for seed in range(23)]
    labels = ["good" if seed % 2 else "bad" for seed in range(23)]
    batches = [rows(photographs[start : start + 5], labels[start : start + 5]) for start in range(0, 23, 5)]
    found = read_samples(batches, 23, ("bad", "good"), 24)
    np.testing.assert_array_equal(found.images, np.stack([decode(each, 24) for each in photographs]))
    assert found.labels.tolist() == [seed % 2 for seed in range(23)] and found.labels.dtype == np.int64
    assert found.sha256.tolist() == [hashlib.sha256(each).hexdigest() for each in photographs]


def test_a_large_split_lives_in_a_file_and_not_in_memory(photograph, monkeypatch):
    monkeypatch.setattr("tasks.samples.IN_MEMORY_BYTES", 1000)
    data = photograph(1)
    found = read_samples([rows([data], ["good"])], 1, ("bad", "good"), 24)
    assert isinstance(found.images, np.memmap)
    np.testing.assert_array_equal(found.images[0], decode(data, 24))


@pytest.mark.parametrize(
    ("count", "labels", "spoiled", "message"),
    [
        (3, ["good", "bad"], False, "holds 2 rows, its version names 3"),
        (1, ["good", "bad"], False, "more rows than the 1"),
        (2, ["good", "worn"], False, r"labels \['worn'\] that are not among its classes \['bad', 'good'\]"),
        (2, ["good", "bad"], True, "photograph [0-9a-f]{64} of the dataset cannot be decoded"),
    ],
)
def test_rows_that_do_not_fit_their_version_are_named(photograph, count, labels, spoiled, message):
    photographs = [photograph(1), photograph(2)[:300] if spoiled else photograph(2)]
    with pytest.raises(ValueError, match=message):
        read_samples([rows(photographs, labels)], count, ("bad", "good"), 24)
