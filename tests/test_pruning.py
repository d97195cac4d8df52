"""What leaves a server's disk: never what somebody needs, and never what S3 could not give back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.model_repository import (
    list_versions,
    network_name,
    publish_version,
    published_versions,
    remove_version,
    stage_version,
    version_directory,
)
from tasks.pruning import prune, to_prune
from tasks.routing import Route, RoutingTable, write_routing
from tasks.sealed import file_digest
from tasks.storage import delete
from tasks.transaction import PROMOTED, Place, intend
from tasks.version_store import fetch_version, folder_of, upload_version

numbers = st.sets(st.integers(1, 30))


@given(numbers, numbers, numbers, st.integers(1, 8))
def test_what_goes_is_published_and_stored_and_needed_by_nobody(published, needed, stored, keep):
    gone = to_prune(published, needed, stored, keep)
    stays = published - {*gone}
    assert {*gone} <= published & stored and not needed & {*gone}
    assert {*sorted(published)[-keep:]} <= stays
    assert stays == needed & published | (published - stored) | {*sorted(published)[-keep:]}, "and nothing else stays"


def test_the_newest_always_stays():
    with pytest.raises(ValueError, match="keep is 0"):
        to_prune({1, 2}, set(), {1, 2}, 0)


def test_old_versions_leave_the_disk_once_s3_holds_them_and_come_back_as_they_were(
    tmp_path, store, mlflow_uri, prefect_server, small_network, describe
):
    """Eight versions: 1 and 2 are routed, 3 was announced, 4 is loaded, 5 is not on S3, 7 and 8 are the newest: 6 goes."""
    model = "pruned"
    network = network_name(model, 32)
    for version in range(1, 9):
        publish_version(tmp_path, stage_version(tmp_path, small_network(), describe(model, version)))
        upload_version(store, version_directory(tmp_path, network, version))
    neighbour = describe(f"{model}_too", 1)
    publish_version(tmp_path, stage_version(tmp_path, small_network(), neighbour))
    upload_version(store, version_directory(tmp_path, neighbour.network, 1))
    delete(store, [f"{folder_of(network, 5)}/version.json"])
    intend(Place(tmp_path, store, mlflow_uri, model), PROMOTED, 3, "test", "all gates held", {})
    write_routing(tmp_path, RoutingTable(model, Route(network, 2), previous=Route(network, 1), revision=2))
    list_versions(tmp_path, network, {1, 2, 4})
    before = file_digest(version_directory(tmp_path, network, 6) / "version.json")

    assert prune(store, tmp_path, mlflow_uri, model, keep=2) == [Route(network, 6)]
    assert published_versions(tmp_path, network) == [1, 2, 3, 4, 5, 7, 8]
    assert published_versions(tmp_path, neighbour.network) == [1], "another model whose name begins alike"
    assert prune(store, tmp_path, mlflow_uri, model, keep=2) == []
    fetch_version(store, tmp_path, network, 6)
    assert file_digest(version_directory(tmp_path, network, 6) / "version.json") == before
    with pytest.raises(ValueError, match="named by a routing table"):
        remove_version(tmp_path, network, 2)
