"""Which stored perceptual hashes are near a given one: exact, in small memory, and harmless when many are equal.

A scan of all hashes. Tables of hash parts probe fewer of them, but only for small distances and evenly spread hashes; the scan
takes the same time whatever the photographs are (measured: docs/decisions.md, near-duplicates).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Positions = NDArray[np.int64]

NEAREST: Final = (
    64  # stored hashes proposed for one query; more is one picture sent again and again, or an empty picture
)
_CELLS: Final = 2**16  # comparisons at a time: their differences (512 KB) stay in a core's own cache
_SIDE_BY_SIDE: Final = 8  # queries among them, so that a block of stored hashes is read once for all
_TOGETHER: Final = 128  # queries that go over the stored hashes together
_PENDING: Final = 2**18  # hits kept for them before all but the nearest are dropped: 2 MB


@dataclass(frozen=True)
class Near:
    """`queries[i]` is near `stored[i]`: positions, ordered by query, then bits that differ, then hash, then position.

    `cut`: the queries that have more near hashes than the limit; only their nearest are here.
    """

    queries: Positions
    stored: Positions
    bits: NDArray[np.uint8]
    cut: Positions


@dataclass(frozen=True)
class _Hits:
    """Hits of a few queries. Positions are int32: of the query within its part, of the hash or photograph in the index."""

    query: NDArray[np.int32]
    found: NDArray[np.int32]
    bits: NDArray[np.uint8]


class HashIndex:
    """64-bit hashes, found again by Hamming distance. Memory: at most 20 bytes a hash."""

    def __init__(self, hashes: Hashes) -> None:
        given = np.asarray(hashes, dtype=np.uint64)
        self._order = np.argsort(given, kind="stable").astype(np.int32)  # equal hashes side by side, in the given order
        self._distinct, starts = np.unique(given[self._order], return_index=True)
        self._starts = np.append(starts, len(given)).astype(np.int32)

    @property
    def nbytes(self) -> int:
        """Memory the index holds."""
        return self._order.nbytes + self._distinct.nbytes + self._starts.nbytes

    def near(self, queries: Hashes, distance: int, limit: int = NEAREST, threads: int | None = None) -> Near:
        """Every stored hash that differs from a query in at most `distance` of its 64 bits; none is missed.

        A query with more than `limit` of them gets the nearest (the lowest hash, then the first stored, where bits are equal)
        and is named in `cut`: a hundred thousand black pictures propose 64 pairs each, not ten thousand million together.
        """
        if not 0 <= distance <= 64:
            raise ValueError(f"distance is {distance}: 64-bit hashes differ in 0 to 64 bits")
        if limit < 1:
            raise ValueError(f"limit is {limit}: allow at least one stored hash for each query")
        asked, back = np.unique(np.asarray(queries, dtype=np.uint64), return_inverse=True)
        parts = [asked[start : start + _TOGETHER] for start in range(0, len(asked), _TOGETHER)]

        def search(part: Hashes) -> tuple[_Hits, NDArray[np.int64]]:
            return self._photographs(self._scanned(part, distance, limit), limit)

        with ThreadPoolExecutor(threads or _processors()) as pool:
            found = [*pool.map(search, parts)] if len(parts) > 1 else [search(part) for part in parts]
        sizes = np.concatenate([_NONE, *(np.bincount(hits.query, minlength=_TOGETHER) for hits, _ in found)])
        stored = np.concatenate([_NONE, *(hits.found for hits, _ in found)])
        bits = np.concatenate([_NONE.astype(np.uint8), *(hits.bits for hits, _ in found)])
        cut = np.concatenate([_NONE, *(number * _TOGETHER + cut for number, (_, cut) in enumerate(found))])
        at, counts = _spread(sizes, back)
        return Near(np.repeat(np.arange(len(back)), counts), stored[at], bits[at], np.flatnonzero(np.isin(back, cut)))

    def _scanned(self, queries: Hashes, distance: int, limit: int) -> _Hits:
        """The `limit` + 1 nearest distinct hashes of each query: one more than allowed tells that there are more."""
        height = min(len(queries), _SIDE_BY_SIDE)
        width = _CELLS // height
        differences = np.empty((height, width), dtype=np.uint64)
        counts = np.empty((height, width), dtype=np.uint8)
        bound = np.full(
            len(queries), distance, dtype=np.uint8
        )  # falls once a query has enough: later ones must be nearer
        kept: list[_Hits] = []
        pending = 0
        for start in range(0, len(self._distinct), width):
            block = self._distinct[start : start + width]
            for first in range(0, len(queries), height):
                some = slice(first, min(first + height, len(queries)))
                used = slice(some.stop - first), slice(len(block))
                np.bitwise_xor(queries[some, None], block, out=differences[used])
                bits = np.bitwise_count(differences[used], out=counts[used])
                near = bits <= bound[some, None]
                if not near.any():
                    continue
                query, found = np.nonzero(near)
                kept.append(_Hits((query + first).astype(np.int32), (found + start).astype(np.int32), bits[near]))
                pending += len(query)
                if pending > _PENDING:
                    kept = [_nearest(kept, limit + 1)]
                    pending = len(kept[0].query)
                    sizes = np.bincount(kept[0].query, minlength=len(queries))
                    full = sizes > limit
                    bound[full] = kept[0].bits[np.cumsum(sizes)[full] - 1] - 1
        return _nearest(kept, limit + 1)

    def _photographs(self, hits: _Hits, limit: int) -> tuple[_Hits, NDArray[np.int64]]:
        """Positions as they were given, for distinct hashes; and the queries that had more than `limit`."""
        starts = self._starts[hits.found]
        lengths = np.minimum(self._starts[hits.found + 1] - starts, limit + 1)
        at = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        query = np.repeat(hits.query, lengths)
        ranks = _ranks(query)
        allowed = ranks < limit
        photographs = _Hits(query[allowed], self._order[at][allowed], np.repeat(hits.bits, lengths)[allowed])
        return photographs, np.unique(query[~allowed]).astype(np.int64)


_NONE: Final = np.zeros(0, dtype=np.int64)


def _nearest(hits: list[_Hits], limit: int) -> _Hits:
    """Of each query the `limit` hits with the fewest bits, then the lowest hash; ordered by query."""
    if not hits:
        return _Hits(_NONE.astype(np.int32), _NONE.astype(np.int32), _NONE.astype(np.uint8))
    query, found, bits = (
        np.concatenate(each) for each in zip(*((h.query, h.found, h.bits) for h in hits), strict=True)
    )
    order = np.lexsort((found, bits, query))
    order = order[_ranks(query[order]) < limit]
    return _Hits(query[order], found[order], bits[order])


def _ranks(ordered: NDArray[np.int32]) -> NDArray[np.int64]:
    """[3, 3, 3, 7, 7] -> [0, 1, 2, 0, 1]."""
    _, starts, counts = np.unique(ordered, return_index=True, return_counts=True)
    return np.arange(len(ordered)) - np.repeat(starts, counts)


def _spread(sizes: NDArray[np.int64], back: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the answers of each original query lie, when those of distinct queries lie one after the other; their counts."""
    starts = np.cumsum(sizes) - sizes
    counts = sizes[back]
    shift = np.repeat(starts[back] - np.cumsum(counts) + counts, counts)
    return shift + np.arange(counts.sum()), counts


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
