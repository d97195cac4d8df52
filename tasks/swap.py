"""The switch: publish, load, check, route, while a probe load asks on; undone when a single request failed for it.

Until the routing table is replaced the former champion answers, so every step can be killed and run again. From then on nothing
but a proof keeps the new version: whatever else ends the watch brings the former routing back.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tasks.gates import Gate
from tasks.inference import Accelerator
from tasks.model_repository import FrontDoor, Runtime, install_front_door, publish_version
from tasks.probe import ProbeLoad, SwapProof, judge_swap
from tasks.routing import Route, RoutingChanged, RoutingTable, promoted, read_routing, replace_routing
from tasks.sealed import SealedVersion, read_sealed
from tasks.serving import TritonAddress, load_model

if TYPE_CHECKING:
    from tasks.proof import Golden

STEADY: Final = 200  # answers before the load of the new version begins, and again after the switch


@dataclass(frozen=True)
class Swap:
    """written: the table that made the switch. previous: the version that answered before. proof: what the probes saw; None for
    a first version, which replaces nothing. back: the former routing, in force again because the proof did not hold; None where
    it was not needed, or somebody else had replaced the table by then.
    """

    version: int
    written: RoutingTable
    previous: int | None = None
    proof: SwapProof | None = None
    back: RoutingTable | None = None

    @property
    def undone(self) -> bool:
        return self.proof is not None and not self.proof.holds

    @property
    def figures(self) -> dict[str, float]:
        return self.proof.figures if self.proof else {}

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The swap as the last gate of a promotion."""
        if self.proof is None:
            return ()
        demanded = "0 failed, 0 misrouted, and the new version answers"
        return (Gate("switch under load", self.proof.holds, self.proof.measured, demanded),)


def swap(
    root: Path,
    address: TritonAddress,
    staged: Path,
    golden: "Golden",
    images: Sequence[bytes],
    accelerator: Accelerator,
    late_ms: float,
    capture_share: float,
    revision: int,
) -> Swap:
    """Make the sealed directory `staged` the version that answers. images: encoded photographs for the probe load;
    late_ms: an answer slower than this counts as late. capture_share: of the traffic, for drift. revision: of the routing
    table that makes the switch, as it was announced; RoutingChanged when another switch came first.
    """
    sealed = read_sealed(staged)
    table = read_routing(root, sealed.model)
    after = replace(promoted(table, sealed.model, Route(sealed.network, sealed.version)), revision=revision)
    door = FrontDoor(capture_share=capture_share)
    if table is None:
        bring_up(root, address, staged, golden, accelerator)
        install_front_door(root, sealed.model, door)
        load_model(address, sealed.model)  # says that nothing is in production, until the table is there
        return Swap(sealed.version, replace_routing(root, after))
    install_front_door(root, sealed.model, door)
    load_model(address, sealed.model)  # does nothing unless this build brought another front door
    written: RoutingTable | None = None
    try:
        with ProbeLoad(address, sealed.model, images) as load:
            load.wait_for(STEADY)  # of a champion that cannot answer it is as many failures: it must be replaceable too
            began = time.monotonic()
            bring_up(root, address, staged, golden, accelerator)
            load.wait_for(1)  # somebody watches
            switching = time.monotonic()
            written = replace_routing(root, after)
            switched = time.monotonic()
            load.wait_for(STEADY)
        proof = judge_swap(load.probes, table.champion.version, sealed.version, began, (switching, switched), late_ms)
    except BaseException:
        if written is not None:
            _back(root, table, written)
        raise
    done = Swap(sealed.version, written, table.champion.version, proof)
    return replace(done, back=_back(root, table, written)) if done.undone else done


def _back(root: Path, before: RoutingTable, written: RoutingTable) -> RoutingTable | None:
    try:
        return replace_routing(root, replace(before, revision=written.revision + 1))
    except RoutingChanged:  # a rollback was quicker
        return None


def bring_up(
    root: Path, address: TritonAddress, staged: Path, golden: "Golden", accelerator: Accelerator
) -> SealedVersion:
    """Publish the version, load it beside the others, and compare its golden answers with the proven ones."""
    from tasks.proof import check_golden

    sealed = publish_version(root, staged, Runtime(accelerator=accelerator))
    load_model(address, sealed.network, sealed.version)
    check_golden(address, sealed, golden)
    return sealed
