"""Old dataset versions that nothing refers to give their storage back; their records stay for the auditor.

Retiring says so in the record first, then takes the Lance tag away, then lets Lance remove the files that no other Lance
version needs. Killed anywhere, the next call goes on where it stopped.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from tasks.dataset import Record, newest_record, read_records, record_key, tag
from tasks.dataset_rows import open_table
from tasks.storage import Store, write

if TYPE_CHECKING:
    from lance.dataset import Version
    from mlflow import MlflowClient

_UNREVEALED_FOR: Final = timedelta(days=1)  # rows without a record this long belong to a run that died
_PAGE: Final = 1000


class ReferencesUnknown(RuntimeError):
    """Which versions are referred to could not be found out, so nothing may be retired."""


@dataclass(frozen=True)
class Retired:
    """What `retire` did. versions: retired now. bytes_removed: given back by Lance, also for what earlier calls left."""

    versions: tuple[int, ...]
    bytes_removed: int


def versions_to_retire(
    records: Sequence[Record], referenced: Set[int], keep_last: int, min_age: timedelta, now: datetime
) -> tuple[int, ...]:
    """Versions that are neither referenced, nor among the newest `keep_last` (at least the newest), nor younger than `min_age`.

    Raises ValueError for a negative number.
    """
    if keep_last < 0 or min_age < timedelta(0):
        raise ValueError(f"keep_last {keep_last} and min_age {min_age} must not be negative")
    numbers = sorted(each.version.version for each in records)
    kept = set(numbers[-max(1, keep_last) :]) | referenced
    return tuple(
        sorted(
            each.version.version
            for each in records
            if each.version.version not in kept
            and not each.retired_at
            and now - datetime.fromisoformat(each.created_at) >= min_age
        )
    )


def referenced_versions(tracking_uri: str, name: str) -> set[int]:
    """Versions of the dataset that a registered version of any model, or a run that is training, names.

    Raises ReferencesUnknown when MLflow does not answer, or knows a version of the model `name` without its dataset version.
    """
    from mlflow.exceptions import MlflowException

    from tasks.registry import client_of

    _answers(tracking_uri)
    client = client_of(tracking_uri)
    try:
        return set(_of_models(client, name)) | set(_of_running(client, name))
    except MlflowException as error:
        raise ReferencesUnknown(
            f"MLflow at {tracking_uri} could not be asked, so nothing is retired: {error}"
        ) from error


def _answers(tracking_uri: str) -> None:
    """The client's own retries take minutes to say that a server is away."""
    import httpx

    if not tracking_uri.startswith("http"):
        return
    try:
        httpx.get(f"{tracking_uri.rstrip('/')}/health", timeout=10).raise_for_status()
    except httpx.HTTPError as error:
        raise ReferencesUnknown(
            f"MLflow at {tracking_uri} does not answer ({error!r}), so which versions models refer to is unknown: nothing is "
            "retired. Start it, or set TIREWATCH_MLFLOW_TRACKING_URI"
        ) from error


def _of_models(client: "MlflowClient", name: str) -> Iterator[int]:
    for found in _pages(client.search_model_versions):
        tags: dict[str, str] = dict(found.tags)
        if "dataset_version" not in tags and found.run_id:
            tags = dict(client.get_run(found.run_id).data.tags)
        if tags.get("dataset", found.name) != name:
            continue
        if "dataset_version" not in tags:
            raise ReferencesUnknown(
                f"model {found.name} v{found.version} does not say on which version of {name!r} it was trained, so nothing is "
                "retired: set its tags `dataset` and `dataset_version` in MLflow"
            )
        yield int(tags["dataset_version"])


def _of_running(client: "MlflowClient", name: str) -> Iterator[int]:
    experiments = [each.experiment_id for each in _pages(client.search_experiments)]
    wanted = f"attributes.status = 'RUNNING' and tags.dataset = '{name}'"
    for run in client.search_runs(experiments, wanted, max_results=_PAGE):
        if "dataset_version" in run.data.tags:
            yield int(run.data.tags["dataset_version"])


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    token = None
    while True:
        found = search(max_results=_PAGE, page_token=token)
        yield from found
        token = found.token
        if not token:
            return


def retire(store: Store, name: str, versions: Sequence[int], now: datetime) -> Retired:
    """Retires these versions of the dataset, and finishes what an earlier call left half done.

    Raises ValueError for the newest version: the next one is built upon it.
    """
    newest = newest_record(store, name)
    if newest is not None and newest.version.version in versions:
        raise ValueError(f"{name} v{newest.version.version} is the newest version: the next is built upon it")
    records = {each.version.version: each for each in read_records(store, name)}
    for number in versions:
        if not records[number].retired_at:
            records[number] = replace(records[number], retired_at=now.astimezone(UTC).isoformat(timespec="seconds"))
            write(store, record_key(name, number), records[number].to_json())
    return Retired(tuple(versions), _clean(store, name, list(records.values()), now))


def _clean(store: Store, name: str, records: Sequence[Record], now: datetime) -> int:
    """Removes the Lance versions of retired records, and those of runs that died, with the files that only they need; bytes."""
    table = open_table(store, name)
    for record in records:
        if not record.retired_at:
            tag(store, record)  # Lance's clean-up spares what is tagged
    tags = table.tags.list()
    retired = {each.lance_version for each in records if each.retired_at}
    for record in records:
        if record.retired_at and f"v{record.version.version}" in tags:
            table.tags.delete(f"v{record.version.version}")
    held = {each.lance_version for each in records if not each.retired_at}
    ages = {each["version"]: _is_old(each, now) for each in table.versions()}
    died = {number for number, old in ages.items() if old and number not in held and number < max(held)}
    doomed = sorted((retired | died) & ages.keys())
    if not doomed:
        return 0
    cleaned = table.cleanup_old_versions(versions=doomed, error_if_tagged_old_versions=False)
    return int(cleaned.bytes_removed)


def _is_old(version: "Version", now: datetime) -> bool:
    """Lance tells the local time of this machine without saying so."""
    made: Any = version["timestamp"]
    return bool(now - made.astimezone(UTC) > _UNREVEALED_FOR)
