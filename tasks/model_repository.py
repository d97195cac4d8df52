"""Publish and remove sealed versions in a Triton model repository on local disk.

A version is made in `staging/`, sealed, and renamed into place: Triton reads any directory whose name begins with a
number as a version (`4_tmp` is version 4), so nothing unfinished ever lies inside the repository.
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from tasks.inference import Accelerator
from tasks.model_config import config_text, network_config
from tasks.routing import read_routing
from tasks.sealed import InvalidVersion, SealedVersion, read_sealed, seal, sync_directory, write_durably
from tasks.staging import THIS_PROCESS, Owner, fresh_directory

NETWORK_FILE: Final = "model.onnx"
REFERENCE_FILE: Final = "float32.onnx"  # what a reduced network was made from; no server reads it
PLAN_FILE: Final = "model.plan"
_NOTHING: Final[Mapping[str, Path]] = MappingProxyType({})
FRONT_DOOR_TEMPLATE: Final = Path(__file__).parents[1] / "model_repository" / "front_door"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_LISTED = re.compile(r"version_policy \{ specific \{ versions: \[([0-9, ]*)\] \} \}")


@dataclass(frozen=True)
class Runtime:
    """How a network runs on this server's CPU. threads: of one inference; all cores unless told otherwise."""

    accelerator: Accelerator = "openvino"
    threads: int = os.cpu_count() or 1
    max_batch_size: int = 8


def network_name(model: str, image_size: int, form: Literal["onnx", "trt"] = "onnx") -> str:
    """`tire`, 224 -> `tire_onnx_224`: the network model behind the public model; `tire_trt_224` for its TensorRT plans."""
    return f"{_checked(model)}_{form}_{image_size}"


def repository(root: Path) -> Path:
    return root / "model_repository"


def version_directory(root: Path, network: str, version: int) -> Path:
    return repository(root) / network / str(version)


def stage_version(
    root: Path,
    network_file: Path,
    version: SealedVersion,
    beside: Mapping[str, Path] = _NOTHING,
    owner: Owner = THIS_PROCESS,
) -> Path:
    """Copy the network into a sealed directory of its own under `staging/`. Returns that directory; nothing is served yet.

    network_file: ONNX, or a TensorRT plan (`.plan`). beside: further files to seal with it, by the name they get there.
    owner: what it and those that are gone have staged of this version before is removed.
    """
    _checked(version.network)
    if version.version < 1:
        raise ValueError(f"version {version.version} of {version.network}: versions start at 1")
    directory = fresh_directory(root, version.network, version.version, owner)
    served = PLAN_FILE if network_file.suffix == ".plan" else NETWORK_FILE
    for name, file in {**beside, served: network_file}.items():
        shutil.copyfile(file, directory / name)
    seal(directory, version)
    return directory


def publish_version(root: Path, staged: Path, runtime: Runtime | None = None) -> SealedVersion:
    """Rename the staged version into the repository and list it in `config.pbtxt`, beside those that a routing table names:
    what no table names any more stays on disk and leaves the server's memory. The server loads it when told to.

    Running it again with the same content is harmless. Raises InvalidVersion when the staged directory is not as
    sealed, and FileExistsError when that number already holds something else: version numbers are never reused.
    """
    sealed = read_sealed(staged)
    target = version_directory(root, sealed.network, sealed.version)
    target.parent.mkdir(parents=True, exist_ok=True)
    if _holds(target, sealed):
        shutil.rmtree(staged)
    else:
        _discard(root, target)
        staged.rename(target)
        sync_directory(target.parent)
    keep = routed_versions(root, sealed.network) | {sealed.version}
    list_versions(root, sealed.network, keep, sealed.image_size, runtime)
    return sealed


def _holds(target: Path, sealed: SealedVersion) -> bool:
    """Whether exactly this version stands there already, undamaged. Raises FileExistsError when another one does; a
    damaged copy of this version, or a directory that was never sealed, is not a version.
    """
    try:
        present = read_sealed(target, verify_files=False)
    except InvalidVersion:
        return False
    if present.files != sealed.files:
        raise FileExistsError(f"{target} already holds another network: register a new version instead")
    try:
        read_sealed(target)
    except InvalidVersion:
        return False
    return True


def _discard(root: Path, directory: Path) -> None:
    """Out of the repository in one step, then off the disk; also what an earlier, killed call left on the way."""
    discarded = root / "staging" / f"removed-{directory.parent.name}-{directory.name}"
    shutil.rmtree(discarded, ignore_errors=True)
    if directory.exists():
        discarded.parent.mkdir(parents=True, exist_ok=True)
        directory.rename(discarded)
        shutil.rmtree(discarded)


def remove_version(root: Path, network: str, version: int) -> None:
    """Take the version off the list and off the disk; the server forgets it at the next `load`. Harmless when it is gone.

    Raises ValueError while a routing table names it: it answers, or a rollback may need it.
    """
    if version in routed_versions(root, network):
        raise ValueError(f"{network} version {version} is named by a routing table: it cannot be removed")
    listed = {*listed_versions(root, network)}
    if version in listed and listed != {version}:
        list_versions(root, network, listed - {version})
    _discard(root, version_directory(root, network, version))


def routed_versions(root: Path, network: str) -> set[int]:
    """Versions of the network that a routing table names: champions, previous ones and challengers.

    Raises ValueError for a damaged table, because nobody knows then what may go.
    """
    tables = (read_routing(root, path.stem) for path in (root / "routing").glob("*.json"))
    return {route.version for table in tables if table for route in table.routes if route.network == network}


def published_versions(root: Path, network: str) -> list[int]:
    """Numbers of the validly sealed versions on disk, ascending; their `version.json` is checked, their files are not."""
    found = []
    for directory in (repository(root) / network).glob("[0-9]*"):
        if not directory.name.isdigit():
            continue
        try:
            found.append(read_sealed(directory, verify_files=False).version)
        except InvalidVersion:
            continue
    return sorted(found)


def listed_versions(root: Path, network: str) -> list[int]:
    """Numbers that `config.pbtxt` tells the server to load, ascending; empty where there is none yet."""
    try:
        text = (repository(root) / network / "config.pbtxt").read_text()
    except FileNotFoundError:
        return []
    found = _LISTED.search(text)
    return sorted(int(number) for number in found[1].split(",")) if found else []


def list_versions(
    root: Path, network: str, versions: set[int], image_size: int | None = None, runtime: Runtime | None = None
) -> None:
    """Replace `config.pbtxt` so that the next `load` serves exactly these versions.

    Without `image_size` or `runtime` the ones in force stay: then only the list of versions is edited, which reloads nothing.
    """
    path = repository(root) / network / "config.pbtxt"
    if path.exists() and runtime is None:
        policy = f"version_policy {{ specific {{ versions: {sorted(versions)} }} }}"
        text = _LISTED.sub(policy, path.read_text())
    else:
        if image_size is None:
            raise ValueError(f"{network} has no config.pbtxt yet: its first version must say the image size")
        chosen = runtime or Runtime()
        text = config_text(
            network_config(
                network, image_size, tuple(versions), chosen.accelerator, chosen.threads, chosen.max_batch_size
            )
        )
    if not path.exists() or path.read_text() != text:
        write_durably(path, text)


@dataclass(frozen=True)
class FrontDoor:
    """How the public model stands in front of its networks.

    instances: decoding processes; one a core. capture_share: sampled share of the traffic. spool_bytes: bound of the spool.
    """

    instances: int = os.cpu_count() or 1
    capture_share: float = 0.05
    spool_bytes: int = 2**30


def install_front_door(
    root: Path, model: str, door: FrontDoor | None = None, template: Path = FRONT_DOOR_TEMPLATE
) -> Path:
    """Put the front door template into the repository under the public name. Only what differs is written."""
    settings = door or FrontDoor()
    directory = repository(root) / _checked(model)
    (directory / "1").mkdir(parents=True, exist_ok=True)
    config = (template / "config.pbtxt").read_text()
    for key, value in (
        ("front_door", model),
        ("instances", settings.instances),
        ("capture_share", settings.capture_share),
        ("spool_bytes", settings.spool_bytes),
    ):
        config = config.replace(f"${{{key}}}", str(value))
    bytecode = directory / "1" / "__pycache__"
    if bytecode.is_dir():
        shutil.rmtree(bytecode)
    for path, text in (
        # A file where the interpreter would put its folder: bytecode written there counts as a change of the model, and
        # the next `load` would start every process of the front door anew. The stub ignores PYTHONDONTWRITEBYTECODE.
        (bytecode, ""),
        (directory / "1" / "model.py", (template / "1" / "model.py").read_text()),
        (directory / "config.pbtxt", config),
    ):
        if not path.exists() or path.read_text() != text:
            write_durably(path, text)
    return directory


def front_doors(root: Path) -> list[str]:
    """Names of the public models installed in the repository."""
    return sorted(path.parents[1].name for path in repository(root).glob("*/1/model.py"))


def copy_version(source: Path, root: Path, runtime: Runtime | None = None) -> SealedVersion:
    """Stage and publish a copy of a sealed directory in another serving root."""
    return publish_version(root, restage(root, source), runtime)


def restage(root: Path, source: Path) -> Path:
    """A copy of a sealed directory under `staging/` of this root; `publish_version` takes it and leaves the source."""
    sealed = read_sealed(source)
    served = served_file(source)
    beside = {name: source / name for name in sealed.files if name != served.name}
    return stage_version(root, served, replace(sealed, files={}), beside)


def served_file(directory: Path) -> Path:
    """What the server loads out of a version directory: the plan where there is one, else the ONNX network."""
    plan = directory / PLAN_FILE
    return plan if plan.exists() else directory / NETWORK_FILE


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name a Triton model: use small letters, digits and _, beginning with a letter"
        )
    return name
