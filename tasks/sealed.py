"""Sealed versions: a directory holding one network file and `version.json`, which says everything about it and is written last.

A directory without a valid `version.json` does not exist for us: neither the publisher nor the server touches it.
Standard library only, because the serving environment imports this module too.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from tasks.decision import DecisionRule

SEAL: Final = "version.json"


class InvalidVersion(ValueError):
    """The directory is no sealed version: something is missing, was changed, or was never finished."""


@dataclass(frozen=True)
class SealedVersion:
    """The content of `version.json`: what a server and an auditor need to know about one version of one model.

    files: name -> sha256 (hex) of every other file of the directory; filled in by `seal`.
    passport: versions of the software that made it (torch, onnx, onnxruntime, ...), and what INT8 was calibrated on.
    rehearsal: why this is not what its recipe demands (no TensorRT here, ...); such a version is proven, and never answers.
    """

    model: str
    version: int
    network: str
    rule: DecisionRule
    preprocessing: str
    image_size: int
    dataset: str
    dataset_version: int
    dataset_digest: str
    run_id: str
    commit: str
    precision: str
    passport: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    rehearsal: str | None = None

    def lineage(self) -> dict[str, str | int | float | None]:
        """What every answer says about where it comes from."""
        return {
            "model": self.model,
            "version": self.version,
            "dataset": self.dataset,
            "dataset_version": self.dataset_version,
            "dataset_digest": self.dataset_digest,
            "threshold": self.rule.threshold,
            "run_id": self.run_id,
            "preprocessing": self.preprocessing,
        }


def write_durably(path: Path, text: str) -> None:
    """Replace the file in one step: whoever reads sees the old text or the new, also after a power cut."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as output:
        output.write(text)
        output.flush()
        os.fsync(output.fileno())
    unfinished.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make a rename inside the directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(directory: Path, version: SealedVersion) -> SealedVersion:
    """Digest and sync every file of the directory, then write `version.json`. Returns the version with its file digests."""
    files = sorted(path for path in directory.iterdir() if path.name != SEAL)
    if not files:
        raise InvalidVersion(f"{directory} holds no file to seal: put the network into it first")
    for path in files:
        if not path.is_file() or path.is_symlink():
            raise InvalidVersion(f"{path} is not a plain file: a sealed version holds plain files only")
        with path.open("rb") as content:
            os.fsync(content.fileno())
    sealed = replace(version, files={path.name: file_digest(path) for path in files})
    body = _to_json(sealed)
    write_durably(directory / SEAL, json.dumps(body | {"seal": _digest(body)}, indent=2, sort_keys=True) + "\n")
    return sealed


def read_sealed(directory: Path, verify_files: bool = True) -> SealedVersion:
    """The sealed version in the directory. Raises InvalidVersion when anything is missing or a digest differs.

    verify_files=False checks `version.json` itself only (microseconds instead of 50 ms for a ResNet-18): for a reader
    that comes after the one who loaded the network, and verified it.
    """
    path = directory / SEAL
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidVersion(
            f"{directory} has no {SEAL}: it was never sealed, so it is not served; remove it"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidVersion(f"{path} is damaged ({error}): publish the version again") from None
    if not isinstance(body, dict) or body.pop("seal", None) != _digest(body):
        raise InvalidVersion(f"{path} was changed after it was sealed: publish the version again")
    version = _from_json(body, path)
    if directory.name.isdigit() and int(directory.name) != version.version:
        raise InvalidVersion(f"{directory} holds version {version.version}: a version directory carries its own number")
    if verify_files:
        _verify_files(directory, version)
    return version


def _verify_files(directory: Path, version: SealedVersion) -> None:
    present = {path.name for path in directory.iterdir() if path.name != SEAL}
    if present != set(version.files):
        odd = sorted(present ^ set(version.files))
        raise InvalidVersion(
            f"{directory}: files {odd} are not as sealed (missing or added): publish the version again"
        )
    for name, expected in version.files.items():
        found = file_digest(directory / name)
        if found != expected:
            raise InvalidVersion(
                f"{directory / name} has sha256 {found[:12]}, sealed with {expected[:12]}: publish the version again"
            )


def file_digest(path: Path) -> str:
    """sha256 of the file's bytes, hex."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _to_json(version: SealedVersion) -> dict[str, Any]:
    body = asdict(version)
    size = body.pop("image_size")
    preprocessing = {"id": version.preprocessing, "size": size}
    rule = {
        "labels": list(version.rule.labels),
        "defect_labels": list(version.rule.defect_labels),
        "threshold": version.rule.threshold,
    }
    return body | {"preprocessing": preprocessing, "rule": rule}


def _from_json(body: dict[str, Any], path: Path) -> SealedVersion:
    try:
        fields = dict(body)
        preprocessing, rule = fields.pop("preprocessing"), fields.pop("rule")
        return SealedVersion(
            **fields,
            preprocessing=preprocessing["id"],
            image_size=preprocessing["size"],
            rule=DecisionRule(tuple(rule["labels"]), tuple(rule["defect_labels"]), rule["threshold"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidVersion(f"{path} does not describe a version this build can read: {error}") from None
