"""A version leaves for a plant without network, and arrives there: sealed network, card, evidence, golden photographs.

sealed/<network>/<file>     the sealed directories, as they are served
run/<artifact>              card, weights, drift reference, evaluation, passport and promotion of the MLflow run
golden/<number>             encoded validation photographs, with what the sealed network answers in `golden.json`
ledger.json, registration.json   when it was champion and why; parameters, metrics and tags of its run
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from tasks.archive import Archive, InvalidArchive, open_archive, write_archive
from tasks.inference import Accelerator
from tasks.model_repository import Runtime, publish_version, published_versions, repository, version_directory
from tasks.parity import ROUNDING, Rung, Step, climb
from tasks.registry import IMPORTED_TAG
from tasks.sealed import SealedVersion, file_digest, read_sealed
from tasks.storage import Store

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from mlflow import MlflowClient

GOLDEN: Final = 32  # photographs that travel with a version
POOL: Final = 256  # validation photographs among which they are looked for
ARCHIVE_TAG, SIGNER_TAG = "imported_archive", "imported_signed_by"


@dataclass(frozen=True)
class Plant:
    """One installation: where it serves, stores and registers."""

    root: Path
    store: Store
    tracking_uri: str
    accelerator: Accelerator


@dataclass(frozen=True)
class Imported:
    """What arrived. networks: the network models that hold it now; rung: the golden photographs there against here."""

    model: str
    version: int
    networks: tuple[str, ...]
    signed_by: str | None
    rehearsal: str | None
    rung: Rung


def export_version(
    plant: Plant, model: str, version: int, file: Path, key: "Ed25519PrivateKey | None" = None
) -> dict[str, str]:
    """Writes the archive; returns its members' digests. LookupError naming what is published, where that version is not."""
    directories = sealed_directories(plant.root, model, version)
    sealed = read_sealed(directories[0])
    with TemporaryDirectory(prefix="tirewatch-") as folder:
        work = Path(folder)
        registration = _download(plant.tracking_uri, model, version, work / "run")
        _write(work / "registration.json", registration)
        _write(work / "ledger.json", _ledger(plant.store, model, version))
        _golden(plant, directories[0], sealed, work)
        members = {str(path.relative_to(work)): path for path in sorted(work.rglob("*")) if path.is_file()}
        for directory in directories:
            for path in sorted(directory.iterdir()):
                members[f"sealed/{directory.parent.name}/{path.name}"] = path
        about = {
            "model": model,
            "version": version,
            "networks": [directory.parent.name for directory in directories],
            "precision": sealed.precision,
            "dataset": f"{sealed.dataset}@{sealed.dataset_version}",
            "dataset_digest": sealed.dataset_digest,
            "run_id": sealed.run_id,
            "commit": sealed.commit,
            "rehearsal": sealed.rehearsal,
        }
        return write_archive(file, members, about, key)


def sealed_directories(root: Path, model: str, version: int) -> list[Path]:
    """The published directories of the version, that of the ONNX network first. LookupError naming what is published."""
    names = sorted(path.name for path in repository(root).glob(f"{model}_*_*") if path.is_dir())
    held = {name: published_versions(root, name) for name in names}
    found = [version_directory(root, name, version) for name in names if version in held[name]]
    found = [directory for directory in found if read_sealed(directory, verify_files=False).model == model]
    if not found:
        raise LookupError(f"{model} v{version} is not published in {root}; there are {held or 'no versions'}")
    return found


def import_version(plant: Plant, file: Path, trusted: "Ed25519PublicKey | None") -> Imported:
    """Checks every byte, decides about the golden photographs here as there, then publishes the version beside the others and
    registers it under its own number, with the archive's digest and signer. Nothing routes to it yet (`tasks/activation.py`
    does). Running it again is harmless.

    Raises InvalidArchive naming what was changed or decides otherwise here, and FileExistsError when the number holds another
    version.
    """
    archive = open_archive(file, trusted)
    with TemporaryDirectory(prefix="tirewatch-", dir=_made(plant.root / "staging")) as folder:
        work = Path(folder)
        archive.unpack(work)
        model, version = str(archive.about["model"]), int(archive.about["version"])
        directories = sorted(path for path in (work / "sealed").iterdir())
        versions = [_sealed(archive, directory, model, version) for directory in directories]
        rung = _decides_alike(plant, archive, directories[0], work)
        with _registered_here(plant.tracking_uri, archive, model, version, work):
            for directory in directories:
                publish_version(plant.root, directory, Runtime(accelerator=plant.accelerator))
    networks = tuple(each.network for each in versions)
    return Imported(model, version, networks, archive.signed_by, versions[0].rehearsal, rung)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sealed(archive: Archive, directory: Path, model: str, version: int) -> SealedVersion:
    sealed = read_sealed(directory)
    if (sealed.model, sealed.version, sealed.network) != (model, version, directory.name):
        raise InvalidArchive(
            f"{archive.path} is said to hold {model} v{version}, and holds {sealed.network} v{sealed.version}"
        )
    return sealed


def _golden(plant: Plant, directory: Path, sealed: SealedVersion, work: Path) -> None:
    """Golden photographs and what the sealed network answers, for the plant to compare with."""
    from tasks.dataset import open_version
    from tasks.network_forms import artifact_run, run_all
    from tasks.parity import golden_indices
    from tasks.proof import photographs

    pool = photographs(plant.store, open_version(plant.store, sealed.dataset, sealed.dataset_version), "val", POOL)
    run = artifact_run(directory, plant.accelerator)
    (probabilities,) = run_all([run], pool.encoded, sealed.image_size, sealed.preprocessing)
    chosen = golden_indices(probabilities, pool.labels, sealed.rule, GOLDEN).tolist()
    _made(work / "golden")
    for number, index in enumerate(chosen):
        (work / "golden" / f"{number:03d}").write_bytes(pool.encoded[index])
    told = {"accelerator": plant.accelerator, "probabilities": probabilities[chosen].tolist()}
    _write(work / "golden.json", told)


def _decides_alike(plant: Plant, archive: Archive, directory: Path, work: Path) -> Rung:
    """The golden photographs of an archive through its network on this machine."""
    encoded = [path.read_bytes() for path in sorted((work / "golden").iterdir())]
    there = np.array(json.loads((work / "golden.json").read_text())["probabilities"])
    return answers_alike(plant, str(archive.path), directory, encoded, there)[1]


def answers_alike(
    plant: Plant, what: str, directory: Path, encoded: Sequence[bytes], there: NDArray[Any]
) -> tuple[NDArray[np.float32], Rung]:
    """What the sealed network answers on this machine, and how that compares with its answers there. InvalidArchive, about
    `what`, when a decision is another one here.
    """
    from tasks.network_forms import artifact_run, run_all

    sealed = read_sealed(directory)
    (here,) = run_all([artifact_run(directory, plant.accelerator)], encoded, sealed.image_size, sealed.preprocessing)
    # Another processor and runtime: INT8 may round otherwise there, and only its decisions must not.
    limit = ROUNDING if sealed.precision == "float32" else None
    (rung,) = climb([Step("there", there), Step("here", here, limit)], sealed.rule)
    if not rung.held:
        raise InvalidArchive(f"{what}: on this machine {rung.measured}; demanded {rung.demanded}")
    return here, rung


def _ledger(store: Store, model: str, version: int) -> list[dict[str, Any]]:
    from tasks.ledger import read_ledger

    return [asdict(entry) for entry in read_ledger(store, model) if version in (entry.version, entry.previous)]


def _download(tracking_uri: str, model: str, version: int, folder: Path) -> dict[str, Any]:
    """Every artifact of the version's run but its TensorBoard log, which repeats the series, and the golden photographs with
    which it was imported; returns what MLflow says of it.
    """
    from tasks.registry import client_of

    client = client_of(tracking_uri)
    registered = client.get_model_version(model, str(version))
    run_id = str(registered.run_id)
    run = client.get_run(run_id)
    _made(folder)
    for artifact in client.list_artifacts(run_id):
        if artifact.path not in ("tensorboard", "golden"):
            client.download_artifacts(run_id, artifact.path, str(folder))
    return {
        "run_id": run_id,
        "tags": dict(registered.tags),
        "run_name": run.info.run_name,
        "run_tags": {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")},
        "params": dict(run.data.params),
        "metrics": dict(run.data.metrics),
    }


@contextmanager
def _registered_here(tracking_uri: str, archive: Archive, model: str, version: int, work: Path) -> Iterator[None]:
    """The version in MLflow under its own number, after the block has published it: what is registered is complete.

    Raises FileExistsError when that number belongs to another version here, or has gone by.
    """
    from tasks.registry import client_of

    client = client_of(tracking_uri)
    told = json.loads((work / "registration.json").read_text())
    present = {int(each.version): each for each in client.search_model_versions(f"name = '{model}'")}
    known = present.get(version)
    if known is not None and told["run_id"] not in (known.run_id, known.tags.get(IMPORTED_TAG)):
        raise FileExistsError(
            f"{model} v{version} is another version here (run {known.run_id}): numbers are never reused"
        )
    yield
    if known is None:
        came = {IMPORTED_TAG: told["run_id"], ARCHIVE_TAG: f"sha256:{file_digest(archive.path)}"}
        if archive.signed_by:
            came[SIGNER_TAG] = archive.signed_by
        _register(client, model, version, told, came, work)


def _register(
    client: "MlflowClient", model: str, version: int, told: Mapping[str, Any], came: Mapping[str, str], work: Path
) -> None:
    """A run with what the archive says and its golden photographs, and the version. MLflow counts by itself: the numbers before
    it, which belong to the plant that trained them, are taken and given up until it has come to ours. came: tags that say
    where it came from.
    """
    from mlflow.entities import Param, RunTag
    from mlflow.exceptions import MlflowException

    from tasks.registry import log_metrics
    from tasks.tracking import experiment_of

    tags = {**told["run_tags"], **came}
    run = client.create_run(experiment_of(client, model), run_name=f"{told['run_name']} (imported)")
    client.log_batch(
        run.info.run_id,
        params=[Param(key, value) for key, value in told["params"].items()],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    log_metrics(client, run.info.run_id, told["metrics"])
    client.log_artifacts(run.info.run_id, str(work / "run"))
    client.log_artifacts(run.info.run_id, str(work / "golden"), "golden")
    client.log_artifact(run.info.run_id, str(work / "golden.json"), "golden")
    client.set_terminated(run.info.run_id, "FINISHED")
    try:
        client.create_registered_model(model, description=f"Trained on the dataset {model}")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    while True:
        made = client.create_model_version(
            model,
            source=f"{run.info.artifact_uri}/model",
            run_id=run.info.run_id,
            tags={**told["tags"], **came},
        )
        if int(made.version) == version:
            return
        client.delete_model_version(model, made.version)
        if int(made.version) > version:
            raise FileExistsError(
                f"{model} v{version} cannot be registered: MLflow's next number is {made.version}; numbers are never reused"
            )


def _write(path: Path, body: Any) -> None:
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
