"""Whether the latest verdict is worth an alarm. Pure: history in, decision out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Announcement = Literal["detected", "cleared"]


@dataclass(frozen=True)
class AlarmRule:
    """Alarm when the latest window drifted and `drifted` of the last `of` did; the same alarm again after `cool_down` s."""

    drifted: int = 1
    of: int = 1
    cool_down: float = 4 * 3600

    def __post_init__(self) -> None:
        if not 1 <= self.drifted <= self.of:
            raise ValueError(f"an alarm after {self.drifted} of {self.of} windows is impossible: 1 <= drifted <= of")


@dataclass(frozen=True)
class Finding:
    """One drift run as the alarm sees it. at: Unix seconds. window: digest of its records. announced: what it told."""

    at: float
    version: int
    verdict: str
    window: str
    cause: str = ""
    announced: Announcement | None = None


def decide_announcement(history: Sequence[Finding], latest: Finding, rule: AlarmRule) -> Announcement | None:
    """What the latest run announces; None: nothing new. `history`: the runs before it, oldest first.

    Windows of another version do not vote, nor does a window that was seen before, nor one without a verdict; but an alarm
    stays open across versions until some version is quiet.
    """
    votes = _votes([*history, latest], latest.version)[-rule.of :]
    enough = sum(each.verdict == "drifted" for each in votes) >= rule.drifted
    alarm = open_alarm(history)
    if latest.verdict == "quiet":
        return "cleared" if alarm and not enough else None
    if latest.verdict != "drifted" or not enough:
        return None
    return None if _told_lately(history, latest, rule.cool_down) else "detected"


def _told_lately(history: Sequence[Finding], latest: Finding, cool_down: float) -> bool:
    """Whether the same alarm, of this version and cause, was raised within the cool-down and not cleared since."""
    for each in reversed(history):
        if each.announced == "cleared":
            return False
        if each.announced and (each.version, each.cause) == (latest.version, latest.cause):
            return latest.at - each.at < cool_down
    return False


def open_alarm(history: Sequence[Finding]) -> Finding | None:
    """The last alarm that has not been cleared."""
    announced = [each for each in history if each.announced]
    return announced[-1] if announced and announced[-1].announced == "detected" else None


def _votes(findings: Sequence[Finding], version: int) -> list[Finding]:
    """One vote for each window, its newest finding, in order."""
    newest: dict[str, Finding] = {}
    for each in findings:
        if each.version == version and each.verdict != "insufficient":
            newest.pop(each.window, None)
            newest[each.window] = each
    return list(newest.values())
