"""Sealed versions that may leave a server's disk: nobody needs them there, and S3 holds them."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from tasks.model_repository import listed_versions, published_versions, remove_version, repository, routed_versions
from tasks.routing import Route
from tasks.sealed import read_sealed
from tasks.storage import Store
from tasks.transaction import Place, newest_intention
from tasks.version_store import is_whole, stored_version

if TYPE_CHECKING:
    from pathlib import Path


def to_prune(published: Collection[int], needed: Collection[int], stored: Collection[int], keep: int) -> list[int]:
    """Versions of one network that may go, ascending. needed: those that a routing table names, the server loads or a switch
    was announced to; stored: whole on S3; keep: so many of the newest stay whatever happens. Raises ValueError for keep < 1.
    """
    if keep < 1:
        raise ValueError(
            f"keep is {keep}: at least the newest version stays, it may be on its way into the routing table"
        )
    newest = sorted(published)[-keep:]
    return sorted({*published} & {*stored} - {*needed} - {*newest})


def prune(store: Store, root: "Path", tracking_uri: str, model: str, keep: int) -> list[Route]:
    """Takes what may go of a model off the disk of this serving root; what went. Nothing that a server has loaded changes, and
    `fetch_version` brings each of them back.
    """
    last, gone = newest_intention(Place(root, store, tracking_uri, model)), []
    announced = {last.version} if last else set()
    for folder in sorted(repository(root).glob(f"{model}_*")):
        network, published = folder.name, published_versions(root, folder.name)
        if not published or read_sealed(folder / str(published[-1]), verify_files=False).model != model:
            continue
        needed = routed_versions(root, network) | {*listed_versions(root, network)} | announced
        # S3 is asked about candidates only.
        candidates = to_prune(published, needed, published, keep)
        stored = {version for version in candidates if _is_kept(store, root, network, version)}
        for version in to_prune(published, needed, stored, keep):
            remove_version(root, network, version)
            gone.append(Route(network, version))
    return gone


def _is_kept(store: Store, root: "Path", network: str, version: int) -> bool:
    there = stored_version(store, network, version)
    return there is not None and is_whole(root, there)
