"""Two versions on the same photographs of production: what one has answered, the other is asked now, and the two are counted.

The photographs come from the front door's capture, so the shadow costs no request a moment; the other version is asked for by
its number, past the front door, by a client of ours.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tasks.decision import decide
from tasks.delivery import Tally
from tasks.images import UnreadableImage, decode
from tasks.production import bundles, collect, rows_of
from tasks.sealed import SealedVersion
from tasks.serving import NotServed, TritonAddress, infer_network
from tasks.storage import Store, read

MOST_IN_A_LOOK: Final = (
    64  # photographs that the other version is asked for: a look must not be the load that it watches
)
LOOK_WITHIN: Final = 20.0  # seconds; no version is asked later in a look, so that one which hangs is judged soon

log = logging.getLogger(__name__)


class NoAnswer(RuntimeError):
    """The version has no answer for this photograph; the message says why."""


@dataclass
class Shadow:
    """Champion and candidate beside each other, since that moment. late_ms: a slower answer counts as late.

    Each captured request is counted once, whatever `look` it is found in.
    """

    store: Store
    spool: Path
    model: str
    address: TritonAddress
    champion: SealedVersion
    candidate: SealedVersion
    late_ms: float
    since: datetime
    _read: set[str] = field(default_factory=set)
    _counted: set[tuple[str, float]] = field(default_factory=set)

    def look(self) -> Tally:
        """What has come since the last look. Raises what the network raises; nothing is lost or counted twice then."""
        collect(self.store, self.spool, self.model)
        fresh = list(self._fresh())
        self._read |= {key for _, key, _ in fresh}
        total, asked, until = Tally(), 0, time.monotonic() + LOOK_WITHIN
        for version, _, rows in fresh:
            for row in filter(self._is_new, rows):
                may_ask = asked < MOST_IN_A_LOOK and time.monotonic() < until
                counted, has_asked = self._count(version, row, may_ask)
                total, asked = total + counted, asked + has_asked
        return total

    def _fresh(self) -> Iterator[tuple[SealedVersion, str, list[dict[str, Any]]]]:
        """(who answered, bundle, its rows), what was not read before."""
        for version in (self.candidate, self.champion):
            for bundle in bundles(self.store, self.model, version.version, self.since):
                if bundle.key not in self._read and bundle.last / 1000 + 0.001 >= self.since.timestamp():
                    yield version, bundle.key, rows_of(read(self.store, bundle.key)).to_pylist()

    def _is_new(self, row: dict[str, Any]) -> bool:
        identity = (row["request_id"], row["captured_at"])
        if identity in self._counted or row["captured_at"] < self.since.timestamp():
            return False
        self._counted.add(identity)
        return True

    def _count(self, version: SealedVersion, row: dict[str, Any], may_ask: bool) -> tuple[Tally, bool]:
        """(what the request adds, whether the other version was asked)."""
        if version is self.champion:
            return (self._by_champion(row), True) if may_ask and not row["error"] else (Tally(), False)
        if row["error"]:
            log.warning("request %s: %s", row["request_id"], row["error"])
            return Tally(served=1, answers=1, errors=1), False
        served = Tally(served=1, answers=1, answered=1, late=int(row["milliseconds"] > self.late_ms))
        if not may_ask:
            return served, False
        try:
            label, _ = self._ask(self.champion, row["image"])
        except NoAnswer as why:
            log.warning("request %s, asked of the champion too: %s", row["request_id"], why)
            return served, True
        return served + self._pair(champion=label, candidate=row["label"]), True

    def _by_champion(self, row: dict[str, Any]) -> Tally:
        try:
            label, milliseconds = self._ask(self.candidate, row["image"])
        except NoAnswer as why:
            return self._unanswered(row, why)
        answered = Tally(answers=1, answered=1, late=int(milliseconds > self.late_ms))
        return answered + self._pair(champion=row["label"], candidate=label)

    def _unanswered(self, row: dict[str, Any], why: NoAnswer) -> Tally:
        """An error of the candidate, unless the champion cannot answer now either: then it is the server that is ill."""
        try:
            self._ask(self.champion, row["image"])
        except NoAnswer as too:
            log.warning("neither version answers request %s: %s; %s", row["request_id"], why, too)
            return Tally()
        log.warning("request %s in the shadow: %s", row["request_id"], why)
        return Tally(answers=1, errors=1)

    def _ask(self, version: SealedVersion, image: bytes) -> tuple[str, float]:
        """(label, milliseconds). Raises NoAnswer."""
        try:
            pixels = decode(image, version.image_size, version.preprocessing)[None]
            began = time.perf_counter()
            probabilities = infer_network(self.address, version.network, version.version, pixels)
        except (UnreadableImage, NotServed) as error:
            raise NoAnswer(str(error)) from error
        return label_of(probabilities, version), (time.perf_counter() - began) * 1000

    def _pair(self, champion: str, candidate: str) -> Tally:
        """Labels are compared by name: the two may have been trained on different classes."""
        theirs, ours = champion in self.champion.rule.defect_labels, candidate in self.candidate.rule.defect_labels
        is_binary = bool(self.champion.rule.defect_labels)
        return Tally(
            pairs=1,
            disagreements=int(champion != candidate),
            defects=int(theirs),
            missed=int(theirs and not ours),
            good=int(is_binary and not theirs),
            overcalled=int(is_binary and not theirs and ours),
        )


def label_of(probabilities: NDArray[np.float32], version: SealedVersion) -> str:
    """The decision by the version's own rule. Raises NoAnswer for what is no number: it would pass as good."""
    if not np.isfinite(probabilities).all():
        raise NoAnswer(f"{version.network} version {version.version} gave no number for this photograph")
    return version.rule.labels[int(decide(probabilities, version.rule)[0])]
