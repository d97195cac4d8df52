"""Which photographs show the same picture: hashes propose pairs, registered pixels confirm them, confirmed pairs make groups.

Pure: hashes and tiles in, pairs and groups out. Hashes alone chain a third of the solar cells together: docs/decisions.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from tasks.hash_index import Hashes, HashIndex, Positions
from tasks.twin_rule import TwinRule

Pairs = NDArray[np.int64]  # [P, 2] positions: the smaller one first, in rising order, no pair twice
Tile = NDArray[np.uint8]  # [SIDE, SIDE] grey
_Real = NDArray[np.float32]

SIDE: Final = 64  # a tile is 4 KB

_NEIGHBOURHOOD: Final = 6.0  # tile pixels (standard deviation) over which mean and contrast are local
_NOISE: Final = 2.0  # grey levels of contrast that count for little: compression, not picture
_EMPTY: Final = 1.0  # grey levels: a tile with less detail shows nothing that could be recognised
_HOPELESS: Final = 0.5  # correlation of 16x16 detail below which registering was never worth while
_EDGE: Final = 4  # tile pixels at the border that a crop or shift may have changed
_MOST_SHIFT: Final = 6.0  # tile pixels; of a 300-pixel photograph 28
_MOST_STRETCH: Final = 0.12
_STEPS: Final = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 5, 1e-3)  # more steps confirmed nothing more
_EVERYWHERE: Final = np.full((SIDE, SIDE), 255, dtype=np.uint8)
_ONTO: Final = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
_CENTRE: Final = np.array([(SIDE - 1) / 2, (SIDE - 1) / 2, 1.0])
_KEPT: Final = 256  # prepared tiles: 4 MB


@dataclass(frozen=True)
class Proposals:
    """Pairs whose pixels are worth comparing. `cut`: photographs with more near hashes than are followed up."""

    pairs: Pairs
    cut: Positions


def proposed(hashes: Hashes, rule: TwinRule, first_new: int = 0) -> Proposals:
    """Pairs of photographs with near hashes of which at least one is new: those from position `first_new` on."""
    if rule.hash_distance == 0 or first_new >= len(hashes):
        return Proposals(np.zeros((0, 2), np.int64), np.zeros(0, np.int64))
    near = HashIndex(hashes).near(hashes[first_new:], rule.hash_distance)
    return Proposals(_ordered(np.stack([near.queries + first_new, near.stored], axis=1)), near.cut + first_new)


def tile(pixels: NDArray[np.uint8]) -> Tile:
    """[H, W, 3] uint8 RGB -> [SIDE, SIDE] uint8: the luma of the whole picture, all that the confirmation needs of it."""
    luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.resize(luma, (SIDE, SIDE), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def same_picture(first: Tile, second: Tile, rule: TwinRule) -> bool:
    """Whether two tiles show one picture."""
    return _confirms(_detailed(first), _detailed(second), rule)


def likeness(first: Tile, second: Tile) -> float:
    """-1 to 1: correlation of the detail of two tiles after registration; 0 where one is empty or they cannot be registered."""
    one, other = _detailed(first), _detailed(second)
    return 0.0 if one is None or other is None else _registered(one, other)


def confirmed(pairs: Pairs, tile_of: Callable[[int], Tile], rule: TwinRule) -> Pairs:
    """Those of the pairs whose registered pixels agree.

    Pairs are taken in rising order and the tiles of the last few hundred photographs are kept, so `tile_of` is seldom asked
    twice for a position.
    """
    detail_of = lru_cache(maxsize=_KEPT)(lambda position: _detailed(tile_of(position)))
    found = [(one, other) for one, other in pairs.tolist() if _confirms(detail_of(one), detail_of(other), rule)]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class _Detail:
    """What tells a picture from others of its kind. fine [SIDE, SIDE]; coarse [196] of unit length."""

    fine: _Real
    coarse: _Real


def _detailed(given: Tile) -> _Detail | None:
    """The tile about its local mean in units of its local contrast: light and vignetting do not count. None: it is empty."""
    grey = cv2.GaussianBlur(given.astype(np.float32), (0, 0), 0.7, borderType=cv2.BORDER_REFLECT)
    high = grey - cv2.GaussianBlur(grey, (0, 0), _NEIGHBOURHOOD, borderType=cv2.BORDER_REFLECT)
    if high.std() < _EMPTY:
        return None
    contrast = np.sqrt(cv2.GaussianBlur(high * high, (0, 0), _NEIGHBOURHOOD, borderType=cv2.BORDER_REFLECT))
    fine = np.asarray(high / (contrast + _NOISE), dtype=np.float32)
    coarse = np.asarray(cv2.resize(fine, (16, 16), interpolation=cv2.INTER_AREA), dtype=np.float32)
    return _Detail(fine, _unit(coarse[1:-1, 1:-1]))


def _confirms(one: _Detail | None, other: _Detail | None, rule: TwinRule) -> bool:
    if one is None or other is None or float(one.coarse @ other.coarse) < _HOPELESS:
        return False
    return _correlation(one.fine, other.fine) >= rule.likeness or _registered(one, other) >= rule.likeness


def _registered(one: _Detail, other: _Detail) -> float:
    """Correlation once the other is moved, scaled and turned onto the one (ECC: Evangelidis and Psarakis, TPAMI 30, 2008)."""
    if one.fine.tobytes() > other.fine.tobytes():
        one, other = other, one  # the same answer whichever comes first
    start = np.eye(2, 3, dtype=np.float32)
    try:
        _, move = cv2.findTransformECC(one.fine, other.fine, start, cv2.MOTION_AFFINE, _STEPS, _EVERYWHERE, 1)
    except cv2.error:  # it says so when two pictures have nothing in common: no step makes them more alike
        return 0.0
    if (
        np.abs(move[:, :2] - np.eye(2)).max() > _MOST_STRETCH
        or np.abs(move @ _CENTRE - _CENTRE[:2]).max() > _MOST_SHIFT
    ):
        return 0.0
    moved = cv2.warpAffine(other.fine, move, (SIDE, SIDE), flags=_ONTO, borderMode=cv2.BORDER_REFLECT)
    return _correlation(one.fine, np.asarray(moved, dtype=np.float32))


def _correlation(one: _Real, other: _Real) -> float:
    inner = slice(_EDGE, SIDE - _EDGE)
    return float(_unit(one[inner, inner]) @ _unit(other[inner, inner]))


def _unit(values: _Real) -> _Real:
    flat = values.ravel() - values.mean()
    return np.asarray(flat / max(float(np.sqrt(flat @ flat)), 1e-6), dtype=np.float32)


@dataclass(frozen=True)
class Groups:
    """`of` [N]: for each photograph the smallest position in its group.

    `oversized`: the photographs that confirmed pairs would join beyond the rule's limit, one array for each such group. In `of`
    each of them is with a leader whose picture it was confirmed to be, or alone.
    """

    of: Positions
    oversized: tuple[Positions, ...]


def grouped(
    count: int, pairs: Pairs, rule: TwinRule, given: Positions | None = None, total: int | None = None
) -> Groups:
    """Groups of `count` photographs from confirmed pairs.

    given [N]: equal numbers for photographs that are known to belong together (an annotated tire, a stored group); those are
    never divided, whatever their size. total: photographs of the whole set, where only some take part. The answer depends on
    positions only, so a caller that orders by sha256 gets the same groups for the same photographs.
    """
    member = np.arange(count) if given is None else np.unique(given, return_inverse=True)[1]
    weights = np.bincount(member)
    links = _ordered(member[pairs])
    joined = _components(len(weights), links)
    limit = rule.largest_group(count if total is None else total)
    several = np.bincount(joined, minlength=len(weights)) > 1
    beyond = np.flatnonzero(several & (np.bincount(joined, weights, len(weights)) > limit))
    oversized = tuple(np.flatnonzero(joined[member] == each) for each in beyond)
    for each in beyond:
        _divide(joined, links[joined[links[:, 0]] == each], weights, limit)
    _, first, group = np.unique(joined[member], return_index=True, return_inverse=True)
    return Groups(first[group], oversized)


def _divide(joined: Positions, links: Pairs, weights: Positions, limit: int) -> None:
    """Makes stars of one component, in place: who has most links leads, its free neighbours follow while the limit has room."""
    both = np.concatenate([links, links[:, ::-1]])
    both = both[np.lexsort((both[:, 1], both[:, 0]))]
    units, starts, degrees = np.unique(both[:, 0], return_index=True, return_counts=True)
    joined[units] = -1
    for at in np.lexsort((units, -degrees)):
        leader = units[at]
        if joined[leader] >= 0:
            continue
        joined[leader] = leader
        room = limit - weights[leader]
        for follower in both[starts[at] : starts[at] + degrees[at], 1]:
            if joined[follower] < 0 and weights[follower] <= room:
                joined[follower] = leader
                room -= weights[follower]


def _components(units: int, links: Pairs) -> Positions:
    """[U]: the smallest unit that each unit is connected with. Hooks the higher root to the lower, then shortens the ways."""
    root = np.arange(units)
    while True:
        low, high = np.sort(root[links], axis=1).T
        if np.array_equal(low, high):
            return root
        np.minimum.at(root, high, low)
        while not np.array_equal(root, root[root]):
            root = root[root]


def _ordered(pairs: Pairs) -> Pairs:
    """Smaller position first, each pair once, none with itself, in rising order."""
    low, high = np.sort(pairs.reshape(-1, 2), axis=1).T
    keys = np.unique((low << 32 | high)[low < high])
    return np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=1)
