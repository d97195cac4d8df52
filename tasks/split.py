"""In which split each photograph of a batch goes: given splits are honoured, rows never move, every class keeps its shares."""

import hashlib
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from tasks.batch import SPLITS

if TYPE_CHECKING:
    from tasks.checks import Known
    from tasks.examination import Photograph


@dataclass(frozen=True)
class SplitRule:
    """How rows without a given split are divided. The rest is train. `seed` changes the order of the hashes."""

    val: float = 0.15
    test: float = 0.15
    seed: int = 0


def assigned(
    photographs: "Sequence[Photograph]", known: "Known", rule: SplitRule, carved: tuple[str, ...], dataset: str
) -> "Iterator[tuple[Photograph, str]]":
    """Each photograph with its split.

    Given splits are honoured, and a group that the dataset holds stays where it is. The other groups of a class are laid on
    a line in the order of a seeded hash, and the line is cut at the shares: each share holds in every class to less than
    one group. That asks nothing of the rows that are stored, so batches give the same splits in whatever order they come.
    """
    shares = {"train": 1.0 - rule.val - rule.test, "val": rule.val, "test": rule.test}
    carving = {split: share for split, share in shares.items() if split in carved}
    carving["train"] = 1.0 - sum(carving.values())
    home = dict(known.groups)
    members: dict[str, list[Photograph]] = defaultdict(list)
    for each in photographs:
        members[each.group].append(each)
        if each.item.split and not (each.item.split == "train" and carved):
            home.setdefault(each.group, each.item.split)
    given = Counter(
        (each.item.label, home[each.group])
        for each in photographs
        if each.group in home and each.group not in known.groups
    )

    def order(group: str) -> bytes:
        return hashlib.sha256(f"{rule.seed}\0{dataset}\0{group}".encode()).digest()

    lines: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for group in sorted(members.keys() - home.keys(), key=order):
        some = members[group]
        lines[min(each.item.label for each in some), any(each.item.split for each in some)].append(group)
    for (label, is_given), groups in lines.items():
        wanted = carving if is_given else shares
        sizes = [len(members[group]) for group in groups]
        there = {split: given[label, split] for split in wanted}
        home |= zip(groups, _cut(sizes, wanted, there, _fraction(order(groups[0]))), strict=True)
    for group, some in members.items():
        yield from ((each, home[group]) for each in some)


def _cut(sizes: Sequence[int], shares: dict[str, float], there: dict[str, int], phase: float) -> Iterator[str]:
    """The split of each group on the line: train lies in the middle, val and test at the ends.

    sizes: rows of each group. there: rows of the class whose split is given. A group belongs where the point `phase` of its
    length falls (systematic sampling): 0 <= phase < 1, drawn for each batch, so that a share is right on average even where
    batches are too small to hold it (one photograph each, say).
    """
    total = sum(sizes) + sum(there.values())
    missing = {split: max(0.0, share * total - there[split]) for split, share in shares.items()}
    line = [split for split in ("val", "train", "test") if missing.get(split)]
    scale = sum(sizes) / sum(missing.values())
    ends = list(accumulate(missing[split] * scale for split in line))
    begin = 0
    for size in sizes:
        yield line[min(bisect_right(ends, begin + phase * size), len(line) - 1)]
        begin += size


def _fraction(digest: bytes) -> float:
    """A number from 0 up to 1 that the digest does not otherwise show: it was the smallest of its batch."""
    return int.from_bytes(hashlib.sha256(digest).digest()[:6], "big") / 2**48


def carved_splits(photographs: "Sequence[Photograph]", known: "Known") -> tuple[str, ...]:
    """The held-out splits that must come out of the given train rows, so that one exists which nobody selected on."""
    given = {each.item.split for each in photographs} - {None}
    present = {split for (_, split), count in known.rows.items() if count} - set(known.carved)
    if "train" not in given:
        return known.carved
    return tuple(split for split in SPLITS if split != "train" and split not in given | present)


def carved_from(photograph: "Photograph", home: str, known: "Known") -> bool:
    return photograph.item.split == "train" and home in known.carved
