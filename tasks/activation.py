"""An imported version takes over at a plant: what was proven elsewhere is compared here, and then switched to like any other.

The gates held where it was trained, on photographs that did not travel. What can be shown here is that this server decides the
golden photographs as the proving plant did, that it is the archive's version, and that nobody noticed the switch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from tasks.engine_stage import is_plan, publish_twin, require_no_rehearsal, why_not_loaded
from tasks.ledger import Entry
from tasks.model_repository import Runtime, restage, version_directory
from tasks.parity import Rung
from tasks.registry import IMPORTED_TAG
from tasks.routing import Route, read_routing
from tasks.sealed import SealedVersion, read_sealed
from tasks.serving import TritonAddress
from tasks.swap import Swap, bring_up, swap
from tasks.transaction import PROMOTED, Place, complete, intend, settle, take_back
from tasks.version_store import upload_version
from tasks.version_transfer import ARCHIVE_TAG, SIGNER_TAG, Plant, answers_alike, sealed_directories

if TYPE_CHECKING:
    from tasks.proof import Golden

LATE_MS: Final = 500.0  # as in the default limits of a promotion


@dataclass(frozen=True)
class Arrival:
    """What came with an imported version. encoded: golden photographs; answers [G, C]: probabilities of the plant it comes
    from; evidence: its archive and who signed it, for the ledger.
    """

    encoded: tuple[bytes, ...]
    answers: NDArray[Any]
    evidence: Mapping[str, str]


@dataclass(frozen=True)
class Activated:
    """The switch, its entry in the ledger, and the golden photographs there against here. entry is None where the switch was
    undone because a request failed and somebody else had changed the routing by then.
    """

    swap: Swap
    entry: Entry | None
    rung: Rung


def activate(
    plant: Plant, address: TritonAddress, model: str, version: int, who: str, why: str, capture_share: float
) -> Activated:
    """Make an imported version the one that answers. capture_share: of the traffic, for drift.

    Raises LookupError for a version that was not imported here, ValueError for a rehearsal or the present champion,
    InvalidArchive or RuntimeError when it decides otherwise here, RoutingChanged when another switch came first.
    """
    place = Place(plant.root, plant.store, plant.tracking_uri, model)
    settle(place, who)
    table = read_routing(plant.root, model)
    if table and table.champion.version == version:
        raise ValueError(f"{model} v{version} is the champion already")
    arrival = arrived(plant.tracking_uri, model, version)
    directory = runnable_directory(plant, address, model, version)
    sealed = read_sealed(directory)
    require_no_rehearsal(sealed)
    golden, rung = golden_here(plant, directory, arrival)
    upload_version(plant.store, directory, golden)
    bring_up(plant.root, address, restage(plant.root, directory), golden, plant.accelerator)
    intention = intend(place, PROMOTED, version, who, why, {**arrival.evidence, "golden": rung.measured})
    done = swap(
        plant.root,
        address,
        restage(plant.root, directory),
        golden,
        arrival.encoded,
        plant.accelerator,
        late_ms=LATE_MS,
        capture_share=capture_share,
        revision=intention.revision,
    )
    if not done.undone:
        return Activated(done, complete(place, intention, done.written, done.figures), rung)
    if done.back:
        told = "; ".join(gate.measured for gate in done.gates)
        return Activated(done, take_back(place, intention, done.written, done.back, told), rung)
    settle(place, who)
    return Activated(done, None, rung)


def arrived(tracking_uri: str, model: str, version: int) -> Arrival:
    """What came with the version. Raises LookupError for one that was not imported here: `promote` proves those."""
    from mlflow.exceptions import MlflowException

    from tasks.registry import client_of

    client = client_of(tracking_uri)
    try:
        registered = client.get_model_version(model, str(version))
    except MlflowException as error:
        raise LookupError(f"{model} v{version} is not registered: import its archive first ({error})") from None
    if IMPORTED_TAG not in registered.tags:
        raise LookupError(
            f"{model} v{version} was trained here and not imported: prove it with promote "
            f"(prefect deployment run 'promote/{model}' -p version={version})"
        )
    with TemporaryDirectory(prefix="tirewatch-") as folder:
        try:
            found = Path(client.download_artifacts(str(registered.run_id), "golden", folder))
        except (MlflowException, OSError) as error:
            raise LookupError(f"{model} v{version} was imported without golden photographs: {error}") from error
        encoded = tuple(path.read_bytes() for path in sorted(found.glob("[0-9]*")))
        told = json.loads((found / "golden.json").read_text())
    evidence = {
        "archive": registered.tags[ARCHIVE_TAG],
        "signed_by": registered.tags.get(SIGNER_TAG, "nobody: imported without a signature"),
        "mlflow_run": str(registered.run_id),
        "trained_in_run": registered.tags[IMPORTED_TAG],
    }
    return Arrival(encoded, np.array(told["probabilities"]), evidence)


def runnable_directory(plant: Plant, address: TritonAddress, model: str, version: int) -> Path:
    """The published directory of the version that this server can run: its plan where it does, else its ONNX network."""
    published = sealed_directories(plant.root, model, version)
    plans = [each for each in published if is_plan(plant.root, Route(each.parent.name, version))]
    if not plans:
        return published[0]
    if why_not_loaded(address, Route(plans[0].parent.name, version)) is None:
        return plans[0]
    twin: SealedVersion = publish_twin(plant.root, plans[0], Runtime(accelerator=plant.accelerator))
    return version_directory(plant.root, twin.network, version)


def golden_here(plant: Plant, directory: Path, arrival: Arrival) -> "tuple[Golden, Rung]":
    """The golden photographs as this machine decodes and decides them, after comparison with the plant they come from."""
    from tasks.images import decode
    from tasks.proof import Golden

    sealed = read_sealed(directory)
    here, rung = answers_alike(plant, f"{sealed.model} v{sealed.version}", directory, arrival.encoded, arrival.answers)
    pixels = np.stack([decode(each, sealed.image_size, sealed.preprocessing) for each in arrival.encoded])
    return Golden(pixels, here), rung
