"""What an engine was built from, by what and for which cards, and whether a server can run it. Pure but for the reading and
writing of its file.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

Builder = Literal["tensorrt", "tensorrt_rtx"]
PASSPORT_FILE: Final = "engine.json"
AMPERE: Final = (8, 0)


@dataclass(frozen=True)
class EnginePassport:
    """An engine's own account, sealed beside it.

    profile: smallest, best and largest batch. compute_capability: of the cards it runs on, `8.9`. device: the card it was
    built on; `none` when it was built ahead of time. calibration_digest: of the images INT8 was measured on.
    """

    builder: Builder
    builder_version: str
    onnx_sha256: str
    engine_sha256: str
    precision: str
    compute_capability: str
    device: str
    profile: tuple[int, int, int]
    hardware_compatible: bool
    version_compatible: bool
    calibration_digest: str | None
    built_at: str  # ISO 8601, UTC
    build_seconds: float

    def is_of(self, other: "EnginePassport") -> bool:
        """Whether both were built from the same network in the same way, wherever and whenever."""
        return (
            replace(
                self,
                engine_sha256=other.engine_sha256,
                builder_version=other.builder_version,
                compute_capability=other.compute_capability,
                device=other.device,
                built_at=other.built_at,
                build_seconds=other.build_seconds,
            )
            == other
        )


@dataclass(frozen=True)
class EngineServer:
    """What a server would run an engine with."""

    builder: Builder
    version: str
    compute_capability: str
    device: str


def mismatches(passport: EnginePassport, server: EngineServer) -> tuple[str, ...]:
    """Why the server cannot run the engine, one sentence each; empty when it can.

    TensorRT loads a plan of its own version on a card of the same compute capability; built as compatible, also of an older
    version, and from Ampere on. An engine of TensorRT for RTX is for one release (developer guide, "Engine compatibility").
    """
    if passport.builder != server.builder:
        return (f"built by {passport.builder}, and the server has {server.builder}",)
    found = []
    later = _numbers(server.version) > _numbers(passport.builder_version)
    if passport.builder_version != server.version and not (passport.version_compatible and later):
        found.append(f"built by {passport.builder} {passport.builder_version}, and the server has {server.version}")
    built_for, has = _numbers(passport.compute_capability), _numbers(server.compute_capability)
    if built_for != has and not (passport.hardware_compatible and min(built_for, has) >= AMPERE):
        found.append(
            f"built for compute capability {passport.compute_capability}, and the server's {server.device} has "
            f"{server.compute_capability}"
        )
    return tuple(found)


def matches(passport: EnginePassport, server: EngineServer) -> bool:
    """Whether the server can run the engine as it is."""
    return not mismatches(passport, server)


def write_passport(directory: Path, passport: EnginePassport) -> Path:
    """`engine.json` in the directory, before it is sealed."""
    path = directory / PASSPORT_FILE
    path.write_text(json.dumps(asdict(passport), indent=2, sort_keys=True) + "\n")
    return path


def read_passport(directory: Path) -> EnginePassport | None:
    """The passport of the directory's engine; None where there is none. Raises ValueError for one this build cannot read."""
    path = directory / PASSPORT_FILE
    if not path.exists():
        return None
    try:
        body: Mapping[str, Any] = json.loads(path.read_text())
        return EnginePassport(**{**body, "profile": tuple(body["profile"])})
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is no engine passport that this build can read ({error}): build the engine again"
        ) from None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
