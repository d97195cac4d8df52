"""The routing table: which version of which network model answers for a public model. One JSON file, replaced atomically.

Promotion is the replacement of this file; rollback is another. The front door reads it again when it has changed.
Standard library only, because the serving environment imports this module too.
"""

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks.sealed import write_durably


class RoutingChanged(RuntimeError):
    """Somebody else replaced the table meanwhile; nothing was written."""


@dataclass(frozen=True)
class Route:
    """One version of one network model, e.g. `tire_onnx_224`, 7."""

    network: str
    version: int


@dataclass(frozen=True)
class RoutingTable:
    """Who answers for `model`.

    previous: what a rollback goes back to; it stays loaded.
    challenger: answers the share [0, 1] of requests, and all requests of these lines (canary); None, 0.0 and () otherwise.
    until: Unix seconds after which the champion answers everything again, so that nobody must be alive to end a canary;
    None: no end. revision: counts the changes of this table, beginning at 1. changed_at: UTC, ISO 8601.
    """

    model: str
    champion: Route
    previous: Route | None = None
    challenger: Route | None = None
    share: float = 0.0
    lines: tuple[str, ...] = ()
    until: float | None = None
    revision: int = 1
    changed_at: str = ""

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share {self.share} of the challenger is outside [0, 1]")
        if (self.share > 0 or self.lines) and self.challenger is None:
            what = f"a share of {self.share}" if self.share > 0 else f"the lines {', '.join(self.lines)}"
            raise ValueError(f"{what} needs a challenger to answer it")

    @property
    def has_canary(self) -> bool:
        """Whether a challenger answers anybody, as long as `until` has not come."""
        return self.challenger is not None and (self.share > 0 or bool(self.lines))

    @property
    def routes(self) -> tuple[Route, ...]:
        """Everything a server must keep loaded for this table."""
        return tuple(dict.fromkeys(route for route in (self.champion, self.previous, self.challenger) if route))


def promoted(table: RoutingTable | None, model: str, champion: Route) -> RoutingTable:
    """The table after `champion` took over: the former one becomes `previous`, a challenger is dismissed."""
    if table is None:
        return RoutingTable(model, champion)
    previous = table.previous if table.champion == champion else table.champion
    return RoutingTable(model, champion, previous, revision=table.revision + 1)


def challenged(
    table: RoutingTable, challenger: Route, share: float, lines: Sequence[str] = (), until: float | None = None
) -> RoutingTable:
    """The table with this challenger beside the champion, until then; in the place of one that is there."""
    return replace(
        table, challenger=challenger, share=share, lines=tuple(lines), until=until, revision=table.revision + 1
    )


def unchallenged(table: RoutingTable) -> RoutingTable:
    """The table in which the champion answers alone."""
    return replace(table, challenger=None, share=0.0, lines=(), until=None, revision=table.revision + 1)


def routing_file(root: Path, model: str) -> Path:
    return root / "routing" / f"{model}.json"


def read_routing(root: Path, model: str) -> RoutingTable | None:
    """The table in force; None when no version of the model is in production. Raises ValueError when it is damaged."""
    path = routing_file(root, model)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        body = json.loads(text)
        routes = {name: _route(body.pop(name)) for name in ("champion", "previous", "challenger")}
        if routes["champion"] is None:
            raise ValueError("no champion")
        body["lines"] = tuple(body.get("lines", ()))
        table = RoutingTable(**body, **routes)  # type: ignore[arg-type]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is no routing table ({error}): write it again with the promote or rollback flow"
        ) from None
    if table.model != model:
        raise ValueError(f"{path} routes {table.model!r}, not {model!r}: a table carries the name of its model")
    return table


def write_routing(root: Path, table: RoutingTable) -> RoutingTable:
    """Put the table in force, atomically and durably; stamps the time. Returns what was written."""
    stamped = replace(table, changed_at=datetime.now(UTC).isoformat(timespec="milliseconds"))
    path = routing_file(root, table.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(asdict(stamped), indent=2) + "\n")
    return stamped


def replace_routing(root: Path, table: RoutingTable) -> RoutingTable:
    """`write_routing`, but only while the table in force is the one right before it, by their revisions (1 follows on none).

    Raises RoutingChanged otherwise: of two that read the same table and replace it, one is told so.
    """
    with _alone(root, table.model):
        present = read_routing(root, table.model)
        revision = present.revision if present else 0
        if table.revision != revision + 1:
            raise RoutingChanged(
                f"the routing table of {table.model} is at revision {revision}, and {table.revision} was to follow on "
                f"{table.revision - 1}: another promotion or rollback came first; look at `tirewatch ledger {table.model}` "
                "and run this one again if it is still wanted"
            )
        return write_routing(root, table)


@contextmanager
def _alone(root: Path, model: str) -> Iterator[None]:
    """No other process of this machine replaces the model's table in the block; the kernel drops the lock with the process."""
    path = root / "routing" / f".{model}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _route(body: dict[str, Any] | None) -> Route | None:
    return None if body is None else Route(str(body["network"]), int(body["version"]))
