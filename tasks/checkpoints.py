"""Where an interrupted training goes on: its states as objects on S3, and who may take them up.

    checkpoints/<dataset>/<identity>/00000012.ckpt    a line of JSON (format, digest, MLflow run, epoch, step), then the state
    line/training/<dataset>/<identity>/claim-0001.json    the flow run that works on it (tasks/claims.py)

One object is one checkpoint, so there is no half one; its digest tells a damaged one, and then the one before it is taken.
The identity is everything that decides the result, so any run for the same work finds them. All is gone when the work is done.
"""

import hashlib
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from tasks.claims import Subject, claim, claimant, release
from tasks.recipe import NOT_IDENTITY, TrainConfig
from tasks.storage import Store, delete, list_objects, read, store_faults, write

if TYPE_CHECKING:
    from tasks.dataset import DatasetVersion

log = logging.getLogger(__name__)

FORMAT: Final = 1  # of the state; another one is another identity
KEPT: Final = 2  # the newest, and one before it should that be damaged
PREFIX: Final = "checkpoints"


class Superseded(RuntimeError):
    """Another run has taken this work over: what this one would still write is not its own any more."""


@dataclass(frozen=True)
class Undertaking:
    """A piece of training work and the right of `run` to its checkpoints. predecessor: the dead run it was taken over from."""

    store: Store
    dataset: str
    identity: str
    resumable: bool
    run: str
    predecessor: str | None = None

    @property
    def folder(self) -> str:
        return f"{PREFIX}/{self.dataset}/{self.identity}/"

    @property
    def subject(self) -> Subject:
        return Subject("training", f"{self.dataset}/{self.identity}")


def identity_of(version: "DatasetVersion", config: TrainConfig, stage: str) -> str:
    """32 hex digits over what decides the result of a training, and the deployment it is for."""
    told = {
        "dataset": version.name,
        "digest": version.digest,
        "config": config.model_dump(mode="json", exclude=NOT_IDENTITY),
        "stage": stage,
        "format": FORMAT,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def undertake(
    store: Store,
    version: "DatasetVersion",
    config: TrainConfig,
    stage: str,
    run: str,
    is_running: Callable[[str], bool],
) -> Undertaking:
    """Take up the training for `run`: with its checkpoints, unless another run that is running is at the same work (then both
    train on their own) or the recipe wants none.
    """
    identity = identity_of(version, config, stage)
    found = Undertaking(store, version.name, identity, resumable=False, run=run)
    if not config.resume:
        return found
    before = claimant(store, found.subject)
    if not claim(store, found.subject, run, is_running):
        log.warning("run %s is at work on the same training: this one trains on its own, without checkpoints", before)
        return found
    return replace(found, resumable=True, predecessor=before if before != run else None)


def require_ours(work: Undertaking) -> None:
    """Raises Superseded where another run took the work over: this one was cut off, and thought dead."""
    if work.resumable and (owner := claimant(work.store, work.subject)) != work.run:
        raise Superseded(
            f"run {owner} has taken this training over from {work.run}, which was thought dead for want of heartbeats: "
            "this one writes nothing more; see the other run"
        )


def conclude(work: Undertaking) -> None:
    """The work is done: nothing to take up is left. What another run has taken over is left to it."""
    if work.resumable and claimant(work.store, work.subject) == work.run:
        _remove(work.store, _keys(work))
        release(work.store, work.subject)


def has_checkpoint(work: Undertaking) -> bool:
    return work.resumable and bool(_keys(work))


def save(work: Undertaking, state: dict[str, Any], run_id: str) -> None:
    """Write the state as the newest checkpoint, then remove what is older than the one before it."""
    import torch

    payload = io.BytesIO()
    torch.save(state, payload)
    data = payload.getbuffer()
    header = {
        "format": FORMAT,
        "sha256": hashlib.sha256(data).hexdigest(),
        "mlflow_run": run_id,
        "epochs": len(state["epochs"]),
        "step": state["step"],
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    keys = _keys(work)
    number = _number(keys[-1]) + 1 if keys else 1
    write(work.store, f"{work.folder}{number:08d}.ckpt", json.dumps(header).encode() + b"\n" + data)
    _remove(work.store, keys[: -(KEPT - 1)])


def keeping(work: Undertaking, run_id: str) -> Callable[[dict[str, Any]], None] | None:
    """What keeps a training's states; None where it is not to be taken up.

    A store that does not answer costs a checkpoint, not the training: it is told in the log and tried again with the next.
    Raises Superseded before it writes what would be another run's.
    """
    if not work.resumable:
        return None

    def keep(state: dict[str, Any]) -> None:
        try:
            require_ours(work)
            save(work, state, run_id)
        except store_faults() as error:
            log.warning("no checkpoint after %d epochs, the one before stays: %s", len(state["epochs"]), error)

    return keep


def newest(work: Undertaking) -> dict[str, Any] | None:
    """The state of the newest checkpoint that is whole; None where there is none, or the work is not to be resumed."""
    for key in reversed(_keys(work)) if work.resumable else ():
        try:
            state = unpacked(read(work.store, key))
        except ValueError as error:
            log.warning("checkpoint %s is damaged, taking the one before it: %s", work.store.uri(key), error)
            continue
        log.info("going on from %s: %d epochs and %d steps done", key, len(state["epochs"]), state["step"])
        return state
    return None


def unpacked(data: bytes) -> dict[str, Any]:
    """The state in a checkpoint's bytes, read without running code of its own. ValueError where it is not whole."""
    import torch

    line, _, payload = data.partition(b"\n")
    try:
        header = json.loads(line)
    except ValueError as error:
        raise ValueError("its first line is no header") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"its format is {header.get('format')}, this version reads {FORMAT}")
    if hashlib.sha256(payload).hexdigest() != header.get("sha256"):
        raise ValueError(f"its {len(payload)} bytes do not have the digest that its header names")
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state


def _keys(work: Undertaking) -> list[str]:
    return [each.key for each in list_objects(work.store, work.folder) if each.key.endswith(".ckpt")]


def _remove(store: Store, keys: Sequence[str]) -> None:
    """Take the objects away, for good where the store allows it. Raises what a store that is away raises."""
    from botocore.exceptions import ClientError

    for key in keys:
        try:
            refused = _delete_for_good(store, key)
        except ClientError as error:
            refused = str(error.response.get("Error", {}).get("Code"))
        if refused:
            log.warning(
                "old versions of %s stay (%s): does the role have s3:ListBucketVersions and s3:DeleteObjectVersion?",
                *(store.uri(key), refused),
            )
            delete(store, [key])


def _delete_for_good(store: Store, key: str) -> str:
    """Every version of the object, which would fill a bucket that keeps them; why not, where the store refuses."""
    client, refused = _boto3_client(store), ""
    for page in client.get_paginator("list_object_versions").paginate(Bucket=store.bucket, Prefix=key):
        entries = [*page.get("Versions", ()), *page.get("DeleteMarkers", ())]
        if doomed := [{"Key": each["Key"], "VersionId": each["VersionId"]} for each in entries]:
            answer = client.delete_objects(Bucket=store.bucket, Delete={"Objects": doomed, "Quiet": True})
            refused = "; ".join({str(error["Code"]) for error in answer.get("Errors", ())}) or refused
    return refused


@cache
def _boto3_client(store: Store) -> Any:
    """obstore, which does the rest, cannot name versions."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        aws_access_key_id=store.access_key_id,
        aws_secret_access_key=store.secret_access_key,
        region_name=store.region,
    )


def _number(key: str) -> int:
    return int(key.rsplit("/", 1)[-1].removesuffix(".ckpt"))
