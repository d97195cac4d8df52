"""Whether a service that the bridge depends on answers: growing pauses, and two log lines an outage instead of thousands."""

import logging
import time
from typing import Final

logger: Final = logging.getLogger(__name__)

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0


class Availability:
    """One service by its name. away_since: Unix time of the first failure since it last answered."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.away_since: float | None = None
        self._pause = FIRST_PAUSE
        self._next_try = 0.0

    def failed(self, error: object) -> float:
        """It did not answer; seconds until the next attempt makes sense."""
        if self.away_since is None:
            self.away_since, self._pause = time.time(), FIRST_PAUSE
            logger.warning(
                "%s does not answer; trying again at least every %.0f s: %.500s", self.name, LONGEST_PAUSE, error
            )
        else:
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._next_try = time.monotonic() + self._pause
        return self._pause

    def answered(self) -> None:
        if self.away_since is not None:
            logger.warning("%s answers again after %.0f s", self.name, time.time() - self.away_since)
            self.away_since = None
            self._next_try = 0.0

    def may_try(self) -> bool:
        """Whether the pause after the last failure is over."""
        return time.monotonic() >= self._next_try

    @property
    def state(self) -> str:
        return "ok" if self.away_since is None else "away"
