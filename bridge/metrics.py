"""Counters of the bridge as Prometheus text."""

from collections import Counter
from collections.abc import Mapping
from typing import Final

_PREFIX: Final = "tirewatch_bridge_"
_MOST_LABELS: Final = (
    100  # a sender may invent datasets without end; the monitoring behind this must not grow with them
)

# family -> (its label, what it counts)
COUNTERS: Final[Mapping[str, tuple[str, str]]] = {
    "objects": ("dataset", "Created objects that belong to a batch"),
    "ignored": ("reason", "Created objects that belong to no batch"),
    "repeated": ("what", "Markers and objects told again after the sealing that covers them"),
    "late": ("dataset", "Objects written after the marker of their batch; a newer marker or the sweep takes them in"),
    "bare_markers": ("", "Markers of batches of which no photograph had been told; ingest refuses a batch without any"),
    "sealed": ("by", "Batches whose event Prefect has accepted"),
    "publish_failures": ("", "Attempts to post an event that Prefect did not accept"),
    "refused": ("reason", "Requests that were refused"),
    "sqs_received": ("", "Messages received from the queue"),
    "sqs_deleted": ("", "Messages deleted from the queue after their effect was durable"),
    "sqs_poison": ("", "Messages that nobody understands, each counted once"),
    "sqs_receive_errors": ("", "Attempts to reach the queue that failed"),
}
GAUGES: Final[Mapping[str, str]] = {
    "pending": "Batches that wait for silence or for Prefect",
    "overdue_seconds": "How long the complete batch that has waited longest has been waiting for Prefect",
    "prefect_up": "1 while Prefect answers",
    "sqs_up": "1 while the queue answers",
    "sqs_messages": "Messages in the queue, as it says itself",
    "dead_letters": "Messages kept in the local dead-letter table",
}


class Metrics:
    """Counts since the process started."""

    def __init__(self) -> None:
        # Every counter without labels is there from the start: a rate needs the zero before the first event, and the
        # thread of the queue then never changes the size of the table that a request is reading.
        self._counts: Counter[tuple[str, str]] = Counter(
            {(name, ""): 0 for name, told in COUNTERS.items() if not told[0]}
        )

    def count(self, family: str, label: str = "", by: int = 1) -> None:
        """Raises KeyError for a family that is not in COUNTERS."""
        if COUNTERS[family][0] and (family, label) not in self._counts:
            known = sum(name == family for name, _ in self._counts)
            label = label if known < _MOST_LABELS else "other"
        self._counts[family, label] += by

    def text(self, gauges: Mapping[str, float]) -> str:
        lines = []
        for family, (label, meaning) in COUNTERS.items():
            name = f"{_PREFIX}{family}_total"
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} counter"]
            for (of, value), count in sorted(self._counts.items()):
                if of == family:
                    lines.append(name + (f'{{{label}="{value}"}}' if label else "") + f" {count}")
        for gauge, level in gauges.items():
            name = _PREFIX + gauge
            lines += [f"# HELP {name} {GAUGES[gauge]}", f"# TYPE {name} gauge", f"{name} {level:g}"]
        return "\n".join(lines) + "\n"
