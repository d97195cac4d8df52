"""The parts of a batch on a Ray cluster: examined there, written there, committed once by the flow that asked.

With TIREWATCH_RAY_ADDRESS set, `ingest` hands its photographs out in parts of 1,000. A worker reads and decodes them, and
reads them again from S3 when their rows are written, comparing digests: so nothing but descriptions travels through the flow.
The workers need this package in their environment, and reach S3 and the Prefect server. Needs `pip install 'tirewatch[ray]'`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE

from tasks.storage import NETWORK_RETRY, Store

if TYPE_CHECKING:
    from prefect.task_runners import TaskRunner

    from tasks.batch import Batch, BatchItem, Finding
    from tasks.dataset import RowWriter
    from tasks.examination import Photograph, Reread

PART = 1000  # photographs


@contextmanager
def ray_cluster(address: str) -> "Iterator[TaskRunner[Any]]":
    """The cluster at this address. Raises RuntimeError with the remedy when prefect-ray is not installed."""
    try:
        from prefect_ray import RayTaskRunner
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"TIREWATCH_RAY_ADDRESS is {address!r}, but prefect-ray is not installed: pip install 'tirewatch[ray]', "
            "or leave the address empty"
        ) from error
    with RayTaskRunner(address=address) as runner:
        yield runner


def examined_on(cluster: "TaskRunner[Any]", store: Store, batch: "Batch") -> "Reread":
    """Every photograph of the batch, read and decoded by the workers of the cluster."""
    from tasks.examination import Reread

    examination = Reread(store)
    for results in _in_parts(cluster, examine_part, batch.items, {"store": store}):
        for result in results:
            examination.take(result)
    return examination


def writer_on(cluster: "TaskRunner[Any]", store: Store, batch: "Batch") -> "RowWriter":
    """Writes planned rows from the workers of the cluster; nobody sees them before the flow has committed them all."""
    from lance.fragment import FragmentMetadata

    where = {"store": store, "dataset": batch.dataset, "batch": batch.name}

    def write(rows: "Sequence[tuple[Photograph, str]]") -> list[FragmentMetadata]:
        parts = _in_parts(cluster, write_part, rows, where)
        return [FragmentMetadata.from_json(written) for part in parts for written in part]

    return write


def _in_parts(
    cluster: "TaskRunner[Any]", work: Task[..., Any], items: Sequence[Any], fixed: dict[str, Any]
) -> Iterator[Any]:
    """What `work` made of each part, in order; the first failure is raised."""
    parts = [items[first : first + PART] for first in range(0, len(items), PART)]
    futures = [cluster.submit(work, parameters={**fixed, "part": part}) for part in parts]
    for future in futures:
        yield future.result()


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False)
def examine_part(store: Store, part: "Sequence[BatchItem]") -> "list[Photograph | Finding]":
    """Some photographs of a batch, read and decoded; their bytes are not kept."""
    from tasks.examination import examined

    return list(examined(store, part, lambda data: 0))


@task(**NETWORK_RETRY, cache_policy=NO_CACHE, persist_result=False)
def write_part(store: Store, dataset: str, batch: str, part: "Sequence[tuple[Photograph, str]]") -> list[str]:
    """Some planned rows as uncommitted Lance fragments, as JSON."""
    os.environ.setdefault("LANCE_UPLOAD_CONCURRENCY", "2")
    import json

    from tasks.dataset_rows import new_rows, write_rows
    from tasks.examination import read_again

    rows = new_rows(part, read_again(store, (photograph for photograph, _ in part)), batch)
    return [json.dumps(fragment.to_json()) for fragment in write_rows(store, dataset, rows)]
