"""One answered request, years later: which photograph, which version, trained on what, allowed by whom; and its score again.

Only sampled requests are captured (`TIREWATCH_CAPTURE_SHARE`); a recipe that must answer for every piece captures all of them.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from tasks.decision import DecisionRule, decide, score
from tasks.engine_passport import EnginePassport, read_passport
from tasks.images import decode
from tasks.ledger import Entry, champion_at, read_ledger
from tasks.model_repository import NETWORK_FILE, PLAN_FILE, repository, version_directory
from tasks.sealed import InvalidVersion, SealedVersion, read_sealed
from tasks.storage import Store, StoredObject, list_folders, list_objects
from tasks.stored_file import StoredFile

if TYPE_CHECKING:
    from tasks.inference import Accelerator

log = logging.getLogger(__name__)

_SPOOL: Final = "spool"
_CAPTURES: Final = "captures"


@dataclass(frozen=True)
class Captured:
    """The request as it was answered. where: the file or object that holds it. at: UTC."""

    model: str
    request_id: str
    at: datetime
    version: int
    label: str
    score: float
    image: bytes
    tire_id: str
    line: str
    where: str


@dataclass(frozen=True)
class Origin:
    """What the version was made of, as its seal says, or its card in MLflow where neither the server nor S3 holds it any more.

    engine: the passport of the TensorRT engine that is sealed with it, if there is one.
    """

    rule: DecisionRule
    preprocessing: str
    image_size: int
    dataset: str
    dataset_version: int
    dataset_digest: str
    run_id: str
    commit: str
    precision: str
    passport: dict[str, str]
    engine: EnginePassport | None = None


@dataclass(frozen=True)
class Trace:
    """by: the network that the score was computed with again. entry: of the ledger, in force at that moment."""

    captured: Captured
    image_sha256: str
    origin: Origin
    by: str
    label: str
    score: float
    entry: Entry | None

    @property
    def difference(self) -> float:
        return abs(self.score - self.captured.score)

    @property
    def equal(self) -> bool:
        """The same label, and the same score to the last bit."""
        return self.label == self.captured.label and self.difference == 0.0

    def as_dict(self) -> dict[str, Any]:
        """For scripts: without the photograph."""
        captured = {name: value for name, value in vars(self.captured).items() if name != "image"}
        return {
            **captured,
            "at": self.captured.at.isoformat(timespec="milliseconds"),
            "image_sha256": self.image_sha256,
            "origin": asdict(self.origin),
            "reproduced": {
                "by": self.by,
                "label": self.label,
                "score": self.score,
                "difference": self.difference,
                "equal": self.equal,
            },
            "ledger": asdict(self.entry) if self.entry else None,
        }


def captured_models(store: Store, root: Path) -> list[str]:
    """Models of which requests were captured."""
    from monitoring import capture

    return sorted({*list_folders(store, _CAPTURES), *capture.captured_models(root / _SPOOL)})


def find_captured(store: Store, root: Path, model: str, request_id: str, day: date | None = None) -> Captured | None:
    """The newest request of that id, from the server's spool or from S3; None where none was captured."""
    return next(_in_spool(root, model, request_id), None) or next(_on_s3(store, model, request_id, day), None)


def _in_spool(root: Path, model: str, request_id: str) -> Iterator[Captured]:
    """Newest first; of the others only the ids are read, and a file that the server or a collector took away is passed over."""
    from monitoring.capture import read_record, request_of, spooled

    for path in reversed(spooled(root / _SPOOL / model)):
        try:
            if request_of(path) != request_id:
                continue
            record = read_record(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            log.warning("%s", error)
            continue
        if not record.error:  # then the champion answered it
            assert isinstance(record.image, bytes)  # as it is read; pixels are encoded when they are written
            moment = datetime.fromtimestamp(record.captured_at, UTC)
            facts = (record.version, record.label, record.score, record.image, record.tire_id, record.line)
            yield Captured(model, request_id, moment, *facts, str(path))


def _on_s3(store: Store, model: str, request_id: str, day: date | None) -> Iterator[Captured]:
    """Newest day first. Of a bundle that does not hold the request only the ids are fetched, a hundredth of it."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    days = [day.isoformat()] if day else reversed(list_folders(store, f"{_CAPTURES}/{model}"))
    for folder in days:
        bundles = list_objects(store, f"{_CAPTURES}/{model}/{folder}")
        for found in sorted(bundles, key=_last_moment, reverse=True):
            file = pq.ParquetFile(StoredFile(store, found))
            place = pc.index(file.read(["request_id"])["request_id"], request_id).as_py()
            if place < 0:
                continue
            row: dict[str, Any] = file.read().slice(place, 1).to_pylist()[0]
            if not row.get("error"):  # else a challenger had no answer, and the champion gave one
                moment = datetime.fromtimestamp(row["captured_at"], UTC)
                facts = (row["version"], row["label"], row["score"], row["image"], row["tire_id"], row["line"])
                yield Captured(model, request_id, moment, *facts, store.uri(found.key))


def _last_moment(bundle: StoredObject) -> str:
    """Of `v<version>-<first ms>-<last ms>-<digest>.parquet`; 13 digits each."""
    return bundle.key.rsplit("-", 2)[-2]


def trace(captured: Captured, store: Store, root: Path, tracking_uri: str, accelerator: "Accelerator") -> Trace:
    """Everything behind the answer, and the score computed again from the captured photograph.

    Raises LookupError when neither the server's disk nor S3 nor MLflow holds the version.
    """
    with _sealed(store, root, captured.model, captured.version) as directory:
        if directory is not None:
            sealed = read_sealed(directory, verify_files=False)
            origin, by = _of_seal(sealed, directory), f"the sealed network {sealed.network}/{sealed.version}"
            if PLAN_FILE in sealed.files:
                by += ", the one that its TensorRT plan was built from"
            probabilities = _by_artifact(directory, _pixels(captured, origin), accelerator)
        else:
            origin = _of_card(tracking_uri, captured.model, captured.version)
            by = "the registered PyTorch network: no sealed one is on this server or on S3"
            probabilities = _by_registered(tracking_uri, captured, _pixels(captured, origin))
    return Trace(
        captured=captured,
        image_sha256=hashlib.sha256(captured.image).hexdigest(),
        origin=origin,
        by=by,
        label=origin.rule.labels[int(decide(probabilities, origin.rule)[0])],
        score=float(score(probabilities, origin.rule)[0]),
        entry=champion_at(read_ledger(store, captured.model), captured.at),
    )


@contextmanager
def _sealed(store: Store, root: Path, model: str, version: int) -> Iterator[Path | None]:
    """The sealed directory of the version that runs on a processor, from the server's disk or from S3; None without any."""
    from tasks.version_store import fetch_files, stored_networks

    if directory := sealed_directory(root, model, version):
        yield directory
        return
    with TemporaryDirectory(prefix="tirewatch-") as folder:
        named = re.compile(rf"{re.escape(model)}_onnx_\d+")
        name = next(filter(named.fullmatch, stored_networks(store, model, version)), None)
        yield fetch_files(store, name, version, Path(folder)) if name else None


def sealed_directory(root: Path, model: str, version: int) -> Path | None:
    """The sealed directory of the version that runs on a processor; None where the server holds none any more."""
    for network in sorted(repository(root).glob(f"{model}_*")):
        directory = version_directory(root, network.name, version)
        try:
            sealed = read_sealed(directory, verify_files=False)
        except InvalidVersion:
            continue
        if sealed.model == model and NETWORK_FILE in sealed.files:
            return directory
    return None


def _pixels(captured: Captured, origin: Origin) -> NDArray[np.uint8]:
    return decode(captured.image, origin.image_size, origin.preprocessing)[None]


def _by_artifact(directory: Path, pixels: NDArray[np.uint8], accelerator: "Accelerator") -> NDArray[np.float32]:
    from tasks.inference import open_network

    return open_network(directory / NETWORK_FILE, accelerator, os.cpu_count() or 1)(pixels)["probabilities"]


def _by_registered(tracking_uri: str, captured: Captured, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    from tasks.network_forms import torch_run
    from tasks.registry import load_network

    return torch_run(load_network(tracking_uri, captured.model, captured.version))(pixels)


def _of_seal(sealed: SealedVersion, directory: Path) -> Origin:
    return Origin(
        sealed.rule,
        sealed.preprocessing,
        sealed.image_size,
        sealed.dataset,
        sealed.dataset_version,
        sealed.dataset_digest,
        sealed.run_id,
        sealed.commit,
        sealed.precision,
        dict(sealed.passport),
        read_passport(directory),
    )


def _of_card(tracking_uri: str, model: str, version: int) -> Origin:
    from tasks.registry import load_card

    registered, card = load_card(tracking_uri, model, version)
    return Origin(
        card.rule,
        card.preprocessing,
        card.image_size,
        card.dataset,
        card.dataset_version,
        card.dataset_digest,
        registered.run_id,
        card.commit,
        "float32",
        {},
    )
