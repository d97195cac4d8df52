"""One file that carries a version to a plant without network: members, a statement of their digests, and a signature of that.

A plain tar, the same bytes for the same content. `statement.json` is an in-toto statement (v1): every other member by name and
sha256. `statement.dsse.json` is its DSSE envelope, signed with Ed25519. Nothing of an archive is believed before every member
has the digest that the statement gives it, and nothing is unpacked that the statement does not name.
"""

import base64
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

STATEMENT: Final = "statement.json"
ENVELOPE: Final = "statement.dsse.json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "urn:tirewatch:version:v1"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
_PIECE: Final = 1 << 20


class InvalidArchive(ValueError):
    """The file is no archive of a version, or not as it was made; the message names what is wrong."""


@dataclass(frozen=True)
class Archive:
    """A verified archive. about: what its maker says about it; digests: member -> sha256 (hex); signed_by: the id of the key
    whose signature was checked, None where none was.
    """

    path: Path
    about: Mapping[str, Any]
    digests: Mapping[str, str]
    signed_by: str | None

    def unpack(self, folder: Path) -> None:
        """Every member below `folder`, its digest checked once more as it is written."""
        with tarfile.open(self.path) as tar:
            for name, expected in self.digests.items():
                source = tar.extractfile(name)
                assert source is not None
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                seen = hashlib.sha256()
                with target.open("wb") as output:
                    while piece := source.read(_PIECE):
                        seen.update(piece)
                        output.write(piece)
                if seen.hexdigest() != expected:
                    raise InvalidArchive(f"{self.path}: {name} changed while it was unpacked")


def write_archive(
    path: Path, members: Mapping[str, Path], about: Mapping[str, Any], key: "Ed25519PrivateKey | None"
) -> dict[str, str]:
    """Writes the archive in one step (a reader finds all of it or nothing); returns its members' digests."""
    digests = {name: _digest(file) for name, file in sorted(members.items())}
    body = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in digests.items()],
        "predicateType": PREDICATE_TYPE,
        "predicate": dict(about),
    }
    statement = json.dumps(body, indent=1, sort_keys=True).encode()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with tarfile.open(unfinished, "w", format=tarfile.PAX_FORMAT) as tar:
            _add(tar, STATEMENT, statement)
            if key is not None:
                _add(tar, ENVELOPE, json.dumps(_envelope(statement, key), indent=1).encode())
            for name in digests:
                _add(tar, name, members[name])
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return digests


def open_archive(path: Path, trusted: "Ed25519PublicKey | None") -> Archive:
    """The archive, every byte of it checked. trusted: whose signature is demanded; None accepts any archive that is whole.

    Raises InvalidArchive naming the member or the signature that is not as it should be.
    """
    try:
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            _check_names(path, members)
            content = {name: _read(tar, name) for name in (STATEMENT, ENVELOPE) if name in {m.name for m in members}}
            digests = {m.name: _digest_of(tar, m) for m in members if m.name not in (STATEMENT, ENVELOPE)}
    except (tarfile.TarError, OSError) as error:
        raise InvalidArchive(f"{path} cannot be read as an archive: {error}") from None
    if STATEMENT not in content:
        raise InvalidArchive(f"{path} holds no {STATEMENT}: it was not made by `tirewatch version export`")
    statement = _statement(path, content[STATEMENT])
    signed_by = _check_signature(path, content[STATEMENT], content.get(ENVELOPE), trusted)
    _check_members(path, statement, digests)
    return Archive(path, statement["predicate"], digests, signed_by)


def _statement(path: Path, data: bytes) -> dict[str, Any]:
    try:
        statement: dict[str, Any] = json.loads(data)
        known = (statement["_type"], statement["predicateType"]) == (STATEMENT_TYPE, PREDICATE_TYPE)
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArchive(f"{path}: {STATEMENT} is damaged ({error})") from None
    if not known:
        raise InvalidArchive(f"{path}: {STATEMENT} is of a kind this build cannot read ({statement['predicateType']})")
    return statement


def _check_names(path: Path, members: "list[tarfile.TarInfo]") -> None:
    seen: set[str] = set()
    for member in members:
        parts = PurePosixPath(member.name).parts
        if not member.isreg() or member.name.startswith("/") or ".." in parts or member.name in seen:
            raise InvalidArchive(f"{path}: {member.name!r} is no plain member, or stands there twice")
        seen.add(member.name)


def _check_members(path: Path, statement: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    promised = {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}
    for name in sorted(promised.keys() | digests.keys()):
        if name not in digests:
            raise InvalidArchive(f"{path}: {name} is missing")
        if name not in promised:
            raise InvalidArchive(f"{path}: {name} was added: the statement does not name it")
        if digests[name] != promised[name]:
            raise InvalidArchive(
                f"{path}: {name} was changed: sha256 {digests[name][:12]}, stated {promised[name][:12]}"
            )


def _check_signature(
    path: Path, statement: bytes, envelope: bytes | None, trusted: "Ed25519PublicKey | None"
) -> str | None:
    from cryptography.exceptions import InvalidSignature

    if trusted is None:
        return None
    if envelope is None:
        raise InvalidArchive(f"{path} is not signed, and a signature is demanded")
    try:
        body = json.loads(envelope)
        signatures = [base64.b64decode(each["sig"]) for each in body["signatures"]]
        told = base64.b64decode(body["payload"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArchive(f"{path}: {ENVELOPE} is damaged ({error})") from None
    if told != statement:
        raise InvalidArchive(f"{path}: {STATEMENT} was changed after it was signed")
    for signature in signatures:
        try:
            trusted.verify(signature, _to_sign(statement))
        except InvalidSignature:
            continue
        return key_id(trusted)
    raise InvalidArchive(f"{path} is not signed with the trusted key {key_id(trusted)}, or {STATEMENT} was changed")


def _envelope(statement: bytes, key: "Ed25519PrivateKey") -> dict[str, Any]:
    signature = base64.b64encode(key.sign(_to_sign(statement))).decode()
    return {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(statement).decode(),
        "signatures": [{"keyid": key_id(key.public_key()), "sig": signature}],
    }


def _to_sign(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding, version 1 (github.com/secure-systems-lab/dsse, protocol.md)."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def make_keys(folder: Path) -> tuple[Path, Path]:
    """A new Ed25519 pair: `signing.pem` (for the owner alone) and `trusted.pem`. FileExistsError where there is one already."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    folder.mkdir(parents=True, exist_ok=True)
    files = (folder / "signing.pem", folder / "trusted.pem")
    for file, data, mode in zip(files, (private, public), (0o600, 0o644), strict=True):
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as output:
            output.write(data)
    return files


def signing_key(path: Path) -> "Ed25519PrivateKey":
    """The private key in the PEM file. Raises ValueError for anything else."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path} holds no Ed25519 key: make one with `tirewatch version key`")
    return key


def trusted_key(path: Path) -> "Ed25519PublicKey":
    """The public key in the PEM file. Raises ValueError for anything else."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = load_pem_public_key(path.read_bytes())
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(
            f"{path} holds no Ed25519 key: `tirewatch version key` makes a pair, trusted.pem is its public half"
        )
    return key


def key_id(key: "Ed25519PublicKey") -> str:
    """The first 16 digits of the sha256 of the public key: what people compare over the telephone."""
    from cryptography.hazmat.primitives import serialization

    data = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(data).hexdigest()[:16]


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _digest_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    source = tar.extractfile(member)
    assert source is not None
    seen = hashlib.sha256()
    while piece := source.read(_PIECE):
        seen.update(piece)
    return seen.hexdigest()


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    source = tar.extractfile(name)
    assert source is not None
    return source.read()


def _add(tar: tarfile.TarFile, name: str, content: Path | bytes) -> None:
    """Without time, owner or mode of its own: the same content gives the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content) if isinstance(content, bytes) else content.stat().st_size
    member.mode = 0o644
    if isinstance(content, bytes):
        tar.addfile(member, io.BytesIO(content))
        return
    with content.open("rb") as source:
        tar.addfile(member, source)
