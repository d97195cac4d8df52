"""Near-duplicates of a batch's photographs, among themselves and in the dataset: which group each one joins.

The tests are `tasks/near_duplicates.py`; this module brings them the hashes and pixels, and says what they mean for the splits:
photographs that show one picture share a group, a group never stands in two splits, and stored rows never move.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.batch import SPLITS, Finding
from tasks.examination import Examination, Photograph
from tasks.images import decode_full
from tasks.near_duplicates import Pairs, Tile, confirmed, grouped, proposed, tile
from tasks.storage import Store
from tasks.twin_rule import TwinRule

if TYPE_CHECKING:
    from tasks.dataset import Record

_AHEAD: Final = 64  # stored photographs read at a time: one request each would cost 5 ms
_COLUMNS: Final = ("sha256", "phash", "label", "group", "split")


@dataclass(frozen=True)
class Twins:
    """What near-duplicates mean for the photographs of a batch.

    groups: sha256 of a new photograph -> the group that it shares with its twins. homes: of these groups, those with stored
    rows -> the split they stand in. across: sha256 -> why the photograph would bring one picture into two splits.
    findings: what to report, once for each photograph with a twin and each group that was too large to be one.
    """

    groups: Mapping[str, str] = field(default_factory=dict)
    homes: Mapping[str, str] = field(default_factory=dict)
    across: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    def grouped(self, photographs: Sequence[Photograph]) -> list[Photograph]:
        """The photographs, those with twins in the group they share."""
        return [
            replace(each, twin_group=self.groups[each.sha256]) if each.sha256 in self.groups else each
            for each in photographs
        ]


NO_TWINS: Final = Twins()


def find_twins(store: Store, base: "Record | None", examination: Examination, rule: TwinRule) -> Twins:
    """Near-duplicates of the examined photographs. Reads the pixels of stored photographs only where hashes propose them."""
    if rule.hash_distance == 0 or not examination.photographs:
        return NO_TWINS
    stored = _stored(store, base)
    new = sorted({each.sha256: each for each in examination.photographs}.values(), key=_sha)
    known = pc.is_in(pa.array([each.sha256 for each in new], pa.string()), stored["sha256"]).to_pylist()
    new = [each for each, is_known in zip(new, known, strict=True) if not is_known]
    hashes = np.concatenate([stored["phash"].to_numpy(), np.array([each.phash for each in new], np.uint64)])
    pairs = proposed(hashes, rule, first_new=stored.num_rows).pairs
    if not len(pairs):
        return NO_TWINS

    def tile_of_new(position: int) -> Tile:
        return tile(decode_full(examination.bytes_of(new[position - stored.num_rows])))

    needed = sorted({int(position) for position in pairs.ravel() if position < stored.num_rows})
    tile_of_stored = _StoredTiles(store, base, needed)
    pairs = confirmed(pairs, lambda at: tile_of_stored(at) if at < stored.num_rows else tile_of_new(at), rule)
    return _meaning(stored, new, pairs, rule)


def _sha(photograph: Photograph) -> str:
    return photograph.sha256


def _stored(store: Store, base: "Record | None") -> pa.Table:
    from tasks.dataset import open_rows

    if base is None:
        types = {name: pa.uint64() if name == "phash" else pa.string() for name in _COLUMNS}
        return pa.table({name: pa.array([], kind) for name, kind in types.items()})
    return open_rows(store, base).to_table(columns=list(_COLUMNS))


class _StoredTiles:
    """Tiles of stored photographs, read in rising order some at a time; a position asked for again much later is read again."""

    def __init__(self, store: Store, base: "Record | None", needed: Sequence[int]) -> None:
        self._take: Callable[[list[int]], list[bytes]] = _reader(store, base)
        self._needed = np.array(needed, np.int64)
        self._tiles: dict[int, Tile] = {}

    def __call__(self, position: int) -> Tile:
        if position not in self._tiles:
            first = int(np.searchsorted(self._needed, position))
            some = self._needed[first : first + _AHEAD].tolist()
            self._tiles = {at: tile(decode_full(data)) for at, data in zip(some, self._take(some), strict=True)}
        return self._tiles[position]


def _reader(store: Store, base: "Record | None") -> Callable[[list[int]], list[bytes]]:
    from tasks.dataset import open_rows

    if base is None:
        return lambda some: []
    table = open_rows(store, base)
    return lambda some: list(table.take(some, columns=["image"])["image"].to_pylist())


@dataclass(frozen=True)
class _Party:
    """A photograph that takes part: a stored row (split set) or a new photograph (sha256 set)."""

    name: str
    group: str
    label: str
    split: str | None = None
    sha256: str | None = None


def _meaning(stored: pa.Table, new: Sequence[Photograph], pairs: Pairs, rule: TwinRule) -> Twins:
    """Groups, splits and findings from confirmed pairs of positions: stored rows first, then the new photographs."""
    annotated = [stored.num_rows + at for at, each in enumerate(new) if each.item.group]
    part = np.union1d(pairs.ravel(), np.array(annotated, np.int64))
    rows = stored.take(part[part < stored.num_rows]).to_pylist()
    parties = [_Party(f"{row['sha256'][:12]} in the dataset", row["group"], row["label"], row["split"]) for row in rows]
    taking = [new[at - stored.num_rows] for at in part[part >= stored.num_rows].tolist()]
    parties += [_Party(each.item.name, each.group, each.item.label, sha256=each.sha256) for each in taking]
    links = np.searchsorted(part, pairs)
    given = np.unique([each.group for each in parties], return_inverse=True)[1]
    made = grouped(len(parties), links, rule, given, total=stored.num_rows + len(new))
    names, homes = _names_and_homes(parties, made.of.tolist())

    joined: dict[str, str] = {}
    across: dict[str, str] = {}
    findings: dict[str, Finding] = {}
    for one, other in links.tolist():
        for at, twin in ((one, parties[other]), (other, parties[one])):
            me, group = parties[at], names[int(made.of[at])]
            if me.sha256 is None:
                continue
            joined[me.sha256] = group
            if twin.split not in (None, homes.get(group, twin.split)):
                split = f"{twin.name} stands in {twin.split}, the group it would join in {homes[group]}"
                across[me.sha256] = f"the same picture as others in two splits: {split}"
            found = _finding(me, twin)
            if me.sha256 not in findings or found.reason == "twins_disagree":
                findings[me.sha256] = found
    large = [
        Finding("large_group", parties[some[-1]].name, f"{len(some)} photographs are twins in a chain: divided")
        for some in made.oversized
    ]
    return Twins(joined, homes, across, (*(findings[sha256] for sha256 in sorted(findings)), *large))


def _names_and_homes(parties: Sequence[_Party], group_of: Sequence[int]) -> tuple[dict[int, str], dict[str, str]]:
    """Each group's name: that of its stored rows in the most strictly held-out split, else of its first photograph; and the
    split of those that have stored rows.
    """
    names: dict[int, str] = {}
    homes: dict[str, str] = {}
    members: dict[int, list[_Party]] = defaultdict(list)
    for each, group in zip(parties, group_of, strict=True):
        members[group].append(each)
    for group, some in members.items():
        standing = [each for each in some if each.split is not None]
        first = max(standing, key=lambda each: SPLITS.index(str(each.split)), default=some[0])
        names[group] = first.group
        if first.split is not None:
            homes[first.group] = first.split
    return names, homes


def _finding(me: _Party, twin: _Party) -> Finding:
    if me.label == twin.label:
        return Finding("near_duplicate", me.name, f"nearly the same picture as {twin.name}", me.sha256)
    told = f"nearly the same picture as {twin.name}, which is labelled {twin.label!r} and not {me.label!r}"
    return Finding("twins_disagree", me.name, told, me.sha256)
