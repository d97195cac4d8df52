"""The engine that a recipe demands, built for a staged version; and what answers on a server that an engine does not fit."""

import logging
import re
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from tasks.engine_passport import PASSPORT_FILE, EnginePassport, EngineServer, matches, read_passport, write_passport
from tasks.export import Export
from tasks.gates import Gate
from tasks.model_repository import (
    NETWORK_FILE,
    PLAN_FILE,
    list_versions,
    network_name,
    publish_version,
    published_versions,
    routed_versions,
    stage_version,
    version_directory,
)
from tasks.routing import Route, RoutingTable, read_routing, replace_routing
from tasks.sealed import SEAL, SealedVersion, read_sealed, seal
from tasks.staging import THIS_PROCESS, Owner
from tasks.tensorrt_engine import EngineOptions, NoEngine, Tell, announced, build_engine

if TYPE_CHECKING:
    from tasks.model_repository import Runtime
    from tasks.serving import TritonAddress
    from tasks.storage import Store

log = logging.getLogger(__name__)

RTX_FILE: Final = "model.rtx"
# What a server says of a plan that it will refuse again: other library, other card, no card, damaged. Triton's `tensorrt`
# backend (`LoadPlan`) and TensorRT's `deserializeCudaEngine`.
_OF_THE_ENGINE: Final = re.compile(
    r"plan file|TensorRT (engine|runtime)|seriali[sz]ation|version tag|compute capability|incompatible|not compatible"
    r"|no kernel image|backend library|CUDA-capable|support GPU",
    re.IGNORECASE,
)
# What may pass. ("at UNAVAILABLE state" is in every failed load; the status of the call is something else.)
_PASSING: Final = re.compile(
    r"StatusCode\.(UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED|RESOURCE_EXHAUSTED)"
    r"|out of ?memory|memory allocation|failed to allocate|bad_alloc|Cuda Runtime \(",
    re.IGNORECASE,
)


def stage_engine(
    root: Path,
    staged: Path,
    how: Export,
    tell: Tell = log.info,
    store: "Store | None" = None,
    owner: Owner = THIS_PROCESS,
) -> Path:
    """The staged version with the engine that `how` demands; returns the directory to prove and publish.

    tensorrt_rtx: sealed beside the ONNX network, which Triton goes on serving. tensorrt: a version of `<model>_trt_<size>`,
    which holds the plan and everything it was made from. Where it cannot be built, and is required, the version is marked
    as a rehearsal; where it is not required, it stays what it is.

    store: where a run that was killed may have kept this very version. Its engine is taken from there, because no builder
    makes the same bytes twice and a number never holds other bytes. owner: who staged it.
    """
    if how.engine == "onnx":
        return staged
    sealed = read_sealed(staged)
    with TemporaryDirectory() as folder:
        built = Path(folder) / (PLAN_FILE if how.engine == "tensorrt" else RTX_FILE)
        network, options = staged / NETWORK_FILE, options_of(how, root)
        measured_on = sealed.passport.get("calibration_digest")
        try:
            wanted = announced(network, options, sealed.precision, measured_on)
            passport = _kept(store, sealed, wanted, built) if store else None
            if passport is None:
                passport = build_engine(network, built, options, sealed.precision, measured_on, tell)
                write_passport(Path(folder), passport)
            else:
                tell(f"{how.engine}: the engine of {passport.built_at} that S3 keeps with this version is taken")
        except NoEngine as error:
            tell(f"no {how.engine} engine: {error}")
            return _sealed_again(staged, replace(sealed, rehearsal=str(error))) if how.engine_required else staged
        if how.engine == "tensorrt_rtx":
            for name in (RTX_FILE, PASSPORT_FILE):
                shutil.copyfile(Path(folder) / name, staged / name)
            return _sealed_again(staged, sealed)
        beside = {path.name: path for path in staged.iterdir() if path.name != SEAL}
        planned = replace(sealed, network=network_name(sealed.model, sealed.image_size, "trt"), files={})
        made = stage_version(root, built, planned, {**beside, PASSPORT_FILE: Path(folder) / PASSPORT_FILE}, owner)
    shutil.rmtree(staged)
    return made


def _kept(store: "Store", sealed: SealedVersion, wanted: EnginePassport, engine: Path) -> EnginePassport | None:
    """The engine that S3 holds for this version, where it is of the same making and runs here; written to `engine`."""
    from tasks.version_store import fetch_file, stored_version

    planned = wanted.builder == "tensorrt"
    network = network_name(sealed.model, sealed.image_size, "trt") if planned else sealed.network
    there = stored_version(store, network, sealed.version)
    if there is None or not {PASSPORT_FILE, engine.name} <= there.files.keys():
        return None
    fetch_file(store, there, PASSPORT_FILE, engine.with_name(PASSPORT_FILE))
    found = read_passport(engine.parent)
    here = EngineServer(wanted.builder, wanted.builder_version, wanted.compute_capability, wanted.device)
    if found is None or not found.is_of(wanted) or not matches(found, here):
        return None
    fetch_file(store, there, engine.name, engine)
    return found


def options_of(how: Export, root: Path) -> EngineOptions:
    """How the engine of a recipe is built. Timing caches lie in the serving root: they belong to its card."""
    assert how.engine != "onnx"
    return EngineOptions(
        how.engine,
        largest=how.max_batch_size,
        best=how.max_batch_size,
        compute_capability=how.compute_capability,
        hardware_compatible=how.hardware_compatible,
        version_compatible=how.version_compatible,
        timing_cache=root / "timing-caches" if how.engine == "tensorrt" else None,
    )


def _sealed_again(staged: Path, sealed: SealedVersion) -> Path:
    """Unsealed first, so that a crash in between leaves no version whose seal does not say everything."""
    (staged / SEAL).unlink()
    seal(staged, replace(sealed, files={}))
    return staged


def engine_gates(staged: Path, how: Export) -> tuple[Gate, ...]:
    """Whether the staged version has what its recipe demands; nothing where it demands nothing."""
    if how.engine == "onnx":
        return ()
    sealed, passport = read_sealed(staged, verify_files=False), read_passport(staged)
    if passport is not None and passport.builder == how.engine:
        capability = f"for compute capability {passport.compute_capability}, built in {passport.build_seconds:.0f} s"
        return (Gate("engine", True, f"{passport.builder} {passport.builder_version} {capability}", how.engine),)
    if sealed.rehearsal is None:
        return (Gate("engine", True, "the ONNX network answers", f"{how.engine}, or the ONNX network"),)
    return (Gate("engine", False, f"a rehearsal without it: {sealed.rehearsal}", how.engine),)


def require_no_rehearsal(sealed: SealedVersion) -> None:
    """ValueError for a version that is not what its recipe demands: it may never answer anybody."""
    if sealed.rehearsal is not None:
        raise ValueError(
            f"{sealed.model} v{sealed.version} is a rehearsal and cannot be champion: {sealed.rehearsal}; "
            "promote it on a machine where the engine can be built"
        )


def make_answer(root: Path, address: "TritonAddress", model: str, runtime: "Runtime | None" = None) -> str | None:
    """Plans of the table that the running server refuses to load give way to the ONNX networks of their versions; which, why.
    None where nothing has to change, no server is up, or what went wrong is not the plan: that is asked again the next time.

    The version in force stays the same, so the ledger has nothing to say about it.
    """
    from tasks.serving import NotServed, is_version_ready

    table = read_routing(root, model)
    if table is None:
        return None
    plans = [route for route in table.routes if is_plan(root, route)]
    silent = [route for route in plans if not is_version_ready(address, route.network, route.version)]
    if not silent or not is_version_ready(address, model):  # the front door is the last that a starting server loads
        return None
    refused = {}
    for route in silent:
        try:
            if why := why_not_loaded(address, route):
                refused[route] = why
        except NotServed as fault:
            log.warning("the plan %s version %s may still be served: %s", route.network, route.version, fault)
    if not refused:
        return None
    _route_to_twins(root, address, table, refused.keys(), runtime)
    told = "; ".join(f"{route.network} version {route.version}: {why}" for route, why in refused.items())
    return f"{told}: the ONNX network of the same version answers"


def is_plan(root: Path, route: Route) -> bool:
    """Whether the version is a TensorRT plan."""
    return (version_directory(root, route.network, route.version) / PLAN_FILE).exists()


def why_not_loaded(address: "TritonAddress", route: Route) -> str | None:
    """Loads the version; why the server refuses its engine, None where it serves it. Raises NotServed for what may pass."""
    from tasks.serving import NotServed, load_model

    try:
        load_model(address, route.network, route.version)
    except NotServed as refusal:
        if not names_engine(str(refusal)):
            raise
        return str(refusal)
    return None


def names_engine(said: str) -> bool:
    """Whether a server's words about a failed load mean its engine, and not a time-out, a lost call or full memory."""
    return bool(_OF_THE_ENGINE.search(said)) and not _PASSING.search(said)


def _route_to_twins(
    root: Path, address: "TritonAddress", table: RoutingTable, plans: Collection[Route], runtime: "Runtime | None"
) -> None:
    """The table with the ONNX networks of these plans in their places, in force once they are loaded."""
    from tasks.serving import load_model

    def answering(route: Route | None) -> Route | None:
        if route is None or route not in plans:
            return route
        twin = publish_twin(root, version_directory(root, route.network, route.version), runtime)
        return Route(twin.network, twin.version)

    champion, previous, challenger = (answering(each) for each in (table.champion, table.previous, table.challenger))
    assert champion is not None
    after = replace(table, champion=champion, previous=previous, challenger=challenger, revision=table.revision + 1)
    added = [route for route in after.routes if route not in table.routes]
    for network in {route.network for route in added}:
        versions = {route.version for route in after.routes if route.network == network}
        list_versions(root, network, routed_versions(root, network) | versions)
    for route in added:
        load_model(address, route.network, route.version)
    replace_routing(root, after)


def publish_twin(root: Path, planned: Path, runtime: "Runtime | None" = None) -> SealedVersion:
    """The ONNX network that a plan was built from as a version of `<model>_onnx_<size>`; harmless when it is there."""
    sealed = read_sealed(planned)
    network = network_name(sealed.model, sealed.image_size)
    if sealed.version in published_versions(root, network):
        return read_sealed(version_directory(root, network, sealed.version))
    kept = {name for name in sealed.files if name not in (NETWORK_FILE, PLAN_FILE, PASSPORT_FILE)}
    twin = replace(sealed, network=network, files={})
    staged = stage_version(root, planned / NETWORK_FILE, twin, {name: planned / name for name in kept})
    return publish_version(root, staged, runtime)
