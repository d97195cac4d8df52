"""What differs between two dataset versions, photograph by photograph."""

from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from tasks.dataset import DatasetVersion, open_rows, readable_record
from tasks.storage import Store

_COLUMNS: Final = ("sha256", "label", "split", "source_key")


@dataclass(frozen=True)
class Difference:
    """Photographs by what became of them from `first` to `second`; tables in order of sha256.

    added, removed: sha256, label, split, source_key. relabelled: sha256, was, label, split, source_key. moved: sha256, label,
    was, split, source_key; within one dataset it is always empty.
    """

    first: DatasetVersion
    second: DatasetVersion
    added: pa.Table
    removed: pa.Table
    relabelled: pa.Table
    moved: pa.Table
    unchanged: int

    @property
    def counts(self) -> dict[str, int]:
        kinds = {kind: getattr(self, kind).num_rows for kind in ("added", "removed", "relabelled", "moved")}
        return {**kinds, "unchanged": self.unchanged}

    def as_json(self, limit: int | None = None) -> dict[str, Any]:
        """Plain values; at most `limit` photographs of each kind (None: all)."""
        listed = {kind: getattr(self, kind).slice(0, limit).to_pylist() for kind in self.counts if kind != "unchanged"}
        ends = {
            end: {"name": version.name, "version": version.version, "digest": version.digest}
            for end, version in (("first", self.first), ("second", self.second))
        }
        return {**ends, "counts": self.counts, **listed}


def difference(store: Store, first: DatasetVersion, second: DatasetVersion) -> Difference:
    """What was added, removed, relabelled and moved. Reads the narrow columns only. LookupError for a retired version."""
    before, after = _index(store, first), _index(store, second)
    stayed = before.join(after, "sha256", join_type="inner", left_suffix="_before", right_suffix="").sort_by("sha256")
    relabelled = stayed.filter(pc.not_equal(stayed["label_before"], stayed["label"]))
    moved = stayed.filter(pc.not_equal(stayed["split_before"], stayed["split"]))
    changed = pc.or_(
        pc.not_equal(stayed["label_before"], stayed["label"]), pc.not_equal(stayed["split_before"], stayed["split"])
    )
    return Difference(
        first,
        second,
        added=_others(after, before),
        removed=_others(before, after),
        relabelled=_told(relabelled, "label"),
        moved=_told(moved, "split"),
        unchanged=stayed.num_rows - (pc.sum(changed).as_py() or 0),
    )


def _index(store: Store, version: DatasetVersion) -> pa.Table:
    record = readable_record(store, version.name, version.version)
    return open_rows(store, record).to_table(columns=list(_COLUMNS))


def _others(of: pa.Table, than: pa.Table) -> pa.Table:
    """Rows of the one table whose photograph the other lacks."""
    return of.join(than.select(["sha256"]), "sha256", join_type="left anti").select(_COLUMNS).sort_by("sha256")


def _told(changed: pa.Table, what: str) -> pa.Table:
    """The changed rows with the former value of `what` as `was`."""
    rest = [name for name in ("label", "split", "source_key") if name != what]
    columns = ["sha256", f"{what}_before", what, *rest]
    return changed.select(columns).rename_columns(["sha256", "was", what, *rest])
