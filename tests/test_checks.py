"""tasks/checks.py: what is wrong with a batch's photographs, and where the good ones go."""

import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from monitoring.features import STATISTICS
from tasks import storage
from tasks.batch import Batch, BatchItem, BatchRefused, Finding, read_batch
from tasks.checks import RULES, Known, Plan, plan, refuse_if_too_bad
from tasks.examination import Photograph, Spooled, examine
from tasks.split import SplitRule
from tasks.storage import Store

Made = Callable[..., bytes]


def photo(name: str, content: str | None = None, **item: Any) -> Photograph:
    """A photograph as `examine` reports it; equal `content` stands for equal bytes."""
    label = item.pop("label", "good")
    each = BatchItem("incoming/tire/b/", name, 9, label, **item)
    return Photograph(each, content or f"sha-{name}", 1, "JPEG", 32, 32, bytes(4 * len(STATISTICS)), None, 0, 9)


@pytest.fixture(scope="module")
def decide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Plan]]:
    with Spooled(tmp_path_factory.mktemp("spool") / "photographs") as examination:

        def planned(*photographs: Photograph, known: Known | None = None, **how: Any) -> Plan:
            examination.photographs = list(photographs)
            batch = Batch("tire", "b", "incoming/tire/b/", tuple(each.item for each in photographs), (), "content")
            return plan(batch, examination, known or Known(), how.pop("split", SplitRule()), **how)

        yield planned


def found(planned: Plan, *but: str) -> dict[str, list[str]]:
    """Reason -> names, without the reasons named in `but` and without small classes."""
    reasons: dict[str, list[str]] = {}
    for each in planned.findings:
        if each.reason not in {*but, "small_class"}:
            reasons.setdefault(each.reason, []).append(each.name)
    return reasons


def splits(planned: Plan) -> dict[str, str]:
    return {photograph.item.name: split for photograph, split in planned.rows}


def test_the_same_bytes_twice_count_once(decide: Callable[..., Plan]) -> None:
    planned = decide(photo("b.jpg", "same"), photo("a.jpg", "same"), photo("c.jpg"))
    assert sorted(splits(planned)) == ["a.jpg", "c.jpg"]
    assert found(planned) == {"duplicate": ["b.jpg"]}


def test_the_same_bytes_under_two_labels_are_all_quarantined_by_name(decide: Callable[..., Plan]) -> None:
    planned = decide(photo("x.jpg", "same"), photo("y.jpg", "same", label="bad"), photo("z.jpg"))
    assert sorted(splits(planned)) == ["z.jpg"]
    assert [each.name for each in planned.quarantined] == ["x.jpg", "y.jpg"]
    assert all("x.jpg (good)" in each.message and "y.jpg (bad)" in each.message for each in planned.quarantined)


@pytest.mark.parametrize(("held", "lost"), [("val", "train"), ("test", "train"), ("test", "val")])
def test_a_twin_in_two_given_splits_stays_on_the_held_out_side(
    decide: Callable[..., Plan], held: str, lost: str
) -> None:
    planned = decide(photo("a.jpg", "same", split=lost), photo("b.jpg", "same", split=held))
    assert splits(planned) == {"b.jpg": held}
    assert found(planned) == {"twin_across_splits": ["a.jpg"]}


def test_bytes_the_dataset_holds_are_skipped_or_contradict_it(decide: Callable[..., Plan]) -> None:
    known = Known(classes=("bad", "good"), labels={"old": "good", "older": "bad"})
    planned = decide(photo("a.jpg", "old"), photo("b.jpg", "older"), photo("c.jpg"), known=known)
    assert list(splits(planned)) == ["c.jpg"]
    assert found(planned) == {"already_known": ["a.jpg"], "contradicts_dataset": ["b.jpg"]}


def test_a_class_the_dataset_lacks_is_quarantined_unless_it_is_allowed(decide: Callable[..., Plan]) -> None:
    known = Known(classes=("bad", "good"))
    planned = decide(photo("a.jpg", label="odd"), photo("b.jpg"), known=known)
    assert found(planned) == {"unknown_class": ["a.jpg"]}
    assert "'odd' is not one of bad, good" in planned.quarantined[0].message
    assert len(decide(photo("a.jpg", label="odd"), known=known, new_classes=True).rows) == 1


def test_the_first_batch_defines_the_classes_and_small_ones_are_noted(decide: Callable[..., Plan]) -> None:
    planned = decide(*(photo(f"{n}.jpg") for n in range(9)), photo("odd.jpg", label="odd"))
    assert len(planned.rows) == 10
    assert [(each.reason, each.name) for each in planned.findings] == [("small_class", "odd")]


def test_a_wrong_extension_is_noted_and_the_photograph_kept(decide: Callable[..., Plan]) -> None:
    planned = decide(photo("a.png"), photo("b.JPG"), photo("c.jpg.jpeg"), photo("d"))
    assert len(planned.rows) == 4
    assert found(planned) == {"wrong_extension": ["a.png", "d"]}


def test_a_group_never_stands_in_two_splits(decide: Callable[..., Plan]) -> None:
    tire = {"group": "tire-7"}
    planned = decide(
        photo("a.jpg", split="train", **tire), photo("b.jpg", split="test", **tire), photo("c.jpg", **tire)
    )
    assert splits(planned) == {"b.jpg": "test", "c.jpg": "test"}
    assert found(planned) == {"bridges_splits": ["a.jpg"]}
    known = Known(classes=("good",), groups={"tire-7": "val"})
    planned = decide(photo("d.jpg", split="test", **tire), photo("e.jpg", **tire), known=known)
    assert splits(planned) == {"e.jpg": "val"}
    assert found(planned) == {"bridges_splits": ["d.jpg"]}


def test_without_given_splits_every_class_gets_its_shares(decide: Callable[..., Plan]) -> None:
    photographs = [
        photo(f"{label}{n}.jpg", label=label) for label, count in (("good", 100), ("bad", 20)) for n in range(count)
    ]
    counts = Counter((photograph.item.label, split) for photograph, split in decide(*photographs).rows)
    assert [counts["good", split] for split in ("train", "val", "test")] == [70, 15, 15]
    assert [counts["bad", split] for split in ("train", "val", "test")] == [14, 3, 3]


def test_the_split_does_not_depend_on_the_order_of_the_files_but_on_the_seed(decide: Callable[..., Plan]) -> None:
    photographs = [photo(f"{n}.jpg") for n in range(60)]
    forth = splits(decide(*photographs))
    assert splits(decide(*reversed(photographs))) == forth
    assert splits(decide(*photographs, split=SplitRule(seed=1))) != forth


def test_batches_give_the_same_splits_in_whatever_order_they_come(decide: Callable[..., Plan]) -> None:
    batches = [[photo(f"{batch}-{n}.jpg", label="bad" if n % 3 else "good") for n in range(7)] for batch in range(12)]

    def one_after_the_other(order: list[list[Photograph]]) -> dict[str, str]:
        stored: dict[str, str] = {}
        rows: Counter[tuple[str, str]] = Counter()
        for batch in order:
            planned = decide(*batch, known=Known(classes=("bad", "good"), rows=rows))
            stored |= splits(planned)
            rows.update((photograph.item.label, split) for photograph, split in planned.rows)
        return stored

    assert one_after_the_other(batches) == one_after_the_other(batches[::-1])


@pytest.mark.parametrize(
    ("batches", "each", "group"), [(600, 1, 1), (200, 3, 1), (60, 10, 1), (100, 6, 6), (50, 12, 4)]
)
def test_the_shares_hold_over_many_small_batches(
    decide: Callable[..., Plan], batches: int, each: int, group: int
) -> None:
    """A batch of one photograph, or of one tire, cannot hold 15 %; all of them together do, within three deviations."""
    counts: Counter[str] = Counter()
    for batch in range(batches):
        some = [photo(f"{batch}-{n}.jpg", group=f"{batch}-{n // group}") for n in range(each)]
        counts.update(splits(decide(*some)).values())
    groups = batches * each / group
    for split, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        deviation = (share * (1 - share) / groups) ** 0.5
        assert counts[split] / (batches * each) == pytest.approx(share, abs=3 * deviation), split


def test_missing_held_out_splits_are_carved_out_of_the_given_train_rows(decide: Callable[..., Plan]) -> None:
    given_rows = [photo(f"t{n}.jpg", split="train") for n in range(100)] + [
        photo(f"v{n}.jpg", split="val") for n in range(9)
    ]
    planned = decide(*given_rows)
    assert planned.carved == ("test",)
    assert Counter(splits(planned).values()) == {"train": 85, "test": 15, "val": 9}
    assert all(split == "val" for name, split in splits(planned).items() if name.startswith("v"))


def test_given_splits_that_are_complete_are_left_as_they_are(decide: Callable[..., Plan]) -> None:
    given_rows = {f"{split}{n}.jpg": split for split in ("train", "val", "test") for n in range(7)}
    planned = decide(*(photo(name, split=split) for name, split in given_rows.items()))
    assert planned.carved == ()
    assert splits(planned) == given_rows


def test_a_later_batch_goes_on_carving_what_the_first_had_to_carve(decide: Callable[..., Plan]) -> None:
    rows = Counter({("good", "train"): 85, ("good", "test"): 15, ("good", "val"): 9})
    more = [photo(f"u{n}.jpg", split="train") for n in range(20)] + [photo("v.jpg", split="val")]
    planned = decide(*more, known=Known(classes=("good",), rows=rows, carved=("test",)))
    assert Counter(splits(planned).values()) == {"train": 17, "test": 3, "val": 1}
    assert decide(*more, known=Known(classes=("good",), rows=rows)).carved == ()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_comes_no_group_is_divided_and_no_bytes_are_stored_twice(data: st.DataObject) -> None:
    some = st.builds(
        lambda n, content, label, split, group: photo(f"{n}.jpg", f"c{content}", label=label, split=split, group=group),
        st.integers(0, 10**6),
        st.integers(0, 12),
        st.sampled_from(["good", "bad"]),
        st.sampled_from([None, "train", "val", "test"]),
        st.sampled_from([None, "g1", "g2", "g3"]),
    )
    photographs = data.draw(st.lists(some, max_size=25, unique_by=lambda each: each.item.name))
    known = Known(groups={"g1": data.draw(st.sampled_from(["train", "val", "test"]))})
    examination = Spooled.__new__(Spooled)  # no spool: nothing is read from it
    examination.photographs, examination.findings = photographs, []
    batch = Batch("tire", "b", "incoming/tire/b/", tuple(each.item for each in photographs), (), "content")
    planned = plan(batch, examination, known, SplitRule())
    homes: dict[str, set[str]] = {"g1": {known.groups["g1"]}}
    for photograph, split in planned.rows:
        homes.setdefault(photograph.group, set()).add(split)
    assert all(len(home) == 1 for home in homes.values())
    digests = [photograph.sha256 for photograph, _ in planned.rows]
    assert digests == sorted(set(digests))
    accounted = [each.name for each in planned.findings if RULES[each.reason][0] != "noted"]
    assert sorted(accounted + list(splits(planned))) == sorted(each.item.name for each in photographs)


def test_a_batch_with_too_many_bad_files_is_refused_with_counts_and_examples() -> None:
    items = tuple(photo(f"{n}.jpg").item for n in range(10))
    batch = Batch("tire", "b", "incoming/tire/b/", items, (), "content")
    bad = tuple(Finding("truncated", f"{n}.jpg", "cut off") for n in range(3))
    refuse_if_too_bad(batch, Plan((), bad[:2], ()), 0.2)
    with pytest.raises(
        BatchRefused, match=r"3 of 10 files of incoming/tire/b/ are bad \(3 truncated\).*20%.*0.jpg: cut off"
    ):
        refuse_if_too_bad(batch, Plan((), bad, ()), 0.2)


def test_every_bad_file_is_found_and_every_good_one_read(store: Store, tmp_path: Path, photograph: Made) -> None:
    pixel, huge = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "PNG")
    Image.new("1", (10_000, 6_000)).save(huge, "PNG")
    bad = {
        "truncated": photograph(1, 200)[:-800],
        "too_small": pixel.getvalue(),
        "not_an_image": b"a text, whatever its name",
        "too_large": huge.getvalue(),
        "empty": b"",
        "unsupported_format": photograph(1, 32, "GIF"),
    }
    for reason, data in bad.items():
        storage.write(store, f"incoming/six/b/good/{reason}.jpg", data)
    good = {f"good/{n} of 9.jpg": photograph(100 + n, 40 + n, "PNG" if n % 2 else "JPEG") for n in range(9)}
    storage.write_many(store, ((f"incoming/six/b/{name}", data) for name, data in good.items()))
    with examine(store, read_batch(store, "six", "incoming/six/b/"), tmp_path / "spool") as examination:
        assert {each.name: each.reason for each in examination.findings} == {
            f"good/{reason}.jpg": reason for reason in bad
        }
        assert {each.item.name: examination.bytes_of(each) for each in examination.photographs} == good
        sides = {each.item.name: (each.width, each.height, each.format) for each in examination.photographs}
    assert sides["good/3 of 9.jpg"] == (43, 43, "PNG")


def test_a_file_beyond_the_byte_limit_is_not_even_read(store: Store, tmp_path: Path, photograph: Made) -> None:
    listed = BatchItem("incoming/none/b/", "good/not-there.jpg", 65 * 2**20, "good")
    batch = Batch("none", "b", "incoming/none/b/", (listed,), (), "content")
    with examine(store, batch, tmp_path / "spool") as examination:
        assert [each.reason for each in examination.findings] == ["too_many_bytes"]


@pytest.mark.shared_data
def test_the_faults_of_real_tire_photographs_are_found(store: Store, shared_data: Path, tmp_path: Path) -> None:
    from tasks.sources import upload_folder

    prefix = upload_folder(store, shared_data / "tyre-condition", "tyres", "all")
    batch = read_batch(store, "tyres", prefix)
    with examine(store, batch, tmp_path / "spool") as examination:
        planned = plan(batch, examination, Known(), SplitRule())
    assert Counter(each.reason for each in planned.findings) == {
        "wrong_extension": 156,
        "contradictory_labels": 6,
        "duplicate": 2,
        "twin_across_splits": 1,
        "ignored_file": 1,
        "outlier": 7,
    }
    relabelled = [each.name for each in planned.quarantined if "/neg_" in each.name]
    assert relabelled, "the relabelled photographs are named"
    assert planned.carved == ("test",)
    counts = Counter(split for _, split in planned.rows)
    assert counts["train"] + counts["val"] + counts["test"] == 1123 - 9
    assert abs(counts["test"] - 0.15 * (counts["train"] + counts["test"])) < 2, "less than one for each class"
    assert all(split == "val" for photograph, split in planned.rows if photograph.item.name.startswith("val/"))
