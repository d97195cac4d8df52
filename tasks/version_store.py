"""Sealed versions on S3: what a server that lost its disk is made again from. Content first, the seal last.

model-repository/<network>/<version>/<sha256>/<name>         each file of the sealed directory, under its own digest
model-repository/<network>/<version>/<sha256>/golden.npz     golden images and what was proven of them, under that of the seal
model-repository/<network>/<version>/version.json            the seal, by a conditional write, when all the others are there

Of two who upload other networks under one number neither can spoil the files of the other, and one seal is first. What has no
seal is no version: it is completed or cleared away by the next upload of that number. A killed upload of a large file also
leaves parts that no listing shows; the bucket's rule for incomplete multipart uploads removes them.
"""

import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from tasks.model_repository import Runtime, publish_version, version_directory
from tasks.routing import Route, read_routing
from tasks.sealed import SEAL, InvalidVersion, SealedVersion, file_digest, read_sealed, write_durably
from tasks.staging import THIS_PROCESS, fresh_directory
from tasks.storage import (
    Store,
    delete,
    exists,
    list_folders,
    list_objects,
    read,
    read_into,
    write_file,
    write_if_absent,
)

if TYPE_CHECKING:
    from tasks.proof import Golden

PREFIX: Final = "model-repository"
GOLDEN_FILE: Final = "golden.npz"


def upload_version(store: Store, directory: Path, golden: "Golden | None" = None) -> bool:
    """The sealed directory on S3, with the answers that were proven of it; whether this call revealed it there.

    The same version again is harmless, and completes what a killed upload left. Raises InvalidVersion when the directory is
    not as sealed, and FileExistsError naming both digests when the number holds other content: numbers are never reused.
    """
    sealed = read_sealed(directory)
    folder = folder_of(sealed.network, sealed.version)
    if _is_stored(store, sealed, directory):
        return False
    held = {each.key: each.size for each in list_objects(store, folder)}
    wanted = {f"{folder}/{digest}/{name}": directory / name for name, digest in sealed.files.items()}
    for key, file in wanted.items():
        if held.get(key) != file.stat().st_size:
            write_file(store, key, file)
    proven = _golden_key(folder, file_digest(directory / SEAL))
    if golden is not None:
        _write_golden(store, proven, golden)
    if not write_if_absent(store, f"{folder}/{SEAL}", (directory / SEAL).read_bytes()):
        _is_stored(store, sealed, directory)  # else somebody was quicker with another network
        return False
    # Left by uploads that did not come to their seal, and now cannot any more.
    delete(store, held.keys() - wanted.keys() - {proven})
    return True


def _is_stored(store: Store, sealed: SealedVersion, directory: Path) -> bool:
    """Whether S3 holds this version. Raises FileExistsError when it holds another one under its number."""
    there = stored_version(store, sealed.network, sealed.version)
    if there is None:
        return False
    if not _same(there, sealed):
        key = f"{folder_of(sealed.network, sealed.version)}/{SEAL}"
        raise FileExistsError(
            f"{store.uri(key)} (sha256 {_stored_digest(store, key)[:12]}) holds another version than {directory.name} (sha256 "
            f"{file_digest(directory / SEAL)[:12]}): register a new version instead, numbers are never reused"
        )
    return True


def upload_routed(store: Store, root: Path, model: str) -> list[Route]:
    """Uploads the champion and the previous version of a model where S3 does not hold them; returns those."""
    table = read_routing(root, model)
    standing = [each for each in (table.champion, table.previous) if each] if table else []
    return [
        each
        for each in standing
        if stored_version(store, each.network, each.version) is None
        and upload_version(store, version_directory(root, each.network, each.version))
    ]


def _same(one: SealedVersion, other: SealedVersion) -> bool:
    """The same files, threshold and origin; the software that made them may be newer the second time."""
    return replace(one, passport={}) == replace(other, passport={})


def stored_version(store: Store, network: str, version: int) -> SealedVersion | None:
    """What the seal on S3 says; None where there is none. Raises InvalidVersion for a seal that was changed."""
    data = _stored_seal(store, network, version)
    return None if data is None else _parsed(data, network, version)


def stored_networks(store: Store, model: str, version: int) -> list[str]:
    """Network models under which S3 holds this version of the public model: `tire_onnx_224`, `tire_trt_224`."""
    named = re.compile(rf"{re.escape(model)}_(onnx|trt)_\d+")
    names = [name for name in list_folders(store, PREFIX) if named.fullmatch(name)]
    return [name for name in names if exists(store, f"{folder_of(name, version)}/{SEAL}")]


def fetch_version(
    store: Store, root: Path, network: str, version: int, runtime: Runtime | None = None
) -> SealedVersion:
    """The version from S3 in the repository of this root, every byte of it as sealed. Nothing is loaded. One that stands
    there already and is whole stays as it is.

    Raises LookupError where S3 has no such version, InvalidVersion when its files are not as sealed, and FileExistsError when
    the number holds something else here.
    """
    data = _stored_seal(store, network, version)
    if data is None:
        raise LookupError(
            f"{store.uri(folder_of(network, version))} holds no sealed version: it was promoted before versions were "
            "kept on S3, or never; promote or import it again"
        )
    sealed = _parsed(data, network, version)
    if is_whole(root, sealed):
        return sealed
    staged = fresh_directory(root, network, version, THIS_PROCESS)
    try:
        return publish_version(root, fetch_files(store, network, version, staged), runtime)
    except (InvalidVersion, FileNotFoundError):
        shutil.rmtree(staged, ignore_errors=True)
        raise


def fetch_files(store: Store, network: str, version: int, folder: Path) -> Path:
    """Every file of a stored version into the folder, the seal last; the folder. Raises InvalidVersion where one is not as
    sealed, and FileNotFoundError.
    """
    data = read(store, f"{folder_of(network, version)}/{SEAL}")
    sealed = _parsed(data, network, version)
    for name in sealed.files:
        fetch_file(store, sealed, name, folder / name)
    write_durably(folder / SEAL, data.decode())
    return folder


def fetch_file(store: Store, sealed: SealedVersion, name: str, path: Path) -> None:
    """One file of a stored version, as sealed. Raises InvalidVersion where it is not, and FileNotFoundError."""
    read_into(store, f"{folder_of(sealed.network, sealed.version)}/{sealed.files[name]}/{name}", path)
    if (found := file_digest(path)) != sealed.files[name]:
        raise InvalidVersion(
            f"{sealed.network} version {sealed.version} on S3: {name} has sha256 {found[:12]} and was sealed as "
            f"{sealed.files[name][:12]}: somebody changed it; register a new version instead"
        )


def is_whole(root: Path, sealed: SealedVersion) -> bool:
    """Whether the repository of this root holds exactly this version, undamaged."""
    try:
        return _same(read_sealed(version_directory(root, sealed.network, sealed.version)), sealed)
    except InvalidVersion:
        return False


def stored_golden(store: Store, network: str, version: int) -> "Golden | None":
    """The golden images that were proven of the stored version; None where none were uploaded with it."""
    import numpy as np

    from tasks.proof import Golden

    folder = folder_of(network, version)
    key = _golden_key(folder, _stored_digest(store, f"{folder}/{SEAL}"))
    with TemporaryDirectory(prefix="tirewatch-") as scratch:
        file = Path(scratch) / GOLDEN_FILE
        try:
            read_into(store, key, file)
        except FileNotFoundError:
            return None
        with np.load(file, allow_pickle=False) as found:
            return Golden(found["pixels"], found["probabilities"])


def folder_of(network: str, version: int) -> str:
    return f"{PREFIX}/{network}/{version}"


def _golden_key(folder: str, seal_digest: str) -> str:
    return f"{folder}/{seal_digest}/{GOLDEN_FILE}"


def _write_golden(store: Store, key: str, golden: "Golden") -> None:
    import numpy as np

    with TemporaryDirectory(prefix="tirewatch-") as scratch:
        file = Path(scratch) / GOLDEN_FILE
        np.savez_compressed(file, pixels=golden.pixels, probabilities=golden.probabilities)
        write_file(store, key, file)


def _stored_seal(store: Store, network: str, version: int) -> bytes | None:
    try:
        return read(store, f"{folder_of(network, version)}/{SEAL}")
    except FileNotFoundError:
        return None


def _stored_digest(store: Store, key: str) -> str:
    return hashlib.sha256(read(store, key)).hexdigest()


def _parsed(data: bytes, network: str, version: int) -> SealedVersion:
    with TemporaryDirectory(prefix="tirewatch-") as scratch:
        (Path(scratch) / SEAL).write_bytes(data)
        sealed = read_sealed(Path(scratch), verify_files=False)
    if (sealed.network, sealed.version) != (network, version):
        raise InvalidVersion(
            f"the seal of {network} version {version} on S3 is that of {sealed.network} version {sealed.version}: "
            "somebody copied it there; remove it"
        )
    if odd := [name for name in sealed.files if Path(name).name != name]:
        raise InvalidVersion(f"{network} version {version} on S3 names files {odd}: a sealed version has no folders")
    return sealed
