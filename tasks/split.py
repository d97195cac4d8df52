"""In which split each photograph of a batch goes: given splits are honoured, rows never move, every class keeps its shares."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

    Given splits are honoured. The others go group by group, in the order of a seeded hash of the group, each to the split
    that is furthest below its share of the group's class: shares hold in every class even where there are few photographs,
    and no row that is already stored ever moves.
    """
    shares = {"train": 1.0 - rule.val - rule.test, "val": rule.val, "test": rule.test}
    carving = {split: share for split, share in shares.items() if split in carved}
    carving["train"] = 1.0 - sum(carving.values())
    home = dict(known.groups)
    for each in photographs:
        if each.item.split and not (each.item.split == "train" and carved):
            home.setdefault(each.group, each.item.split)
    rows = Counter(known.rows)
    members: dict[str, list[Photograph]] = defaultdict(list)
    for each in photographs:
        members[each.group].append(each)
        if each.group in home and each.group not in known.groups:
            rows[each.item.label, home[each.group]] += 1

    def order(group: str) -> bytes:
        return hashlib.sha256(f"{rule.seed}\0{dataset}\0{group}".encode()).digest()

    for group in sorted(members, key=order):
        some = members[group]
        label = min(each.item.label for each in some)
        if group not in home:
            wanted = carving if any(each.item.split for each in some) else shares
            home[group] = _furthest_below(wanted, {split: rows[label, split] for split in SPLITS}, len(some))
            rows[label, home[group]] += len(some)
        yield from ((each, home[group]) for each in some)


def _furthest_below(shares: dict[str, float], rows: dict[str, int], coming: int) -> str:
    """The split with the greatest shortfall once `coming` more rows are there; train first where two are equal."""
    total = sum(rows[split] for split in shares) + coming
    wanted = [split for split in SPLITS if shares.get(split, 0.0) > 0.0]
    return max(wanted, key=lambda split: shares[split] * total - rows[split])


def carved_splits(photographs: "Sequence[Photograph]", known: "Known") -> tuple[str, ...]:
    """The held-out splits that must come out of the given train rows, so that one exists which nobody selected on."""
    given = {each.item.split for each in photographs} - {None}
    present = {split for (_, split), count in known.rows.items() if count} - set(known.carved)
    if "train" not in given:
        return known.carved
    return tuple(split for split in SPLITS if split != "train" and split not in given | present)


def carved_from(photograph: "Photograph", home: str, known: "Known") -> bool:
    return photograph.item.split == "train" and home in known.carved
