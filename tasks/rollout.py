"""Progressive delivery: a proven version in the shadow, then as a canary, withdrawn at the first settled fault.

The champion answers whatever happens: requests that the candidate has no answer for are answered by the champion (front door),
and the table lets the candidate in for a minute at a time, so that a canary ends by itself when nobody renews it.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tasks.delivery import Delivery, Stage, Tally, any_above, gate, stages
from tasks.gates import Gate
from tasks.inference import Accelerator
from tasks.model_repository import listed_versions, remove_version, routed_versions, version_directory
from tasks.routing import Route, RoutingChanged, challenged, read_routing, replace_routing, unchallenged
from tasks.sealed import SealedVersion, read_sealed
from tasks.serving import TritonAddress, load_model, unload_model
from tasks.shadow import Shadow
from tasks.storage import Store, list_objects, read, store_faults, write

if TYPE_CHECKING:
    from tasks.proof import Golden

PREFIX: Final = "deliveries"
LOOK_EVERY: Final = 5.0  # seconds
LEASE: Final = 60.0  # seconds that the table lets the candidate in without being renewed
Tell = Callable[[Stage, Tally], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Server:
    """The live one: its serving root, address and CPU runtime."""

    root: Path
    address: TritonAddress
    accelerator: Accelerator


@dataclass(frozen=True)
class Delivered:
    """One delivery as it is kept on S3 (`deliveries/<model>/<began>-v<version>.json`): for people, and for `who-was`.

    over_by: it lasts no longer than until then, even if it is killed. stages: name, share, lines, began, ended (ISO 8601, UTC;
    empty while it lasts), held, measured, and the counts.
    """

    model: str
    version: int
    champion: int
    who: str
    began: str
    over_by: str
    stages: tuple[dict[str, Any], ...] = ()

    @property
    def key(self) -> str:
        return f"{PREFIX}/{self.model}/{self.began}-v{self.version}.json"


def roll_out(
    server: Server, store: Store, staged: Path, golden: "Golden", how: Delivery, late_ms: float, who: str, tell: Tell
) -> tuple[Gate, ...]:
    """Lead the sealed directory `staged` through every step; each step as a gate, the last one not held where it was withdrawn.

    `staged` stays, for the switch. late_ms: an answer slower than this counts as late. tell: called after each look. Raises
    LookupError without a champion: a first version has nobody to be compared with.
    """
    sealed = read_sealed(staged)
    table = read_routing(server.root, sealed.model)
    if table is None:
        raise LookupError(f"{sealed.model} has no champion: its first version is switched to at once, without delivery")
    champion = read_sealed(
        version_directory(server.root, table.champion.network, table.champion.version), verify_files=False
    )
    began = datetime.now(UTC)
    delivery = _Delivery(
        server=server,
        shadow=Shadow(
            store, server.root / "spool" / sealed.model, sealed.model, server.address, champion, sealed, late_ms, began
        ),
        candidate=Route(sealed.network, sealed.version),
        how=how,
        ends=time.monotonic() + how.minutes * 60,
        revision=table.revision,
        kept=Delivered(
            sealed.model,
            sealed.version,
            champion.version,
            who,
            began=began.isoformat(timespec="milliseconds"),
            over_by=(began + timedelta(minutes=how.minutes, seconds=2 * LEASE)).isoformat(timespec="milliseconds"),
        ),
        tell=tell,
    )
    gates: list[Gate] = []
    try:
        _bring_up(server, staged, golden)
        for stage in stages(how):
            gates.append(delivery.step(stage))
            if not gates[-1].held:
                break
    finally:
        dismiss(server.root, sealed.model, delivery.candidate)
        if not gates or not gates[-1].held:
            withdraw(server, sealed)
    return tuple(gates)


def dismiss(root: Path, model: str, candidate: Route) -> None:
    """The champion answers alone, if the candidate was let in. Harmless otherwise, and when somebody else is quicker."""
    table = read_routing(root, model)
    if table is not None and table.challenger == candidate:
        with suppress(RoutingChanged):
            replace_routing(root, unchallenged(table))


def withdraw(server: Server, sealed: SealedVersion) -> None:
    """The version off the server's memory and disk, unless a table names it."""
    if sealed.version in routed_versions(server.root, sealed.network):
        return
    alone = listed_versions(server.root, sealed.network) == [sealed.version]
    remove_version(server.root, sealed.network, sealed.version)
    if alone:
        unload_model(server.address, sealed.network)
    else:
        load_model(server.address, sealed.network)


def deliveries(store: Store, model: str) -> list[Delivered]:
    """All of the model, the oldest first."""
    found = [json.loads(read(store, each.key)) for each in list_objects(store, f"{PREFIX}/{model}/")]
    return [Delivered(**{**body, "stages": tuple(body["stages"])}) for body in found]


def beside(store: Store, model: str, moment: datetime) -> dict[int, str]:
    """Versions that answered requests beside the champion at the moment, and which requests."""
    found = {}
    for delivery in deliveries(store, model):
        for stage in delivery.stages:
            began = datetime.fromisoformat(stage["began"])
            ended = datetime.fromisoformat(stage["ended"] or delivery.over_by)
            if began <= moment < ended and (stage["share"] or stage["lines"]):
                found[delivery.version] = stage["name"].removeprefix("canary, ")
    return found


@dataclass
class _Delivery:
    """One delivery while it lasts. revision: of the table as this delivery left it; another one is somebody else's."""

    server: Server
    shadow: Shadow
    candidate: Route
    how: Delivery
    ends: float
    revision: int
    kept: Delivered
    tell: Tell
    total: Tally = field(default_factory=Tally)
    let_in_until: float = 0.0

    def step(self, stage: Stage) -> Gate:
        """Look until the step has seen enough, or something speaks against the candidate."""
        began = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.let_in_until = 0.0  # the step before let in others
        self._keep(stage, began)
        while True:
            stage, why_not = self._look(stage)
            judged = gate(stage, self.total, self.how, why_not)
            if judged.held or why_not or any_above(self.total, self.how):
                self._keep(stage, began, judged)
                return judged
            time.sleep(LOOK_EVERY)

    def _look(self, stage: Stage) -> tuple[Stage, str]:
        """(the step with what was seen now, why it cannot go on)."""
        try:
            seen = self.shadow.look()
            self._let_in(stage)
        except RoutingChanged as changed:
            return stage, str(changed)
        except store_faults() as fault:
            # Nobody is let in anew while nobody can look; what the server captures waits in its spool.
            log.warning("nothing can be seen of production at the moment: %s", fault)
            seen = Tally()
        stage = replace(stage, tally=stage.tally + seen)
        self.total += seen
        self.tell(stage, self.total)
        if time.monotonic() > self.ends and stage.done < stage.needed:
            return stage, f"production had shown too little after {self.how.minutes:g} minutes"
        return stage, ""

    def _let_in(self, stage: Stage) -> None:
        """Renew the table's permission in time. Raises RoutingChanged when somebody else has changed the table."""
        table = read_routing(self.server.root, self.kept.model)
        if table is None or table.revision != self.revision:
            raise RoutingChanged(
                f"the routing of {self.kept.model} was changed meanwhile, by a rollback or another switch"
            )
        if stage.canary is None or time.time() < self.let_in_until - LEASE / 2:
            return
        until = time.time() + LEASE
        table = challenged(table, self.candidate, stage.canary.share, stage.canary.lines, until)
        self.revision = replace_routing(self.server.root, table).revision
        self.let_in_until = until

    def _keep(self, stage: Stage, began: str, judged: Gate | None = None) -> None:
        canary = stage.canary
        ended = datetime.now(UTC).isoformat(timespec="milliseconds") if judged else ""
        body = {
            "name": stage.name,
            "share": canary.share if canary else 0.0,
            "lines": list(canary.lines) if canary else [],
            "began": began,
            "ended": ended,
            "held": judged.held if judged else None,
            "measured": judged.measured if judged else "",
            **asdict(stage.tally),
        }
        others = tuple(each for each in self.kept.stages if each["name"] != stage.name)
        self.kept = replace(self.kept, stages=(*others, body))
        write(self.shadow.store, self.kept.key, json.dumps(asdict(self.kept), indent=1).encode())


def _bring_up(server: Server, staged: Path, golden: "Golden") -> None:
    """Loaded on the live server and compared with what was proven; nobody is routed to it. `staged` stays where it is."""
    from tasks.swap import bring_up

    twin = staged.with_name(f"{staged.name}-delivered")
    shutil.rmtree(twin, ignore_errors=True)
    shutil.copytree(staged, twin, copy_function=os.link)
    bring_up(server.root, server.address, twin, golden, server.accelerator)
